"""Normalisations on NumPy: rows standardised in cache-sized blocks, sums as BLAS products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from infera_kernels.calls import SERIAL, Array, Call, Scratch, Split
from infera_kernels.cpu.elementwise import call, clamp, const
from infera_kernels.cpu.parts import parts
from infera_kernels.portable.norm import neighbours

BLOCK_BYTES = 1 << 18
"""A block of rows: it is read four times."""

ROW_NS = 0.8
"""Nanoseconds an element takes, about."""

NARROWEST = 64
"""Elements side by side that a tile has at least: inner loops are that long."""

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


def standardize_axis(
    x: Array,
    y: Array,
    scratch: Scratch,
    split: Split = SERIAL,
    *,
    epsilon: float,
    center: bool = True,
    scale: Array | None = None,
    bias: Array | None = None,
) -> list[Call]:
    """`standardize` along the middle axis of (outer, axis, inner), times scale plus bias, one of each a place on it."""
    share, one, shift = const(1 / x.shape[1], x), const(1, x), const(epsilon, x)
    columns = [None if a is None else a[:, None] for a in (scale, bias)]

    def part(tiles: Sequence[Tile]) -> list[Call]:
        most = max(x[tile].size for tile in tiles)
        squares, statistics = scratch((most,), x.dtype), scratch((most // x.shape[1],), x.dtype)
        calls: list[Call] = []
        for tile in tiles:
            source, target = x[tile], y[tile]
            square = squares[: source.size].reshape(source.shape)
            n = statistics[: source.size // x.shape[1]].reshape(len(source), 1, -1)
            if center:
                calls += [
                    (np.add.reduce, (source, 1, None, n, True)),
                    (np.multiply, (n, share, n)),
                    (np.subtract, (source, n, target)),
                ]
                source = target
            calls += [
                (np.multiply, (source, source, square)),
                (np.add.reduce, (square, 1, None, n, True)),
                (np.multiply, (n, share, n)),
                (np.add, (n, shift, n)),
                (np.sqrt, (n, n)),
                (np.true_divide, (one, n, n)),
                (np.multiply, (source, n, target)),
                *scaled(target, columns[0], columns[1]),
            ]
        return calls

    return _tiled(x, split, part)


def l2_normalize(
    x: Array,
    y: Array,
    scratch: Scratch,
    split: Split = SERIAL,
    *,
    epsilon: float,
    bound: Literal["max", "add"],
    squared: bool,
    finite: bool = False,
) -> list[Call]:
    """y = x / n along the middle axis of (outer, axis, inner), where n is the root of the sum of squares.

    With `bound` "max" n is at least `epsilon`, and where `finite` at most the largest number; with "add" it is greater
    by that; where `squared` the sum is, and not its root. `y` may be `x`.
    """
    low, high, one = (const(value, x) for value in (epsilon, np.finfo(x.dtype).max if finite else np.inf, 1))

    def part(tiles: Sequence[Tile]) -> list[Call]:
        most = max(x[tile].size for tile in tiles)
        norms = scratch((most // x.shape[1],), x.dtype)
        squares = scratch((most,), x.dtype) if x.shape[2] > 1 else None
        calls: list[Call] = []
        for tile in tiles:
            source = x[tile]
            n = norms[: source.size // x.shape[1]].reshape(len(source), 1, -1)
            if squares is None:
                row = source[:, :, 0]
                calls.append((np.vecdot, (row, row, n[:, 0, 0])))
            else:
                square = squares[: source.size].reshape(source.shape)
                calls += [(np.multiply, (source, source, square)), (np.add.reduce, (square, 1, None, n, True))]
            limit = clamp(n, low, high, n) if bound == "max" else call(np.add, n, low, n)
            root = call(np.sqrt, n, n)
            calls += [limit, root] if squared else [root, limit]
            calls += [call(np.true_divide, one, n, n), call(np.multiply, source, n, y[tile])]
        return calls

    return _tiled(x, split, part)


Tile: TypeAlias = tuple[slice, slice, slice]
"""An index into (outer, axis, inner) that takes the whole axis."""


def _tiled(x: Array, split: Split, part: Callable[[Sequence[Tile]], list[Call]]) -> list[Call]:
    """The calls of `part` for the tiles of (outer, axis, inner), spread over threads."""
    outer, length, inner = x.shape
    width = max(NARROWEST, BLOCK_BYTES // (length * x.itemsize))
    columns = [slice(j, min(j + width, inner)) for j in range(0, inner, width)]
    planes = row_blocks(slice(0, outer), length * min(width, inner) * x.itemsize)
    tiles = [(rows, slice(None), cut) for rows in planes for cut in columns]
    return split.parallel([part(tiles[cut]) for cut in parts(len(tiles), x.size * ROW_NS, split)])


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
