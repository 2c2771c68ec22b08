"""Arrays in memory that two processes share: one writes, the other reads, never both at once."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from infera_gpu.spec import dtype_of_onnx, onnx_of_dtype
from infera_server import codec
from infera_server.errors import Unavailable
from infera_server.rows import Arrays, HostArray

Described: TypeAlias = Mapping[str, tuple[int, list[int], int, int]]
"""By name: ONNX's number of the dtype, shape, offset and length in bytes."""

ALIGNMENT = 64
STEP = 1 << 18
"""A segment grows by multiples of this."""


class Segment:
    """Memory behind a file descriptor. It grows to what is put there; arrays that view it stay valid.

    The memory is reserved as it grows, and sealed against shrinking: neither process can be ended by a page that is not
    there (SIGBUS).
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls, name: str) -> Segment:
        """An empty one of a new file. Raises OSError."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return cls(fd)

    def put(self, arrays: Arrays) -> Described:
        """Copy arrays here, in place of those before. Raises Unavailable where there is no memory for them."""
        described: dict[str, tuple[int, list[int], int, int]] = {}
        texts: dict[str, codec.Buffer] = {}
        end = 0
        for name, array in arrays.items():
            nbytes = array.nbytes
            if array.dtype.hasobject:
                texts[name] = codec.to_bytes(array)
                nbytes = len(texts[name])
            described[name] = (onnx_of_dtype(array.dtype), list(array.shape), end, nbytes)
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        memory = self._reaching(end, grow=True)
        for name, (_, _, offset, nbytes) in described.items():
            if name in texts:
                memory[offset : offset + nbytes] = bytes(texts[name])
            elif nbytes:
                array = arrays[name]
                np.ndarray(array.shape, array.dtype, memory, offset)[...] = array
        return described

    def views(self, described: Described) -> dict[str, HostArray]:
        """The arrays, where they lie; strings are copied. Raises ValueError for what cannot lie there."""
        memory = self._reaching(max((offset + nbytes for _, _, offset, nbytes in described.values()), default=0))
        return {name: _array(memory, name, *where) for name, where in described.items()}

    def close(self) -> None:
        """The memory is free once no array views it."""
        os.close(self.fd)
        self._map = None

    def _reaching(self, end: int, grow: bool = False) -> mmap.mmap:
        if self._map is None or len(self._map) < end:
            if grow:
                size = max(1, -(-end // STEP)) * STEP
                try:
                    os.posix_fallocate(self.fd, 0, size)
                except OSError as error:
                    raise Unavailable(f"{size:,} bytes of shared memory cannot be had: {error.strerror}") from None
            self._map = mmap.mmap(self.fd, 0)
        return self._map


def _array(memory: mmap.mmap, name: str, code: int, shape: list[int], offset: int, nbytes: int) -> HostArray:
    dtype, dims = dtype_of_onnx(code), tuple(shape)
    if offset < 0 or not 0 <= nbytes <= len(memory) - offset:
        raise ValueError(f"'{name}' is said to lie outside of the shared memory")
    if dtype.hasobject:
        return codec.from_bytes(memory[offset : offset + nbytes], dtype, dims, name)
    if math.prod(dims) * dtype.itemsize != nbytes:
        raise ValueError(f"'{name}' is said to have {nbytes} bytes at {list(dims)} of {dtype}")
    return np.ndarray(dims, dtype, memory, offset)
