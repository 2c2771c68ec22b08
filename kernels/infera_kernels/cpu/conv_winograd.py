"""3x3 convolution by Winograd's minimal filtering, F(2x2, 3x3) and F(4x4, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308. The two transforms of a tile are
written as one matrix each (the Kronecker square of the one-dimensional transform), so that they too are GEMMs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from infera_kernels.calls import Array, Call, Pack, Scratch
from infera_kernels.cpu.conv_epilogue import Activation, epilogue
from infera_kernels.cpu.conv_planes import Pair, planes

BLOCK_BYTES = 1 << 20
"""Gathered tiles and their transforms of one block of tile rows."""

FILTERS = 256
"""Filters transformed at a time: their float64 transforms stay in the cache."""

_POINTS: dict[int, tuple[tuple[int, ...], int]] = {2: ((0, 1, -1), 1), 4: ((0, 2, -2, 4, -4), 3)}
"""Interpolation points by output tile, as numerators and their denominator (infinity is added). Those of 4 round three
times better than 0, 1, -1, 2, -2."""


@cache
def transforms(tile: int) -> tuple[Array, Array, Array]:
    """(B^T of the data, G of the filter, A^T of the output) of F(tile, 3) in float64, by the Cook-Toom construction.

    Every element is a quotient of two integers, rounded once.
    """
    points, below = _POINTS[tile]
    size = tile + 2

    def powers(count: int) -> list[list[float]]:
        return [[p**k / below**k for k in range(count)] for p in points] + [[0.0] * (count - 1) + [1.0]]

    def vanishing_at(roots: Sequence[int]) -> list[float]:
        """The coefficients of the product of x - root / below, that of 1 first."""
        polynomial = [1]
        for root in roots:
            shifted = zip([0, *polynomial], [*polynomial, 0], strict=True)
            polynomial = [below * low - root * high for low, high in shifted]
        return [c / below ** len(roots) for c in polynomial] + [0.0] * (size - len(polynomial))

    others = [[q for q in points if q != p] for p in points]
    data = [*map(vanishing_at, others), vanishing_at(points)]
    scales = [(below ** len(rest), math.prod(p - q for q in rest)) for p, rest in zip(points, others, strict=True)]
    taps = [[s * p**k / (t * below**k) for k in range(3)] for p, (s, t) in zip(points, scales, strict=True)]
    return np.array(data), np.array([*taps, [0.0, 0.0, 1.0]]), np.array(powers(tile)).T


@cache
def _squared(tile: int) -> Array:
    """What makes (tile's elements,) of a filter's 9 taps."""
    taps = transforms(tile)[1]
    return np.kron(taps, taps)


def tile_of(w: Sequence[int], out: Sequence[int], strides: Pair, dilations: Pair, group: int) -> int:
    """The output tile that pays at this shape, 0 for none."""
    if tuple(w[2:]) != (3, 3) or strides != (1, 1) or dilations != (1, 1) or group != 1 or min(w[:2]) < 16:
        return 0
    smallest = min(out)
    return 4 if smallest >= 28 else 2 if smallest >= 10 else 0


def winograd(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    pack: Pack,
    tile: int,
    *,
    pads: tuple[Pair, Pair],
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual) with w (O, C, 3, 3), stride 1; see `conv2d`."""
    n, c = x.shape[:2]
    o, height, width = y.shape[1:]
    size = tile + 2
    data, _, out = transforms(tile)
    data, out = np.kron(data, data).astype(x.dtype), np.kron(out, out).astype(x.dtype)

    def transformed(w: Array) -> Array:
        return transform_filters(w, tile, np.empty((size * size, o, c), w.dtype))

    filters = pack(f"winograd{tile}", transformed)
    down, across = -(-height // tile), -(-width // tile)
    padded = planes(
        scratch, c, (down, across), (size, size), x.dtype, strides=(tile, tile), dilations=(1, 1),
        before=(pads[0][0], pads[1][0]),
    )  # fmt: skip
    row_bytes = size * size * across * max(c, o) * x.itemsize
    blocks = max(1, -(-down * row_bytes // max(BLOCK_BYTES, row_bytes)))
    step = -(-down // blocks)
    most = size * size * step * across * max(c, o)
    one, two = scratch((most,), x.dtype), scratch((most,), x.dtype)
    column = None if b is None else b.reshape(o, 1, 1)
    calls, finish = epilogue(activation, y[0].size, y.dtype, scratch)
    calls.append(padded.clear())
    for i in range(n):
        calls += padded.load(x[i])
        for start in range(0, down, step):
            rows = slice(start, min(start + step, down))
            tiles = (rows.stop - start) * across

            def matrix(room: Array, count: int, channels: int, tiles: int = tiles) -> Array:
                return room[: count * channels * tiles].reshape(count, channels, tiles)

            gathered, spectrum = matrix(one, size * size, c), matrix(two, size * size, c)
            grid = gathered.reshape(size, size, c, rows.stop - start, across)
            calls += [
                (np.copyto, (grid[a, e], padded.tap(a, e, rows, across))) for a in range(size) for e in range(size)
            ]
            calls.append((np.matmul, (data, gathered.reshape(size * size, -1), spectrum.reshape(size * size, -1))))
            sums, pixels = matrix(one, size * size, o), matrix(two, tile * tile, o)
            calls.append((np.matmul, (filters, spectrum, sums)))
            calls.append((np.matmul, (out, sums.reshape(size * size, -1), pixels.reshape(tile * tile, -1))))
            band = slice(start * tile, min(rows.stop * tile, height))
            block = y[i, :, band]
            made = pixels.reshape(tile, tile, o, rows.stop - start, across)
            for a in range(tile):
                for e in range(tile):
                    target = block[:, a::tile, e::tile]
                    source = made[a, e, :, : target.shape[1], : target.shape[2]]
                    calls.append(
                        (np.copyto, (target, source)) if column is None else (np.add, (source, column, target))
                    )
            calls += finish(block, None, None if residual is None else residual[i, :, band])
    return calls


def transform_filters(w: Array, tile: int, made: Array) -> Array:
    """made (tile's elements, O, C) = G w G^T of w (O, C, 3, 3), in float64, rounded once. C may be several axes."""
    matrix = _squared(tile)
    step = max(1, FILTERS // w.shape[1])
    wide, products = (np.empty(n * min(step, len(w)) * w.shape[1]) for n in (9, len(matrix)))
    for start in range(0, len(w), step):
        part = w[start : start + step].reshape(-1, 9)
        columns, product = (space[: n * len(part)].reshape(n, -1) for space, n in ((wide, 9), (products, len(matrix))))
        np.copyto(columns, part.T)
        np.matmul(matrix, columns, product)
        target = made[:, start : start + step]
        np.copyto(target, product.reshape(target.shape))
    return made
