"""A row of the GPU benchmarks: a model at given inputs, what it does by its plan, its time and the peers' times.

A single operator is a model of one node. What a row does is counted from the plan (`gpu_work`), its roofline comes from
the card's peaks (`gpu_roofline`); nothing of that is written down by hand. Times are medians over rounds in which all
contenders take turns. Every contender that can be is replayed from a CUDA graph; a row of one or two steps is repeated
in it, so that the host does not show.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bench.gpu_peers import REPEATED, Contender, Feeds, Peer, contenders, torch_on_gpu
from bench.gpu_report import CASE_SECONDS, CheckFailed, Context, Section
from bench.gpu_roofline import bound, limit
from bench.gpu_timings import in_turn
from bench.gpu_work import Work, bytes_of, operations_of, works_of
from infera_gpu.devices import open_device
from infera_gpu.errors import OutOfMemoryError
from infera_gpu.graph import Graph, HostArray
from infera_gpu.loader import load_graph
from infera_gpu.passes import Precision
from infera_gpu.plan import Plan
from infera_gpu.session import Session
from infera_gpu.source import Source
from infera_gpu.verify import TOLERANCES, compare
from infera_kernels.launch.devices import Device

FEW = 2
"""Steps, up to which a row is repeated in a graph."""
HOST_RUNS = 50
LEAST_SECONDS = 8
"""Left, without which no row is begun."""
COMPILING_SECONDS = 600.0
"""That a row with torch.compile may take."""


@dataclass(frozen=True)
class Row:
    """What is timed. `make` gives the model and its inputs; `outline` too, with a model that is enough to plan with,
    where the other one is large."""

    set: str
    name: str
    make: Callable[[], tuple[Source, Feeds]]
    precision: Precision = "fp32"
    peer: Peer | None = None
    network: bool = False
    """Whether the peer is a module: eager, and compiled where there is time."""
    outline: Callable[[], tuple[Source, Feeds]] | None = None
    tolerance: float | None = None
    """Of the peak, between answers here and the peer's; None: twice what `infera verify` allows."""
    exact: Callable[[], Source] | None = None
    """The float32 model of which this one is quantised: how far answers are from its, on the CPU, is a column."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further columns, as how often a network has the layer."""

    @property
    def label(self) -> str:
        return f"{self.set}: {self.name} {self.precision}"


def shapes_of(feeds: Feeds) -> dict[str, str]:
    """Type and shape of the first four inputs: caches are alike."""
    return {name: f"{a.dtype.name}{list(a.shape)}" for name, a in list(feeds.items())[:4]}


def described(set_: str, name: str, precision: Precision, feeds: Feeds, works: Sequence[Work]) -> dict[str, Any]:
    """The columns that need no GPU."""
    return {
        "set": set_,
        "name": name,
        "precision": precision,
        "inputs": shapes_of(feeds),
        "steps": len(works),
        "operations": operations_of(works),
        "bytes": bytes_of(works),
    }


def planned(row: Row, device: Any) -> tuple[Feeds, tuple[Work, ...]]:
    """What goes in, and what the steps of its plan do."""
    source, feeds = (row.outline or row.make)()
    device.tf32 = row.precision == "tf32"
    with Session(load_graph(source), device, precision=row.precision) as session:
        return feeds, works_of(session.plan_for(feeds), tf32=device.tf32)


def bound_run(device: Any, session: Session, feeds: Feeds) -> tuple[Callable[[], object], Mapping[str, Any]]:
    """The calls of a run that reads arrays on the GPU where they lie, without copying answers out; and its answers.

    Of what a run has copied in, its steps may have overwritten everything: only such a binding can run again by itself.
    """
    with device.running():
        there = {name: device.constant(array, "device") for name, array in feeds.items()}
    for _ in range(4):  # copied, bound to, recorded, replayed
        answers = session.run(there)
    (lease,) = session._leases.values()
    *_, (bound_plan, _) = lease._direct.values()
    return bound_plan.run, answers


