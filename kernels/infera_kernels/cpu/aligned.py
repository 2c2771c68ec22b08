"""Where arrays begin, and the memory of those that last."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from infera_kernels.calls import Array

LINE = 64
"""Bytes of a cache line. A vector of AVX-512 that lies in two of them is read twice."""

LARGE_PAGE = 1 << 21
"""Bytes of a large page, of x86-64 and of most 64-bit ARM systems."""

SLAB_BYTES = 1 << 26
"""Of addresses. Memory it becomes page by page, as arrays come to lie there."""

SLAB_LEAST, SLAB_MOST = 1 << 18, 1 << 24
"""Bytes of an array that lies in a slab, or of smaller ones together, beyond which others do: a small model needs no
large page. Larger ones come to lie on large pages in any case, as NumPy asks for them, but for their ends, and may lie
where weights were that are no more."""


def _nothing() -> None: ...


class Slabs:
    """Memory for arrays that live about as long as each other, one behind the other in blocks of large pages.

    On pages of 4 KiB the processor finds out anew every few lines where the next ones lie, on a virtual machine in two
    steps. NumPy asks for large pages for arrays of 4 MiB and more, but memory that has been used before keeps the pages
    it has. A block's memory goes back when the last array in it is let go of.
    """

    def __init__(self) -> None:
        self._slab: Array = np.empty(0, np.uint8)
        self._at = 0
        self._small = 0
        self._lock = threading.Lock()  # one thread may plan while another binds

    def room(self, nbytes: int, slack: int = 0) -> Array | None:
        """What `take` gives for an array of so many bytes, and some behind it; None where it is none for a slab, or
        where addresses are scarce: it may have a place alone."""
        self._small += nbytes
        if self._small >= SLAB_LEAST and nbytes <= SLAB_MOST:
            with suppress(MemoryError):
                return self.take(nbytes + slack)
        return None

    def take(self, nbytes: int) -> Array:
        """So many bytes, at most SLAB_BYTES, which begin with a cache line. Raises MemoryError."""
        with self._lock:
            if not self.fits(nbytes):
                self._slab, self._at = self.slab(), 0
            slab, start = self._slab, self._at
            self._at += -(-nbytes // LINE) * LINE
            prepare = self.reached(start + nbytes)
        prepare()
        return slab[start : start + nbytes]

    def slab(self) -> Array:
        """SLAB_BYTES that begin with a large page. Raises MemoryError."""
        return begun(SLAB_BYTES, LARGE_PAGE)

    def fits(self, nbytes: int) -> bool:
        """Whether the slab at hand has room for so many bytes more."""
        return self._at + nbytes <= len(self._slab)

    def reached(self, end: int) -> Callable[[], object]:
        """The first `end` bytes of the slab at hand are about to be used: what is to be done before, without a lock."""
        return _nothing


class _Current(threading.local):
    slabs: Slabs | None = None


_current = _Current()


@contextmanager
def within(slabs: Slabs | None) -> Iterator[None]:
    """This thread's calls of `aligned` find room in `slabs`; with None none does."""
    before, _current.slabs = _current.slabs, slabs
    try:
        yield
    finally:
        _current.slabs = before


def address(x: Array) -> int:
    """Of its first element."""
    return int(x.__array_interface__["data"][0])


def root_of(array: Array) -> Array:
    """The outermost array that it is a window of."""
    root, base = array, array.base
    while base is not None:
        if isinstance(base, np.ndarray):
            root = base
        base = getattr(base, "base", None)  # what `as_strided` puts in between is no array
    return root


def begun(nbytes: int, page: int) -> Array:
    """So many uninitialised bytes, which begin with a page, or a line, of so many."""
    raw = np.empty(nbytes + page, np.uint8)
    skip = -address(raw) % page
    return raw[skip : skip + nbytes]


def aligned(shape: Sequence[int], dtype: Any = np.float32, slack: int = 0) -> Array:
    """An uninitialised array that begins with a cache line, with `slack` bytes behind it. NumPy aligns to 16 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if _current.slabs is not None and (room := _current.slabs.room(size, slack)) is not None:
        return np.ndarray(shape, dtype, room)
    return np.ndarray(shape, dtype, begun(size + slack, LINE))
