"""Memory for results, used again when the caller has let go of it: fresh pages cost more than copying to old ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.spec import DType

LARGE = 1 << 17
"""Bytes of a result from which the allocator asks the system for fresh pages."""

KEPT = 1 << 28
"""Bytes that wait to be used again, at most."""


class _Block(np.ndarray[Any, np.dtype[Any]]):
    """Memory. A class of its own: NumPy leaves views in between out where their base has the new view's class."""


class _Lent(np.ndarray[Any, np.dtype[Any]]):
    """What a result and all views of it lie in. It goes with the last of them, and its memory goes back."""

    results: Results | None = None

    def __del__(self) -> None:
        if self.results is not None and self.base is not None:
            self.results.take_back(self.base)


class Results:
    """Gives out arrays. Any thread may ask, and let go: deques are changed in one step, without a lock, since a
    finaliser may run anywhere."""

    def __init__(self) -> None:
        self._free: dict[int, deque[_Block]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that wait to be used again."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def empty(self, shape: Sequence[int], dtype: DType, nbytes: int) -> HostArray:
        """An uninitialised array of `nbytes`. Small ones, and arrays of objects, are as NumPy makes them."""
        if nbytes < LARGE or dtype.hasobject:
            return np.empty(shape, dtype)
        size = _rounded(nbytes)
        try:
            raw = self._free[size].pop()
        except (KeyError, IndexError):
            raw = _Block((size,), np.uint8)
        lent = raw.view(_Lent)
        lent.results = self
        return np.ndarray(tuple(shape), dtype, lent)

    def take_back(self, raw: Any) -> None:
        if self.nbytes + raw.nbytes <= KEPT:
            self._free.setdefault(raw.nbytes, deque()).append(raw)

    def clear(self) -> None:
        """Free what waits."""
        self._free = {}


def _rounded(nbytes: int) -> int:
    """Up to an eighth more, so that results of similar sizes share memory."""
    step = 1 << max(nbytes.bit_length() - 4, 0)
    return -(-nbytes // step) * step


RESULTS = Results()
"""Of all sessions of the process."""