def measure(context: Context, row: Row, compile_mode: str = "") -> dict[str, Any]:
    """The row's columns. Raises CheckFailed where the answer is not the peer's.

    `compile_mode` is what torch.compile is asked for where the peer is a module; empty: not at all.
    """
    torch, device = torch_on_gpu(), context.open()
    device.tf32 = row.precision == "tf32"
    source, feeds = row.make()
    with Session(load_graph(source), device, precision=row.precision) as session:
        plan = session.plan_for(feeds)
        works = works_of(plan, tf32=device.tf32)
        made = {**described(row.set, row.name, row.precision, feeds, works), **row.facts}
        began = time.perf_counter()
        call, answers = bound_run(device, session, feeds)
        made["first_run_seconds"] = time.perf_counter() - began
        calls = {"infera": _ours(device, plan, call)}
        if torch is not None and row.peer is not None:
            theirs, want, failure = contenders(
                torch, row.peer, source, feeds, row.precision, network=row.network, compile_mode=compile_mode
            )
            _compare(row, answers, want, "PyTorch", made)
            calls |= theirs
            made |= {"torch_compile_failed": failure} if failure else {}
        elif not row.network and row.exact is None:
            _compare_with_cupy(context, row, source, feeds, answers, made)
        if row.exact is not None:
            made["error_against_float32"] = _distance(load_graph(row.exact()), feeds, answers)
        seconds = _timed(device, torch, calls)
        made["host_seconds"] = _host_seconds(device, call)
    made["seconds"] = seconds.pop("infera")
    made["peers"] = seconds
    gc.collect()
    return made | against_roofline(made, works, context.card)


def _distance(graph: Graph, feeds: Feeds, answers: Feeds) -> float:
    """How far the first answer is from what a graph answers on the CPU, of the peak."""
    with Session(graph, open_device("cpu")) as session:
        want = session.run(feeds)
    name = next(iter(want))
    (difference,) = compare({name: answers[name]}, {name: want[name]})
    return difference.error


def against_roofline(made: Mapping[str, Any], works: Sequence[Work], card: Device | None) -> dict[str, Any]:
    """The columns that follow from a time and the card's peaks; without a listed card only rates."""
    seconds = made["seconds"]
    rates = {"operations_per_s": made["operations"] / seconds, "bytes_per_s": made["bytes"] / seconds}
    if card is None:
        return rates
    least = bound(works, card)
    return {**rates, "bound_seconds": least, "fraction": least / seconds, "limit": limit(works, card)}


def _ours(device: Any, plan: Plan, call: Callable[[], object]) -> Contender:
    """A plan that holds graphs replays them; one of a few launches is repeated in a graph of its own."""
    if plan.graphs or len(plan.packed) > FEW or any(step.uncapturable for step in plan.steps):
        return Contender(call)
    fn, args = device.graph([(call, ())] * REPEATED)
    return Contender(partial(fn, *args), REPEATED)


def _compare(row: Row, answers: Feeds, want: HostArray, whose: str, made: dict[str, Any]) -> None:
    """Notes how far the first answer is from `want`. Raises CheckFailed where that is too far."""
    got = next(iter(answers.values())).astype(np.float32)
    (difference,) = compare({"output": got}, {"output": want})
    made["error"] = difference.error
    if not difference.within(row.tolerance or 2 * TOLERANCES[row.precision]):
        raise CheckFailed(f"{row.label} differs from {whose}: {difference}", made)


def _compare_with_cupy(
    context: Context, row: Row, source: Source, feeds: Feeds, answers: Feeds, made: dict[str, Any]
) -> None:
    """The same with what CuPy's functions answer, as far as the GPU has room for their temporaries."""
    device = context.open()
    device.kinds, device.channels_last = ("cupy",), False
    try:
        with Session(load_graph(source), device, precision=row.precision) as session:
            want = next(iter(session.run(feeds).values()))
    except OutOfMemoryError as error:
        made["not_compared"] = str(error)
        return
    _compare(row, answers, want.astype(np.float32), "CuPy", made)


