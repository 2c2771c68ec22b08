"""The CPU: NumPy, in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from infera_gpu.devices import processes
from infera_gpu.devices.base import Args, compute_into, host_block, host_copy, host_view, quiet_numpy
from infera_gpu.devices.ports import HostPorts, Ports
from infera_gpu.devices.processes import POOL
from infera_gpu.devices.sending import SHARED_ABOVE, Region
from infera_gpu.devices.shared import SharedSlabs
from infera_gpu.devices.workers import WORKERS
from infera_gpu.errors import DeviceError
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space
from infera_gpu.op import Call, Launcher
from infera_gpu.plan import Step
from infera_gpu.source import usual_room
from infera_gpu.spec import Array
from infera_kernels.calls import LEAST_NS, one_after_the_other
from infera_kernels.cpu.aligned import Slabs

if TYPE_CHECKING:
    from infera_gpu.devices.timing import Timer


def _usual_threads() -> tuple[int, str]:
    from infera_gpu.cpus import default_threads

    return default_threads()


class _WithProcesses(quiet_numpy):
    """How plans run where worker processes make some of their calls."""

    __slots__ = ()

    def __enter__(self) -> None:
        POOL.enter()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        POOL.leave()
        super().__exit__(*error)


class CpuDevice:
    """Runs "cpu" kernels, with `jit` compiled ones before them, and operators' own functions where there is none.

    `threads` is how many parts of a step run at a time; None asks `cpus.default_threads`. Worker processes make them
    from a step's second run on, where there can be any, else threads. From its first run until it is closed NumPy's
    BLAS has one thread in the whole process: see `Workers`.
    """

    name = "cpu"
    space: Space = "host"
    runs_portable = True
    channels_last = True
    captures = False
    lost = ""
    tf32 = False
    batch_invariant = False
    tuned = None
    tiles = None
    xp: Any = np

    def __init__(self, threads: int | None = 1, strict: bool = False, jit: bool = False) -> None:
        self.threads, why = _usual_threads() if threads is None else (threads, "as asked")
        self.strict = strict
        self.kinds: tuple[str, ...] = ("jit", "cpu") if jit else ("cpu",)
        self._working = False
        self._shares = self.threads > 1 and not processes.unavailable(self.threads)
        self.slabs: Slabs | None = SharedSlabs(lambda: POOL.memory) if self._shares else Slabs()
        where = f", in {self.threads} processes" if self._shares else ""
        self.concurrency = f"{self.threads} thread{'s' if self.threads > 1 else ''}{where} ({why})"
        self.least_ns = processes.LEAST_NS if self._shares else LEAST_NS

    @property
    def launcher(self) -> Launcher:
        raise DeviceError("the CPU launches no Triton kernels")

    def timer(self) -> Timer:
        raise DeviceError("the CPU's kernels have no tiles that are measured; tune on a GPU")

    def running(self) -> AbstractContextManager[None]:
        if not self._working:
            self._working = True
            WORKERS.enter(self, self.threads)
        return _WithProcesses() if self._shares else quiet_numpy()

    def launch(self, run: Callable[[*Args], None], *args: *Args) -> None:
        with self.running():
            run(*args)

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        if self.threads == 1 or len(parts) < 2:
            return one_after_the_other(parts)
        made = tuple(map(tuple, parts))
        if self._shares:
            return [(POOL.run, (Region(made, self.threads, WORKERS.run),))]
        return [(WORKERS.run, (made, self.threads))]

    def parts_of(self, call: Call) -> Sequence[Sequence[Call]] | None:
        fn, args = call
        if fn == POOL.run:
            return args[0].parts  # type: ignore[no-any-return]
        return args[0] if fn == WORKERS.run else None

    def alloc(self, nbytes: int, space: Space) -> HostArray:
        if self._shares and POOL.memory is not None:
            return POOL.memory.block(nbytes)
        return host_block(nbytes)

    def view(self, block: Any, operand: Operand) -> HostArray:
        return host_view(block, operand)

    def room(self, nbytes: int) -> HostArray:
        if self._shares and nbytes >= SHARED_ABOVE and POOL.memory is not None:
            return POOL.memory.block(nbytes, constant=True)
        return usual_room(nbytes)

    def require(self, what: str, nbytes: int) -> None: ...

    def weights(self, nbytes: int) -> AbstractContextManager[None]:
        return nullcontext()

    def constant(self, host: HostArray, space: Space, *, lasting: bool = False, packed: bool = False) -> HostArray:
        if self._shares and packed and lasting and host.nbytes >= SHARED_ABOVE and POOL.memory is not None:
            return POOL.memory.copy(host, self.slabs)
        return host

    def transfer(self, source: Array, target: Array) -> Call:
        return host_copy(source, target)

    def compute(self, step: Step, ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> Call:
        return compute_into, (np, step, ins, outs)

    def wrap(self, step: Step, calls: list[Call], ins: Sequence[Array | None], outs: tuple[Array, ...]) -> list[Call]:
        return calls

    def ports(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], staging: Any) -> Ports:
        return HostPorts(inputs, outputs)

    def graph(self, calls: Sequence[Call]) -> Call:
        raise DeviceError("the CPU has no CUDA graphs")

    def accepts(self, value: object) -> HostArray | None:
        return value if isinstance(value, np.ndarray) else None

    def block_of(self, array: Array) -> None:
        return None

    def synchronize(self) -> None: ...

    def close(self) -> None:
        self._working = False
        self.slabs = None
        WORKERS.leave(self)
