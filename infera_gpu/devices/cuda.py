"""An NVIDIA GPU through CuPy: arenas in VRAM, transfers and launches on one stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from infera_gpu.devices.base import compute_into, host_view, quiet_numpy
from infera_gpu.errors import DeviceError, OutOfMemoryError
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space
from infera_gpu.op import Call, Launcher
from infera_gpu.plan import Step
from infera_gpu.spec import Array

INSTALL = "pip install 'infera-gpu[cuda12]' or 'infera-gpu[cuda13]', whichever CUDA the driver supports, never both"


def why_unavailable() -> str | None:
    """Why no GPU can be used, in one line; None where one can."""
    if find_spec("cupy") is None:
        return f"CuPy is not installed: {INSTALL}"
    try:
        import cupy

        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # a missing driver library surfaces as ImportError, OSError or CUDARuntimeError
        return f"CuPy finds no usable driver: {error}"
    return None if count else "the driver reports no GPU"


class CudaDevice:
    """GPU `index`. Raises DeviceError where there is none, saying why.

    Everything is ordered on one non-blocking stream, the current one inside `running`: transfers, kernel launches and
    the portable operators, which run on CuPy.
    """

    space: Space = "device"
    runs_portable = True

    def __init__(self, index: int = 0) -> None:
        reason = why_unavailable()
        if reason:
            raise DeviceError(f"cuda:{index} is not available: {reason}")
        import cupy

        count = int(cupy.cuda.runtime.getDeviceCount())
        if index >= count:
            raise DeviceError(
                f"cuda:{index} does not exist; this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}"
            )
        self.index, self.name, self.xp = index, f"cuda:{index}", cupy
        self._device = cupy.cuda.Device(index)
        with self._device:
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self.kinds: tuple[str, ...] = ("triton", "cupy") if find_spec("triton") else ("cupy",)
        self._launcher: Launcher | None = None

    @property
    def launcher(self) -> Launcher:
        if self._launcher is None:
            from infera_kernels.launch import CudaLauncher

            self._launcher = CudaLauncher(self.index, self._stream.ptr)
        return self._launcher

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._device, self._stream, quiet_numpy():
            yield

    def alloc(self, nbytes: int, space: Space) -> Any:
        cupy = self.xp
        if space == "host":  # pinned, so that transfers are asynchronous
            return np.frombuffer(cupy.cuda.alloc_pinned_memory(max(nbytes, 1)), np.uint8)
        free, _ = cupy.cuda.runtime.memGetInfo()
        if nbytes > free:
            raise OutOfMemoryError(f"the arena on {self.name}", needed=nbytes, available=int(free))
        memory = cupy.cuda.Memory(max(nbytes, 1))  # cudaMalloc, outside CuPy's pool; freed with its last view
        return cupy.cuda.MemoryPointer(memory, 0)

    def view(self, block: Any, operand: Operand) -> Array:
        if operand.space == "host":
            return host_view(block, operand)
        return self.xp.ndarray(operand.shape, operand.dtype, block + operand.offset, operand.strides)

    def constant(self, host: HostArray, space: Space) -> Array:
        return host if space == "host" else self.xp.asarray(host)

    def transfer(self, source: Array, target: Array) -> Call:
        here = self.xp.ndarray
        match isinstance(source, here), isinstance(target, here):
            case True, True:
                return self.xp.copyto, (target, source)
            case True, False:
                return self._download, (source, target)
            case False, True:
                return target.set, (np.ascontiguousarray(source), self._stream)
            case _:
                return self._after_stream, (np.copyto, (target, source))

    def _download(self, source: Array, target: HostArray) -> None:
        source.get(self._stream, out=target, blocking=True)

    def _after_stream(self, fn: Any, args: tuple[Any, ...]) -> None:
        self._stream.synchronize()
        fn(*args)

    def compute(self, step: Step, ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> Call:
        if step.space == "host":
            return self._after_stream, (compute_into, (np, step, ins, outs))
        return compute_into, (self.xp, step, ins, outs)

    def wrap(self, step: Step, calls: list[Call], ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> list[Call]:
        return calls

    def accepts(self, value: object) -> Array | None:
        """A CuPy array on this GPU as it is; anything else that offers its GPU memory through DLPack, wrapped."""
        cupy = self.xp
        if isinstance(value, cupy.ndarray):
            return value if value.device.id == self.index else None
        if not hasattr(value, "__dlpack_device__"):
            return None
        kind, index = value.__dlpack_device__()
        return cupy.from_dlpack(value) if (int(kind), index) == (2, self.index) else None  # 2 is kDLCUDA

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self.synchronize()
