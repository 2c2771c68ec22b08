"""Kernels compiled ahead, by all processors at once: what sections launch, into the cache on disk.

Compiling them one by one, as they are met, takes longer than everything else. Nothing here needs the GPU but to be
told which it is: plans are bound to host memory, by a driver that loads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from multiprocessing import TimeoutError as Late
from multiprocessing import get_context
from typing import Any

import numpy as np

from bench.gpu_batches import BATCH, HALVES, NETWORKS
from bench.gpu_models import LATENCIES, MODELS
from bench.gpu_networks import PRECISE
from bench.gpu_operators import bound
from bench.gpu_report import CheckFailed, Context, Section, first_line
from bench.gpu_rows import Row
from bench.gpu_selections import NETWORKS as NETWORK_SETS
from bench.gpu_selections import OPERATORS, SHORT, selected
from bench.gpu_tma import products
from infera_gpu.cpus import default_threads, usable_cores
from infera_gpu.devices.base import host_block
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.graph import HostArray
from infera_gpu.layout import Space
from infera_gpu.loader import load_graph
from infera_gpu.op import Op
from infera_gpu.passes import PRECISIONS, Precision
from infera_gpu.session import Session
from infera_gpu.source import Source
from infera_kernels.launch import Call, CudaLauncher, LaunchError, Target
from infera_kernels.launch.abi import Address
from infera_kernels.launch.compiling import nothing
from infera_kernels.launch.cublaslt import Product
from infera_kernels.tuning import DeviceTiles
from tests.cases import covered

Feeds = Mapping[str, HostArray]
Result = tuple[str, Mapping[str, Any]]

MOST_SECONDS = 3600.0
"""That the jobs may take, whatever the deadline."""

PARTS = 32
"""Into how many jobs the operators' cases are shared out."""


class AbsentDriver:
    """Says of a card what the one that has it said; loads nothing, launches nothing."""

    def __init__(self, target: Target, version: int) -> None:
        self._target, self._version = target, version

    def version(self) -> int:
        return self._version

    def target(self, device_id: int) -> Target:
        return self._target

    def load(self, device_id: int, cubin: bytes, name: str) -> Address:
        return Address.of(0, None)

    def allow_shared(self, function: int, nbytes: int) -> None: ...

    def encode(self, *_: object) -> int:
        """Describes nothing: what is compiled here is not launched."""
        return 0

    @property
    def launch(self) -> Callable[..., object]:
        return _refuse


def _refuse(*_: int) -> None:
    raise LaunchError("kernels are compiled ahead here, not launched")


class AheadDevice(RecordingDevice):
    """Plans and binds like the CUDA device of a card that is elsewhere; arrays lie as they do there, on whole words."""

    def __init__(self, launcher: CudaLauncher, *, tf32: bool = False, batch_invariant: bool = False) -> None:
        super().__init__(tf32=tf32, batch_invariant=batch_invariant)
        self._launcher = launcher
        self.tiles = DeviceTiles.of(launcher)

    def constant(self, host: HostArray, space: Space, *, lasting: bool = False, packed: bool = False) -> HostArray:
        if space == "host":
            return host
        return np.ndarray(host.shape, host.dtype, host_block(host.nbytes))


# ---- jobs


@dataclass(frozen=True)
class Job:
    """Some of what sections launch. `run` binds it to a launcher that compiles; where there is a library, products may
    be left to it if `shared`."""

    name: str
    run: Callable[[CudaLauncher], None]
    shared: bool = True


class TakingLibrary:
    """Takes every product, as the library of a card that is elsewhere would take nearly all."""

    def call(self, product: Product, workspace: Any) -> Call:
        return nothing, ()


def _plan(
    source: Source,
    feeds: Sequence[Feeds],
    precision: Precision,
    batch_invariant: bool,
    launcher: CudaLauncher,
) -> None:
    device = AheadDevice(launcher, tf32=precision == "tf32", batch_invariant=batch_invariant)
    with Session(load_graph(source), device, precision=precision) as session:
        session.reserve(*feeds)


def planned(
    name: str,
    build: Callable[[], Source],
    *feeds: Feeds,
    precision: Precision = "fp32",
    batch_invariant: bool = False,
) -> Job:
    """The plans of a model at some inputs."""
    full = f"{name} {precision}{' batch invariant' if batch_invariant else ''}"
    return Job(full, lambda launcher: _plan(build(), feeds, precision, batch_invariant, launcher))


def _row(row: Row, launcher: CudaLauncher) -> None:
    source, feeds = (row.outline or row.make)()
    _plan(source, [feeds], row.precision, False, launcher)


def of_rows(rows: Iterable[Row]) -> list[Job]:
    """One for each. Those of products are timed without the library too."""
    return [Job(row.label, partial(_row, row), shared=not row.set.startswith("products")) for row in rows]


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
}
"""What can be compiled ahead, by name."""


@cache
def jobs(name: str) -> Sequence[Job]:
    return JOBS[name]()


# ---- processes


@cache
def _launcher(target: Target, version: int) -> CudaLauncher:
    return CudaLauncher(0, 0, driver=AbsentDriver(target, version))


def _run(target: Target, version: int, name: str, index: int) -> tuple[str, int, str]:
    """The name of one of the jobs, how many kernels it compiled, and what went wrong."""
    job, launcher = jobs(name)[index], _launcher(target, version)
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
    run = partial(_run, launcher.target, launcher.driver_version, which)
    with get_context("spawn").Pool(count) as pool:  # leaving it ends the processes
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
