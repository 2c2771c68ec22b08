"""Cutting a kernel's work into parts that run at the same time.

Measured with two threads on two cores (AVX-512, NumPy 2.4, Python 3.11): to enter and leave a region costs the caller
6 us, and 10 us where a worker has to be woken. A part that calls NumPy often is slowed down by the interpreter's lock,
which each call takes again: at 3 us a call two threads are no faster than one, at 10 us they are 1.7 times as fast.
"""

from __future__ import annotations

from itertools import pairwise

from infera_kernels.calls import Array, Split

LEAST_NS = 90_000
"""Nanoseconds of work below which a part is not worth a thread of its own, by whole models: with 25,000 those of many
small steps took longer with two threads than with one."""


def parts(count: int, ns: float, split: Split, *, multiple: int = 1) -> list[slice]:
    """Slices of nearly equal size that cover range(count), which is `ns` nanoseconds of work for one thread.

    There are as many as threads, or fewer where there is less to do, and at least one. All but the last are multiples
    of `multiple`.
    """
    units = -(-count // multiple)
    number = max(1, min(split.threads, units, int(ns // LEAST_NS)))
    edges = [min(count, units * i // number * multiple) for i in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def spans(count: int, number: int) -> list[tuple[int, int]]:
    """[0, count) in at most so many ranges of nearly equal length, none of them empty."""
    edges = [count * i // number for i in range(number + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if stop > start]


def worth(ns: float, split: Split) -> Split:
    """`split`, with no more threads than `ns` nanoseconds of work are worth."""
    return split._replace(threads=max(1, min(split.threads, int(ns // LEAST_NS))))


def along(x: Array, axis: int, part: slice) -> Array:
    """The part of `x` along `axis`, which is counted from the end; all of it where it broadcasts along that axis."""
    if x.ndim < -axis or x.shape[axis] == 1:
        return x
    return x[(..., part, *(slice(None),) * (-axis - 1))]