def _timed(device: Any, torch: Any, calls: Mapping[str, Contender]) -> dict[str, float]:
    """Seconds of the work once, by contender."""
    with device.running():
        where = nullcontext()
        if torch is not None:
            stream = torch.cuda.ExternalStream(device.xp.cuda.get_current_stream().ptr)
            where = torch.cuda.stream(stream)
        with where, torch.inference_mode() if torch is not None else nullcontext():
            found = in_turn(device, {name: c.call for name, c in calls.items()})
    return {name: found[name] / c.times for name, c in calls.items()}


def _host_seconds(device: Any, call: Callable[[], object]) -> float:
    """The median that one run takes of the host, the GPU being idle."""
    taken = []
    with device.running():
        for _ in range(HOST_RUNS):
            device.synchronize()
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        device.synchronize()
    return statistics.median(taken)


def measured(
    context: Context, rows: Sequence[Row], compile_mode: str = "", least: float = LEAST_SECONDS
) -> tuple[list[dict[str, Any]], list[str]]:
    """The columns of every row that there is time for, and what is wrong. None is begun with less than `least` left."""
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for row in rows:
        tried = context.cases.known(row.label)
        if tried is None:
            if context.left() < least:
                break
            seconds = COMPILING_SECONDS if compile_mode else CASE_SECONDS
            tried = context.cases.run(row.label, partial(measure, context, row, compile_mode), seconds)
        if tried.problem:
            wrong.append(tried.problem if row.label in tried.problem else f"{row.label}: {tried.problem}")
        else:
            found.append(tried.found)
    return found, wrong


def summary(found: Sequence[Mapping[str, Any]], of: int) -> str:
    """A line: how many rows, the least share of the roofline, and against each peer the least and the mean ratio."""
    parts = [f"{len(found)} of {of} rows"]
    fractions = [row["fraction"] for row in found if "fraction" in row]
    if fractions:
        parts.append(f"{min(fractions):.0%} to {max(fractions):.0%} of the roofline")
    for peer in sorted({name for row in found for name in row["peers"]}):
        ratios = [row["peers"][peer] / row["seconds"] for row in found if peer in row["peers"]]
        parts.append(f"{min(ratios):.2f}x to {max(ratios):.2f}x {peer}, mean {statistics.geometric_mean(ratios):.2f}x")
    return "; ".join(parts)


def copies(context: Context, nbytes: int = 1 << 29) -> dict[str, Any]:
    """A row: what the driver's copy inside of the GPU reaches, which bounds all that memory bounds."""
    device = context.open()
    with device.running():
        source, target = (device.xp.empty((nbytes,), np.uint8) for _ in range(2))
        call = partial(device.xp.copyto, target, source)
        seconds = in_turn(device, {"": call})[""]
    work = Work("copy", "", 0, 2 * nbytes)
    made = {"set": "bandwidth", "name": f"copy of {nbytes >> 20} MiB", "precision": "", "steps": 1, "operations": 0}
    made |= {"bytes": work.nbytes, "seconds": seconds, "peers": {}}
    return made | against_roofline(made, [work], context.card)


def section(
    rows: Callable[[], Sequence[Row]],
    compile_mode: str = "",
    *,
    before: Callable[[Context], dict[str, Any]] | None = None,
    least: float = LEAST_SECONDS,
) -> Section:
    """A section that measures rows, `before` another one. It fails where one is wrong, or there was time for none."""

    def run(context: Context) -> tuple[str, Mapping[str, Any]]:
        wanted = rows()
        first = [before(context)] if before else []
        found, wrong = measured(context, wanted, compile_mode, least)
        facts = {"rows": [*first, *found]}
        if wrong or not found:
            raise CheckFailed("; ".join(wrong) or "no time for any row", facts)
        return summary(found, len(wanted)), facts

    return run
