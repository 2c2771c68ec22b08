"""Convolution with few output channels, channels last: one product for all taps, then a sum of shifted planes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from infera_kernels.calls import Array, Call, Scratch, Split
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.nhwc_epilogue import epilogue
from infera_kernels.cpu.nhwc_product import product
from infera_kernels.cpu.nhwc_rows import Window, flat, images, in_parts, longest, spans

BLOCK_BYTES = 1 << 20
"""Products of one block."""


def shifted(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split,
    window: Window,
    *,
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual) with stride 1; see `conv2d`.

    Columns would copy each element of x as often as the kernel has taps, for a product that hardly uses it.
    """
    c, o = x.shape[3], y.shape[3]
    height, width = window.out
    weights = scratch((c, *window.kernel, o), w.dtype)
    products_each = weights[0].size
    most = max(1, BLOCK_BYTES // (x.shape[2] * products_each * x.itemsize))

    def part(start: int, stop: int) -> Iterator[Call]:
        step = longest(start, stop, most)
        once, finish = epilogue(activation, b, step * width, o, y, scratch)
        rows = min(window.seen(0, min(step, height)), x.shape[1])
        room, sums = scratch((rows * x.shape[2], products_each), x.dtype), scratch((o, step, width), x.dtype)
        aside = None if residual is None else scratch((step, width, o), x.dtype)

        def calls() -> Iterator[Call]:
            yield from once
            for first, last in spans(start, stop, step):
                for i, row, end, _ in images(first, last, height):
                    top = row - window.before[0]
                    low, high = max(0, top), max(0, min(x.shape[1], top + window.seen(0, end - row)))
                    total, block = sums[:, : end - row], y[i, row:end]
                    yield np.copyto, (total, total.dtype.type(0))
                    if high > low:
                        products = room[: (high - low) * x.shape[2]]
                        yield from product(flat(x[i, low:high])[None], weights.reshape(1, 1, c, -1), products[None])
                        planes = products.reshape(high - low, -1, *window.kernel, o).transpose(2, 3, 4, 0, 1)
                        shift = (top - low, -window.before[1])
                        for to, tap in _overlaps(total, planes, shift, window):
                            yield np.add, (to, tap, to)
                    made = block if aside is None else aside[: end - row]
                    yield np.copyto, (made, total.transpose(1, 2, 0))
                    if residual is None:
                        yield from finish(flat(block), None)
                    else:
                        yield from finish(made, residual[i, row:end], block)

        return calls()

    return [(np.copyto, (weights, w.transpose(1, 2, 3, 0))), *in_parts(y.shape[0] * height, split, part)]


def _overlaps(sums: Array, planes: Array, shift: tuple[int, int], window: Window) -> Iterator[tuple[Array, Array]]:
    """For each tap, the part of `sums` (O, rows, OW) that it reaches, and what of `planes` goes there."""
    for i, j in np.ndindex(*window.kernel):
        to, at = [], []
        for axis, tap in enumerate((i, j)):
            offset = shift[axis] + tap * window.dilations[axis]
            start = max(0, -offset)
            stop = max(start, min(sums.shape[1 + axis], planes.shape[3 + axis] - offset))
            to.append(slice(start, stop))
            at.append(slice(start + offset, stop + offset))
        target = sums[:, *to]
        if target.size:
            yield target, planes[i, j][:, *at]
