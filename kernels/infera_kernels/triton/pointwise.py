"""Functions of single elements: unary, binary and select, with broadcasting, casts and strided copies.

One kernel walks up to six dimensions in tiles of rows x columns. Columns are the output's innermost dimension, so that
nothing is divided along them. Rows are all the others together; or, where an input is contiguous along another
dimension than the output, that dimension alone: such a tile is a transpose through shared memory, coalesced both ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher
from infera_kernels.triton.indexing import offset_of, store_type, widened
from infera_kernels.triton.layout import (
    INT32_MAX,
    MAX_DIMS,
    Dims,
    broadcast_strides,
    ceil_div,
    coalesce,
    element_strides,
    fold,
    next_power_of_two,
    span,
)

_TILE = 1024
_TRANSPOSE = 32
_TRANSPOSE_MIN = 8
"""Below this many elements along a dimension, a transposed tile would be mostly empty."""


@triton.jit
def pointwise_kernel(
    a,
    b,
    c,
    out,
    dims,
    a_strides,
    b_strides,
    c_strides,
    out_strides,
    rows,
    alpha,
    beta,
    FN: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = FN(a [, b [, c]]). dims[0] is the columns, dims[1:ROW_DIMS] the `rows`, the rest one tile each."""
    tile = tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
    col_tiles = tl.cdiv(dims[0], COLS)
    row_tiles = tl.cdiv(rows, ROWS)
    col = (tile % col_tiles) * COLS + tl.arange(0, COLS)[None, :]
    tile = tile // col_tiles
    row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    tile = tile // row_tiles
    inside = (row < rows) & (col < dims[0])
    LAST: tl.constexpr = len(dims)

    at = offset_of(tile, dims, a_strides, ROW_DIMS, LAST) + offset_of(row, dims, a_strides, 1, ROW_DIMS)
    x = widened(tl.load(a + (at + col * a_strides[0]), mask=inside, other=0))
    if b is None:
        value = FN(x, alpha, beta)
    else:
        at = offset_of(tile, dims, b_strides, ROW_DIMS, LAST) + offset_of(row, dims, b_strides, 1, ROW_DIMS)
        y = widened(tl.load(b + (at + col * b_strides[0]), mask=inside, other=0))
        if c is None:
            value = FN(x, y)
        else:
            at = offset_of(tile, dims, c_strides, ROW_DIMS, LAST) + offset_of(row, dims, c_strides, 1, ROW_DIMS)
            z = widened(tl.load(c + (at + col * c_strides[0]), mask=inside, other=0))
            value = FN(x, y, z)
    at = offset_of(tile, dims, out_strides, ROW_DIMS, LAST) + offset_of(row, dims, out_strides, 1, ROW_DIMS)
    tl.store(out + (at + col * out_strides[0]), store_type(value, out), mask=inside)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel walks an output: `row_dims` is where dims beyond the rows begin."""

    dims: Dims
    strides: tuple[Dims, ...]
    row_dims: int
    rows: int
    tile: tuple[int, int]

    @property
    def transposed(self) -> bool:
        return self.row_dims == 2 and self.tile == (_TRANSPOSE, _TRANSPOSE)

    @property
    def programs(self) -> int:
        rest = math.prod(self.dims[self.row_dims :])
        return ceil_div(self.dims[0], self.tile[1]) * ceil_div(self.rows, self.tile[0]) * rest


def pick_tiling(shape: Dims, strides: Sequence[Dims]) -> Tiling:
    """The tiling of operands with these strides; the output's come last. Raises ValueError beyond MAX_DIMS."""
    dims, walked = coalesce(shape, strides)
    if len(dims) > MAX_DIMS:
        raise ValueError(f"shape {shape} needs {len(dims)} dimensions after merging, at most {MAX_DIMS} are supported")
    turned = next((k for s in walked[:-1] for k in range(1, len(dims)) if s[k] == 1 and s[0] > 1), 0)
    if turned and min(dims[0], dims[turned]) >= _TRANSPOSE_MIN:
        order = (0, turned, *(k for k in range(1, len(dims)) if k != turned))
        dims = tuple(dims[k] for k in order)
        walked = tuple(tuple(s[k] for k in order) for s in walked)
        return Tiling(dims, walked, 2, dims[1], (_TRANSPOSE, _TRANSPOSE))
    rows = math.prod(dims[1:])
    widths = [w for w in (_TILE, _TILE // 2, _TILE // 4, _TILE // 8) if w < dims[0] * 2]
    cols = min(widths, key=lambda w: ceil_div(dims[0], w) * w) if widths else next_power_of_two(dims[0])
    return Tiling(dims, walked, len(dims), rows, (min(_TILE // cols, next_power_of_two(rows)), cols))


def pointwise(
    fn: Any, ins: Sequence[Any], out: Any, launcher: Launcher, alpha: float | None = None, beta: float | None = None
) -> list[Call]:
    """out = fn(*ins) for one to three inputs that broadcast to `out`; no calls where `out` is empty."""
    shape = tuple(out.shape)
    if 0 in shape:
        return []
    tiling = pick_tiling(shape, [*(broadcast_strides(x, shape) for x in ins), element_strides(out)])
    a, b, c = (*ins, None, None)[:3]
    a_strides, b_strides, c_strides = (*map(fold, tiling.strides[:-1]), None, None)[:3]
    args = {
        "a": a,
        "b": b,
        "c": c,
        "out": out,
        "dims": tiling.dims,
        "rows": tiling.rows,
        "alpha": alpha,
        "beta": beta,
        "a_strides": a_strides,
        "b_strides": b_strides,
        "c_strides": c_strides,
        "out_strides": fold(tiling.strides[-1]),
    }
    constexprs = {
        "FN": fn,
        "ROW_DIMS": tiling.row_dims,
        "ROWS": tiling.tile[0],
        "COLS": tiling.tile[1],
        "WIDE": any(span(tiling.dims, s) > INT32_MAX - _TILE for s in tiling.strides),
    }
    return [launcher.launch(pointwise_kernel, (tiling.programs,), args, constexprs, num_warps=4)]
