"""Depthwise convolution and pooling, channels last: one pass over the input, the channels in SIMD lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.parts import spans
from infera_kernels.jit.codes import CLIP, NONE
from infera_kernels.jit.compiling import bound, compiled
from infera_kernels.jit.epilogue import activate, parameters
from infera_kernels.jit.functions import F
from infera_kernels.jit.microkernel import I64, TILE, VECTOR, address_of, clamp, load, multiply_add, spread

Pair = tuple[int, int]


LEAST_CHANNELS = TILE.lanes
"""Of a depthwise convolution here."""

PIXELS = 4
"""Neighbours computed together, which share the loads of a weight."""


@intrinsic
def filter_pixels(
    context: Any, pixels: Any, x: Any, step: Any, offsets: Any, places: Any, taps: Any, w: Any, bias: Any, y: Any,
    channels: Any, low: Any, high: Any,
) -> Any:  # fmt: skip
    """One pixel of a depthwise convolution, or PIXELS neighbours; addresses and strides in bytes:

    y[p, c] = clamp(bias[c] + sum over t < taps of x[p * step + offsets[t] + c] * w[places[t] + c], low, high), for at
    least TILE.lanes channels: the last vector may overlap the one before.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pixels, *operands = args
        with builder.if_else(builder.icmp_signed("==", pixels, ir.Constant(I64, PIXELS))) as (several, single):
            with several:
                _filter(builder, PIXELS, *operands)
            with single:
                _filter(builder, 1, *operands)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 10, types.float32, types.float32), generate


