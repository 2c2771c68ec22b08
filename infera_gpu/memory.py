"""Where every intermediate lives: a pure function from lifetimes to offsets."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np

ALIGN = 256
"""Bytes. What cudaMalloc guarantees; enough for Triton's 16-byte loads, TMA descriptors and cuBLASLt."""

SLACK = 0.02
"""How far above the lower bound, as a part of it, an arena may be before a smaller one is searched for."""

EFFORT = 700_000
"""Pairs of values that searches for one arena may look at together. Those for most models end long before."""

ATTEMPT = 100_000
"""Pairs that one of them may look at before the next begins, which chooses differently.

How long a search takes is luck with a long tail, which restarts cut off (Gomes, Selman and Kautz, AAAI 1998).
"""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGN) * ALIGN


class Request(NamedTuple):
    """`nbytes` that are alive on steps [begin, end).

    The higher the `rank`, the lower the place: for values that later plans find in the arena, and plan around.
    """

    value: str
    nbytes: int
    begin: int
    end: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """Offsets of the requests in an arena of `nbytes`. `lower_bound` is the most bytes alive at one step."""

    nbytes: int
    offsets: Mapping[str, int]
    lower_bound: int


Taken: TypeAlias = tuple[int, int, int, int]
"""What is taken: [low, high) on steps [begin, end)."""


