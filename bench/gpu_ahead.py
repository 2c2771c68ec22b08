"""Kernels compiled ahead, by all processors at once: what sections launch, or may choose to, into the cache on disk.

Compiling them one by one, as they are met, takes longer than everything else. Nothing here needs the GPU but to be
told which it is: plans are bound to host memory, by a driver that loads nothing. No kernel is compiled by two
processes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from multiprocessing import TimeoutError as Late
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.gpu_absent import AbsentDriver, AheadDevice, SharingLauncher, TakingLibrary
from bench.gpu_batches import BATCH, HALVES, NETWORKS
from bench.gpu_models import LATENCIES, MODELS, WIDE_FEEDS, wide
from bench.gpu_networks import PRECISE, REPLAYED, small_bert
from bench.gpu_operators import bound
from bench.gpu_parity import trained
from bench.gpu_report import CheckFailed, Context, Section, first_line
from bench.gpu_rows import Row
from bench.gpu_selections import NETWORKS as NETWORK_SETS
from bench.gpu_selections import OPERATORS, SHORT, selected, tuned_networks, tuned_operators
from bench.gpu_tma import products
from infera_gpu.cpus import default_threads, usable_cores
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.op import Op
from infera_gpu.passes import PRECISIONS, Precision
from infera_gpu.session import Session
from infera_gpu.source import Source
from infera_gpu.tuning import bind_candidates
from infera_kernels.launch import CudaLauncher, LaunchError, Target
from infera_kernels.tuning import DeviceTiles
from tests.cases import covered

Feeds = Mapping[str, HostArray]
Result = tuple[str, Mapping[str, Any]]

MOST_SECONDS = 3600.0
"""That the jobs may take, whatever the deadline."""

PARTS = 32
"""Into how many jobs the operators' cases are shared out."""

OPERATOR_HELPERS, NETWORK_HELPERS = 2, 4
"""Jobs that compile the candidates of one row, each what no other has begun."""


# ---- jobs


@dataclass(frozen=True)
class Job:
    """Some of what sections launch. `run` binds it to a launcher that compiles; where there is a library, products may
    be left to it if `shared`."""

    name: str
    run: Callable[[CudaLauncher], None]
    shared: bool = True


@contextmanager
def _bound(
    source: Source,
    feeds: Sequence[Feeds],
    precision: Precision,
    launcher: CudaLauncher,
    *,
    batch_invariant: bool = False,
    tiles: DeviceTiles | None = None,
) -> Iterator[Session]:
    """A session with its plans for some inputs bound."""
    device = AheadDevice(launcher, tf32=precision == "tf32", batch_invariant=batch_invariant, tiles=tiles)
    with Session(load_graph(source), device, precision=precision) as session:
        session.reserve(*feeds)
        yield session


def planned(
    name: str,
    build: Callable[[], Source],
    *feeds: Feeds,
    precision: Precision = "fp32",
    batch_invariant: bool = False,
) -> Job:
    """The plans of a model at some inputs."""

    def run(launcher: CudaLauncher) -> None:
        with _bound(build(), feeds, precision, launcher, batch_invariant=batch_invariant):
            pass

    invariant = " batch invariant" if batch_invariant else ""
    return Job(f"{name} {precision}{invariant}", run, shared=not batch_invariant)


def _row(row: Row, launcher: CudaLauncher) -> None:
    """By predicted tiles, and by those measured where there are any: both are timed."""
    source, feeds = (row.outline or row.make)()
    measured = DeviceTiles.of(launcher)
    for tiles in (None, *([measured] if measured.tuned.measured else [])):
        with _bound(source, [feeds], row.precision, launcher, tiles=tiles):
            pass


def _candidates(row: Row, launcher: CudaLauncher) -> None:
    """What tuning the row may launch."""
    source, feeds = (row.outline or row.make)()
    tiles = DeviceTiles.of(launcher)
    with _bound(source, [feeds], row.precision, launcher, tiles=tiles) as session:
        (lease,) = session._leases.values()
        for bound_plan in tuple(lease._bound.values()):
            bind_candidates(bound_plan, tiles.tuned)


def of_rows(rows: Iterable[Row]) -> list[Job]:
    """One for each. Those of products are timed without the library too."""
    return [Job(row.label, partial(_row, row), shared=not row.set.startswith("products")) for row in rows]


def candidates_of(rows: Iterable[Row], helpers: int) -> list[Job]:
    """So many for each row, next to each other."""
    return [
        Job(f"candidates of {row.label}, {i + 1} of {helpers}", partial(_candidates, row))
        for row in rows
        for i in range(helpers)
    ]


