"""Products with weights that are laid out once for OpenBLAS' inner loops, where its version is known.

np.matmul has the whole right-hand matrix laid out anew in every call: a good part of the time beside a hundred rows,
most of it beside a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from infera_kernels.calls import SERIAL, Array, Call, Scratch, Split
from infera_kernels.cpu.aligned import LINE, address, aligned
from infera_kernels.cpu.blas import ADDRESS, FACTOR, SIZE, Argument, Inner, inner_loops
from infera_kernels.cpu.elementwise import call, const, contiguous, copy
from infera_kernels.cpu.matmul import FEW_ROWS, UNPACKED, Piece, epilogue, pieces, rows_of

DEPTH, WIDTH = 256, 384
"""Rows and columns of the weights that are multiplied at a time: they stay in a second-level cache of 512 KiB while
the rows go by."""

PANEL = 4
"""Rows of a panel of what is multiplied with weights: rows in whole panels lie one behind the other."""

SLACK = 1024
"""Elements behind what is laid out, which is a part of large buffers where OpenBLAS calls its own loops: they may look
ahead."""

MOST_ROWS = 512
"""Beside more rows it costs little to lay weights out anew, which need not be in memory twice then."""


Arguments: TypeAlias = tuple[Argument, ...]


@cache
def inner() -> Inner | None:
    """OpenBLAS' inner loops, tried out; None where there are none of a version that is known."""
    loops = inner_loops()
    return loops if loops is not None and _agree(loops) else None


def _agree(loops: Inner) -> bool:
    """Whether a product of theirs is np.matmul's: of two depths, odd sizes, and cut between columns and rows.

    Of small integers, whose sums are exact in any order. A process pays for it in its first run.
    """
    m, k, n = 3 * PANEL + 1, DEPTH + 9, LINE + 7
    numbers = (np.arange(509) ** 3 % 509 % 17 - 8).astype(np.float32)  # a prime number: no two lines are the same
    a, w = np.resize(numbers, (m, k)), np.resize(numbers[::-1], (k, n))
    y, weights = np.zeros((m, n), np.float32), pack(w, loops)
    ranges = [[a[: 2 * PANEL, start:stop], a[2 * PANEL :, start:stop]] for start, stop in pairwise(depths(k))]
    for first, last in ((0, LINE), (LINE, n)):
        multiply, _ = added(ranges, weights, y[:, first:last], room(m, k, aligned), loops, first=first)
        multiply()
    return np.array_equal(y, a @ w)


