"""Functions of tensors of 8-bit integers, quantised again: sums, products, activations, means.

The last bit decides what lies halfway between two integers, so that the order of operations is that of
`portable.quant`, and none are fused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.layout import (
    INT32_MAX,
    MAX_DIMS,
    broadcast_strides,
    ceil_div,
    element_strides,
    fold,
    fold_one,
    name_of,
    next_power_of_two,
    span,
)
from infera_kernels.triton.pointwise import pick_tiling
from infera_kernels.triton.quantise import bounds, offset_at, saturated, tile_at

_CHANNELS, _PIXELS = 64, 64


@triton.jit
def _point(p):
    """A zero point as int32, 0 without one."""
    if p is None:
        return tl.full([], 0, tl.int32)
    else:
        return tl.load(p).to(tl.int32)


@triton.jit
def add(a, a_scale, a_zero, b, b_scale, b_zero, scale, zero, alpha, LOW: tl.constexpr, HIGH: tl.constexpr):
    f = tl.div_rn(a_scale, scale)
    g = tl.div_rn(b_scale, scale)
    total = zero.to(tl.float32) - (f * a_zero.to(tl.float32) + g * b_zero.to(tl.float32))
    return saturated(total + a.to(tl.float32) * f + b.to(tl.float32) * g, 0.0, LOW, HIGH)


@triton.jit
def mul(a, a_scale, a_zero, b, b_scale, b_zero, scale, zero, alpha, LOW: tl.constexpr, HIGH: tl.constexpr):
    factor = tl.div_rn(a_scale * b_scale, scale)
    made = ((a - a_zero) * (b - b_zero)).to(tl.float32) * factor
    return saturated(made, zero.to(tl.float32), LOW, HIGH)


@triton.jit
def leaky_relu(a, a_scale, a_zero, b, b_scale, b_zero, scale, zero, alpha, LOW: tl.constexpr, HIGH: tl.constexpr):
    x = (a - a_zero).to(tl.float32) * a_scale
    x = tl.where(x < 0, alpha * x, x)
    return saturated(tl.div_rn(x, scale), zero.to(tl.float32), LOW, HIGH)


@triton.jit
def sigmoid(a, a_scale, a_zero, b, b_scale, b_zero, scale, zero, alpha, LOW: tl.constexpr, HIGH: tl.constexpr):
    x = 1.0 / (1.0 + tl.exp(-(a - a_zero).to(tl.float32) * a_scale))
    return saturated(tl.div_rn(x, scale), zero.to(tl.float32), LOW, HIGH)


@triton.jit
def again(a, a_scale, a_zero, b, b_scale, b_zero, scale, zero, alpha, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The operand itself, by another scale and zero point."""
    x = (a - a_zero).to(tl.float32) * a_scale
    return saturated(tl.div_rn(x, scale), zero.to(tl.float32), LOW, HIGH)


FUNCTIONS: dict[str, Any] = {"add": add, "mul": mul, "leaky_relu": leaky_relu, "sigmoid": sigmoid, "again": again}


