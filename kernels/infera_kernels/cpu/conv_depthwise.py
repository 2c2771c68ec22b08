"""Depthwise convolution: one filter a channel, as a matrix-vector product over shifted copies of its padded plane."""

from __future__ import annotations

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.conv_epilogue import Activation, activator
from infera_kernels.cpu.conv_planes import Pair, planes

BLOCK_BYTES = 1 << 21
"""Planes, columns and sums of one block of channels."""


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
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual) with w (C, 1, KH, KW); see `conv2d`.

    The sums keep the padded plane's row pitch: a tap is then one long copy, and the columns past the output's width
    are computed from whatever follows and dropped at the end.
    """
    n, c = x.shape[:2]
    height, width = y.shape[2:]
    kh, kw = w.shape[2:]
    taps = kh * kw
    step = max(1, min(c, BLOCK_BYTES // (_elements((height, width), (kh, kw), strides, dilations) * x.itemsize)))
    before = (pads[0][0], pads[1][0])
    padded = planes(
        scratch, step, (height, width), (kh, kw), x.dtype, strides=strides, dilations=dilations, before=before
    )
    count = height * padded.width
    cols, sums = scratch((step, taps, count), x.dtype), scratch((step, 1, count), x.dtype)
    calls, apply = activator(activation, step * height * width, y.dtype, scratch)
    calls.append(padded.clear())
    for i in range(n):
        for start in range(0, c, step):
            channels = slice(start, min(start + step, c))
            size = channels.stop - start
            part, columns, total = padded.head(size), cols[:size], sums[:size]
            calls += part.load(x[i, channels])
            calls += [(np.copyto, (columns[:, k], part.flat_tap(k // kw, k % kw, count))) for k in range(taps)]
            calls.append((np.matmul, (w[channels].reshape(size, 1, taps), columns, total)))
            made = total.reshape(size, height, padded.width)[:, :, :width]
            block = y[i, channels]
            if b is None:
                calls.append((np.copyto, (block, made)))
            else:
                calls.append((np.add, (made, b[channels].reshape(size, 1, 1), block)))
            if residual is not None:
                calls.append((np.add, (block, residual[i, channels], block)))
            calls += apply(block, block)
    return calls


def _elements(out: Pair, kernel: Pair, strides: Pair, dilations: Pair) -> int:
    """Elements that one channel keeps in use."""
    rows, cols = (o + (k - 1) * d // s for o, k, s, d in zip(out, kernel, strides, dilations, strict=True))
    return rows * cols * strides[0] * strides[1] + (kernel[0] * kernel[1] + 1) * out[0] * cols
