"""Local response normalisation: every element over a power of the squares around it, along the channels."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import offset_of, store_type
from infera_kernels.triton.layout import (
    FLOATS,
    INT32_MAX,
    ceil_div,
    coalesce,
    element_strides,
    fold,
    fold_one,
    name_of,
    next_power_of_two,
    span,
)

_TILE = 1024


@triton.jit
def local_response_kernel(
    x,
    out,
    dims,
    x_strides,
    out_strides,
    others,
    channels,
    x_step,
    out_step,
    alpha,
    beta,
    bias,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    OTHERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = x / (bias + alpha * sum of squares of BEFORE channels, this one and AFTER more) ** beta for a tile of
    OTHERS x CHANNELS elements; `dims` are those that are not the channels, innermost first."""
    tile = tl.program_id(0)
    column = tl.arange(0, CHANNELS)[None, :]
    if WIDE:
        tile = tile.to(tl.int64)
        column = column.to(tl.int64)
    across = tl.cdiv(channels, CHANNELS)
    row = tile // across * OTHERS + tl.arange(0, OTHERS)[:, None]
    column += tile % across * CHANNELS
    inside = (row < others) & (column < channels)
    x += offset_of(row, dims, x_strides, 0, len(dims))
    total = tl.zeros([OTHERS, CHANNELS], tl.float32)
    for shift in range(-BEFORE, AFTER + 1):
        near = column + shift
        v = tl.load(x + near * x_step, mask=inside & (near >= 0) & (near < channels), other=0).to(tl.float32)
        total += v * v
    v = tl.load(x + column * x_step, mask=inside, other=0).to(tl.float32)
    y = v * tl.exp(-beta * tl.log(bias + alpha * total))
    tl.store(out + offset_of(row, dims, out_strides, 0, len(dims)) + column * out_step, store_type(y, out), mask=inside)


def supports_local_response(x: Typed, out: Typed) -> bool:
    """float32, float16 or bfloat16, of one shape and type."""
    return name_of(x) in FLOATS and name_of(x) == name_of(out) and tuple(x.shape) == tuple(out.shape)


def local_response(
    x: Any, out: Any, launcher: Launcher, *, axis: int, size: int, alpha: float, beta: float, bias: float
) -> list[Call]:
    """out = x / (bias + alpha / size * sum of squares over `size` neighbours along `axis`) ** beta. Any strides; `out`
    must not overlap x."""
    if not supports_local_response(x, out):
        raise ValueError(f"no local response for {name_of(x)}{list(x.shape)} -> {name_of(out)}{list(out.shape)}")
    shape = tuple(x.shape)
    if 0 in shape:
        return []
    strides = element_strides(x), element_strides(out)
    order = sorted((a for a in range(len(shape)) if a != axis), key=lambda a: -abs(strides[0][a]))
    dims, walked = coalesce(tuple(shape[a] for a in order), [tuple(s[a] for a in order) for s in strides])
    others, channels = math.prod(dims), shape[axis]
    steps = tuple(s[axis] for s in strides)
    if abs(steps[0]) == 1:
        wide = min(_TILE, next_power_of_two(channels))
        rows = min(_TILE // wide, next_power_of_two(others))
    else:
        rows = min(_TILE, next_power_of_two(others))
        wide = min(_TILE // rows, next_power_of_two(channels))
    args = {
        "x": x,
        "out": out,
        "dims": dims,
        "x_strides": fold(walked[0]),
        "out_strides": fold(walked[1]),
        "others": others,
        "channels": channels,
        "x_step": fold_one(steps[0]),
        "out_step": fold_one(steps[1]),
        "alpha": alpha / size,
        "beta": beta,
        "bias": bias,
    }
    reach = [span(dims, s) + channels * abs(step) for s, step in zip(walked, steps, strict=True)]
    constexprs = {
        "BEFORE": min((size - 1) // 2, channels),
        "AFTER": min(size // 2, channels),
        "OTHERS": rows,
        "CHANNELS": wide,
        "WIDE": max(*reach, others) > INT32_MAX - _TILE,
    }
    grid = (ceil_div(others, rows) * ceil_div(channels, wide),)
    return [launcher.launch(local_response_kernel, grid, args, constexprs, num_warps=4)]
