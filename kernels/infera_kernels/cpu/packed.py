"""Products with weights that are laid out once for OpenBLAS' inner loops, where its version is known.

np.matmul has the whole right-hand matrix laid out anew in every call: a good part of the time beside a hundred rows,
most of it beside a few.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np

from infera_kernels.calls import SERIAL, Array, Call, Scratch, Split
from infera_kernels.cpu.aligned import LINE, address, aligned
from infera_kernels.cpu.blas import Inner, openblas
from infera_kernels.cpu.elementwise import call, const, contiguous, copy
from infera_kernels.cpu.matmul import FEW_ROWS, UNPACKED, Piece, epilogue, pieces, rows_of
from infera_kernels.record import Record

DEPTH, WIDTH = 256, 384
"""Rows and columns of the weights that are multiplied at a time: they stay in a second-level cache of 512 KiB while
the rows go by."""

SLACK = 1024
"""Elements behind what is laid out, which is a part of large buffers where OpenBLAS calls its own loops: they may look
ahead."""

MOST_ROWS = 512
"""Beside more rows it costs little to lay weights out anew, which need not be in memory twice then."""


@cache
def inner() -> Inner | None:
    """OpenBLAS' inner loops, tried out; None where NumPy calls another BLAS or a version that is not known."""
    found = openblas()
    loops = None if found is None else found.inner()
    return loops if loops is not None and _agree(loops) else None


def _agree(loops: Inner) -> bool:
    """Whether a product of theirs is np.matmul's: of two depths, odd sizes, and cut between columns."""
    m, k, n = 29, DEPTH + 9, 3 * LINE + 7
    a = np.cos(np.arange(m * k, dtype=np.float32)).reshape(m, k)
    w = np.cos(np.arange(k * n, dtype=np.float32) * 3).reshape(k, n)
    y, weights = np.zeros((m, n), np.float32), pack(w, loops)
    for part in (slice(0, LINE), slice(LINE, n)):
        multiply, _ = _product(Piece(a, weights, y[:, part], -1, part), weights, aligned, loops, 1.0)
        multiply()
    return bool(np.allclose(y, a @ w, rtol=0, atol=1e-3))


def _depths(k: int) -> list[int]:
    """Where ranges of `k` rows of weights begin and end: of one depth but for the last, and never within a line."""
    count = -(-k // DEPTH)
    step = -(-k // (count * LINE)) * LINE
    return [*range(0, k, step), k]


def pack(w: Array, loops: Inner) -> Array:
    """The weights (K, N) of `fused`, float32 in any layout: as many elements in an order of OpenBLAS' own.

    A range of columns at a time: rows of all of them would be spread over as many pages as there are panels.
    """
    w = np.ascontiguousarray(w)
    k, n = w.shape
    made = aligned((k, n), slack=4 * SLACK)
    source, target, item = address(w), address(made), w.itemsize
    for start, stop in pairwise(_depths(k)):
        depth = stop - start
        for left in range(0, n, WIDTH):
            rows, panels = source + (start * n + left) * item, target + (start * n + left * depth) * item
            loops.pack_weight(depth, min(WIDTH, n - left), rows, n, panels)
    return made


def loops_for(out: Array, depth: int, most_rows: int = MOST_ROWS) -> Inner | None:
    """For `fused`, where it takes `out` and is made for a product of its size; None elsewhere."""
    y = rows_of(out)
    if y is None or y.dtype != np.float32 or y.strides[1] != y.itemsize:
        return None
    return inner() if FEW_ROWS < len(y) <= most_rows and y.size * depth > UNPACKED else None


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


class _Bound(Record):
    """Calls by address, and the arrays that they point into."""

    calls: Sequence[Call]
    kept: Sequence[Array]

    def __call__(self) -> None:
        for fn, args in self.calls:
            fn(*args)


def _product(p: Piece, weights: Array, scratch: Scratch, loops: Inner, alpha: float) -> Call:
    """p.out += alpha p.a @ w, at p's columns of the weights w."""
    a, y = rows_of(p.a), rows_of(p.out)
    assert a is not None
    assert y is not None
    rows = scratch((len(a) * min(a.shape[1], DEPTH) + SLACK,), np.float32)
    first = (p.part.start or 0) if p.axis == -1 else 0
    return _Bound(tuple(_steps(a, weights, first, y, rows, loops, alpha)), (a, weights, y, rows)), ()


def _steps(a: Array, weights: Array, first: int, y: Array, rows: Array, loops: Inner, alpha: float) -> Iterator[Call]:
    (m, k), (_, n), columns, item = a.shape, weights.shape, y.shape[1], a.itemsize
    factor, room, count = ctypes.c_float(alpha), ctypes.c_void_p(address(rows)), _size(m)
    lda, ldy = (_size(x.strides[0] // item) for x in (a, y))
    source, target, packed = map(address, (a, y, weights))
    for start, stop in pairwise(_depths(k)):
        depth = _size(stop - start)
        yield loops.pack_rows, (depth, count, ctypes.c_void_p(source + start * item), lda, room)
        for left in range(0, columns, WIDTH):
            at = ctypes.c_void_p(packed + (start * n + (first + left) * (stop - start)) * item)
            result = ctypes.c_void_p(target + left * item)
            width = _size(min(WIDTH, columns - left))
            yield loops.multiply, (width, count, depth, factor, at, room, result, ldy)


@cache
def _size(value: int) -> ctypes.c_ssize_t:
    return ctypes.c_ssize_t(value)
