"""3x3 convolution by Winograd's minimal filtering, channels last; see `conv_winograd` for its matrices.

Both transforms are separable: one product for each axis of a tile. Filters of taps d apart see d x d images, one for
each phase of the pixels, that have nothing in common: these are convolved like the images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import groupby, pairwise
from itertools import product as pairs
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_kernels.calls import Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.aligned import aligned
from infera_kernels.cpu.blas import Inner
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.conv_planes import Pair
from infera_kernels.cpu.conv_winograd import transform_filters, transforms
from infera_kernels.cpu.nhwc_epilogue import epilogue
from infera_kernels.cpu.nhwc_product import product, slice_of
from infera_kernels.cpu.nhwc_rows import Window, images, in_parts, is_slice, longest, moved, spans
from infera_kernels.cpu.packed import added, depths
from infera_kernels.cpu.packed import pack as pack_weights
from infera_kernels.cpu.packed import room as inner_room

BLOCK_BYTES = 1 << 20
"""Transformed tiles of one block."""

BLOCK_TILES = 98
"""Tiles of one block, even where they are larger: the weights come from memory anew for each."""

LAID_OUT = 1 << 23
"""Multiply-adds of a product from which OpenBLAS' own loops are faster than its products of operands as they lie."""

MANY_FILTERS = 1 << 15
"""Input channels times output channels from which filters count as many; see `tile_of`."""

ENOUGH_TILES = 16
"""Tiles that are worth laying out many filters."""

DIRECT_TILES = 32
"""Tiles below which windows are better multiplied by weights that are laid out once."""


CHEAP = frozenset({"relu", "clip"})
"""Activations that cost little."""


class Image(NamedTuple):
    """One image, or one phase of it: views (H, W, C) and (OH, OW, O), and the padding above and left."""

    x: Array
    y: Array
    residual: Array | None
    before: Pair


