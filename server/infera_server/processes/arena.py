"""Blocks of shared memory: one process takes and writes them, the other reads them where they lie."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from functools import lru_cache

import numpy as np

from infera_server.errors import Overloaded
from infera_server.processes.segment import ALIGNMENT, Described, Segment, described
from infera_server.scheduling.rows import Arrays, HostArray

RETRY_AFTER = 0.1
"""Seconds after which a request is worth another try that found no memory."""


KEPT, LARGE = 64 << 20, 1 << 20
"""Bytes of free blocks that keep their memory, for the next ones; large blocks beyond give it back to the system."""


class _View(weakref.ref[HostArray]):
    """Knows when nothing views a block any more."""

    __slots__ = ("key", "offset")
    key: int
    offset: int


class _Watched(Segment):
    """A block that nothing views any more is in `returned`, where any thread may put it."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.returned: deque[int] = deque()
        self._views: dict[int, _View] = {}
        self._callback = self._over

    def _viewed(self, offset: int, nbytes: int, grow: bool = False) -> HostArray:
        """The bytes of a block, until nothing views them. Raises ValueError where there is none."""
        memory = self.reaching(offset + nbytes, grow)
        if offset < 0 or offset + nbytes > len(memory):
            raise ValueError(f"{nbytes} bytes at {offset} lie outside of the shared memory")
        array: HostArray = np.ndarray((nbytes,), np.uint8, memory, offset)
        view = _View(array, self._callback)
        view.key, view.offset = id(array), offset
        self._views[view.key] = view
        return array

    def _over(self, view: weakref.ref[HostArray]) -> None:
        assert isinstance(view, _View)
        del self._views[view.key]
        self.returned.append(view.offset)


class Lent(_Watched):
    """The reader's end."""

    def block(self, offset: int, nbytes: int) -> HostArray:
        """The bytes of a block, which is in `returned` once nothing views them. Raises ValueError."""
        return self._viewed(offset, nbytes)


class Blocks(_Watched):
    """The writer's end: blocks by their offsets, of at most `limit` bytes altogether, each held by one or several.

    A block that nobody holds is taken again for one of its size. Only where none is left and the limit is reached are
    free neighbours joined. The memory of large ones that are free goes back to the system, but for some that is kept.
    """

    def __init__(self, fd: int, limit: int) -> None:
        super().__init__(fd)
        self._limit = limit
        self._end = self._reached = 0
        self._given = self._idle = 0
        self._hollow: set[int] = set()
        """Free blocks that may have no memory."""

        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._sizes: dict[int, int] = {}
        self._shared: dict[int, int] = {}

    @property
    def taken(self) -> int:
        """Blocks that somebody holds."""
        return len(self._sizes)

    def take(self, nbytes: int) -> int:
        """The offset of a block of so many bytes. Raises Overloaded where the limit leaves no room."""
        size = _rounded(nbytes)
        if free := self._free.get(size):
            offset = free.pop()
            if offset not in self._hollow:
                self._idle -= size
        elif (found := self._beyond(size)) is not None or (found := self._joined(size)) is not None:
            offset = found
        else:
            raise Overloaded(f"{nbytes:,} bytes of shared memory are not free, of {self._limit:,}", RETRY_AFTER)
        if offset in self._hollow:
            try:
                self.refill(offset, size)
            except OSError as error:
                self._free[size].append(offset)
                raise Overloaded(f"{nbytes:,} bytes of memory cannot be had: {error.strerror}", RETRY_AFTER) from None
            self._hollow.discard(offset)
        self._sizes[offset] = size
        return offset

    def hold(self, offset: int) -> None:
        """Somebody else holds a block too."""
        self._shared[offset] = self._shared.get(offset, 0) + 1

    def give_back(self, offset: int) -> None:
        """One that held a block does no more."""
        if (others := self._shared.pop(offset, 0)) == 0:
            self._free[size := self._sizes.pop(offset)].append(offset)
            if size >= LARGE and self._idle + size > KEPT and self.empty(offset, size):
                self._hollow.add(offset)
            else:
                self._idle += size
        elif others > 1:
            self._shared[offset] = others - 1

    def array(self, nbytes: int) -> HostArray:
        """Memory to write to, held by whatever views it: at most half of all. Raises Overloaded or Unavailable."""
        if self._given + nbytes > self._limit // 2:
            raise Overloaded(f"{nbytes:,} bytes of shared memory are not free for bodies", RETRY_AFTER)
        offset = self.take(nbytes)
        try:
            array = self._viewed(offset, nbytes, grow=True)
        except BaseException:
            self.give_back(offset)
            raise
        self._given += self._sizes[offset]
        return array

    def collect(self) -> None:
        """Have again what `array` gave and nothing views any more."""
        while self.returned:
            offset = self.returned.popleft()
            self._given -= self._sizes[offset]
            self.give_back(offset)

    def lying_in(self, arrays: Arrays) -> tuple[int, int, Described]:
        """The arrays that lie in one block that `array` gave: its offset, its size, and where; else size 0."""
        found: dict[str, tuple[int, list[int], int, int]] = {}
        owner: HostArray | None = None
        for name, array in arrays.items() if self._views else ():
            base = _owner(array)
            if (
                base is not None
                and id(base) in self._views
                and (owner is None or owner is base)
                and array.flags.c_contiguous
            ):
                owner = base
                found[name] = described(array, array.ctypes.data - base.ctypes.data)
        if owner is None:
            return 0, 0, found
        return self._views[id(owner)].offset, owner.nbytes, found

    def _beyond(self, size: int) -> int | None:
        """A block after all others, where the limit allows it."""
        if self._end + size > self._limit:
            return None
        offset, self._end = self._end, self._end + size
        if offset < self._reached:
            self._hollow.add(offset)
        self._reached = max(self._reached, self._end)
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
        self._hollow = {start for start, _ in spans} | ({found} if found is not None else set())  # or parts of them
        self._idle = 0
        return found


@lru_cache
def _rounded(nbytes: int) -> int:
    """One of few sizes: less than a quarter more, and a multiple of `ALIGNMENT`."""
    step = max(ALIGNMENT, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return max(step, -(-nbytes // step) * step)


def _owner(array: HostArray) -> HostArray | None:
    """The array whose memory this one views, also through a memoryview."""
    owner: object = array
    while True:
        below = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
        if not isinstance(below, np.ndarray | memoryview):
            return owner if isinstance(owner, np.ndarray) else None
        owner = below
