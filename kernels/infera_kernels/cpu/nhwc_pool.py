"""Two-dimensional pooling on NumPy, channels last: first down, then across, a cache-sized block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from infera_kernels.calls import Array, Call, Scratch, Split
from infera_kernels.cpu.caches import block_of
from infera_kernels.cpu.conv_planes import Pair
from infera_kernels.cpu.elementwise import call, const
from infera_kernels.cpu.nhwc_rows import images, in_parts, is_slice, longest, moved, spans
from infera_kernels.cpu.parts import worth
from infera_kernels.portable.pool import counts, lowest
from infera_kernels.portable.windows import Pads

ELEMENT_NS = 0.2
"""What an element takes to be read and combined, about."""

BLOCK_BYTES = 1 << 18
"""Input rows reduced to output rows, of one block."""


ALIKE = 16
"""Columns of a matrix that BLAS' product with a vector sums in one order, if there are multiples of so many."""


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
    weights = (1 / size.astype(np.float64)).astype(y.dtype)
    scale = weights[:, :, None] if (weights != weights[0, 0]).any() else const(weights[0, 0], y)
    return _pool(np.add, const(0, y), scale, x, y, scratch, split, kernel, strides, dilations, pads)


def global_average_pool(x: Array, y: Array, scratch: Scratch, split: Split) -> list[Call]:
    """y (N, 1, 1, C) = the mean over all pixels of x (N, H, W, C), as a product with a vector; see `max_pool2d`.

    Channels that are alike have one mean: the last `ALIKE`, where C is no multiple of it, are multiplied apart.
    """
    n, height, width, c = x.shape
    mean = scratch((1, height * width), x.dtype)
    pixels, target = x.reshape(n, -1, c, copy=False), y.reshape(n, 1, c, copy=False)

    def part(start: int, stop: int) -> list[Call]:
        first, last = start * ALIKE, min(stop * ALIKE, c)
        whole = last - last % ALIKE
        ranges = [(first, whole), (max(0, last - ALIKE), last)] if whole < last else [(first, last)]
        return [(np.matmul, (mean, pixels[..., a:b], target[..., a:b])) for a, b in ranges if a < b]

    parts = in_parts(-(-c // ALIKE), worth(ELEMENT_NS * x.size, split), part)
    return [(np.copyto, (mean, const(1 / (height * width), x))), *parts]


def global_max_pool(x: Array, y: Array, scratch: Scratch, split: Split) -> list[Call]:
    """y (N, 1, 1, C) = the maximum over all pixels of x (N, H, W, C); see `max_pool2d`."""
    n, c = x.shape[0], x.shape[3]
    pixels, target = x.reshape(n, -1, c, copy=False), y.reshape(n, c, copy=False)

    def part(start: int, stop: int) -> list[Call]:
        return [(np.maximum.reduce, (pixels[..., start:stop], 1, None, target[:, start:stop]))]

    return in_parts(c, worth(ELEMENT_NS * x.size, split), part)


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
    """`ufunc` over each window, times `scale`, (OH, OW, 1) or 0-d.

    A horizontal stride parts the columns into phases first, so that both operands of `ufunc` are rows of pixels. Where
    y is a channel slice its own rows are no such ones: they are made aside.
    """
    if not y.size:
        return []
    height, (width, c) = y.shape[1], x.shape[2:]
    stride = strides[1]
    across = -(-width // stride)
    most = max(1, block_of(BLOCK_BYTES) // (width * c * x.itemsize * strides[0]))
    right = list(_taps(width, y.shape[2], kernel[1], stride, dilations[1], pads[1][0]))

    def part(start: int, stop: int) -> Iterator[Call]:
        step = min(height, longest(start, stop, most))
        room, apart = (scratch((step, across * stride, c), x.dtype) for _ in range(2))
        aside = scratch((step, *y.shape[2:]), x.dtype) if is_slice(y) else None

        def calls() -> Iterator[Call]:
            for first, last in spans(start, stop, step):
                for i, row, end, _ in images(first, last, height):
                    rows = room[: end - row, :width]
                    block = y[i, row:end] if aside is None else aside[: end - row]
                    above = pads[0][0] - row * strides[0]
                    down = _taps(x.shape[1], end - row, kernel[0], strides[0], dilations[0], above)
                    yield from _reduced(ufunc, none, rows, [(rows[to], x[i, at]) for to, at in down])
                    phases = room[None, : end - row]
                    if stride > 1:
                        phases = apart[: end - row].reshape(stride, end - row, across, c)
                        yield moved(phases.transpose(1, 2, 0, 3), room[: end - row].reshape(-1, across, stride, c))
                    taps = [
                        (block[:, to], phases[at.start % stride, :, at.start // stride :][:, : to.stop - to.start])
                        for to, at in right
                    ]
                    yield from _reduced(ufunc, none, block, taps)
                    if scale is not None:
                        yield np.multiply, (block, scale[row:end] if scale.ndim else scale, block)
                    if aside is not None:
                        yield np.copyto, (y[i, row:end], block)

        return calls()

    work = ELEMENT_NS * (kernel[0] * x.size + kernel[1] * y.size)
    return in_parts(y.shape[0] * height, worth(work, split), part)


def _taps(size: int, out: int, kernel: int, stride: int, dilation: int, before: int) -> Iterator[tuple[slice, slice]]:
    """For each k < kernel, the outputs o where o * stride + k * dilation - before is in range(size), and these."""
    for k in range(kernel):
        shift = k * dilation - before
        first = max(0, -(shift // stride))
        count = min(out, (size - 1 - shift) // stride + 1) - first
        if count > 0:
            start = first * stride + shift
            yield slice(first, first + count), slice(start, start + (count - 1) * stride + 1, stride)


def _reduced(ufunc: Callable[..., object], none: Array, y: Array, taps: Sequence[tuple[Array, Array]]) -> list[Call]:
    """y = ufunc over the sources of (part of y, source); `none` where there is no source."""
    whole = [source for part, source in taps if part.shape == y.shape]
    rest = [(part, source) for part, source in taps if part.shape != y.shape]
    calls: list[Call] = []
    if len(whole) > 1:
        calls.append(call(ufunc, whole[0], whole[1], y))
    else:
        calls.append((np.copyto, (y, whole[0] if whole else none)))
    calls += [call(ufunc, y, source, y) for source in whole[2:]]
    return calls + [call(ufunc, part, source, part) for part, source in rest]