def tile_of(
    w: tuple[int, ...], images: int, out: Pair, strides: Pair, dilations: Pair, group: int, *, direct: bool = False
) -> int:
    """The output tile that pays at this shape, 0 for none. `direct`: where it does not, weights are laid out once.

    Many filters need many tiles: with few rows BLAS spends a product on laying out its other operand.
    """
    smallest = min(-(-n // d) for n, d in zip(out, dilations, strict=True))
    if tuple(w[2:]) != (3, 3) or strides != (1, 1) or group != 1 or min(w[:2]) < 8:
        return 0
    if smallest < (7 if dilations == (1, 1) else 14):
        return 0
    four, two = (images * math.prod(-(-n // tile) for n in out) for tile in (4, 2))
    many = w[0] * w[1] >= MANY_FILTERS
    if direct and (two if many else four) < DIRECT_TILES:
        return 0
    if not many or four >= (DIRECT_TILES if direct else ENOUGH_TILES):
        return 4
    return 2 if two >= ENOUGH_TILES else 0


@cache
def _matrices(tile: int, dtype: np.dtype[Any]) -> tuple[Array, Array, Array]:
    """(B^T, A^T, A^T with a column of ones) of `transforms`."""
    data, _, out = (m.astype(dtype) for m in transforms(tile))
    return data, out, np.hstack([out, np.ones((tile, 1), dtype)])


def phases(x: Array, y: Array, residual: Array | None, window: Window) -> Iterator[Image]:
    """The images of a batch, apart by the phases of a dilated convolution."""
    for i, down, right in pairs(range(x.shape[0]), *map(range, window.dilations)):
        (top, first), (left, second) = (
            divmod(phase - before, dilation)
            for phase, before, dilation in zip((down, right), window.before, window.dilations, strict=True)
        )
        to = slice(down, None, window.dilations[0]), slice(right, None, window.dilations[1])
        at = slice(first, None, window.dilations[0]), slice(second, None, window.dilations[1])
        if y[i][to].size:
            rest = None if residual is None else residual[i][to]
            yield Image(x[i][at], y[i][to], rest, (-top, -left))


def finishes_early(activation: Activation | None, with_residual: bool) -> bool:
    """Whether what follows the sums may be done to all pixels of the tiles, some of which are left out then."""
    return not with_residual and (activation is None or activation[0] in CHEAP)


def winograd(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split,
    pack: Pack,
    tile: int,
    window: Window,
    *,
    loops: Inner | None,
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual) with w (O, C, 3, 3), stride 1; see `conv2d`."""
    c, o = x.shape[3], y.shape[3]
    size = tile + 2
    data, out, with_bias = _matrices(tile, x.dtype)
    jobs = list(phases(x, y, residual, window))
    down, across = (-(-n // tile) for n in jobs[0].y.shape[:2])
    tiles = Window((down, across), (size, size), (tile, tile), (1, 1), (0, 0))
    most = max(BLOCK_BYTES // (size * size * across * max(c, o) * x.itemsize), -(-BLOCK_TILES // across))
    together = min(most, -(-len(jobs) * down // split.threads)) * across
    by_address = loops if together * c * o >= LAID_OUT else None
    columns = slice_of(together, c, o) if by_address is None else o

    def matrices(w: Array) -> Array:
        """(tile's elements, O / columns, C, columns)"""
        made = (aligned if by_address is None else np.empty)((size * size, o // columns, c, columns), w.dtype)
        transform_filters(w.swapaxes(0, 1), tile, made.swapaxes(1, 2))
        return made if by_address is None else pack_weights(made, by_address)

    early = finishes_early(activation, residual is not None) and is_slice(y)
    filters = pack(f"winograd{tile} {columns if by_address is None else 'inner'}", matrices)

    def part(start: int, stop: int) -> Iterator[Call]:
        step = longest(start, stop, most)
        # `half` has one more element a column: the bias, which the last product adds.
        once, finish = epilogue(activation, None, step * tile * across * tile, o, y, scratch)
        halved = scratch((tiles.seen(0, min(step, down)), size, across * c), x.dtype)
        one, two = (scratch((size * size * step * across * max(c, o),), x.dtype) for _ in range(2))
        space = None if by_address is None else inner_room(step * across, c, scratch)
        half = scratch((tile, size + 1, step * across * o), x.dtype)
        biases = half[:, size].reshape(tile, -1, o)

        def shaped(space: Array, *shape: int) -> Array:
            return space[: math.prod(shape)].reshape(shape)

        gathered = shaped(two, *halved.shape)  # before there are sums

        def calls() -> Iterator[Call]:
            yield from once
            yield np.copyto, (biases, half.dtype.type(0) if b is None else b)
            for first, last in spans(start, stop, step):
                h = last - first
                spectrum = shaped(one, size, size, h, across * c)
                for i, row, end, at in images(first, last, down):
                    rows = tiles.seen(0, end - row)
                    seen = gathered[:rows].reshape(rows, size, across, c)
                    yield from _gather(jobs[i].x, row * tile - jobs[i].before[0], jobs[i].before[1], tile, seen)
                    yield from _transform(gathered[:rows], data, halved[:rows], spectrum[:, :, at], tile)
                sums = shaped(two, size * size, h * across, o)
                if by_address is None or space is None:
                    yield from product(spectrum.reshape(size * size, -1, c), filters, sums)
                else:
                    yield from _by_address(spectrum.reshape(size * size, -1, c), filters, sums, space, by_address)
                rows_done = half[:, :, : h * across * o]
                pixels = shaped(one, tile, tile, h * across * o)
                sums = sums.reshape(size, size, -1)
                yield np.matmul, (out, sums.transpose(1, 0, 2), rows_done[:, :size].transpose(1, 0, 2))
                yield np.matmul, (with_bias, rows_done, pixels)
                if early:
                    yield from finish(pixels.reshape(-1, o), None)
                made = pixels.reshape(tile, tile, h, across, o)
                for i, row, end, at in images(first, last, down):
                    image, rows_made = jobs[i], slice(row * tile, end * tile)
                    block = image.y[rows_made]
                    if image.residual is None:
                        yield from _scatter(made[:, :, at], block)
                        if not early:
                            yield from finish(block, None)
                    else:  # which may lie there
                        aside = shaped(two, *block.shape)
                        yield from _scatter(made[:, :, at], aside)
                        yield from finish(aside, image.residual[rows_made], block)

        return calls()

    return in_parts(len(jobs) * down, split, part)


def _by_address(x: Array, filters: Array, sums: Array, space: Array, loops: Inner) -> Iterator[Call]:
    """sums (tile's elements, tiles, O) = x (tile's elements, tiles, C) @ filters, which are laid out for `loops`."""
    yield np.copyto, (sums, sums.dtype.type(0))
    for matrix, (weights,), total in zip(x, filters, sums, strict=True):
        yield added(
            [[matrix[:, start:stop]] for start, stop in pairwise(depths(x.shape[2]))], weights, total, space, loops
        )


def _gather(x: Array, top: int, left: int, tile: int, seen: Array) -> list[Call]:
    """seen (rows, size, across, C) = what tiles see of an image x (H, W, C) from row `top` on, zeros outside of it.

    The first tile begins `left` columns before the image. Columns that the same tiles find within it are one copy.
    """
    rows, size, across, _ = seen.shape
    (height, width), zero = x.shape[:2], x.dtype.type(0)
    inside = slice(min(rows, max(0, -top)), max(0, min(rows, height - top)))
    outside = [seen[: inside.start], seen[max(inside.start, inside.stop) :]]
    found: list[Call] = []
    for (first, last), group in groupby(range(size), lambda e: _within(left - e, width + left - e, tile, across)):
        column, *others = group
        target = seen[inside, column : column + len(others) + 1]
        outside += [target[:, :, :first], target[:, :, last:]]
        if (part := target[:, :, first:last]).size:
            corner = x[top + inside.start :, column + first * tile - left :]
            down, right, one = x.strides
            found.append(moved(part, as_strided(corner, part.shape, (down, right, tile * right, one), writeable=False)))
    return [*((np.copyto, (part, zero)) for part in outside if part.size), *found]


def _within(start: int, end: int, tile: int, across: int) -> Pair:
    """[first, last) of `across` numbers whose multiples of `tile` lie in [start, end)."""
    first = min(across, max(0, -(-start // tile)))
    return first, max(first, min(across, -(-end // tile)))


def _transform(gathered: Array, data: Array, halved: Array, spectrum: Array, tile: int) -> list[Call]:
    """What tiles see, (rows, size, across * C), transformed, into spectrum (size, size, tile rows, across * C)."""
    size, _, h, line = spectrum.shape
    below, column, one = halved.strides
    seen = as_strided(halved, (h, size, size, line), (tile * below, column, below, one), writeable=False)
    return [
        (np.matmul, (data, gathered, halved)),
        (np.matmul, (data, seen, spectrum.transpose(2, 1, 0, 3))),
    ]


def _scatter(made: Array, y: Array) -> list[Call]:
    """The pixels of tiles (tile, tile, rows, across, O) to their places in y (OH, OW, O)."""
    calls: list[Call] = []
    for rows, down in _whole_and_cut(y.shape[0], made.shape[0]):
        for cols, right in _whole_and_cut(y.shape[1], made.shape[1]):
            target = y[rows.start * made.shape[0] :, cols.start * made.shape[1] :]
            target = target[: (rows.stop - rows.start) * down, : (cols.stop - cols.start) * right]
            target = target.reshape(-1, down, target.shape[1] // right, right, y.shape[2], copy=False)
            calls.append(moved(target, made[:down, :right, rows, cols].transpose(2, 0, 3, 1, 4)))
    return calls


def _whole_and_cut(size: int, tile: int) -> Iterator[tuple[slice, int]]:
    """(tiles, their length): the whole tiles of an axis, and the one that its end cuts."""
    whole, rest = divmod(size, tile)
    if whole:
        yield slice(0, whole), tile
    if rest:
        yield slice(whole, whole + 1), rest
