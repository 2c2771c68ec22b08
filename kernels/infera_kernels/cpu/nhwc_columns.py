"""Convolution as a product, channels last: a block of columns (im2col) at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from infera_kernels.calls import Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.conv_planes import Pair
from infera_kernels.cpu.nhwc_epilogue import Blocks
from infera_kernels.cpu.nhwc_pointwise import by_taps, grouped, packed
from infera_kernels.cpu.nhwc_product import block_bytes, product, slice_of
from infera_kernels.cpu.nhwc_rows import Window, images, in_parts, longest, moved, padded, room_for, spans
from infera_kernels.cpu.strides import strided

SHORT_RUN = 24
"""Elements that one row of a window reads; see `_shaped`."""


def copies_taps(w: Sequence[int], group: int) -> bool:
    """Whether `columns` copies the taps of weights (O, C / group, KH, KW) one by one: see `_shaped`."""
    return group == 1 and w[1] * w[3] < SHORT_RUN


def columns(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split,
    pack: Pack | None,
    window: Window,
    *,
    group: int,
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual); see `conv2d`. x has any strides."""
    c, o = x.shape[3], y.shape[3]
    kernel, taps = window.kernel, w.shape[1] * w.shape[2] * w.shape[3]
    height, width = window.out
    most = max(1, block_bytes() // (width * max(taps * group, o) * x.itemsize))
    rows = min(most, -(-y.shape[0] * height // split.threads)) * width
    once, weights = _weights(w, group, slice_of(rows, taps, o // group), scratch, pack)

    def part(start: int, stop: int) -> Iterator[Call]:
        step = longest(start, stop, most)
        blocks = Blocks(activation, b, residual, y, scratch, most=step, line=width)
        room = room_for(x, window, min(step, height), scratch)
        space = scratch((step * width * taps * group,), x.dtype)

        def calls() -> Iterator[Call]:
            yield from blocks.once
            for first, last in spans(start, stop, step):
                spread, matrices = _shaped(space, (last - first, width), (*kernel, c // group), group)
                for i, row, end, at in images(first, last, height):
                    band, load = padded(x[i], room, window, row, end)
                    yield from load
                    yield _gathered(spread[at], _windows(band, window, spread[at].shape))
                yield from product(matrices, weights, grouped(blocks.sums(first, last), group))
                yield from blocks.finish(first, last)

        return calls()

    return [*once, *in_parts(y.shape[0] * height, split, part)]


def _shaped(space: Array, pixels: Pair, window: tuple[int, int, int], group: int) -> tuple[Array, Array]:
    """Columns as (rows, OW, KH, KW, group, C / group) and as (group, pixels, taps).

    A pixel's taps lie side by side. Where few of them are so in x too, they are copied one by one all the same, and
    then the pixels lie side by side: that makes longer loops.
    """
    count, taps = math.prod(pixels), math.prod(window)
    if copies_taps((0, window[2], *window[:2]), group):
        cols = space[: taps * count].reshape(*window[:2], 1, window[2], *pixels)
        return cols.transpose(4, 5, 0, 1, 2, 3), cols.reshape(1, taps, count).transpose(0, 2, 1)
    cols = space[: group * count * taps].reshape(group, *pixels, *window)
    return cols.transpose(1, 2, 3, 4, 0, 5), cols.reshape(group, count, taps)


def _windows(band: Array, window: Window, shape: tuple[int, ...]) -> Array:
    """(rows, OW, KH, KW, group, C / group): what each output pixel sees of a band, as a view."""
    down, right, one = band.strides
    steps = (
        down * window.strides[0],
        right * window.strides[1],
        down * window.dilations[0],
        right * window.dilations[1],
    )
    return strided(band, shape, (*steps, shape[-1] * one, one))


def _gathered(target: Array, seen: Array) -> Call:
    """target[...] = seen, (rows, OW, KH, KW, group, C / group) each."""
    if target.strides[-1] != target.itemsize or seen.strides[-1] != seen.itemsize:
        return np.copyto, (target, seen)
    if target.shape[4] == 1 and seen.strides[3] == seen.shape[5] * seen.itemsize:
        target, seen = (_merged(a) for a in (target, seen))
    return moved(target, seen)


def _merged(a: Array) -> Array:
    """(rows, OW, KH, KW, 1, C) with KW and C as one axis."""
    return a.reshape(*a.shape[:3], a.shape[3] * a.shape[5], copy=False)


def _weights(w: Array, group: int, columns: int, scratch: Scratch, pack: Pack | None) -> tuple[list[Call], Array]:
    """(group, KH * KW * C / group, O / group), in slices where they may be packed, and the calls that make it."""
    if pack is not None:
        return [], packed(pack, group, columns)
    made = scratch((w[0].size, w.shape[0]), w.dtype)
    target = made.reshape(by_taps(w, group).shape)
    return [(np.copyto, (target, by_taps(w, group)))], grouped(made, group)[:, None]
