"""Normalisations on NumPy: rows standardised in cache-sized blocks, sums as BLAS products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from infera_kernels.calls import SERIAL, Array, Call, Scratch, Split
from infera_kernels.cpu.elementwise import clamp, const
from infera_kernels.cpu.parts import parts
from infera_kernels.portable.norm import neighbours

BLOCK_BYTES = 1 << 18
"""A block of rows: it is read four times."""

ROW_NS = 0.8
"""Nanoseconds an element takes, about."""

Finish = Callable[[slice], list[Call]]
"""What follows the standardised rows of a block, in place."""


def standardize(
    x: Array,
    y: Array,
    scratch: Scratch,
    split: Split = SERIAL,
    *,
    epsilon: float,
    center: bool = True,
    mean: Array | None = None,
    inverse: Array | None = None,
    every: int = 1,
    finish: Finish = lambda rows: [],
) -> list[Call]:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + epsilon) along the rows of x (R, L); `y` may be `x`.

    Without `center` the mean is 0. `mean` and `inverse` (R,) receive the statistics. Parts and blocks are multiples of
    `every` rows.
    """
    count, length = x.shape
    weights = scratch((length,), x.dtype) if center else None
    means = (scratch((count,), x.dtype) if mean is None else mean) if center else None
    inverses = scratch((count,), x.dtype) if inverse is None else inverse
    share, one, shift = const(1 / length, x), const(1, x), const(epsilon, x)
    once: list[Call] = [] if weights is None else [(np.copyto, (weights, share))]

    def block(rows: slice) -> list[Call]:
        source, target, inv = x[rows], y[rows], inverses[rows]
        calls: list[Call] = []
        if means is not None:
            calls.append((np.matmul, (source, weights, means[rows])))
            calls.append((np.subtract, (source, means[rows, None], target)))
            source = target
        return [
            *calls,
            (np.vecdot, (source, source, inv)),
            (np.multiply, (inv, share, inv)),
            (np.add, (inv, shift, inv)),
            (np.sqrt, (inv, inv)),
            (np.true_divide, (one, inv, inv)),
            (np.multiply, (source, inv[:, None], target)),
            *finish(rows),
        ]

    cuts = parts(count, x.size * ROW_NS, split, multiple=every)
    return once + split.parallel(
        [[c for rows in row_blocks(cut, length * x.itemsize, every) for c in block(rows)] for cut in cuts]
    )


def row_blocks(part: slice, nbytes: int, every: int = 1) -> Iterator[slice]:
    """Slices of a range of rows of `nbytes` each, a block at a time."""
    step = max(1, BLOCK_BYTES // max(1, nbytes * every)) * every
    for start in range(part.start, part.stop, step):
        yield slice(start, min(start + step, part.stop))


def l2_normalize(
    x: Array,
    y: Array,
    scratch: Scratch,
    split: Split = SERIAL,
    *,
    epsilon: float,
    bound: Literal["max", "add"],
    squared: bool,
) -> list[Call]:
    """y = x / n along the middle axis of (outer, axis, inner), where n is the root of the sum of squares.

    With `bound` "max" n is at least `epsilon`, with "add" it is greater by that; where `squared` the sum is, and not
    its root. `y` may be `x`.
    """
    cuts = parts(x.shape[0], x.size * ROW_NS, split)
    how = _Bound(epsilon, bound, squared)
    return split.parallel([_unit_rows(x[cut], y[cut], scratch, how) for cut in cuts])


class _Bound(NamedTuple):
    epsilon: float
    kind: Literal["max", "add"]
    squared: bool

    def calls(self, n: Array) -> list[Call]:
        """n becomes the inverse of the bounded root of n."""
        low, high, one = (const(value, n) for value in (self.epsilon, np.inf, 1))
        root: Call = (np.sqrt, (n, n))
        limit: Call = clamp(n, low, high, n) if self.kind == "max" else (np.add, (n, low, n))
        return [*((limit, root) if self.squared else (root, limit)), (np.true_divide, (one, n, n))]


def _unit_rows(x: Array, y: Array, scratch: Scratch, bound: _Bound) -> list[Call]:
    outer, length, inner = x.shape
    spans = list(row_blocks(slice(0, outer), length * inner * x.itemsize))
    rows = spans[0].stop if spans else 0
    norms = scratch((rows, 1, inner), x.dtype)
    squares = scratch((rows, length, inner), x.dtype) if inner > 1 else None
    calls: list[Call] = []
    for span in spans:
        source, n = x[span], norms[: span.stop - span.start]
        if squares is None:
            row = source[:, :, 0]
            calls.append((np.vecdot, (row, row, n[:, 0, 0])))
        else:
            square = squares[: len(n)]
            calls += [(np.multiply, (source, source, square)), (np.add.reduce, (square, 1, None, n, True))]
        calls += [*bound.calls(n), (np.multiply, (source, n, y[span]))]
    return calls


def scaled(y: Array, scale: Array | None, bias: Array | None) -> list[Call]:
    """y = y * scale + bias in place, both broadcast."""
    calls: list[Call] = []
    if scale is not None:
        calls.append((np.multiply, (y, scale, y)))
    if bias is not None:
        calls.append((np.add, (y, bias, y)))
    return calls


def batch_norm(
    x: Array, scale: Array, bias: Array, mean: Array, variance: Array, y: Array, scratch: Scratch, *, epsilon: float
) -> list[Call]:
    """y = (x - mean) / sqrt(variance + epsilon) * scale + bias; the four broadcast to x, and `y` may be `x`."""
    factor, offset = scratch(scale.shape, y.dtype), scratch(scale.shape, y.dtype)
    return [
        (np.add, (variance, const(epsilon, y), factor)),
        (np.sqrt, (factor, factor)),
        (np.true_divide, (scale, factor, factor)),
        (np.multiply, (mean, factor, offset)),
        (np.subtract, (bias, offset, offset)),
        (np.multiply, (x, factor, y)),
        (np.add, (y, offset, y)),
    ]


def local_response(
    x: Array, y: Array, scratch: Scratch, *, size: int, alpha: float, beta: float, bias: float
) -> list[Call]:
    """y = x / (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta, (N, C, *spatial)."""
    channels = x.shape[1]
    squares, sums = scratch(x.shape[1:], x.dtype), scratch(x.shape[1:], x.dtype)
    calls: list[Call] = []
    for source, target in zip(x, y, strict=True):
        calls += [(np.multiply, (source, source, squares)), (np.copyto, (sums, squares))]
        for shift in neighbours(size, channels):
            low, high = max(0, -shift), min(channels, channels - shift)
            if shift:
                part = sums[low:high]
                calls.append((np.add, (part, squares[low + shift : high + shift], part)))
        calls += [
            (np.multiply, (sums, const(alpha / size, x), sums)),
            (np.add, (sums, const(bias, x), sums)),
            (np.power, (sums, const(-beta, x), sums)),
            (np.multiply, (source, sums, target)),
        ]
    return calls
