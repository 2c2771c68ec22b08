"""GPU memory that another process allocated and shares by its CUDA IPC handle."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.devices.cuda_current import Current
from infera_gpu.errors import DeviceError
from infera_gpu.graph import HostArray

HANDLE_BYTES = 64
"""CUDA_IPC_HANDLE_SIZE: what a cudaIpcMemHandle_t has."""

LAZY_PEER_ACCESS = 1
"""cudaIpcMemLazyEnablePeerAccess, the only flag there is."""

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
"""cudaMemcpyKind"""


class SharedVram:
    """`nbytes` bytes behind `handle` on GPU `index`, through `cupy`. Mapped until nothing refers to it any more.

    Raises DeviceError where CUDA refuses. It refuses a copy outside the allocation too, and knows its size.
    """

    def __init__(self, cupy: Any, handle: bytes, index: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._pointer = 0
        self._runtime, self._device = cupy.cuda.runtime, Current(cupy, index)
        try:
            with self._device:
                self._pointer = int(self._runtime.ipcOpenMemHandle(handle, LAZY_PEER_ACCESS))
        except self._runtime.CUDARuntimeError as error:
            raise DeviceError(f"cuda:{index} cannot open the shared memory: {error}") from error
        try:
            if nbytes:
                self.read(nbytes - 1, 1)
        except DeviceError:
            self.close()
            raise

    def read(self, offset: int, nbytes: int) -> memoryview:
        """A copy of `nbytes` bytes at `offset`."""
        host = np.empty(nbytes, np.uint8)
        self._copy(host.ctypes.data, self._pointer + offset, nbytes, DEVICE_TO_HOST)
        return host.data

    def write(self, offset: int, data: HostArray) -> None:
        """Copy contiguous bytes to `offset`."""
        self._copy(self._pointer + offset, data.ctypes.data, data.nbytes, HOST_TO_DEVICE)

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        try:
            with self._device:
                self._runtime.memcpy(target, source, nbytes, kind)
                if kind == HOST_TO_DEVICE:  # which may return while the last bytes are on their way
                    self._runtime.streamSynchronize(0)
        except self._runtime.CUDARuntimeError as error:
            raise DeviceError(f"a copy of {nbytes:,} bytes of shared GPU memory failed: {error}") from error

    def close(self) -> None:
        """Unmap it; idempotent."""
        pointer, self._pointer = self._pointer, 0
        if pointer:
            with self._device:
                self._runtime.ipcCloseMemHandle(pointer)

    def __del__(self) -> None:
        self.close()