class _Arena:
    """The places that are taken. Most are for a few steps, and are found by the periods that these fall in."""

    PERIOD = 16
    """Steps."""

    FEW = 4
    """Periods in which a place is looked for under each of them."""

    def __init__(self) -> None:
        self._all: list[Taken] = []
        self._lasting: list[Taken] = []
        self._during: defaultdict[int, list[Taken]] = defaultdict(list)
        self.nbytes = 0

    def free_from(self, size: int, begin: int, end: int) -> int:
        """The lowest offset with `size` free bytes on steps [begin, end)."""
        periods = self._periods(begin, end)
        near = self._all
        if len(periods) <= self.FEW:
            near = [*self._lasting, *chain.from_iterable([self._during[p] for p in periods])]
        free = 0
        beside = [(low, high) for low, high, since, until in near if since < end and until > begin]
        beside.sort()
        for low, high in beside:
            if low - free >= size:
                break
            if high > free:
                free = high
        return free

    def take(self, low: int, size: int, begin: int, end: int) -> None:
        taken = (low, low + size, begin, end)
        self._all.append(taken)
        periods = self._periods(begin, end)
        for among in [self._during[p] for p in periods] if len(periods) <= self.FEW else [self._lasting]:
            among.append(taken)
        if self.nbytes < low + size:
            self.nbytes = low + size

    def _periods(self, begin: int, end: int) -> range:
        return range(begin // self.PERIOD, (end - 1) // self.PERIOD + 1)


class _Search:
    """Looks for offsets below a given top, by squeaky wheel optimisation (Joslin and Clements, JAIR 10, 1999).

    Values are placed one by one, each at its lowest free offset. One that would reach above the top moves forward in
    the order, to before one of the values that lie in its way, and placing goes on from there.
    """

    def __init__(self, requests: Sequence[Request], fixed: Mapping[str, int]) -> None:
        self._requests = requests
        self._sizes = [aligned(r.nbytes) for r in requests]
        self._fixed = [fixed.get(r.value, -1) for r in requests]
        self._begins = np.array([r.begin for r in requests])
        self._ends = np.array([r.end for r in requests])
        self._near: dict[int, list[int]] = {}

    def pairs(self) -> int:
        """The pairs of values that placing each of them once looks at."""
        count = len(self._requests)
        before = np.searchsorted(np.sort(self._ends), self._begins, "right")
        after = count - np.searchsorted(np.sort(self._begins), self._ends, "left")
        return int((count - before - after).sum()) + 10 * count

    def beside(self, i: int) -> list[int]:
        """The requests alive together with request i."""
        found = self._near.get(i)
        if found is None:
            r = self._requests[i]
            found = ((self._begins < r.end) & (self._ends > r.begin)).nonzero()[0].tolist()
            found.remove(i)
            self._near[i] = found
        return found

    def below(self, top: int, effort: int, seed: int) -> list[int] | None:
        """Offsets of all requests, or None where looking at `effort` pairs found none."""
        choose, sizes, lows = random.Random(seed), self._sizes, self._fixed.copy()
        order = [i for i, low in enumerate(lows) if low < 0]
        place = {i: k for k, i in enumerate(order)}
        k = 0
        while k < len(order):
            i = order[k]
            size, beside = sizes[i], self.beside(i)
            effort -= len(beside) + 10
            if effort < 0:
                return None
            free = 0
            for low, j in sorted([(lows[j], j) for j in beside if lows[j] >= 0]):
                if low - free >= size:
                    break
                free = max(free, low + sizes[j])
            if free + size <= top:
                lows[i] = free
                k += 1
                continue
            earlier = [place[j] for j in beside if place.get(j, k) < k]
            if not earlier:
                return None
            to = earlier[int(choose.random() * len(earlier))]
            for j in order[to:k]:
                lows[j] = -1
            order[to : k + 1] = [i, *order[to:k]]
            place.update(zip(order[to : k + 1], range(to, k + 1), strict=True))
            k = to
        return lows


def plan_arena(requests: Iterable[Request], fixed: Mapping[str, int] | None = None) -> ArenaPlan:
    """Greedy by size: the largest first, each at the lowest offset that is free for its whole lifetime.

    Pisarchyk and Lee, "Efficient memory management for deep neural net inference" (arXiv 2001.03288), algorithm 3.
    Where that is more than SLACK above the lower bound, a search follows for offsets that come closer.
    `fixed` gives the offsets of requests that lie in the arena already. The same requests get the same offsets.
    """
    fixed = fixed or {}
    wanted = [r for r in requests if r.nbytes > 0 and r.begin < r.end]
    wanted.sort(key=lambda r: (r.value not in fixed, -r.rank, -r.nbytes, r.begin, r.value))
    arena = _Arena()
    offsets: dict[str, int] = {}
    for r in wanted:
        size = aligned(r.nbytes)
        at = fixed[r.value] if r.value in fixed else arena.free_from(size, r.begin, r.end)
        arena.take(at, size, r.begin, r.end)
        offsets[r.value] = at
    bound = lower_bound(wanted)
    if arena.nbytes > (1 + SLACK) * bound:
        return _closer(wanted, fixed, ArenaPlan(arena.nbytes, offsets, bound))
    return ArenaPlan(arena.nbytes, offsets, bound)


def _closer(wanted: Sequence[Request], fixed: Mapping[str, int], plan: ArenaPlan) -> ArenaPlan:
    """A plan of fewer bytes, where a search finds one."""
    wanted = sorted(wanted, key=lambda r: (-r.nbytes * (r.end - r.begin), r.begin, r.value))
    search = _Search(wanted, fixed)
    lowest = max([plan.lower_bound, *(fixed[r.value] + aligned(r.nbytes) for r in wanted if r.value in fixed)])
    for seed, (top, effort) in enumerate(_tries(search, lowest, plan.nbytes)):
        lows = search.below(min(top, plan.nbytes - 1), effort, seed)
        if lows is not None:
            nbytes = max(low + aligned(r.nbytes) for low, r in zip(lows, wanted, strict=True))
            return ArenaPlan(nbytes, {r.value: low for low, r in zip(lows, wanted, strict=True)}, plan.lower_bound)
    return plan


def _tries(search: _Search, lowest: int, most: int) -> Iterator[tuple[int, int]]:
    """Below which top to search, and how many pairs the search may look at: until within SLACK, then half the way."""
    part, effort, left = SLACK / 2, max(ATTEMPT, 4 * search.pairs()), EFFORT
    while left > 0:
        yield int((1 + part) * lowest), min(effort, left)
        part, left = SLACK, left - effort
    yield (lowest + most) // 2, ATTEMPT


def lower_bound(requests: Iterable[Request]) -> int:
    """The most (aligned) bytes alive at one step: no arena can be smaller."""
    return crowded(requests)[0]


def crowded(requests: Iterable[Request]) -> tuple[int, int]:
    """The most (aligned) bytes alive at one step, and the first such step."""
    changes: dict[int, int] = {}
    for r in requests:
        nbytes = aligned(r.nbytes)
        changes[r.begin] = changes.get(r.begin, 0) + nbytes
        changes[r.end] = changes.get(r.end, 0) - nbytes
    alive = most = at = 0
    for step in sorted(changes):
        alive += changes[step]
        if alive > most:
            most, at = alive, step
    return most, at
