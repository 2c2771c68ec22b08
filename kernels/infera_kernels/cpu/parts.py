"""Cutting a kernel's work into parts that run at the same time.

A part must be worth what it costs: the caller enters and leaves a region, and a worker may have to be woken. One that
calls NumPy often is slowed down by the interpreter's lock besides, which each call takes again.
"""

from __future__ import annotations

from itertools import pairwise

from infera_kernels.calls import Array, Split


def parts(count: int, ns: float, split: Split, *, multiple: int = 1) -> list[slice]:
    """Slices of nearly equal size that cover range(count), which is `ns` nanoseconds of work for one thread.

    There are as many as threads, or fewer where there is less to do, and at least one. All but the last are multiples
    of `multiple`.
    """
    units = -(-count // multiple)
    number = max(1, min(split.threads, units, int(ns // split.least_ns)))
    edges = [min(count, units * i // number * multiple) for i in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def spans(count: int, number: int) -> list[tuple[int, int]]:
    """[0, count) in at most so many ranges of nearly equal length, none of them empty."""
    edges = [count * i // number for i in range(number + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if stop > start]


def worth(ns: float, split: Split) -> Split:
    """`split`, with no more threads than `ns` nanoseconds of work are worth."""
    threads = max(1, min(split.threads, int(ns // split.least_ns)))
    return split if threads == split.threads else split._replace(threads=threads)


def along(x: Array, axis: int, part: slice) -> Array:
    """The part of `x` along `axis`, which is counted from the end; all of it where it broadcasts along that axis."""
    if x.ndim < -axis or x.shape[axis] == 1:
        return x
    return x[(..., part, *(slice(None),) * (-axis - 1))]