def _filter(
    builder: Any, pixels: int, x: Any, step: Any, offsets: Any, places: Any, taps: Any, w: Any, bias: Any, y: Any,
    channels: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    """Emits `filter_pixels` for so many pixels."""
    least, most = spread(builder, low), spread(builder, high)
    lanes, width = ir.Constant(I64, TILE.lanes), ir.Constant(I64, 4)
    count = builder.sdiv(builder.add(channels, ir.Constant(I64, TILE.lanes - 1)), lanes)
    sums = [cgutils.alloca_once(builder, VECTOR) for _ in range(pixels)]
    with cgutils.for_range(builder, count) as loop:
        first = builder.mul(loop.index, lanes)
        last = builder.sub(channels, lanes)
        first = builder.select(builder.icmp_signed(">", first, last), last, first)
        shift = builder.mul(first, width)
        start = load(builder, builder.add(bias, shift), 0)
        for total in sums:
            builder.store(start, total)
        base, weights = builder.add(x, shift), builder.add(w, shift)
        with cgutils.for_range(builder, taps) as tap:
            at = builder.mul(tap.index, ir.Constant(I64, 8))
            offset, place = (builder.load(address_of(builder, builder.add(t, at), 0, I64)) for t in (offsets, places))
            factor = load(builder, builder.add(weights, place), 0)
            source = builder.add(base, offset)
            for p, total in enumerate(sums):
                value = load(builder, builder.add(source, builder.mul(step, ir.Constant(I64, p))), 0)
                builder.store(multiply_add(builder, value, factor, builder.load(total)), total)
        out = builder.add(y, shift)
        for p, total in enumerate(sums):
            pixel = builder.add(out, builder.mul(builder.mul(channels, width), ir.Constant(I64, p)))
            made = clamp(builder, builder.load(total), least, most)
            builder.store(made, address_of(builder, pixel, 0, VECTOR), align=4)


@compiled
def _depthwise(
    x: Any, w: Any, bias: Any, residual: Any, y: Any, tables: Any, first: int, last: int,
    strides: Pair, before: Pair, dilations: Pair, low: Any, high: Any, code: int, a: Any, b: Any,
) -> None:  # fmt: skip
    """Rows [first, last) of all images' rows of y (N, OH, OW, C); tables (2, KH * KW) is scratch."""
    _, height, width, channels = x.shape
    rows, cols = y.shape[1:3]
    kh, kw = w.shape[:2]
    pixel = channels * 4
    step = strides[1] * pixel
    source, weights, start, target = x.ctypes.data, w.ctypes.data, bias.ctypes.data, y.ctypes.data
    offsets, places = tables[0], tables[1]
    where, which = offsets.ctypes.data, places.ctypes.data
    for line in range(first, last):
        n, i = line // rows, line % rows
        top = i * strides[0] - before[0]
        origin = source + (n * height + top) * width * pixel
        filled = -1
        j = 0
        while j < cols:
            left = j * strides[1] - before[1]
            inside = left >= 0 and left + (kw - 1) * dilations[1] < width
            if not inside or filled != 1:
                taps = 0
                for u in range(kh):
                    h = top + u * dilations[0]
                    for v in range(kw):
                        k = left + v * dilations[1]
                        if 0 <= h < height and 0 <= k < width:
                            offsets[taps] = (u * dilations[0] * width + v * dilations[1]) * pixel
                            places[taps] = (u * kw + v) * pixel
                            taps += 1
                filled = 1 if inside else 0
            right = left + (PIXELS - 1) * strides[1] + (kw - 1) * dilations[1]
            pixels = PIXELS if inside and j + PIXELS <= cols and right < width else 1
            filter_pixels(
                pixels, origin + left * pixel, step, where, which, taps, weights, start,
                target + (line * cols + j) * pixel, channels, low, high,
            )  # fmt: skip
            j += pixels
        if code != NONE:
            out = y[n, i].reshape(cols * channels)
            if residual.size:
                more = residual[n, i].reshape(cols * channels)
                for c in range(out.size):
                    out[c] += more[c]
            activate(out, code, a, b)


@compiled
def _max_pool(
    x: Any, y: Any, first: int, last: int, kernel: Pair, strides: Pair, before: Pair, dilations: Pair
) -> None:
    """Rows [first, last) of all images' rows of y (N, OH, OW, C)."""
    _, height, width, channels = x.shape
    rows, cols = y.shape[1:3]
    for line in range(first, last):
        n, i = line // rows, line % rows
        for j in range(cols):
            out = y[n, i, j]
            for c in range(channels):
                out[c] = F(-np.inf)
            for u in range(kernel[0]):
                h = i * strides[0] - before[0] + u * dilations[0]
                if h < 0 or h >= height:
                    continue
                for v in range(kernel[1]):
                    k = j * strides[1] - before[1] + v * dilations[1]
                    if k < 0 or k >= width:
                        continue
                    tap = x[n, h, k]
                    for c in range(channels):
                        # the comparisons keep a NaN on either side
                        out[c] = out[c] if out[c] > tap[c] or out[c] != out[c] else tap[c]


def depthwise(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    *,
    strides: Pair,
    pads: tuple[Pair, Pair],
    dilations: Pair,
    activation: str = "",
    given: Sequence[float] = (),
    residual: Array | None = None,
    parts: int = 1,
) -> list[list[Call]]:
    """y = activation(conv(x, w) + b + residual) in as many parts; x (N, H, W, C), w (KH, KW, C), y and residual
    (N, OH, OW, C), float32, contiguous, C at least TILE.lanes."""
    bias = np.zeros(w.shape[2], np.float32) if b is None else b
    more = np.empty((0, 0, 0, 0), np.float32) if residual is None else residual
    before = (pads[0][0], pads[1][0])
    code, *bounds = parameters(activation, given)
    low, high = F(-np.inf), F(np.inf)
    if residual is None and code == CLIP:
        code, (low, high) = NONE, bounds
    elif residual is not None and code == NONE:
        code, bounds = CLIP, [low, high]
    return [
        [
            bound(
                _depthwise, x, w, bias, more, y, scratch((2, w.shape[0] * w.shape[1]), np.int64), start, stop,
                strides, before, dilations, low, high, code, *bounds,
            )
        ]
        for start, stop in spans(y.shape[0] * y.shape[1], parts)
    ]  # fmt: skip


def max_pool(
    x: Array, y: Array, *, kernel: Pair, strides: Pair, dilations: Pair, pads: tuple[Pair, Pair], parts: int = 1
) -> list[list[Call]]:
    """y (N, OH, OW, C) = the maxima of x (N, H, W, C) under each window, in as many parts; float32, contiguous."""
    before = (pads[0][0], pads[1][0])
    return [
        [bound(_max_pool, x, y, first, last, kernel, strides, before, dilations)]
        for first, last in spans(y.shape[0] * y.shape[1], parts)
    ]
