"""Arrays in memory that two processes share: one writes, the other reads, never both at once."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from infera_gpu.spec import dtype_of_onnx, onnx_of_dtype
from infera_server import codec
from infera_server.errors import Unavailable
from infera_server.scheduling.rows import Arrays, HostArray

Described: TypeAlias = Mapping[str, tuple[int, list[int], int, int]]
"""By name: ONNX's number of the dtype, shape, offset and length in bytes."""


class Place(NamedTuple):
    """Where an array lies, and what it is."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    nbytes: int


Memory: TypeAlias = "mmap.mmap | HostArray"

ALIGNMENT = 64
STEP = 1 << 18
"""A segment grows by multiples of this, and by a quarter at least."""


def aligned(nbytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Packed:
    """Arrays and where each is to lie, one after the other, in `nbytes` bytes."""

    described: Described
    parts: Sequence[HostArray | codec.Buffer]
    nbytes: int


def described(array: HostArray, at: int) -> tuple[int, list[int], int, int]:
    """An array that lies at an offset."""
    return onnx_of_dtype(array.dtype), list(array.shape), at, array.nbytes


def packed(arrays: Arrays) -> Packed:
    """The arrays, the first at offset 0; strings as their bytes on the wire."""
    where: dict[str, tuple[int, list[int], int, int]] = {}
    parts: list[HostArray | codec.Buffer] = []
    end = 0
    for name, array in arrays.items():
        if array.dtype.hasobject:
            parts.append(text := codec.to_bytes(array))
            where[name] = onnx_of_dtype(array.dtype), list(array.shape), end, len(text)
            end += aligned(len(text))
        else:
            parts.append(array)
            where[name] = described(array, end)
            end += aligned(array.nbytes)
    return Packed(where, parts, end)


class Segment:
    """Memory behind a file descriptor. It grows to what is put there; arrays that view it stay valid.

    The memory is reserved as it grows, and sealed against shrinking: neither process can be ended by a page that is not
    there (SIGBUS).
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None
        self._before: tuple[Described, mmap.mmap, dict[str, HostArray]] | None = None
        """What was described last, and the views of it: most of what comes lies where that before it lay."""

    @classmethod
    def create(cls, name: str) -> Segment:
        """An empty one of a new file. Raises OSError."""
        return cls(shared_file(name))

    def put(self, arrays: Arrays) -> Described:
        """Copy arrays here, in place of those before. Raises Unavailable where there is no memory for them."""
        found = packed(arrays)
        write(self.reaching(found.nbytes, grow=True), found, 0)
        return found.described

    def views(self, described: Described) -> dict[str, HostArray]:
        """The arrays, where they lie; strings are copied. Raises ValueError for what cannot lie there."""
        memory = self.reaching(max((offset + nbytes for _, _, offset, nbytes in described.values()), default=0))
        before = self._before
        if before is not None and before[1] is memory and before[0] == described:
            return dict(before[2])
        found = views(memory, places(described))
        is_all_there = not any(array.dtype.hasobject for array in found.values())  # strings are copies
        self._before = (described, memory, found) if is_all_there else None
        return dict(found)

    def close(self) -> None:
        """The memory is free once no array views it."""
        os.close(self.fd)
        self._map = self._before = None

    def reaching(self, end: int, grow: bool = False) -> mmap.mmap:
        """The memory up to `end`, where there is so much; with `grow` there is. Raises Unavailable."""
        if self._map is None or len(self._map) < end:
            if grow:
                before = 0 if self._map is None else len(self._map)
                size = max(1, -(-max(end, before + before // 4) // STEP)) * STEP
                try:
                    os.posix_fallocate(self.fd, before, size - before)
                except OSError as error:
                    raise Unavailable(f"{size:,} bytes of shared memory cannot be had: {error.strerror}") from None
            self._map = mmap.mmap(self.fd, 0)
        return self._map

    def empty(self, offset: int, nbytes: int) -> bool:
        """Let the system have the memory of these bytes, which nobody views; `refill` before they are used again.

        Returns whether it takes them: not every kernel does.
        """
        start, end = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and start < min(end, len(self._map)):
            try:
                self._map.madvise(mmap.MADV_REMOVE, start, min(end, len(self._map)) - start)
            except OSError:
                return False
        return True

    def refill(self, offset: int, nbytes: int) -> None:
        """Reserve memory for these bytes where they have none. Raises OSError."""
        os.posix_fallocate(self.fd, offset, nbytes)


def shared_file(name: str) -> int:
    """A descriptor of an empty file in memory, sealed against shrinking. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def write(memory: mmap.mmap, arrays: Packed, at: int) -> None:
    """Copy arrays to offset `at` and on."""
    for (_, _, offset, nbytes), part in zip(arrays.described.values(), arrays.parts, strict=True):
        start = at + offset
        if not isinstance(part, np.ndarray) or part.flags.c_contiguous:
            memory[start : start + nbytes] = part  # type: ignore[assignment]  # it takes what has a buffer
        elif nbytes:
            np.ndarray(part.shape, part.dtype, memory, start)[...] = part


def places(described: Described) -> Sequence[Place]:
    """What was described, checked. Raises ValueError for what cannot be."""
    found = []
    for name, (code, shape, offset, nbytes) in described.items():
        dtype, dims = dtype_of_onnx(code), tuple(shape)
        if offset < 0 or nbytes < 0 or not (dtype.hasobject or math.prod(dims) * dtype.itemsize == nbytes):
            raise ValueError(f"'{name}' is said to have {nbytes} bytes at {list(dims)} of {dtype}, from {offset} on")
        found.append(Place(name, dtype, dims, offset, nbytes))
    return found


def views(memory: Memory, found: Sequence[Place], at: int = 0) -> dict[str, HostArray]:
    """The arrays, where they lie from `at` on; strings are copied. Raises ValueError for what cannot lie there."""
    arrays = {}
    for name, dtype, dims, offset, nbytes in found:
        start = at + offset
        if start + nbytes > len(memory):
            raise ValueError(f"'{name}' is said to lie outside of the shared memory")
        if dtype.hasobject:
            arrays[name] = codec.from_bytes(bytes(memory[start : start + nbytes]), dtype, dims, name)
        else:
            arrays[name] = np.ndarray(dims, dtype, memory, start)
    return arrays
