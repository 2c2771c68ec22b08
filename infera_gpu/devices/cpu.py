"""The CPU: NumPy, in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from infera_gpu.devices.base import compute_into, host_block, host_copy, host_view, quiet_numpy
from infera_gpu.devices.ports import HostPorts, Ports
from infera_gpu.devices.workers import WORKERS
from infera_gpu.errors import DeviceError
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space
from infera_gpu.op import Call, Launcher
from infera_gpu.plan import Step
from infera_gpu.spec import Array
from infera_kernels.calls import one_after_the_other

if TYPE_CHECKING:
    from infera_gpu.devices.timing import Timer


def _usual_threads() -> tuple[int, str]:
    from infera_gpu.cpus import default_threads

    return default_threads()


class CpuDevice:
    """Runs "cpu" kernels, with `jit` compiled ones before them, and operators' own functions where there is none.

    `threads` is how many parts of a step run at a time; None asks `cpus.default_threads`. From its first
    run until it is closed NumPy's BLAS has one thread in the whole process: see `Workers`.
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
        self.concurrency = f"{self.threads} thread{'s' if self.threads > 1 else ''} ({why})"
        self.strict = strict
        self.kinds: tuple[str, ...] = ("jit", "cpu") if jit else ("cpu",)
        self._working = False

    @property
    def launcher(self) -> Launcher:
        raise DeviceError("the CPU launches no Triton kernels")

    def timer(self) -> Timer:
        raise DeviceError("the CPU's kernels have no tiles that are measured; tune on a GPU")

    def running(self) -> AbstractContextManager[None]:
        if not self._working:
            self._working = True
            WORKERS.enter(self, self.threads)
        return quiet_numpy()

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        if self.threads == 1 or len(parts) < 2:
            return one_after_the_other(parts)
        return [(WORKERS.run, (tuple(map(tuple, parts)), self.threads))]

    def alloc(self, nbytes: int, space: Space) -> HostArray:
        return host_block(nbytes)

    def view(self, block: Any, operand: Operand) -> HostArray:
        return host_view(block, operand)

    def require(self, what: str, nbytes: int) -> None: ...

    def weights(self, nbytes: int) -> AbstractContextManager[None]:
        return nullcontext()

    def constant(self, host: HostArray, space: Space, *, lasting: bool = False) -> HostArray:
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
        WORKERS.leave(self)
