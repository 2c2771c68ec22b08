"""Linear quantisation: q = saturate(round(x / scale) + zero point), halves to even; x = (q - zero point) scale.

Integers of two or four bits lie in the low bits of a byte each. Every operation is rounded by itself, as in NumPy:
a product fused with a sum would move what lies halfway between two integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Array, Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import offset_of, store_type
from infera_kernels.triton.layout import (
    FLOATS,
    INT32_MAX,
    MAX_DIMS,
    broadcast_strides,
    element_strides,
    fold,
    name_of,
    span,
)
from infera_kernels.triton.pointwise import pick_tiling

BITS = {f"{sign}int{bits}": bits for sign in ("", "u") for bits in (2, 4, 8, 16)}
"""Integers that tensors are quantised to, and how many bits they have."""

_WIDE = FLOATS | {"int32"}


@triton.jit
def saturated(x, zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """round(x) + zero between LOW and HIGH, all float32.

    What lies far outside is bounded first: 1.5 * 2**23 added and taken away again rounds what is below 2**22, halves
    to even. NaN becomes LOW.
    """
    x = tl.minimum(tl.where(x > -131072.0, x, -131072.0), 131072.0)
    return tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0 + zero, LOW), HIGH)


@triton.jit
def tile_at(dims, rows, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """(tile, rows, columns, whether they are inside) of this program, which walks as that of `pointwise_kernel`."""
    tile = tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
    col_tiles = (dims[0] + COLS - 1) // COLS
    row_tiles = (rows + ROWS - 1) // ROWS
    col = (tile % col_tiles) * COLS + tl.arange(0, COLS)[None, :]
    tile = tile // col_tiles
    row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    tile = tile // row_tiles
    return tile, row, col, (row < rows) & (col < dims[0])


@triton.jit
def offset_at(tile, row, col, dims, strides, ROW_DIMS: tl.constexpr):
    """The offsets of that part of an operand."""
    outer = offset_of(tile, dims, strides, ROW_DIMS, len(dims)) + offset_of(row, dims, strides, 1, ROW_DIMS)
    return outer + col * strides[0]


@triton.jit
def _integer(x, MASK: tl.constexpr, SIGN: tl.constexpr):
    """A stored integer as int32: of its low bits alone where there is a MASK, SIGN being the highest if it is one."""
    if MASK is None:
        return x.to(tl.int32)
    else:
        return ((x.to(tl.int32) & MASK) ^ SIGN) - SIGN


@triton.jit
def quantise_kernel(
    x,
    scale,
    zero,
    out,
    dims,
    x_strides,
    scale_strides,
    zero_strides,
    out_strides,
    rows,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MASK: tl.constexpr,
    SIGN: tl.constexpr,
    BACK: tl.constexpr,
    TIMES: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x to integers between LOW and HIGH, where they are given; with BACK less the zero point, with TIMES times scale.

    Strides of None are those of one value.
    """
    tile, row, col, inside = tile_at(dims, rows, ROWS, COLS, WIDE)
    if scale_strides is None:
        s = tl.load(scale).to(tl.float32)
    else:
        at = offset_at(tile, row, col, dims, scale_strides, ROW_DIMS)
        s = tl.load(scale + at, mask=inside, other=1.0).to(tl.float32)
    if zero is None:
        z = tl.full([], 0, tl.int32)
    elif zero_strides is None:
        z = _integer(tl.load(zero), MASK, SIGN)
    else:
        at = offset_at(tile, row, col, dims, zero_strides, ROW_DIMS)
        z = _integer(tl.load(zero + at, mask=inside, other=0), MASK, SIGN)
    value = tl.load(x + offset_at(tile, row, col, dims, x_strides, ROW_DIMS), mask=inside, other=0)
    if LOW is None:
        value = (_integer(value, MASK, SIGN) - z).to(tl.float32)
    else:
        value = saturated(tl.div_rn(value.to(tl.float32), s), z.to(tl.float32), LOW, HIGH)
        if BACK:
            value = value - z.to(tl.float32)
    if TIMES:
        value = value * s
    if not BACK:
        value = value.to(tl.int32)
        if MASK is not None:
            value = value & MASK
    at = offset_at(tile, row, col, dims, out_strides, ROW_DIMS)
    tl.store(out + at, store_type(value, out), mask=inside)


def _stretches(x: Typed, *parameters: Typed | None) -> bool:
    """Whether every parameter broadcasts to x's shape, of at most MAX_DIMS dimensions."""
    shape = tuple(x.shape)
    try:
        same = np.broadcast_shapes(shape, *(tuple(p.shape) for p in parameters if p is not None)) == shape
    except ValueError:
        return False
    return same and len(shape) <= MAX_DIMS


def supports_quantise(x: Typed, scale: Typed, zero: Typed | None, out: Typed) -> bool:
    """x of float32, float16, bfloat16 or int32 to a type of BITS, the zero point's; parameters broadcast to x."""
    return (
        name_of(x) in _WIDE
        and name_of(scale) in FLOATS
        and name_of(out) in BITS
        and (zero is None or name_of(zero) == name_of(out))
        and tuple(out.shape) == tuple(x.shape)
        and _stretches(x, scale, zero)
    )


