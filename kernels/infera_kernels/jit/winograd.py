"""3x3 convolution, channels last, by Winograd's minimal filtering F(4x4, 3x3) (arXiv 1509.09308).

A tile's transforms work on vectors of channels, all 36 values of a tile in registers and on the stack; the products are
`gemm`'s, with a packed weight for each of the 36.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.conv_winograd import transforms
from infera_kernels.jit.compiling import bound_by_address, compiled
from infera_kernels.jit.functions import F
from infera_kernels.jit.gemm import multiply, pack_each
from infera_kernels.jit.microkernel import I64, TILE, VECTOR, address_of, clamp, load, multiply_add, spread

OUT, SIZE = 4, 6
BLOCK_BYTES = (1 << 20, 1 << 23)
"""Least and most of transforms and products at a time."""

DATA, _, RESULT = transforms(OUT)


def _combined(builder: Any, matrix: Array, values: list[Any]) -> list[Any]:
    """The matrix times a column of vectors, zeros left out."""
    made = []
    for row in matrix:
        total = None
        for factor, value in zip(row.tolist(), values, strict=True):
            if factor == 0:
                continue
            constant = ir.Constant(VECTOR, [factor] * TILE.lanes)
            if total is None:
                total = value if factor == 1 else builder.fmul(constant, value)
            elif factor == 1:
                total = builder.fadd(total, value)
            else:
                total = multiply_add(builder, constant, value, total)
        made.append(total)
    return made


def _both(builder: Any, matrix: Array, grid: list[list[Any]]) -> list[list[Any]]:
    """M g M^T of a grid of vectors."""
    columns = [_combined(builder, matrix, [row[j] for row in grid]) for j in range(len(grid[0]))]
    return [_combined(builder, matrix, [column[i] for column in columns]) for i in range(len(matrix))]


@intrinsic
def transform_data(context: Any, source: Any, row: Any, pixel: Any, target: Any, element: Any, channels: Any) -> Any:
    """One tile: (6, 6, channels) at `source`, rows and pixels apart in bytes, to 36 vectors of channels `element` bytes
    apart. `channels` is a multiple of TILE.lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, row, pixel, target, element, channels = args
        lanes = ir.Constant(I64, TILE.lanes)
        with cgutils.for_range(builder, builder.sdiv(channels, lanes)) as loop:
            shift = builder.mul(loop.index, ir.Constant(I64, TILE.lanes * 4))
            base, out = builder.add(source, shift), builder.add(target, shift)
            grid = []
            for i in range(SIZE):
                line = builder.add(base, builder.mul(row, ir.Constant(I64, i)))
                places = (builder.add(line, builder.mul(pixel, ir.Constant(I64, j))) for j in range(SIZE))
                grid.append([load(builder, place, 0) for place in places])
            made = _both(builder, DATA, grid)
            for e, value in enumerate(v for line in made for v in line):
                place = builder.add(out, builder.mul(element, ir.Constant(I64, e)))
                builder.store(value, address_of(builder, place, 0, VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 6), generate


@intrinsic
def transform_sums(
    context: Any, source: Any, element: Any, bias: Any, target: Any, row: Any, pixel: Any, channels: Any,
    low: Any, high: Any,
) -> Any:  # fmt: skip
    """One tile: 36 vectors of channels `element` bytes apart to (4, 4, channels) at `target`, plus bias, clamped."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, element, bias, target, row, pixel, channels, low, high = args
        least, most = spread(builder, low), spread(builder, high)
        with cgutils.for_range(builder, builder.sdiv(channels, ir.Constant(I64, TILE.lanes))) as loop:
            shift = builder.mul(loop.index, ir.Constant(I64, TILE.lanes * 4))
            base, out = builder.add(source, shift), builder.add(target, shift)
            start = load(builder, builder.add(bias, shift), 0)
            places = [builder.add(base, builder.mul(element, ir.Constant(I64, e))) for e in range(SIZE * SIZE)]
            grid = [[load(builder, places[i * SIZE + j], 0) for j in range(SIZE)] for i in range(SIZE)]
            for i, line in enumerate(_both(builder, RESULT, grid)):
                at = builder.add(out, builder.mul(row, ir.Constant(I64, i)))
                for j, value in enumerate(line):
                    place = builder.add(at, builder.mul(pixel, ir.Constant(I64, j)))
                    value = clamp(builder, builder.fadd(value, start), least, most)
                    builder.store(value, address_of(builder, place, 0, VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 7, types.float32, types.float32), generate


@compiled
def _data(x: Any, v: Any, down: int, across: int) -> None:
    """Tiles of x (1, rows, cols, C) to v (36, down * across, C)."""
    channels, element, tile = x.shape[3], v.strides[0], v.strides[1]
    row, pixel = x.strides[1], x.strides[2]
    source, target = x.ctypes.data, v.ctypes.data
    for i in range(down):
        for j in range(across):
            at = source + i * OUT * row + j * OUT * pixel
            transform_data(at, row, pixel, target + (i * across + j) * tile, element, channels)


@compiled
def _sums(m: Any, bias: Any, y: Any, room: Any, across: int, low: Any, high: Any) -> None:
    """Tiles of m (36, down * across, O) to y (1, lines, cols, O); tiles that reach past it go through `room`."""
    _, lines, cols, channels = y.shape
    row, pixel = y.strides[1], y.strides[2]
    element, tile = m.strides[0], m.strides[1]
    source, start, target, aside = m.ctypes.data, bias.ctypes.data, y.ctypes.data, room.ctypes.data
    for i in range((lines + OUT - 1) // OUT):
        for j in range(across):
            at = source + (i * across + j) * tile
            height, width = min(OUT, lines - i * OUT), min(OUT, cols - j * OUT)
            if height == OUT and width == OUT:
                to = target + i * OUT * row + j * OUT * pixel
                transform_sums(at, element, start, to, row, pixel, channels, low, high)
                continue
            transform_sums(at, element, start, aside, OUT * channels * 4, channels * 4, channels, low, high)
            for u in range(height):
                for v in range(width):
                    copy_vectors(
                        aside + (u * OUT + v) * channels * 4,
                        target + (i * OUT + u) * row + (j * OUT + v) * pixel,
                        channels,
                    )


@intrinsic
def copy_vectors(context: Any, source: Any, target: Any, channels: Any) -> Any:
    """`channels` values, a multiple of TILE.lanes, from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, channels = args
        with cgutils.for_range(builder, builder.sdiv(channels, ir.Constant(I64, TILE.lanes))) as loop:
            shift = builder.mul(loop.index, ir.Constant(I64, TILE.lanes * 4))
            value = load(builder, builder.add(source, shift), 0)
            builder.store(value, address_of(builder, builder.add(target, shift), 0, VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 3), generate


def pays(out: tuple[int, int], channels: int, filters: int) -> bool:
    """Whether tiles beat the direct convolution: enough of them for each of the 36 weights that they read."""
    tiles = -(-out[0] // OUT) * -(-out[1] // OUT)
    return channels % TILE.lanes == 0 and filters % TILE.lanes == 0 and min(channels, filters) >= 16 and tiles >= 9


def pack(w: Array) -> Array:
    """(O, C, 3, 3) -> (36, panels, C, COLUMNS): G w G^T in float64, rounded once, packed."""
    taps = transforms(OUT)[1]
    wide = np.kron(taps, taps) @ w.astype(np.float64).reshape(*w.shape[:2], 9).reshape(-1, 9).T
    return pack_each([part.reshape(w.shape[:2]).T for part in wide])


def extent(out: int) -> int:
    """Padded input under `out` outputs, whole tiles of them."""
    return -(-out // OUT) * OUT + SIZE - OUT


def lines_of(cols: int, channels: int, weight_bytes: int) -> int:
    """Output lines at a time, whole tiles: `channels` of both sides. All weights are read for each such block."""
    row_bytes = SIZE * SIZE * -(-cols // OUT) * channels * 4
    budget = min(max(BLOCK_BYTES[0], weight_bytes), BLOCK_BYTES[1])
    return max(1, budget // row_bytes) * OUT


def rooms(lines: int, cols: int, channels: int, filters: int, scratch: Scratch) -> tuple[Array, Array, Array]:
    """Scratch of `tiles_of`: the tiles' transforms, their products, and one tile of outputs."""
    tiles = SIZE * SIZE * -(-lines // OUT) * -(-cols // OUT)
    return scratch((tiles * channels,)), scratch((tiles * filters,)), scratch((OUT * OUT * filters,))


def tiles_of(
    slab: Array, packed: Array, bias: Array, y: Array, rooms: tuple[Array, Array, Array], low: float, high: float
) -> list[Call]:
    """y (1, lines, cols, O) = clamp(conv(slab) + bias, low, high) for a padded slab (1, extent(lines) or more,
    extent(cols), C)."""
    down, across = -(-y.shape[1] // OUT), -(-y.shape[2] // OUT)
    spectrum, sums = (
        room[: SIZE * SIZE * down * across * n].reshape(SIZE * SIZE, down * across, n)
        for room, n in zip(rooms, (slab.shape[3], y.shape[3]), strict=False)
    )
    steps = (spectrum.strides[0], 0, spectrum.strides[1])
    return [
        bound_by_address(_data, slab, spectrum, down, across),
        multiply(spectrum, packed, None, sums[:, None], steps=steps, run=slab.shape[3]),
        bound_by_address(_sums, sums, bias, y, rooms[2], across, F(low), F(high)),
    ]