def cases(part: int, launcher: CudaLauncher, wanted: Callable[[Op], bool] = lambda op: True) -> None:
    """Every kernel on every PARTS-th of its cases. One that cannot be compiled is left to the section that runs it."""
    device = AheadDevice(launcher)
    for i, (op, case, variants) in enumerate(covered("triton")):
        if i % PARTS == part and wanted(op):
            for site, ins in variants:
                with suppress(LaunchError):
                    for _ in bound(device, op, site, ins, site.outs[: case.n_outs]):
                        pass


def tma(part: int, launcher: CudaLauncher) -> None:
    """Every PARTS-th of the products by tiles for TMA, where the card has it."""
    if launcher.describes:
        for found in islice(products(launcher.target), part, None, PARTS):
            found.bound(AheadDevice(launcher))


def checked() -> Sequence[Job]:
    """Of `bench.gpu_check`, those that take longest first."""
    made = of_rows(row for name in SHORT for row in selected(name))
    made += [
        planned(name, build, feeds_of(1), feeds_of(BATCH), precision=precision, batch_invariant=invariant)
        for name, (build, feeds_of) in NETWORKS.items()
        for precision in HALVES
        for invariant in (False, True)
    ]
    made += [planned(name, build, feeds) for name, (build, feeds, _) in MODELS.items()]
    made += [planned("replays", small_bert, *REPLAYED.values()), planned("memory", wide, WIDE_FEEDS)]
    made += [planned(name, build, feeds) for name, (build, feeds) in trained().items()]
    made += [planned(name, build, feeds) for name, (build, feeds) in LATENCIES.items()]
    made += [
        planned(name, build, feeds, precision=precision)
        for name, (build, feeds) in PRECISE.items()
        for precision in PRECISIONS
    ]
    made += [Job(f"cases {part + 1} of {PARTS}", partial(cases, part), shared=False) for part in range(PARTS)]
    return (*made, *(Job(f"tiles for TMA {part + 1} of {PARTS}", partial(tma, part)) for part in range(PARTS)))


JOBS: Mapping[str, Callable[[], Sequence[Job]]] = {
    "check": checked,
    "operators": lambda: of_rows(row for rows in OPERATORS.values() for row in rows()),
    "networks": lambda: of_rows(row for rows in NETWORK_SETS.values() for row in rows()),
    "operator candidates": lambda: candidates_of(tuned_operators(), OPERATOR_HELPERS),
    "network candidates": lambda: candidates_of(tuned_networks(), NETWORK_HELPERS),
}
"""What can be compiled ahead, by name."""


@cache
def jobs(name: str) -> Sequence[Job]:
    return JOBS[name]()


# ---- processes


@cache
def _launcher(target: Target, version: int, claims: Path) -> CudaLauncher:
    return SharingLauncher(AbsentDriver(target, version), claims)


def _run(target: Target, version: int, claims: Path, name: str, index: int) -> tuple[str, int, str]:
    """The name of one of the jobs, how many kernels it compiled, and what went wrong."""
    job, launcher = jobs(name)[index], _launcher(target, version, claims)
    before, there = launcher.compiled, TakingLibrary() if target.library_bytes and job.shared else None
    launcher.library = there  # type: ignore[assignment]
    try:
        job.run(launcher)
    except Exception as error:
        return job.name, launcher.compiled - before, first_line(error)
    return job.name, launcher.compiled - before, ""


def processes() -> int:
    """One for each processor, hardware threads counted, or as many as are allowed where that is fewer than cores."""
    count, _ = default_threads()
    return count if count < usable_cores() else len(os.sched_getaffinity(0))


def ahead(which: str, context: Context, wanted: Sequence[int] | None = None) -> Result:
    """Has jobs run, all of that name unless some are `wanted`, for as long as there is time."""
    launcher, count = context.open().launcher, processes()
    wanted = range(len(jobs(which))) if wanted is None else wanted
    by_job: dict[str, int] = {}
    failed: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as claims,
        get_context("spawn").Pool(count) as pool,
    ):  # leaving it ends processes
        run = partial(_run, launcher.target, launcher.driver_version, Path(claims), which)
        results = pool.imap_unordered(run, wanted)
        try:
            for _ in wanted:
                name, number, problem = results.next(timeout=min(max(context.left(), 0.0), MOST_SECONDS))
                by_job[name] = number
                failed |= {name: problem} if problem else {}
        except Late:
            pass
    left = len(wanted) - len(by_job)
    found = {"processes": count, "compiled": by_job, "failed": failed, "no_time_for": left}
    summary = f"{sum(by_job.values())} kernels by {count} processes"
    if left:
        summary += f", no time for {left} of {len(wanted)} jobs"
    if failed:
        name, problem = next(iter(failed.items()))
        raise CheckFailed(f"{summary}, {len(failed)} jobs fail: {name}: {problem}", found)
    return summary, found


SECTIONS: Mapping[str, Section] = {"compiling": partial(ahead, "check")}
