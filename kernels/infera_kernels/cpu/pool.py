"""Two-dimensional pooling on NumPy, one axis after the other, a cache-sized block of planes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.conv_planes import Pair
from infera_kernels.cpu.elementwise import call, const
from infera_kernels.portable.pool import counts, lowest
from infera_kernels.portable.windows import Pads

BLOCK_BYTES = 1 << 18
"""Planes, intermediate and result of one block."""


def max_pool2d(
    x: Array, y: Array, scratch: Scratch, *, kernel: Sequence[int], strides: Pair, dilations: Pair, pads: Pads
) -> list[Call]:
    """y (N, C, OH, OW) = the maxima of x (N, C, H, W) under each window; contiguous, of one dtype."""
    none = const(lowest(np, y.dtype), y)
    calls: list[Call] = []
    for source, rows, target in _blocks(x, y, scratch):
        calls += _reduce(np.maximum, none, source, rows, 1, kernel[0], strides[0], dilations[0], pads[0][0])
        calls += _reduce(np.maximum, none, rows, target, 2, kernel[1], strides[1], dilations[1], pads[1][0])
    return calls


def average_pool2d(
    x: Array,
    y: Array,
    scratch: Scratch,
    *,
    kernel: Sequence[int],
    strides: Pair,
    dilations: Pair,
    pads: Pads,
    include_pad: bool,
) -> list[Call]:
    """y (N, C, OH, OW) = the means of x (N, C, H, W) under each window; contiguous, of one floating dtype."""
    size = counts(
        np, x.shape[2:], y.shape[2:], kernel=kernel, strides=strides, dilations=dilations, pads=pads,
        include_pad=include_pad,
    )  # fmt: skip
    weights = (1 / size.astype(np.float64)).astype(y.dtype)
    scale = weights if (weights != weights[0, 0]).any() else const(weights[0, 0], y)
    zero = const(0, y)
    calls: list[Call] = []
    for source, rows, target in _blocks(x, y, scratch):
        calls += _reduce(np.add, zero, source, rows, 1, kernel[0], strides[0], dilations[0], pads[0][0])
        calls += _reduce(np.add, zero, rows, target, 2, kernel[1], strides[1], dilations[1], pads[1][0])
        calls.append((np.multiply, (target, scale, target)))
    return calls


def global_average_pool(x: Array, y: Array, scratch: Scratch) -> list[Call]:
    """y (N, C, 1...) = the mean of each plane of x (N, C, *spatial), as a product with a vector."""
    planes = y.size
    mean = scratch((x.size // planes,), x.dtype)
    fill = const(planes / x.size, x)
    return [(np.copyto, (mean, fill)), (np.matmul, (x.reshape(planes, -1), mean, y.reshape(planes)))]


def global_max_pool(x: Array, y: Array) -> list[Call]:
    """y (N, C, 1...) = the maximum of each plane of x (N, C, *spatial)."""
    return [(np.maximum.reduce, (x.reshape(y.size, -1), 1, None, y.reshape(y.size)))]


def _blocks(x: Array, y: Array, scratch: Scratch) -> Iterator[tuple[Array, Array, Array]]:
    """Blocks of planes: source (p, H, W), room for reduced rows (p, OH, W), target (p, OH, OW)."""
    planes = x.shape[0] * x.shape[1]
    source, target = x.reshape(planes, *x.shape[2:]), y.reshape(planes, *y.shape[2:])
    middle = (y.shape[2], x.shape[3])
    each = (source[0].size + middle[0] * middle[1] + target[0].size) * x.itemsize
    step = max(1, min(planes, BLOCK_BYTES // each))
    room = scratch((step, *middle), x.dtype)
    for start in range(0, planes, step):
        part = slice(start, min(start + step, planes))
        yield source[part], room[: part.stop - start], target[part]


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
