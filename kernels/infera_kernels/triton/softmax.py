"""Softmax and log-softmax over the last axis, computed in float32.

A row of nothing but -inf gives NaN, as the definition does; a row with some -inf is exact, wherever they stand.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.invariance import of_batch, rows_seen
from infera_kernels.triton.layout import (
    FLOATS,
    INT32_MAX,
    ceil_div,
    fold_one,
    name_of,
    rows_of,
)
from infera_kernels.triton.rows import LONG_BLOCK, row_tile


@triton.jit
def softmax_kernel(x, out, rows, cols, x_stride, out_stride, LOG: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile of whole rows in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < cols)
    v = tl.load(x + row * x_stride + col, mask=inside, other=float("-inf")).to(tl.float32)
    v = v - tl.max(v, axis=1)[:, None]
    e = tl.exp(v)
    total = tl.sum(e, axis=1)[:, None]
    if LOG:
        result = v - tl.log(total)
    else:
        result = e / total
    tl.store(out + row * out_stride + col, store_type(result, out), mask=inside)


@triton.jit
def softmax_online_kernel(x, out, cols, x_stride, out_stride, LOG: tl.constexpr, BLOCK: tl.constexpr):
    """One row, block after block: running maximum and sum in every lane (arXiv 1805.02867), then a second pass."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * out_stride
    lane = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        v = tl.load(x + start + lane, mask=start + lane < cols, other=float("-inf")).to(tl.float32)
        risen = tl.maximum(peak, v)
        # A lane that has seen nothing but -inf has no peak yet: -inf - -inf would be NaN.
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        total = total * tl.exp(peak - shift) + tl.exp(v - shift)
        peak = risen
    top = tl.max(peak, axis=0)
    total_row = tl.sum(total * tl.exp(peak - top), axis=0)
    for start in range(0, cols, BLOCK):
        inside = start + lane < cols
        v = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32) - top
        if LOG:
            result = v - tl.log(total_row)
        else:
            result = tl.exp(v) / total_row
        tl.store(out + start + lane, store_type(result, out), mask=inside)


def supports_softmax(x: Typed, out: Typed) -> bool:
    """float32, float16 or bfloat16, in and out alike, of one shape with at least one dimension, rows below 2**31."""
    return (
        name_of(x) in FLOATS
        and name_of(out) == name_of(x)
        and tuple(x.shape) == tuple(out.shape)
        and len(x.shape) > 0
        and x.shape[-1] <= INT32_MAX - LONG_BLOCK
    )


def softmax(x: Any, out: Any, launcher: Launcher, *, log: bool = False, invariant: bool = False) -> list[Call]:
    """out = softmax(x) over the last axis, or its logarithm. Rows must be contiguous and evenly spaced.

    `invariant` rows are the same bits however many there are.
    """
    if not supports_softmax(x, out):
        raise ValueError(f"softmax: no kernel for {name_of(x)}{list(x.shape)} -> {name_of(out)}{list(out.shape)}")
    rows, cols, *strides = *rows_of(x), rows_of(out)[2]
    x_stride, out_stride = (s if rows > 1 else cols for s in strides)  # one row has the kernel of many
    if not rows * cols:
        return []
    args = {"x": x, "out": out, "cols": cols, "x_stride": fold_one(x_stride), "out_stride": fold_one(out_stride)}
    tile = row_tile(rows_seen(rows, invariant=invariant), cols)
    if tile is None:
        constexprs = {"LOG": log, "BLOCK": LONG_BLOCK}
        return [launcher.launch(softmax_online_kernel, (rows,), args, constexprs, num_warps=8)]
    constexprs = {"LOG": log, "ROWS": tile.rows, "COLS": tile.cols}
    grid = (ceil_div(rows, tile.rows),)
    args = of_batch({**args, "rows": rows}, "rows", invariant=invariant)
    return [launcher.launch(softmax_kernel, grid, args, constexprs, num_warps=tile.warps)]