def depths(k: int, runs: int = 1) -> list[int]:
    """Where ranges of `k` rows of weights begin and end: of one depth but for the last, and never within a line.

    With `runs` these are the ranges of so many parts of equal length.
    """
    length = k // runs
    count = -(-length // DEPTH)
    step = -(-length // (count * LINE)) * LINE
    return [*(run + at for run in range(0, k, length) for at in range(0, length, step)), k]


def pack(w: Array, loops: Inner, runs: int = 1) -> Array:
    """The weights (..., K, N) of `fused`, or of `added` in so many `runs`, float32 in any layout: as many elements of
    each matrix in an order of OpenBLAS' own.

    A range of columns at a time: rows of all of them would be spread over as many pages as there are panels.
    """
    w = np.ascontiguousarray(w)
    *_, k, n = w.shape
    made = aligned(w.shape, slack=4 * SLACK)
    item = w.itemsize
    for matrix in range(0, w.size, k * n):
        source, target = address(w) + matrix * item, address(made) + matrix * item
        for start, stop in pairwise(depths(k, runs)):
            depth = stop - start
            for left in range(0, n, WIDTH):
                rows, panels = source + (start * n + left) * item, target + (start * n + left * depth) * item
                loops.pack_weight(_size(depth), _size(min(WIDTH, n - left)), ADDRESS(rows), _size(n), ADDRESS(panels))
    return made


def copied(packed: Array) -> Array:
    """What a kernel packed once more; it may be `pack`'s."""
    made = aligned(packed.shape, packed.dtype, slack=4 * SLACK)
    made[...] = packed
    return made


def loops_for(out: Array, depth: int) -> Inner | None:
    """For `fused`, where it takes `out` and is made for a product of its size; None elsewhere."""
    y = rows_of(out)
    if y is None or y.dtype != np.float32 or y.strides[1] != y.itemsize:
        return None
    return inner() if FEW_ROWS < len(y) <= MOST_ROWS and y.size * depth > UNPACKED else None


def fused(
    a: Array,
    weights: Array,
    out: Array,
    scratch: Scratch,
    split: Split = SERIAL,
    *,
    loops: Inner,
    alpha: float = 1.0,
    bias: Array | None = None,
    activation: str = "",
    residual: Array | None = None,
) -> list[Call]:
    """`matmul.fused` of a (..., M, K) and a matrix (K, N), of which `weights` is `pack`'s; all of float32.

    `out` suits. What is added before the activation is there first, and the product is added to it.
    """
    rows = rows_of(a)
    if rows is None or rows.strides[1] != a.itemsize or rows.strides[0] < rows.shape[1] * a.itemsize:
        a, calls = contiguous(a, scratch)
    else:
        calls = []
    first, last = (None, residual) if activation else (residual, None)
    return [
        *calls,
        *split.parallel(
            [
                [
                    *_sum(p.out, p.of(bias), p.of(first)),
                    _product(p, weights, scratch, loops, alpha),
                    *epilogue(p.out, scratch, activation=activation, residual=p.of(last)),
                ]
                for p in pieces(a, weights, out, split, activation)
            ]
        ),
    ]


def _sum(y: Array, *terms: Array | None) -> list[Call]:
    """y = the sum of up to two terms, which broadcast to it."""
    given = [t for t in terms if t is not None]
    if len(given) > 1:
        return [call(np.add, *given, y)]
    return [copy(y, given[0] if given else const(0, y))]


class _Bound:
    """`added`: calls by address. The arrays that they point into are kept, and tell another process what to do."""

    sendable = True
    """To another process: see `process`."""

    __slots__ = ("_loops", "_operands", "_ranges")
    # Plain tuples of what garbage collection does not look at: it passes by them, and there are thousands.

    def __init__(self, loops: Inner, ranges: Sequence[Sequence[Array]], *rest: Any) -> None:
        self._loops, self._operands = loops, (tuple(map(tuple, ranges)), *rest)
        self._ranges = tuple(_arguments(*self._operands))

    def __call__(self) -> None:
        pack_rows, multiply = self._loops.pack_rows, self._loops.multiply
        for packed, multiplied in self._ranges:
            for args in packed:
                pack_rows(*args)
            for args in multiplied:
                multiply(*args)

    def __reduce__(self) -> tuple[Callable[..., _Bound], tuple[Any, ...]]:
        return _elsewhere, self._operands


def _elsewhere(
    ranges: Sequence[Sequence[Array]], weights: Array, y: Array, room: Array, alpha: float, first: int
) -> _Bound:
    """What was bound in another process. Raises ValueError where it cannot be bound here, or reaches too far."""
    loops = inner()
    if loops is None or not (y.flags.writeable and room.flags.writeable):
        raise ValueError("no inner loops here, or no memory that both processes may write to")
    if not _suits(ranges, weights, y, room, first):
        raise ValueError("arrays that do not suit each other")
    return _Bound(loops, ranges, weights, y, room, alpha, first)


def _suits(ranges: Sequence[Sequence[Array]], weights: Array, y: Array, room: Array, first: int) -> bool:
    """Whether `added` stays within these arrays, as their shapes and strides say where they end."""
    pieces = [x for rows in ranges for x in rows]
    matrices = [y, weights, *pieces]
    if any(a.dtype != np.float32 or a.strides[-1:] != (a.itemsize,) for a in [*matrices, room]):
        return False
    if not all(a.ndim == 2 and a.strides[0] % a.itemsize == 0 and a.strides[0] >= 0 for a in matrices):
        return False
    (m, columns), (k, n) = y.shape, weights.shape
    depths = [{x.shape[1] for x in rows} for rows in ranges]
    return (
        bool(ranges)
        and all(len(depth) == 1 for depth in depths)
        and all(sum(map(len, rows)) == m for rows in ranges)
        and sum(map(sum, depths)) <= k
        and 0 <= first <= n - columns
        and weights.flags.c_contiguous
        and m * max(map(max, depths)) + SLACK <= room.size
    )


_elsewhere.sendable = True  # type: ignore[attr-defined]


def _product(p: Piece, weights: Array, scratch: Scratch, loops: Inner, alpha: float) -> Call:
    """p.out += alpha p.a @ w, at p's columns of the weights w."""
    a, y = rows_of(p.a), rows_of(p.out)
    assert a is not None
    assert y is not None
    first = (p.part.start or 0) if p.axis == -1 else 0
    ranges = [[a[:, start:stop]] for start, stop in pairwise(depths(a.shape[1]))]
    return added(ranges, weights, y, room(len(y), a.shape[1], scratch), loops, alpha=alpha, first=first)


def room(rows: int, depth: int, scratch: Scratch) -> Array:
    """What `added` lays out so many rows in."""
    return scratch((rows * min(depth, DEPTH) + SLACK,), np.float32)


def added(
    ranges: Sequence[Sequence[Array]],
    weights: Array,
    y: Array,
    room: Array,
    loops: Inner,
    *,
    alpha: float = 1.0,
    first: int = 0,
) -> Call:
    """y (M, N) += alpha x @ w at the columns of w from `first` on, where `weights` is `pack`'s of w.

    `ranges` has x for each of `depths`, (rows, depth) of any distance between rows: in pieces, of which all but the
    last are of whole PANELs and which have M rows together.
    """
    return _Bound(loops, ranges, weights, y, room, alpha, first), ()


def _arguments(
    ranges: Sequence[Sequence[Array]], weights: Array, y: Array, room: Array, alpha: float, first: int
) -> Iterator[tuple[tuple[Arguments, ...], tuple[Arguments, ...]]]:
    """Of each range, those of the calls of `pack_rows` and then of `multiply`."""
    (m, columns), n, item = y.shape, weights.shape[1], y.itemsize
    factor, begin, count, ldy = FACTOR(alpha), ADDRESS(address(room)), _size(m), _line(y)
    target, packed, start = address(y), address(weights), 0
    for rows in ranges:
        depth = _size(rows[0].shape[1])
        pieces, at = [], address(room)
        for x in rows:
            pieces.append((depth, _size(len(x)), ADDRESS(address(x)), _line(x), ADDRESS(at)))
            at += x.size * item
        products = []
        for left in range(0, columns, WIDTH):
            source = ADDRESS(packed + (start * n + (first + left) * rows[0].shape[1]) * item)
            result, width = ADDRESS(target + left * item), _size(min(WIDTH, columns - left))
            products.append((width, count, depth, factor, source, begin, result, ldy))
        yield tuple(pieces), tuple(products)
        start += rows[0].shape[1]


def _line(x: Array) -> Argument:
    """Elements from one row to the next."""
    return _size(x.strides[0] // x.itemsize)


@lru_cache(4096)
def _size(value: int) -> Argument:
    return SIZE(value)
