"""Depthwise convolution and pooling, channels last: one pass over the input, the channels in SIMD lanes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call
from infera_kernels.jit.compiling import bound, compiled
from infera_kernels.jit.epilogue import activate, parameters
from infera_kernels.jit.functions import F

Pair = tuple[int, int]


@compiled
def _depthwise(
    x: Any, w: Any, bias: Any, residual: Any, y: Any, first: int, last: int,
    strides: Pair, before: Pair, dilations: Pair, code: Any, a: Any, b: Any,
) -> None:  # fmt: skip
    """Rows [first, last) of all images' rows of y (N, OH, OW, C)."""
    _, height, width, channels = x.shape
    rows, cols = y.shape[1:3]
    kh, kw = w.shape[:2]
    down, right = dilations
    for line in range(first, last):
        n, i = line // rows, line % rows
        top = i * strides[0] - before[0]
        inside = top >= 0 and top + (kh - 1) * down < height
        for j in range(cols):
            left = j * strides[1] - before[1]
            out = y[n, i, j]
            if inside and kh == 3 and kw == 3 and left >= 0 and left + 2 * right < width:
                x0, x1, x2 = x[n, top, left], x[n, top, left + right], x[n, top, left + 2 * right]
                middle, bottom = top + down, top + 2 * down
                x3, x4, x5 = x[n, middle, left], x[n, middle, left + right], x[n, middle, left + 2 * right]
                x6, x7, x8 = x[n, bottom, left], x[n, bottom, left + right], x[n, bottom, left + 2 * right]
                w0, w1, w2 = w[0, 0], w[0, 1], w[0, 2]
                w3, w4, w5 = w[1, 0], w[1, 1], w[1, 2]
                w6, w7, w8 = w[2, 0], w[2, 1], w[2, 2]
                for c in range(channels):
                    upper = bias[c] + x0[c] * w0[c] + x1[c] * w1[c] + x2[c] * w2[c]
                    lower = x3[c] * w3[c] + x4[c] * w4[c] + x5[c] * w5[c]
                    out[c] = upper + lower + x6[c] * w6[c] + x7[c] * w7[c] + x8[c] * w8[c]
                continue
            for c in range(channels):
                out[c] = bias[c]
            for u in range(kh):
                h = top + u * down
                if h < 0 or h >= height:
                    continue
                for v in range(kw):
                    k = left + v * right
                    if k < 0 or k >= width:
                        continue
                    tap, factor = x[n, h, k], w[u, v]
                    for c in range(channels):
                        out[c] += tap[c] * factor[c]
        line_out = y[n, i].reshape(cols * channels)
        if residual.size:
            more = residual[n, i].reshape(cols * channels)
            for c in range(line_out.size):
                line_out[c] += more[c]
        activate(line_out, code, a, b)


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
    (N, OH, OW, C), float32, contiguous."""
    bias = np.zeros(w.shape[2], np.float32) if b is None else b
    more = np.empty((0, 0, 0, 0), np.float32) if residual is None else residual
    before = (pads[0][0], pads[1][0])
    code, low, high = parameters(activation, given)
    return [
        [bound(_depthwise, x, w, bias, more, y, first, last, strides, before, dilations, code, low, high)]
        for first, last in spans(y.shape[0] * y.shape[1], parts)
    ]


def max_pool(
    x: Array, y: Array, *, kernel: Pair, strides: Pair, dilations: Pair, pads: tuple[Pair, Pair], parts: int = 1
) -> list[list[Call]]:
    """y (N, OH, OW, C) = the maxima of x (N, H, W, C) under each window, in as many parts; float32, contiguous."""
    before = (pads[0][0], pads[1][0])
    return [
        [bound(_max_pool, x, y, first, last, kernel, strides, before, dilations)]
        for first, last in spans(y.shape[0] * y.shape[1], parts)
    ]


def spans(count: int, parts: int) -> list[Pair]:
    """[0, count) in at most so many ranges of nearly equal length, none of them empty."""
    edges = [count * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(edges) if b > a]
