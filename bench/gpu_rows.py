"""A row of the GPU benchmarks: a model at given inputs, what it does by its plan, its time and the peers' times.

A single operator is a model of one node. What a row does is counted from the plan (`gpu_work`), its roofline comes from
the card's peaks (`gpu_roofline`); nothing of that is written down by hand. Times are medians over rounds in which all
contenders take turns, beside the least and the most. Every contender that can be is replayed from a CUDA graph; a row
of one or two steps is repeated in it, so that the host does not show. Where what such a row moves would stay in the L2
cache from one repetition to the next, it is timed `cold` too: what fills the cache is read before each, and its time
taken off.

Inputs are as the model has them: of a float32 model in half precision, casts are part of our time, while PyTorch gets
its inputs cast, and images channels-last, beforehand. We write a decoder's caches whole, one token longer; Llama's peer
writes into its own, GPT-2's does as we do.

A row goes by what is measured on its machine (`bench.gpu_tuning`), and says of how many of its choices something is.
Where that is not what is predicted, infera as predicted is one more contender.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bench.gpu_bound import Run, bound_run, chosen, run_without, without_library, without_measurements
from bench.gpu_peers import REPEATED, Beside, Feeds, Peer, contenders, torch_on_gpu
from bench.gpu_report import CheckFailed, Context
from bench.gpu_roofline import bound, limit
from bench.gpu_timings import FLUSHED, Contender, contended, flushing, l2_bytes
from bench.gpu_work import Work, bytes_of, launches_of, operations_of, works_of
from infera_gpu.devices import open_device
from infera_gpu.dry import launches
from infera_gpu.errors import OutOfMemoryError
from infera_gpu.graph import Graph, HostArray
from infera_gpu.loader import load_graph
from infera_gpu.op import Call
from infera_gpu.passes import Precision
from infera_gpu.plan import Plan
from infera_gpu.session import Session
from infera_gpu.source import Source
from infera_gpu.verify import TOLERANCES, compare
from infera_kernels.launch import library_of
from infera_kernels.launch.devices import Device

ALONE = "infera without cuBLASLt"
"""Among the peers of products: Triton's kernels, where the library may compute ours."""

PREDICTED = "infera, predicted tiles"
"""Among the peers of rows of which something else was measured to be faster."""

FEW = 2
"""Steps, up to which a row is repeated in a graph."""
HOST_RUNS = 50


@dataclass(frozen=True)
class Row:
    """What is timed. `make` gives the model and its inputs; `outline` too, with a model that is enough to plan with,
    where the other one is large."""

    set: str
    name: str
    make: Callable[[], tuple[Source, Feeds]]
    precision: Precision = "fp32"
    peers: Mapping[str, Peer] = field(default_factory=dict)
    network: bool = False
    """Whether peers are modules: eager, and compiled where that is asked for."""
    outline: Callable[[], tuple[Source, Feeds]] | None = None
    tolerance: float | None = None
    """Of the peak, between answers here and the peer's; None: twice what `infera verify` allows."""
    exact: Callable[[], Source] | None = None
    """The float32 model of which this one is quantised: how far answers are from its, on the CPU, is a column."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further columns, as how often a network has the layer."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Outputs that lie in the place of inputs, as a decoder's caches do from step to step."""

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
        "launches": launches_of(works),
        "operations": operations_of(works),
        "bytes": bytes_of(works),
    }


def planned(row: Row, device: Any) -> tuple[Feeds, tuple[Work, ...]]:
    """What goes in, and what the steps of its plan do."""
    source, feeds = (row.outline or row.make)()
    device.tf32 = row.precision == "tf32"
    with Session(load_graph(source), device, precision=row.precision) as session:
        plan = session.plan_for(feeds)
        made = launches(device, session._constants, plan)
        return feeds, works_of(plan, made, tf32=device.tf32, kept=row.kept)


def measure(context: Context, row: Row, compile_mode: str = "") -> dict[str, Any]:
    """The row's columns. Raises CheckFailed, with all of them, where the answer is not the peer's.

    `compile_mode` is what torch.compile is asked for where peers are modules; empty: not at all.
    """
    torch, device = torch_on_gpu(), context.open()
    device.tf32 = row.precision == "tf32"
    source, feeds = row.make()
    graph = load_graph(source)
    with ExitStack() as sessions:
        session = sessions.enter_context(Session(graph, device, precision=row.precision))
        plan = session.plan_for(feeds)
        began = time.perf_counter()
        ours = {"infera": bound_run(device, session, feeds, row.kept)}
        first = time.perf_counter() - began
        works = works_of(plan, ours["infera"].launches, tf32=device.tf32, kept=row.kept)
        made = {**described(row.set, row.name, row.precision, feeds, works), **row.facts, "first_run_seconds": first}
        made |= chosen(session, feeds)
        another = partial(run_without, device=device, graph=graph, feeds=feeds, precision=row.precision, kept=row.kept)
        if made.get("changed") and not compile_mode:
            ours[PREDICTED] = another(without_measurements, sessions=sessions)
        if row.set.startswith("products") and library_of(device.launcher) is not None:
            ours[ALONE] = another(without_library, sessions=sessions)
        least = FLUSHED * l2_bytes(device)
        flushed = least if not row.network and _is_short(plan) and made["bytes"] < least else 0
        beside = Beside()
        if torch is not None:
            beside = contenders(
                *(torch, row.peers, source, feeds, row.precision),
                network=row.network,
                compile_mode=compile_mode,
                flushed=flushed,
            )
        beside.hot |= {name: _ours(device, run) for name, run in ours.items()}
        if flushed:
            beside.cold |= {n: _ours_flushed(device, run.call, flushed) for n, run in ours.items() if n != ALONE}
        made |= _times(_timed(device, torch, beside.hot), _timed(device, torch, beside.cold))
        made["gpu"] = context.reading()
        made["host_seconds"] = _host_seconds(device, ours["infera"].call)
    answers = ours["infera"].answers
    made |= {"peers_failed": beside.failed} if beside.failed else {}
    made |= against_roofline(made, works, context.card)
    if row.exact is not None:
        made["error_against_float32"] = _distance(load_graph(row.exact()), feeds, answers)
    if PREDICTED in ours:
        _compare(row, answers, next(iter(ours[PREDICTED].answers.values())), PREDICTED, made, "error_against_predicted")
    if beside.want is not None:
        _compare(row, answers, beside.want, "PyTorch", made)
    elif not row.network and row.exact is None:
        _compare_with_cupy(context, row, graph, feeds, answers, made)
    gc.collect()
    return made


