"""Two-dimensional pooling on NumPy, channels last: first down, then across, a cache-sized block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from infera_kernels.calls import Array, Call, Scratch, Split
from infera_kernels.cpu.conv_planes import Pair
from infera_kernels.cpu.elementwise import call, const
from infera_kernels.cpu.nhwc_rows import images, in_parts, longest, spans
from infera_kernels.portable.pool import counts, lowest
from infera_kernels.portable.windows import Pads

BLOCK_BYTES = 1 << 18
"""Input rows reduced to output rows, of one block."""


def max_pool2d(
    x: Array,
    y: Array,
    scratch: Scratch,
    split: Split,
    *,
    kernel: Sequence[int],
    strides: Pair,
    dilations: Pair,
    pads: Pads,
) -> list[Call]:
    """y (N, OH, OW, C) = the maxima of x (N, H, W, C) under each window, of one dtype.

    Both are contiguous or channel slices of contiguous arrays.
    """
    none = const(lowest(np, y.dtype), y)
    return _pool(np.maximum, none, None, x, y, scratch, split, kernel, strides, dilations, pads)


def average_pool2d(
    x: Array,
    y: Array,
    scratch: Scratch,
    split: Split,
    *,
    kernel: Sequence[int],
    strides: Pair,
    dilations: Pair,
    pads: Pads,
    include_pad: bool,
) -> list[Call]:
    """y (N, OH, OW, C) = the means of x (N, H, W, C) under each window, of one floating dtype; see `max_pool2d`."""
    size = counts(
        np, x.shape[1:3], y.shape[1:3], kernel=kernel, strides=strides, dilations=dilations, pads=pads,
        include_pad=include_pad,
    )  # fmt: skip
    weights = (1 / size.astype(np.float64)).astype(y.dtype)[:, :, None]
    return _pool(np.add, const(0, y), weights, x, y, scratch, split, kernel, strides, dilations, pads)


def global_average_pool(x: Array, y: Array, scratch: Scratch, split: Split) -> list[Call]:
    """y (N, 1, 1, C) = the mean over all pixels of x (N, H, W, C), as a product with a vector; see `max_pool2d`."""
    n, height, width, c = x.shape
    mean = scratch((1, height * width), x.dtype)
    pixels, target = x.reshape(n, -1, c, copy=False), y.reshape(n, 1, c, copy=False)

    def part(start: int, stop: int) -> list[Call]:
        return [(np.matmul, (mean, pixels[..., start:stop], target[..., start:stop]))]

    return [(np.copyto, (mean, const(1 / (height * width), x))), *in_parts(c, split, part)]


def global_max_pool(x: Array, y: Array, scratch: Scratch, split: Split) -> list[Call]:
    """y (N, 1, 1, C) = the maximum over all pixels of x (N, H, W, C); see `max_pool2d`."""
    n, c = x.shape[0], x.shape[3]
    pixels, target = x.reshape(n, -1, c, copy=False), y.reshape(n, c, copy=False)

    def part(start: int, stop: int) -> list[Call]:
        return [(np.maximum.reduce, (pixels[..., start:stop], 1, None, target[:, start:stop]))]

    return in_parts(c, split, part)


def _pool(
    ufunc: Callable[..., object],
    none: Array,
    scale: Array | None,
    x: Array,
    y: Array,
    scratch: Scratch,
    split: Split,
    kernel: Sequence[int],
    strides: Pair,
    dilations: Pair,
    pads: Pads,
) -> list[Call]:
    height, (width, c) = y.shape[1], x.shape[2:]
    most = max(1, BLOCK_BYTES // (width * c * x.itemsize * strides[0]))

    def part(start: int, stop: int) -> list[Call]:
        step = longest(start, stop, most)
        room = scratch((step, width, c), x.dtype)
        calls: list[Call] = []
        for first, last in spans(start, stop, step):
            for i, row, end in images(first, last, height):
                rows, block = room[: end - row], y[i, row:end]
                above = pads[0][0] - row * strides[0]
                calls += _reduce(ufunc, none, x[i], rows, 0, kernel[0], strides[0], dilations[0], above)
                calls += _reduce(ufunc, none, rows, block, 1, kernel[1], strides[1], dilations[1], pads[1][0])
                if scale is not None:
                    calls.append((np.multiply, (block, scale[row:end], block)))
        return calls

    return in_parts(y.shape[0] * height, split, part) if y.size else []


def _reduce(
    ufunc: Callable[..., object],
    none: Array,
    x: Array,
    y: Array,
    axis: int,
    kernel: int,
    stride: int,
    dilation: int,
    before: int,
) -> list[Call]:
    """y[o] = ufunc over k < kernel of x[o * stride + k * dilation - before] along `axis`; outside counts as nothing."""
    size, out = x.shape[axis], y.shape[axis]
    taps = []
    for k in range(kernel):
        shift = k * dilation - before
        first = max(0, -(shift // stride))
        count = min(out, (size - 1 - shift) // stride + 1) - first
        if count > 0:
            start = first * stride + shift
            taps.append((slice(first, first + count), slice(start, start + (count - 1) * stride + 1, stride)))
    lead = (slice(None),) * axis
    whole = next((t for t in taps if t[0] == slice(0, out)), None)
    calls: list[Call] = [(np.copyto, (y, none if whole is None else x[(*lead, whole[1])]))]
    for to, at in taps:
        if (to, at) != whole:
            calls.append(call(ufunc, y[(*lead, to)], x[(*lead, at)], y[(*lead, to)]))
    return calls
