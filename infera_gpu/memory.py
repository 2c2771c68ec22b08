"""Where every intermediate lives: a pure function from lifetimes to offsets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

ALIGN = 256
"""Bytes. What cudaMalloc guarantees; enough for Triton's 16-byte loads, TMA descriptors and cuBLASLt."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class Request:
    """`nbytes` that are alive on steps [begin, end)."""

    value: str
    nbytes: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """Offsets of the requests in an arena of `nbytes`. `lower_bound` is the most bytes alive at one step."""

    nbytes: int
    offsets: Mapping[str, int]
    lower_bound: int


class _Arena:
    """The places that are taken, by offset: columns low, high, begin, end."""

    def __init__(self, most: int, nbytes: int) -> None:
        self._rows = np.zeros((4, most), np.int64 if nbytes < 1 << 62 else object)
        self._count = 0

    def free_from(self, size: int, begin: int, end: int) -> int:
        """The lowest offset with `size` free bytes on steps [begin, end)."""
        low, high, since, until = self._rows[:, : self._count]
        beside = (since < end) & (until > begin)
        starts = np.concatenate(([0], np.maximum.accumulate(high[beside])))
        fits = starts[:-1] + size <= low[beside]
        return int(starts[fits.argmax() if fits.any() else -1])

    def take(self, low: int, size: int, begin: int, end: int) -> None:
        at = int(np.searchsorted(self._rows[0, : self._count], low))
        self._rows[:, at + 1 : self._count + 1] = self._rows[:, at : self._count].copy()
        self._rows[:, at] = low, low + size, begin, end
        self._count += 1

    @property
    def nbytes(self) -> int:
        return int(self._rows[1].max(initial=0))


def plan_arena(requests: Iterable[Request], fixed: Mapping[str, int] | None = None) -> ArenaPlan:
    """Greedy by size: the largest first, each at the lowest offset that is free for its whole lifetime.

    Pisarchyk and Lee, "Efficient memory management for deep neural net inference" (arXiv 2001.03288), algorithm 3.
    `fixed` gives the offsets of requests that lie in the arena already.
    """
    fixed = fixed or {}
    wanted = [r for r in requests if r.nbytes > 0 and r.begin < r.end]
    wanted.sort(key=lambda r: (r.value not in fixed, -r.nbytes, r.begin, r.value))
    arena = _Arena(len(wanted), sum(aligned(r.nbytes) for r in wanted) + max(fixed.values(), default=0))
    offsets: dict[str, int] = {}
    for r in wanted:
        size = aligned(r.nbytes)
        at = fixed[r.value] if r.value in fixed else arena.free_from(size, r.begin, r.end)
        arena.take(at, size, r.begin, r.end)
        offsets[r.value] = at
    return ArenaPlan(arena.nbytes, offsets, lower_bound(wanted))


def lower_bound(requests: Iterable[Request]) -> int:
    """The most (aligned) bytes alive at one step: no arena can be smaller."""
    changes: dict[int, int] = {}
    for r in requests:
        changes[r.begin] = changes.get(r.begin, 0) + aligned(r.nbytes)
        changes[r.end] = changes.get(r.end, 0) - aligned(r.nbytes)
    alive = most = 0
    for step in sorted(changes):
        alive += changes[step]
        most = max(most, alive)
    return most
