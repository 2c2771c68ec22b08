"""The CUDA device over CuPy's own arrays, in host memory and without a driver: what is bound, planned and packed meets
the array type that a GPU gives it, which `fake_cupy` cannot show. Nothing is launched, and CuPy computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from infera_gpu.budget import VramBudget
from infera_gpu.devices.base import Args, host_block, quiet_numpy
from infera_gpu.devices.cuda import CudaDevice
from infera_gpu.devices.graphs import Calls
from infera_gpu.devices.ports import DirectPorts, Ports
from infera_gpu.graph import HostArray
from infera_gpu.layout import Space
from infera_gpu.op import Call, Launcher
from infera_gpu.spec import Array
from infera_kernels.launch import RecordingLauncher


def pointer(cupy: Any, nbytes: int) -> Any:
    """A pointer of CuPy's to uninitialised host memory, which it keeps, aligned as an allocation on a GPU."""
    block = host_block(max(nbytes, 1))
    address = block.__array_interface__["data"][0]
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, block.nbytes, block, 0), 0)


def on_host(array: Array) -> HostArray:
    """The elements of an array of CuPy's whose memory is the host's; other arrays as they are."""
    if isinstance(array, np.ndarray) or not array.size:
        return np.empty(array.shape, array.dtype) if not array.size else array
    interface = {
        "data": (array.data.ptr, False),
        "shape": array.shape,
        "strides": array.strides,
        "typestr": f"|V{array.dtype.itemsize}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface)).view(array.dtype)


class HostCudaDevice(CudaDevice):
    """Everything of `CudaDevice` but what asks the driver: memory, copies and streams."""

    def __init__(self, launcher: Launcher | None = None, budget: VramBudget | None = None) -> None:
        import cupy

        self.strict, self.captures, self.tf32, self.batch_invariant = False, True, False, False
        self.index, self.name, self.xp = 0, "cuda:0", cupy
        self._stream = SimpleNamespace(ptr=0, synchronize=lambda: None)
        self.channels_last, self.kinds = True, ("triton", "cupy")
        self._launcher, self._tiles = launcher or RecordingLauncher(), None

    def launch(self, run: Callable[[*Args], None], *args: *Args) -> None:
        with self.running():
            run(*args)

    @contextmanager
    def running(self) -> Iterator[None]:
        with quiet_numpy():
            yield

    def alloc(self, nbytes: int, space: Space) -> Any:
        return host_block(nbytes) if space == "host" else pointer(self.xp, nbytes)

    def require(self, what: str, nbytes: int) -> None: ...

    @contextmanager
    def weights(self, nbytes: int) -> Iterator[None]:
        yield

    def constant(self, host: HostArray, space: Space, *, lasting: bool = False, packed: bool = False) -> Array:
        if space == "host":
            return host
        made = self.xp.ndarray(host.shape, host.dtype, pointer(self.xp, host.nbytes))
        self._move(host, made)
        return made

    def transfer(self, source: Array, target: Array) -> Call:
        if isinstance(source, self.xp.ndarray) and isinstance(target, self.xp.ndarray):
            fn, args = self._copy(source, target)
            if fn is not self.xp.copyto:  # a kernel
                return fn, args
        return self._move, (source, target)

    def _move(self, source: Array, target: Array) -> None:
        assert isinstance(source, np.ndarray | self.xp.ndarray)  # CuPy copies no NumPy scalar
        if target.size:
            np.copyto(on_host(target), on_host(source))

    def ports(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], staging: Any) -> Ports:
        return DirectPorts(self, inputs, outputs)

    def graph(self, calls: Any) -> Call:
        return Calls(calls), ()

    def synchronize(self) -> None: ...

    def close(self) -> None: ...

    def __del__(self) -> None: ...
