"""Host memory that worker processes have mapped too."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from mmap import PAGESIZE
from typing import NamedTuple
from weakref import finalize

import numpy as np
from numpy.lib.array_utils import byte_bounds

from infera_gpu.devices.base import require_host_memory
from infera_gpu.graph import HostArray
from infera_gpu.spec import Array
from infera_kernels.cpu.aligned import LARGE_PAGE, SLAB_BYTES, Slabs, address, root_of
from infera_kernels.cpu.process import Mapping, Place

if sys.platform == "linux":
    from mmap import MADV_REMOVE
    from os import memfd_create
    from resource import RLIM_INFINITY, RLIMIT_FSIZE, getrlimit

    def memory_file() -> int:
        """One that may grow: what is freed in it counts for its size."""
        if getrlimit(RLIMIT_FSIZE)[0] != RLIM_INFINITY:
            raise OSError("the size of files is limited (ulimit -f)")
        return memfd_create("infera")

else:  # no file without a name: `SharedMemory` raises OSError, and nothing is shared
    MADV_REMOVE = 0

    def memory_file() -> int:
        raise OSError("no anonymous files on this system")


SLACK = 4096
"""Bytes behind what was asked for: kernels may look ahead."""


class _Block(NamedTuple):
    begin: int
    """Where in the file."""
    nbytes: int
    constant: bool


class SharedMemory:
    """Blocks of an anonymous file, each mapped as long as an array lies in it. Their pages go back with it.

    Those of 2 MiB and more lie on large pages, as far as they fill them, and are there from the start: the system looks
    for small ones as each is written to, and two processes that read weights there were hardly faster than one. See
    `Slabs`.

    The child of a fork has the parent's blocks, and needs memory of its own for others. It may read constants there,
    whose pages stay then for good, and leaves all else alone. Raises OSError where the system has no such files.
    """

    def __init__(self) -> None:
        self.file = memory_file()
        self._lock = threading.Lock()
        self._end = 0
        self._kept = 0
        self._blocks: dict[int, _Block] = {}
        """By address."""
        self._version = object()
        """Another one after every change of the blocks."""
        self._sorted: tuple[object, list[int]] = (None, [])
        """The version that was seen before their addresses were."""
        self._copies: dict[int, HostArray] = {}
        """Of memory elsewhere, by the identity of the array that owns it: two may be windows of one buffer."""
        self._process = os.getpid()

    def block(self, nbytes: int, *, constant: bool = False) -> HostArray:
        """Uninitialised memory that begins with a page. Raises OutOfMemoryError where there is not that much."""
        require_host_memory("the arena", nbytes)
        mapping, root = self._mapped(nbytes, constant)
        if nbytes >= LARGE_PAGE:
            mapping.enlarge(0, nbytes - nbytes % LARGE_PAGE)
        return root[:nbytes]

    def slab(self) -> tuple[Mapping, HostArray]:
        """A block of SLAB_BYTES for constants, without memory yet, and what gives it large pages."""
        mapping, root = self._mapped(SLAB_BYTES, constant=True)
        return mapping, root[:SLAB_BYTES]

    def _mapped(self, nbytes: int, constant: bool) -> tuple[Mapping, HostArray]:
        """A block of so many bytes, and some behind them, and what maps it."""
        size, first = -(-(nbytes + SLACK) // PAGESIZE) * PAGESIZE, LARGE_PAGE if nbytes >= LARGE_PAGE else PAGESIZE
        with self._lock:
            begin = -(-self._end // first) * first
            self._end = begin + size
            os.ftruncate(self.file, self._end)
        mapping = Mapping(self.file, size, begin)
        root: HostArray = np.asarray(mapping)
        at = address(root)
        self._blocks[at] = _Block(begin, size, constant)
        self._version = object()
        finalize(root, self._free, at, mapping).atexit = False
        return mapping, root

    def copy(self, array: HostArray, slabs: Slabs | None = None) -> HostArray:
        """The array, in one of the `slabs` or in a block of its own; as it is where it lies in a block."""
        if self.place_of(array) is not None:
            return array
        room = None if slabs is None else slabs.room(array.nbytes)
        if room is None:
            room = self.block(array.nbytes, constant=True)
        made: HostArray = np.ndarray(array.shape, array.dtype, room)
        np.copyto(made, array)
        made.flags.writeable = False
        return made

    def place_of(self, array: Array) -> Place | None:
        """Where the array's block begins in the file, the block's bytes and where in it the array begins."""
        at = address(array)
        version, found = self._sorted
        if version is not self._version:
            version = self._version
            found = sorted([*self._blocks])
            self._sorted = (version, found)
        i = bisect_right(found, at) - 1
        block = self._blocks.get(found[i]) if i >= 0 else None
        if block is None or at - found[i] >= block.nbytes:
            return None
        return block.begin, block.nbytes, at - found[i]

    def place_of_copy(self, array: HostArray) -> Place:
        """Where the array begins in a copy of all the memory that it is a window of, which never changes. The copy
        lives as long as that memory."""
        low, high = byte_bounds(array)
        root = root_of(array)
        at, end = byte_bounds(root)
        if not at <= low <= high <= end:
            raise ValueError("an array that lies outside of what it is a window of")
        found = self._copies.get(id(root))
        if found is None:
            copy = self.block(end - at, constant=True)
            np.copyto(copy, np.frombuffer(memoryview((ctypes.c_uint8 * (end - at)).from_address(at)), np.uint8))
            found = self._copies[id(root)] = copy
            finalize(root, self._copies.pop, id(root), None).atexit = False
        place = self.place_of(found)
        assert place is not None
        return place[0], place[1], place[2] + address(array) - at

    def keep(self) -> None:
        """The process is about to fork: the child may read the constants that are there."""
        self._kept = self._end

    def goes_back(self, array: Array) -> bool:
        """Whether the pages of the constants that the array begins go back with them: no other process has them."""
        return self._is_own(self._blocks[address(array)])

    def _is_own(self, block: _Block) -> bool:
        return self._process == os.getpid() and not (block.constant and block.begin < self._kept)

    def _free(self, at: int, mapping: Mapping) -> None:
        found = self._blocks.pop(at)
        self._version = object()
        if self._is_own(found):
            mapping.advise(MADV_REMOVE)


class SharedSlabs(Slabs):
    """`Slabs` in what `memory` gives, the pool's: in the child of a fork that is another one.

    Its parent begins a new slab too. What began before stays, for the child, also of what comes to lie there later.
    """

    def __init__(self, memory: Callable[[], SharedMemory | None]) -> None:
        super().__init__()
        self._memory = memory
        self._of: SharedMemory | None = None
        self._mapping: Mapping | None = None
        self._large = 0

    def slab(self) -> Array:
        self._of = self._memory()
        if self._of is None:
            raise MemoryError("no memory that processes share")
        self._mapping, found = self._of.slab()
        self._large = 0
        return found

    def fits(self, nbytes: int) -> bool:
        return super().fits(nbytes) and self._of is not None and self._of.goes_back(self._slab)

    def reached(self, end: int) -> Callable[[], object]:
        start, self._large = self._large, max(self._large, -(-end // LARGE_PAGE) * LARGE_PAGE)
        assert self._mapping is not None
        return partial(self._mapping.enlarge, start, self._large)
