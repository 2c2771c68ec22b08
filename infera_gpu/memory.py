"""Where every intermediate lives: a pure function from lifetimes to offsets."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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


@dataclass(order=True, slots=True)
class _Placed:
    low: int
    high: int
    begin: int = field(compare=False)
    end: int = field(compare=False)


def plan_arena(requests: Iterable[Request], fixed: Mapping[str, int] | None = None) -> ArenaPlan:
    """Greedy by size: the largest first, each at the lowest offset that is free for its whole lifetime.

    Pisarchyk and Lee, "Efficient memory management for deep neural net inference" (arXiv 2001.03288), algorithm 3.
    `fixed` gives the offsets of requests that lie in the arena already.
    """
    fixed = fixed or {}
    wanted = [r for r in requests if r.nbytes > 0 and r.begin < r.end]
    wanted.sort(key=lambda r: (r.value not in fixed, -r.nbytes, r.begin, r.value))
    placed: list[_Placed] = []
    offsets: dict[str, int] = {}
    for r in wanted:
        size = aligned(r.nbytes)
        at = fixed.get(r.value, 0)
        if r.value not in fixed:
            for p in placed:
                if r.begin < p.end and p.begin < r.end:
                    if at + size <= p.low:
                        break
                    at = max(at, p.high)
        insort(placed, _Placed(at, at + size, r.begin, r.end))
        offsets[r.value] = at
    return ArenaPlan(max((p.high for p in placed), default=0), offsets, lower_bound(wanted))


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
