"""Depthwise convolution, channels last: multiply-adds of whole rows."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_kernels.calls import Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.nhwc_epilogue import epilogue
from infera_kernels.cpu.nhwc_rows import Window, flat, images, in_parts, longest, padded, room_for, spans

BLOCK_BYTES = 1 << 18
"""Output of one block."""


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
    pixels where the horizontal stride is 1: then the weights are repeated for every pixel of a row.
    """
    height, width = window.out
    c = x.shape[3]
    rows = window.strides[1] == 1
    once, weights = _weights(w, width if rows else 1, scratch, pack)
    target, rest = flat(y), None if residual is None else flat(residual)
    dense = y.flags.c_contiguous
    most = max(1, BLOCK_BYTES // (width * c * y.itemsize))

    def part(start: int, stop: int) -> list[Call]:
        step = longest(start, stop, most)
        calls, finish = epilogue(activation, b, step * width, c, y, scratch)
        room = room_for(x, window, min(step, height), scratch, dense=rows)
        sums = None if dense else scratch((step * width, c), y.dtype)
        for first, last in spans(start, stop, step):
            pixels = slice(first * width, last * width)
            block = target[pixels] if sums is None else sums[: (last - first) * width]
            done = 0
            for i, row, end in images(first, last, height):
                band, load = padded(x[i], room, window, row, end)
                into = block[done * width : (done + end - row) * width]
                calls += [*load, _multiply_add(band, weights, into.reshape(end - row, width, c), window)]
                done += end - row
            calls += finish(block, None if rest is None else rest[pixels])
            if sums is not None:
                calls.append((np.copyto, (target[pixels], block)))
        return calls

    return [*once, *in_parts(y.shape[0] * height, split, part)]


def _multiply_add(band: Array, weights: Array, y: Array, window: Window) -> Call:
    """y (rows, OW, C) = the weighted sums of what its pixels see of a band."""
    down, right, one = band.strides
    rows, width, c = y.shape
    step, taps = down * window.strides[0], (down * window.dilations[0], right * window.dilations[1])
    if window.strides[1] == 1:
        seen = as_strided(band, (rows, *window.kernel, width * c), (step, *taps, one), writeable=False)
        return partial(np.einsum, out=y.reshape(rows, -1)), ("rijx,ijx->rx", seen, weights)
    steps = (step, right * window.strides[1], *taps, one)
    seen = as_strided(band, (rows, width, *window.kernel, c), steps, writeable=False)
    return partial(np.einsum, out=y), ("rwijc,ijc->rwc", seen, weights)


def _weights(w: Array, repeat: int, scratch: Scratch, pack: Pack | None) -> tuple[list[Call], Array]:
    """(KH, KW, repeat * C), and the calls that make it."""

    def in_order(w: Array) -> Array:
        return np.broadcast_to(w[:, 0].transpose(1, 2, 0)[:, :, None], (*w.shape[2:], repeat, w.shape[0]))

    shape = (*w.shape[2:], repeat * w.shape[0])
    if pack is not None:
        return [], pack(f"depthwise{repeat}", lambda w: np.ascontiguousarray(in_order(w))).reshape(shape)
    made = scratch(shape, w.dtype)
    return [(np.copyto, (made.reshape(*w.shape[2:], repeat, -1), in_order(w)))], made