def supports_dequantise(q: Typed, scale: Typed, zero: Typed | None, out: Typed) -> bool:
    """q of a type of BITS or int32, the zero point's, to float32, float16 or bfloat16."""
    return (
        name_of(q) in BITS.keys() | {"int32"}
        and name_of(scale) in FLOATS
        and name_of(out) in FLOATS
        and (zero is None or name_of(zero) == name_of(q))
        and tuple(out.shape) == tuple(q.shape)
        and _stretches(q, scale, zero)
    )


@dataclass(frozen=True, slots=True)
class _Like:
    """A tensor that exists in no memory."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _bytes_of(array: Array) -> Array:
    """Integers of less than eight bits as the bytes that hold them."""
    return array.view(np.uint8) if BITS.get(name_of(array), 8) < 8 else array


def _strides(parameter: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (0,) * len(shape) if parameter is None else broadcast_strides(parameter, shape)


def _walk(x: Array, scale: Array, zero: Array | None, out: Array, launcher: Launcher, **constexprs: Any) -> list[Call]:
    shape = tuple(out.shape)
    if 0 in shape:
        return []
    held = next((name_of(a) for a in (x, out) if name_of(a) in BITS), "int8")
    packed = BITS[held] < 8
    signs = 1 << (BITS[held] - 1) if held.startswith("i") else 0
    x, out, zero = _bytes_of(x), _bytes_of(out), None if zero is None else _bytes_of(zero)
    arrays = (x, scale, zero)
    tiling = pick_tiling(shape, [*(_strides(a, shape) for a in arrays), element_strides(out)])
    x_strides, *parameters, out_strides = tiling.strides
    single = [None if a is None or a.size == 1 else fold(s) for a, s in zip(arrays[1:], parameters, strict=True)]
    args = {
        "x": x,
        "scale": scale,
        "zero": zero,
        "out": out,
        "dims": tiling.dims,
        "x_strides": fold(x_strides),
        "scale_strides": single[0],
        "zero_strides": single[1],
        "out_strides": fold(out_strides),
        "rows": tiling.rows,
    }
    known = {
        **constexprs,
        "MASK": (1 << BITS[held]) - 1 if packed else None,
        "SIGN": signs if packed else None,
        "ROW_DIMS": tiling.row_dims,
        "ROWS": tiling.tile[0],
        "COLS": tiling.tile[1],
        "WIDE": any(span(tiling.dims, s) > INT32_MAX - 1024 for s in tiling.strides),
    }
    return [launcher.launch(quantise_kernel, (tiling.programs,), args, known, num_warps=4, enable_fp_fusion=False)]


def bounds(dtype: Any) -> tuple[float, float]:
    """The smallest and the largest value of a type of BITS."""
    info = ml_dtypes.iinfo(dtype)
    return float(info.min), float(info.max)


def quantise(x: Array, scale: Array, zero: Array | None, out: Array, launcher: Launcher) -> list[Call]:
    """out = x quantised; scale and zero point broadcast to x, any strides."""
    if not supports_quantise(x, scale, zero, out):
        raise ValueError(f"quantise: no kernel for {name_of(x)}{list(x.shape)} to {name_of(out)}{list(out.shape)}")
    low, high = bounds(out.dtype)
    return _walk(x, scale, zero, out, launcher, LOW=low, HIGH=high, BACK=False, TIMES=False)


def dequantise(q: Array, scale: Array, zero: Array | None, out: Array, launcher: Launcher) -> list[Call]:
    """out = (q - zero) scale; scale and zero point broadcast to q, any strides."""
    if not supports_dequantise(q, scale, zero, out):
        raise ValueError(f"dequantise: no kernel for {name_of(q)}{list(q.shape)} to {name_of(out)}{list(out.shape)}")
    return _walk(q, scale, zero, out, launcher, LOW=None, HIGH=None, BACK=True, TIMES=True)


def supports_centre(x: Typed, scale: Typed, zero: Typed, out: Typed) -> bool:
    """float32 out of what is quantised to the zero point's type, which has eight or sixteen bits."""
    q = _Like(tuple(x.shape), np.dtype(zero.dtype))
    narrow = BITS.get(name_of(zero), 0) >= 8
    return narrow and supports_quantise(x, scale, zero, q) and supports_dequantise(q, scale, zero, out)


def centre(
    x: Array, scale: Array, zero: Array, out: Array, launcher: Launcher, *, low: int, high: int, times: bool
) -> list[Call]:
    """out = x quantised between `low` and `high`, less the zero point; with `times` times the scale."""
    if not supports_centre(x, scale, zero, out):
        raise ValueError(f"centre: no kernel for {name_of(x)}{list(x.shape)} by {name_of(zero)}{list(zero.shape)}")
    return _walk(x, scale, zero, out, launcher, LOW=float(low), HIGH=float(high), BACK=True, TIMES=times)
