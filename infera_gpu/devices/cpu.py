"""The CPU: NumPy, in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from infera_gpu.devices.base import compute_into, host_block, host_copy, host_view, one_after_the_other, quiet_numpy
from infera_gpu.errors import DeviceError
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space
from infera_gpu.op import Call, Launcher
from infera_gpu.plan import Step
from infera_gpu.spec import Array


class CpuDevice:
    """Runs "cpu" kernels, with `jit` compiled ones before them, and operators' own functions where there is none."""

    name = "cpu"
    space: Space = "host"
    runs_portable = True
    channels_last = True
    xp: Any = np

    def __init__(self, threads: int = 1, strict: bool = False, jit: bool = False) -> None:
        self.threads, self.strict = threads, strict
        self.kinds: tuple[str, ...] = ("jit", "cpu") if jit else ("cpu",)

    @property
    def launcher(self) -> Launcher:
        raise DeviceError("the CPU launches no Triton kernels")

    def running(self) -> AbstractContextManager[None]:
        return quiet_numpy()

    def parallel(self, parts: Sequence[Sequence[Call]]) -> list[Call]:
        return one_after_the_other(parts)

    def alloc(self, nbytes: int, space: Space) -> HostArray:
        return host_block(nbytes)

    def view(self, block: Any, operand: Operand) -> HostArray:
        return host_view(block, operand)

    def constant(self, host: HostArray, space: Space) -> HostArray:
        return host

    def transfer(self, source: Array, target: Array) -> Call:
        return host_copy(source, target)

    def compute(self, step: Step, ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> Call:
        return compute_into, (np, step, ins, outs)

    def wrap(self, step: Step, calls: list[Call], ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> list[Call]:
        return calls

    def accepts(self, value: object) -> HostArray | None:
        return value if isinstance(value, np.ndarray) else None

    def block_of(self, array: Array) -> None:
        return None

    def synchronize(self) -> None: ...

    def close(self) -> None: ...
