"""Functions of single elements: chains of unary, binary and ternary ones, with broadcasting, casts, strided copies.

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
from infera_kernels.triton.indexing import offset_in, rounded, store_type, tile_of, widened
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
from infera_kernels.triton.trigonometric import tan

_TILE = 1024
_FEW = 5
"""Values of an element, its output among them, that tiles of _TILE elements have registers for."""

_TRANSPOSE = 32
_TRANSPOSE_MIN = 8
"""Below this many elements along a dimension, a transposed tile would be mostly empty."""


@triton.jit
def pointwise_kernel(
    ins,
    out,
    dims,
    strides,
    out_strides,
    rows,
    FUNCTIONS: tl.constexpr,
    ARGS: tl.constexpr,
    PARAMETERS: tl.constexpr,
    TYPES: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = the last of the terms, each FUNCTIONS[t] of up to three inputs or terms before it.

    ARGS has three places a term, -1 for none, and PARAMETERS two; a function of one value gets them both. TYPES[t] is
    what a term's result is rounded to, None where it stays as computed. These are four flat tuples because Triton 3.6
    takes none that are nested. dims[0] is the columns, dims[1:ROW_DIMS] the `rows`, the rest one tile each; `strides`
    has those of all inputs, one after the other.
    """
    tile, row, col, inside = tile_of(dims, rows, ROWS, COLS, WIDE)
    values = ()
    for i in tl.static_range(len(ins)):
        at = offset_in(tile, row, col, dims, strides, ROW_DIMS, i * len(dims))
        x = tl.load(ins[i] + at, mask=inside, other=0)
        values = values + (widened(x),)  # type: ignore[assignment] # noqa: RUF005
    for t in tl.static_range(len(FUNCTIONS)):
        if ARGS[3 * t + 1] < 0:
            value = FUNCTIONS[t](values[ARGS[3 * t]], PARAMETERS[2 * t], PARAMETERS[2 * t + 1])
        elif ARGS[3 * t + 2] < 0:
            value = FUNCTIONS[t](values[ARGS[3 * t]], values[ARGS[3 * t + 1]])
        else:
            value = FUNCTIONS[t](values[ARGS[3 * t]], values[ARGS[3 * t + 1]], values[ARGS[3 * t + 2]])
        if TYPES[t] is not None:
            value = widened(rounded(value, TYPES[t]))
        values = values + (value,)  # type: ignore[assignment] # noqa: RUF005
    at = offset_in(tile, row, col, dims, out_strides, ROW_DIMS)
    tl.store(out + at, store_type(values[len(values) - 1], out), mask=inside)


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
    def constexprs(self) -> dict[str, Any]:
        """What kernels over `tile_of` are compiled for."""
        wide = any(span(self.dims, s) > INT32_MAX - _TILE for s in self.strides)
        return {"ROW_DIMS": self.row_dims, "ROWS": self.tile[0], "COLS": self.tile[1], "WIDE": wide}

    @property
    def arguments(self) -> dict[str, Any]:
        """What kernels over `tile_of` are told, with the strides of all operands one after the other."""
        strides = tuple(s for own in self.strides for s in fold(own))
        return {"dims": self.dims, "strides": strides, "rows": self.rows}

    @property
    def programs(self) -> int:
        rest = math.prod(self.dims[self.row_dims :])
        return ceil_div(self.dims[0], self.tile[1]) * ceil_div(self.rows, self.tile[0]) * rest


def pick_tiling(shape: Dims, strides: Sequence[Dims], values: int = 0) -> Tiling:
    """The tiling of operands with these strides; the output's come last. Raises ValueError beyond MAX_DIMS.

    Tiles are smaller where many `values` of each element, at least one an operand, have to lie in registers.
    """
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
    tile = _TILE if max(values, len(strides)) <= _FEW else _TILE // 2
    widths = [w for w in (tile, tile // 2, tile // 4, tile // 8) if w < dims[0] * 2]
    cols = min(widths, key=lambda w: ceil_div(dims[0], w) * w) if widths else next_power_of_two(dims[0])
    return Tiling(dims, walked, len(dims), rows, (min(tile // cols, next_power_of_two(rows)), cols))


_LONG = (tan,)
"""Functions of which a thread computes few at a time: with eight, registers spill on sm_100."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A term: a function of `args`, which count the inputs and after them the terms before.

    A function of one value gets the `parameters`; the result is rounded to `dtype` (Triton's) where one is given.
    """

    fn: Any
    args: tuple[int, ...]
    parameters: tuple[float | None, float | None] = (None, None)
    dtype: Any = None


def pointwise(terms: Sequence[Applied], ins: Sequence[Any], out: Any, launcher: Launcher) -> list[Call]:
    """out = the last of the terms over inputs that broadcast to `out`, in one launch; no calls where `out` is empty."""
    shape = tuple(out.shape)
    if 0 in shape:
        return []
    tiling = pick_tiling(shape, [*(broadcast_strides(x, shape) for x in ins), element_strides(out)])
    args = {
        "ins": tuple(ins),
        "out": out,
        "dims": tiling.dims,
        "strides": tuple(s for strides in tiling.strides[:-1] for s in fold(strides)),
        "out_strides": fold(tiling.strides[-1]),
        "rows": tiling.rows,
    }
    constexprs = {
        "FUNCTIONS": tuple(t.fn for t in terms),
        "ARGS": tuple(a for t in terms for a in (*t.args, -1, -1)[:3]),
        "PARAMETERS": tuple(p for t in terms for p in t.parameters),
        "TYPES": tuple(t.dtype for t in terms),
        **tiling.constexprs,
    }
    warps = 8 if any(t.fn in _LONG for t in terms) else 4
    return [launcher.launch(pointwise_kernel, (tiling.programs,), args, constexprs, num_warps=warps)]
