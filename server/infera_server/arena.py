"""Blocks of shared memory: one process takes and writes them, the other reads them where they lie."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from functools import lru_cache

import numpy as np

from infera_server.errors import Unavailable
from infera_server.rows import HostArray
from infera_server.segment import ALIGNMENT, Segment


class Blocks(Segment):
    """The writer's end: blocks by their offsets, of at most `limit` bytes altogether.

    A block that is given back is taken again for one of its size. Only where none is left and the limit is reached are
    free neighbours joined.
    """

    def __init__(self, fd: int, limit: int) -> None:
        super().__init__(fd)
        self._limit = limit
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._sizes: dict[int, int] = {}

    @property
    def taken(self) -> int:
        """Blocks that were not given back."""
        return len(self._sizes)

    def take(self, nbytes: int) -> int:
        """The offset of a block of so many bytes. Raises Unavailable where the limit leaves no room."""
        size = _rounded(nbytes)
        if free := self._free.get(size):
            offset = free.pop()
        elif (found := self._beyond(size)) is not None or (found := self._joined(size)) is not None:
            offset = found
        else:
            raise Unavailable(f"{nbytes:,} bytes of shared memory cannot be had: {self._limit:,} are there")
        self._sizes[offset] = size
        return offset

    def give_back(self, offset: int) -> None:
        """The block is nobody's any more."""
        self._free[self._sizes.pop(offset)].append(offset)

    def _beyond(self, size: int) -> int | None:
        """A block after all others, where the limit allows it."""
        if self._end + size > self._limit:
            return None
        offset, self._end = self._end, self._end + size
        return offset

    def _joined(self, size: int) -> int | None:
        """A block cut from free neighbours; None where they are too small."""
        spans: list[tuple[int, int]] = []
        for start, length in sorted((offset, size) for size, offsets in self._free.items() for offset in offsets):
            if spans and sum(spans[-1]) == start:
                start, length = spans[-1][0], spans.pop()[1] + length
            spans.append((start, length))
        if spans and sum(spans[-1]) == self._end:
            self._end = spans.pop()[0]
        large = [span for span in spans if span[1] >= size]
        found = self._beyond(size)
        if found is None and large:
            spans.remove(span := min(large, key=lambda span: span[1]))
            found = span[0]
            if span[1] > size:
                spans.append((found + size, span[1] - size))
        self._free.clear()
        for start, length in spans:
            self._free[length].append(start)
        return found


@lru_cache
def _rounded(nbytes: int) -> int:
    """One of few sizes: less than a quarter more, and a multiple of `ALIGNMENT`."""
    step = max(ALIGNMENT, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return max(step, -(-nbytes // step) * step)


class _Block(weakref.ref[HostArray]):
    """Knows when nothing views a block any more."""

    __slots__ = ("offset",)
    offset: int


class Lent(Segment):
    """The reader's end. A block that nothing views any more is in `returned`, where any thread may put it."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.returned: deque[int] = deque()
        self._lent: dict[int, _Block] = {}
        self._callback = self._over

    def block(self, offset: int, nbytes: int) -> HostArray:
        """The bytes of a block, until nothing views them. Raises ValueError where there is none."""
        memory = self.reaching(offset + nbytes)
        if offset < 0 or offset + nbytes > len(memory):
            raise ValueError(f"{nbytes} bytes at {offset} lie outside of the shared memory")
        array: HostArray = np.ndarray((nbytes,), np.uint8, memory, offset)
        block = self._lent[offset] = _Block(array, self._callback)
        block.offset = offset
        return array

    def _over(self, block: weakref.ref[HostArray]) -> None:
        assert isinstance(block, _Block)
        del self._lent[block.offset]
        self.returned.append(block.offset)