@triton.jit
def quantised_kernel(
    a,
    a_scale,
    a_zero,
    b,
    b_scale,
    b_zero,
    out,
    scale,
    zero,
    dims,
    a_strides,
    b_strides,
    out_strides,
    rows,
    alpha,
    FN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = FN(a [, b]), each with its scale and zero point, quantised by `scale` and `zero`."""
    tile, row, col, inside = tile_at(dims, rows, ROWS, COLS, WIDE)
    x = tl.load(a + offset_at(tile, row, col, dims, a_strides, ROW_DIMS), mask=inside, other=0).to(tl.int32)
    y = x
    y_scale = 1.0
    if b is not None:
        y = tl.load(b + offset_at(tile, row, col, dims, b_strides, ROW_DIMS), mask=inside, other=0).to(tl.int32)
        y_scale = tl.load(b_scale)
    made = FN(
        x, tl.load(a_scale), _point(a_zero), y, y_scale, _point(b_zero), tl.load(scale), _point(zero), alpha, LOW, HIGH
    )
    at = offset_at(tile, row, col, dims, out_strides, ROW_DIMS)
    tl.store(out + at, made.to(tl.int32).to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantised_mean_kernel(
    x,
    x_scale,
    x_zero,
    out,
    scale,
    zero,
    channels,
    pixels,
    x_c,
    x_p,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """out (images, channels): the means over x's pixels; one image and BC channels a program."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    p = tl.arange(0, BP)
    image = tl.program_id(1).to(tl.int64)
    x += image * channels * pixels
    sums = tl.full((BP, BC), 0, tl.int32)
    for start in range(0, pixels, BP):
        inside = (start + p < pixels)[:, None] & (c < channels)[None, :]
        sums += tl.load(x + (start + p)[:, None] * x_p + c[None, :] * x_c, mask=inside, other=0).to(tl.int32)
    total = tl.sum(sums, axis=0) - _point(x_zero) * pixels
    factor = tl.div_rn(tl.load(x_scale), tl.load(scale) * pixels.to(tl.float32))
    made = saturated(total.to(tl.float32) * factor, _point(zero).to(tl.float32), LOW, HIGH)
    tl.store(out + image * channels + c, made.to(tl.int32).to(out.dtype.element_ty), mask=c < channels)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A tensor, or a spec, with its float32 scale and its zero point, one each; without a zero point it is 0."""

    x: Any
    scale: Any
    zero: Any = None


def _typed(out: Quantised, *operands: Quantised) -> bool:
    every = (out, *operands)
    names = {name_of(q.x) for q in every} | {name_of(q.zero) for q in every if q.zero is not None}
    single = all(math.prod(p.shape) == 1 for q in every for p in (q.scale, q.zero) if p is not None)
    return (
        len(names) == 1 and names <= {"int8", "uint8"} and single and all(name_of(q.scale) == "float32" for q in every)
    )


def supports_quantised(out: Quantised, *operands: Quantised) -> bool:
    """One or two tensors of int8, or of uint8, which broadcast to the output's shape."""
    shape = tuple(out.x.shape)
    try:
        fits = np.broadcast_shapes(shape, *(tuple(q.x.shape) for q in operands)) == shape
    except ValueError:
        return False
    return fits and len(shape) <= MAX_DIMS and _typed(out, *operands)


def _repeats(x: Typed) -> bool:
    return tuple(x.shape[-1:]) in ((), (1,))


def quantised(
    function: str, operands: tuple[Quantised, ...], out: Quantised, launcher: Launcher, *, alpha: float = 0.0
) -> list[Call]:
    """out = a function of FUNCTIONS of one or two operands, any strides."""
    if not supports_quantised(out, *operands):
        raise ValueError(f"{function}: no kernel for {[list(q.x.shape) for q in operands]} to {list(out.x.shape)}")
    shape = tuple(out.x.shape)
    if 0 in shape:
        return []
    if len(operands) == 2 and _repeats(operands[1].x) and not _repeats(operands[0].x):
        operands = operands[::-1]  # sums begin with what repeats along the last axis, as onnxruntime's do
    arrays = [q.x for q in operands]
    tiling = pick_tiling(shape, [*(broadcast_strides(a, shape) for a in arrays), element_strides(out.x)])
    a, b = (*operands, Quantised(None, None))[:2]
    low, high = bounds(out.x.dtype)
    args = {
        "a": a.x,
        "a_scale": a.scale,
        "a_zero": a.zero,
        "b": b.x,
        "b_scale": b.scale,
        "b_zero": b.zero,
        "out": out.x,
        "scale": out.scale,
        "zero": out.zero,
        "dims": tiling.dims,
        "a_strides": fold(tiling.strides[0]),
        "b_strides": None if b.x is None else fold(tiling.strides[1]),
        "out_strides": fold(tiling.strides[-1]),
        "rows": tiling.rows,
        "alpha": float(alpha),
    }
    known = {
        "FN": FUNCTIONS[function],
        "LOW": low,
        "HIGH": high,
        "ROW_DIMS": tiling.row_dims,
        "ROWS": tiling.tile[0],
        "COLS": tiling.tile[1],
        "WIDE": any(span(tiling.dims, s) > INT32_MAX - 1024 for s in tiling.strides),
    }
    return [launcher.launch(quantised_kernel, (tiling.programs,), args, known, num_warps=4, enable_fp_fusion=False)]


def supports_quantised_mean(out: Quantised, x: Quantised) -> bool:
    """Images of at least one pixel, fewer than 2**23, so that sums are exact, and 2**16 of them at most."""
    count = math.prod(x.x.shape) // max(math.prod(out.x.shape), 1)
    return _typed(out, x) and 0 < count < 2**23 and x.x.shape[0] < 2**16


def quantised_mean(x: Quantised, out: Quantised, launcher: Launcher, *, last: bool) -> list[Call]:
    """out = the mean over x's pixels, both contiguous; channels are the last axis, or else the second."""
    images, channels = x.x.shape[0], x.x.shape[-1 if last else 1]
    if not images * channels:
        return []
    pixels = x.x.size // (images * channels)
    low, high = bounds(out.x.dtype)
    block = min(next_power_of_two(channels), _CHANNELS if last else 8)
    args = {
        "x": x.x,
        "x_scale": x.scale,
        "x_zero": x.zero,
        "out": out.x,
        "scale": out.scale,
        "zero": out.zero,
        "channels": channels,
        "pixels": pixels,
        "x_c": fold_one(1 if last else pixels),
        "x_p": fold_one(channels if last else 1),
    }
    known = {"LOW": low, "HIGH": high, "BC": block, "BP": min(next_power_of_two(pixels), _PIXELS if last else 512)}
    grid = (ceil_div(channels, block), images)
    return [launcher.launch(quantised_mean_kernel, grid, args, known, num_warps=4, enable_fp_fusion=False)]
