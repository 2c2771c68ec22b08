"""Layer normalisation and RMS normalisation over the trailing axes, with float32 statistics."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.layout import FLOATS, INT32_MAX, ceil_div, fold_one, name_of, rows_of
from infera_kernels.triton.rows import LONG_BLOCK, row_tile


@triton.jit
def _scaled(y, weight, bias, col, inside):
    """y * weight + bias, either of them optional."""
    if weight is not None:
        y = y * tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        y = y + tl.load(bias + col, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def norm_kernel(
    x,
    weight,
    bias,
    out,
    mean_out,
    inv_std_out,
    rows,
    cols,
    x_stride,
    out_stride,
    eps,
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A tile of whole rows in registers: mean, then the variance about it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < cols)
    v = tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        mean = tl.sum(v, axis=1)[:, None] / cols
        v = tl.where(inside, v - mean, 0.0)
        if mean_out is not None:
            tl.store(mean_out + row, mean, mask=row < rows)
    inv_std = 1.0 / tl.sqrt_rn(tl.sum(v * v, axis=1)[:, None] / cols + eps)
    if inv_std_out is not None:
        tl.store(inv_std_out + row, inv_std, mask=row < rows)
    y = _scaled(v * inv_std, weight, bias, col, col < cols)
    tl.store(out + row * out_stride + col, store_type(y, out), mask=inside)


@triton.jit
def norm_long_kernel(
    x,
    weight,
    bias,
    out,
    mean_out,
    inv_std_out,
    cols,
    x_stride,
    out_stride,
    eps,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, block after block: Welford's recurrence in every lane, the lanes combined as Chan et al. (1979) do."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * out_stride
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        inside = start + lane < cols
        v = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
        if CENTER:
            count += inside.to(tl.float32)
            delta = tl.where(inside, v - mean, 0.0)
            mean += delta / tl.maximum(count, 1.0)
            squares += delta * tl.where(inside, v - mean, 0.0)
        else:
            squares += v * v
    if CENTER:
        center = tl.sum(mean * count, axis=0) / cols
        apart = mean - center
        total = tl.sum(squares + count * apart * apart, axis=0)
        if mean_out is not None:
            tl.store(mean_out + row, center)
    else:
        center = 0.0
        total = tl.sum(squares, axis=0)
    inv_std = 1.0 / tl.sqrt_rn(total / cols + eps)
    if inv_std_out is not None:
        tl.store(inv_std_out + row, inv_std)
    for start in range(0, cols, BLOCK):
        inside = start + lane < cols
        v = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
        y = _scaled((v - center) * inv_std, weight, bias, start + lane, inside)
        tl.store(out + start + lane, store_type(y, out), mask=inside)


def supports_norm(x: Typed, out: Typed, weight: Typed | None, bias: Typed | None = None, *, axis: int = -1) -> bool:
    """float32, float16 or bfloat16 x with `out` of the same type and shape; weight and bias, where given, of any
    of the three types and of shape x.shape[axis:]; fewer than 2**31 elements normalised together."""
    shape = tuple(x.shape)
    if name_of(x) not in FLOATS or name_of(out) != name_of(x) or tuple(out.shape) != shape:
        return False
    if not -len(shape) <= axis < len(shape):
        return False
    inner = shape[axis % len(shape) :]
    scales = [w for w in (weight, bias) if w is not None]
    return all(name_of(w) in FLOATS and tuple(w.shape) == inner for w in scales) and (
        math.prod(inner) <= INT32_MAX - LONG_BLOCK
    )


def _norm(
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    launcher: Launcher,
    *,
    eps: float,
    axis: int,
    center: bool,
    mean: Any = None,
    inv_std: Any = None,
) -> list[Call]:
    if not supports_norm(x, out, weight, bias, axis=axis):
        given = ", ".join("none" if a is None else f"{name_of(a)}{list(a.shape)}" for a in (x, weight, bias))
        raise ValueError(f"norm: no kernel for {given} -> {name_of(out)}{list(out.shape)} at axis {axis}")
    rows, cols, x_stride = rows_of(x, axis)
    _, _, out_stride = rows_of(out, axis)
    for scale in (weight, bias):
        if scale is not None:
            rows_of(scale, 0)
    for statistic in (mean, inv_std):
        if statistic is not None and (name_of(statistic) != "float32" or statistic.size != rows):
            raise ValueError(f"norm: a statistic must be float32 of {rows} elements, one for each row")
    if not rows * cols:
        return []
    args = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "out": out,
        "mean_out": mean,
        "inv_std_out": inv_std,
        "cols": cols,
        "x_stride": fold_one(x_stride),
        "out_stride": fold_one(out_stride),
        "eps": float(eps),
    }
    tile = row_tile(rows, cols)
    if tile is None:
        constexprs = {"CENTER": center, "BLOCK": LONG_BLOCK}
        return [launcher.launch(norm_long_kernel, (rows,), args, constexprs, num_warps=8)]
    constexprs = {"CENTER": center, "ROWS": tile.rows, "COLS": tile.cols}
    grid = (ceil_div(rows, tile.rows),)
    return [launcher.launch(norm_kernel, grid, {**args, "rows": rows}, constexprs, num_warps=tile.warps)]


def layer_norm(
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    launcher: Launcher,
    *,
    eps: float = 1e-5,
    axis: int = -1,
    mean: Any = None,
    inv_std: Any = None,
) -> list[Call]:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias over the axes from `axis` on.

    weight and bias may be None. `mean` and `inv_std`, where given, are contiguous float32 arrays that receive each
    row's statistics.
    """
    return _norm(x, weight, bias, out, launcher, eps=eps, axis=axis, center=True, mean=mean, inv_std=inv_std)


def rms_norm(x: Any, weight: Any, out: Any, launcher: Launcher, *, eps: float = 1e-6, axis: int = -1) -> list[Call]:
    """out = x / sqrt(mean(x ** 2) + eps) * weight over the axes from `axis` on. weight may be None."""
    return _norm(x, weight, None, out, launcher, eps=eps, axis=axis, center=False)