def _times(hot: Mapping[str, Sequence[float]], cold: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The columns of times: ours, the peers', the least and the most of each, and those with a flushed L2 cache. Of the
    latter, which are differences, none that is not positive."""
    peers = {name: statistics.median(rounds) for name, rounds in hot.items()}
    columns: dict[str, Any] = {"seconds": peers.pop("infera"), "peers": peers}
    columns["spread"] = {name: [min(rounds), max(rounds)] for name, rounds in hot.items()}
    flushed = {name: statistics.median(rounds) for name, rounds in cold.items()}
    return {**columns, "cold": {name: seconds for name, seconds in flushed.items() if seconds > 0}} if cold else columns


def _distance(graph: Graph, feeds: Feeds, answers: Feeds) -> float:
    """How far the first answer is from what a graph answers on the CPU, of the peak."""
    with Session(graph, open_device("cpu")) as session:
        want = session.run(feeds)
    name = next(iter(want))
    (difference,) = compare({name: answers[name]}, {name: want[name]})
    return difference.error


def against_roofline(made: Mapping[str, Any], works: Sequence[Work], card: Device | None) -> dict[str, Any]:
    """The columns that follow from a time and the card's peaks; without a listed card only rates. Memory's peak bounds
    what comes from memory: the `cold` time where there is one."""
    seconds = made.get("cold", {}).get("infera", made["seconds"])
    rates = {"operations_per_s": made["operations"] / seconds, "bytes_per_s": made["bytes"] / seconds}
    if card is None:
        return rates
    least = bound(works, card)
    return {**rates, "bound_seconds": least, "fraction": least / seconds, "limit": limit(works, card)}


def _is_short(plan: Plan) -> bool:
    """Whether it is a few launches and holds no graph."""
    return not (plan.graphs or len(plan.packed) > FEW or any(step.uncapturable for step in plan.steps))


def _graph(device: Any, calls: Sequence[Call]) -> Callable[[], object]:
    fn, args = device.graph(calls)
    return partial(fn, *args)


def _ours(device: Any, run: Run) -> Contender:
    """A plan that holds graphs replays them; one of a few launches is repeated in a graph of its own."""
    if not _is_short(run.plan):
        return Contender(run.call)
    return Contender(_graph(device, [(run.call, ())] * REPEATED), REPEATED)


def _ours_flushed(device: Any, call: Callable[[], object], nbytes: int) -> Contender:
    """The same with so many bytes read before each repetition."""
    with device.running():
        flush = flushing(device, nbytes)
    return Contender(_graph(device, [*flush, (call, ())] * REPEATED), REPEATED, _graph(device, flush * REPEATED))


def _compare(
    row: Row, answers: Feeds, want: HostArray, whose: str, made: dict[str, Any], column: str = "error"
) -> None:
    """Notes how far the first answer is from `want`. Raises CheckFailed where that is too far: the row is `wrong`."""
    got = next(iter(answers.values())).astype(np.float32)
    (difference,) = compare({"output": got}, {"output": want.astype(np.float32, copy=False)})
    made[column] = difference.error
    usual = 2 * TOLERANCES[row.precision] if row.exact is None else TOLERANCES["int8"]
    if not difference.within(row.tolerance or usual):
        made["wrong"] = f"differs from {whose}: {difference}"
        raise CheckFailed(f"{row.label} {made['wrong']}", made)


def _compare_with_cupy(
    context: Context, row: Row, graph: Graph, feeds: Feeds, answers: Feeds, made: dict[str, Any]
) -> None:
    """The same with what CuPy's functions answer, as far as the GPU has room for their temporaries."""
    device = context.open()
    device.kinds, device.channels_last = ("cupy",), False
    try:
        with Session(graph, device, precision=row.precision) as session:
            want = next(iter(session.run(feeds).values()))
    except OutOfMemoryError as error:
        made["not_compared"] = str(error)
        return
    _compare(row, answers, want, "CuPy", made)


def _timed(device: Any, torch: Any, calls: Mapping[str, Contender]) -> dict[str, list[float]]:
    """`contended` on the device's stream."""
    with device.running():
        where = nullcontext()
        if torch is not None:
            stream = torch.cuda.ExternalStream(device.xp.cuda.get_current_stream().ptr)
            where = torch.cuda.stream(stream)
        with where, torch.inference_mode() if torch is not None else nullcontext():
            return contended(device, calls)


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
