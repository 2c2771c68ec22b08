"""Depthwise convolution, channels last: multiply-adds of whole rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from infera_kernels.calls import Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.nhwc_epilogue import epilogue
from infera_kernels.cpu.nhwc_rows import Window, flat, images, in_parts, longest, padded, room_for, spans
from infera_kernels.cpu.strides import strided

BLOCK_BYTES = 1 << 20
"""Output of one block. Smaller blocks load more rows twice."""


def depthwise(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split,
    pack: Pack | None,
    window: Window,
    *,
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual) with w (C, 1, KH, KW); see `conv2d`.

    np.einsum multiplies and adds in one pass, where np.multiply and np.add make two. Its inner loop is a whole row of
    pixels, with the weights repeated for every pixel. A horizontal stride s parts the columns of x and of the kernel
    into s phases, each of stride 1, whose sums are added.
    """
    height, width = window.out
    c = x.shape[3]
    once, weights = _weights(w, width, scratch, pack)
    phases = list(_phases(window))
    target, rest = flat(y), None if residual is None else flat(residual)
    dense = y.flags.c_contiguous
    most = max(1, BLOCK_BYTES // (width * c * y.itemsize))

    def part(start: int, stop: int) -> Iterator[Call]:
        step = longest(start, stop, most)
        first_of_all, finish = epilogue(activation, b, step * width, c, y, scratch)
        views = [x[:, :, phase.first :: window.strides[1]] for phase in phases]
        rooms = [
            room_for(view, phase.window, min(step, height), scratch, dense=True)
            for view, phase in zip(views, phases, strict=True)
        ]
        sums = None if dense else scratch((step * width, c), y.dtype)
        more = scratch((step, width * c), y.dtype) if len(phases) > 1 else None

        def calls() -> Iterator[Call]:
            yield from first_of_all
            for first, last in spans(start, stop, step):
                pixels = slice(first * width, last * width)
                block = target[pixels] if sums is None else sums[: (last - first) * width]
                for i, row, end, at in images(first, last, height):
                    into = block.reshape(-1, width * c)[at]
                    for k, (phase, view, room) in enumerate(zip(phases, views, rooms, strict=True)):
                        band, load = padded(view[i], room, phase.window, row, end)
                        made = into if more is None or k == 0 else more[: end - row]
                        yield from load
                        yield _multiply_add(band, weights[:, phase.taps], made, phase.window)
                        if made is not into:
                            yield np.add, (into, made, into)
                yield from finish(block, None if rest is None else rest[pixels])
                if sums is not None:
                    yield np.copyto, (target[pixels], block)

        return calls()

    return [*once, *in_parts(y.shape[0] * height, split, part)]


class Phase(NamedTuple):
    """The columns first, first + stride, ... of x, the taps of the kernel that see them, and how."""

    first: int
    taps: slice
    window: Window


def _phases(window: Window) -> Iterator[Phase]:
    stride, dilation, before = (pair[1] for pair in (window.strides, window.dilations, window.before))
    every = stride // math.gcd(stride, dilation)
    for tap in range(min(every, window.kernel[1])):
        shift, first = divmod(tap * dilation - before, stride)
        taps = slice(tap, None, every)
        yield Phase(
            first + max(0, shift) * stride,
            taps,
            Window(
                window.out,
                (window.kernel[0], len(range(window.kernel[1])[taps])),
                (window.strides[0], 1),
                (window.dilations[0], every * dilation // stride),
                (window.before[0], max(0, -shift)),
            ),
        )


def _multiply_add(band: Array, weights: Array, y: Array, window: Window) -> Call:
    """y (rows, OW * C) = the weighted sums of what its pixels see of a band."""
    down, right, one = band.strides
    steps = (down * window.strides[0], down * window.dilations[0], right * window.dilations[1], one)
    seen = strided(band, (y.shape[0], *window.kernel, y.shape[1]), steps)
    return partial(np.einsum, out=y), ("rijx,ijx->rx", seen, weights)


def _weights(w: Array, width: int, scratch: Scratch, pack: Pack | None) -> tuple[list[Call], Array]:
    """(KH, KW, width * C), and the calls that make it.

    What is packed is long enough for the next power of two: of images of many widths few forms are kept.
    """
    taps, c = w.shape[2:], w.shape[0]
    repeat = width if pack is None else 1 << (width - 1).bit_length()

    def in_order(w: Array) -> Array:
        return np.broadcast_to(w[:, 0].transpose(1, 2, 0)[:, :, None], (*taps, repeat, c))

    if pack is not None:
        made = pack(f"depthwise{repeat}", lambda w: np.ascontiguousarray(in_order(w)))
        return [], made.reshape(*taps, -1)[:, :, : width * c]
    made = scratch((*taps, repeat * c), w.dtype)
    return [(np.copyto, (made.reshape(*taps, repeat, c), in_order(w)))], made
