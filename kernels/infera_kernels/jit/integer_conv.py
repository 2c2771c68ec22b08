"""Convolutions of 8-bit integers, quantised again: exact sums of windows that are read where they lie.

The input is copied once, to channels last between its padding, in the type that the tile multiplies. The windows of a
line of pixels are then rows a fixed distance apart, as in `conv`: no columns are made. A run of values is rounded up to
whole words; what the last one reads beyond it meets weights of 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call, Pack, Scratch
from infera_kernels.cpu.parts import spans
from infera_kernels.jit import integers
from infera_kernels.jit.compiling import bound, compiled, exact
from infera_kernels.jit.dot_tile import LEFT_TYPES, PIXELS, U8, DType, dot_tile, filter_channels, group
from infera_kernels.jit.functions import F, saturated
from infera_kernels.jit.microkernel import TILE

ROWS, COLUMNS = TILE.rows, TILE.columns
Pair = tuple[int, int]

BLOCK_BYTES = 1 << 17
"""Of sums and of input in a block of lines, for which a panel of weights is read once."""


@compiled
def _pad(x: Any, last: bool, lift: Any, fill: Any, top: int, left: int, p: Any) -> None:
    """p (N, H', W' C) = x + lift within a border of `fill`; x (N, H, W, C), or (N, C, H, W) where it is not `last`."""
    height, width, channels = (x.shape[1], x.shape[2], x.shape[3]) if last else (x.shape[2], x.shape[3], x.shape[1])
    for n in range(p.shape[0]):
        for i in range(p.shape[1]):
            line = p[n, i]
            if i < top or i >= top + height:
                begin, end = line.size, line.size
            else:
                begin, end = left * channels, (left + width) * channels
            for k in range(begin):
                line[k] = fill
            for k in range(end, line.size):
                line[k] = fill
            if begin < end:
                inner = line[begin:end]
                if last:
                    source = x[n, i - top].reshape(end - begin)
                    for k in range(inner.size):
                        inner[k] = np.int32(np.int32(source[k]) + lift)
                else:
                    for c in range(channels):
                        source = x[n, c, i - top]
                        for j in range(width):
                            inner[j * channels + c] = np.int32(np.int32(source[j]) + lift)


@exact
def _requantize(sums: Any, factor: Any, point: Any, low: Any, high: Any, row: Any, y: Any, last: bool, i: int) -> None:
    """One line (W, C) of sums to line i of an image y (H, W, C), or (C, H, W) where channels are not `last`, by way of
    `row`: saturate(round(sums factor) + point)."""
    line = y[i] if last else row
    for j in range(line.shape[0]):
        source, target = sums[j], line[j]
        for c in range(target.size):
            target[c] = np.int32(saturated(np.rint(F(source[c]) * factor[c]) + point, low, high))
    if not last:
        flat, channels = row.reshape(row.size), row.shape[1]
        for c in range(channels):
            turned = y[c, i]
            for j in range(turned.size):
                turned[j] = flat[j * channels + c]


@exact
def _convolve(
    p: Any, offsets: Any, steps: Any, words: int, packed: Any, terms: Any, given: Any, factor: Any, zero: Any, low: Any,
    high: Any, sums: Any, row: Any, y: Any, last: bool, lines: int, first: int, end: int,
) -> None:  # fmt: skip
    """Lines [first, end) of all images' lines, in blocks of as many as `sums` (block, W, C) has."""
    together, cols, out = sums.shape
    groups, panels = packed.shape[0], packed.shape[1]
    channels, tiles, width = out // groups, (cols + ROWS - 1) // ROWS, sums.strides[1]
    for begin in range(first, end, together):
        stop = min(begin + together, end)
        for g in range(groups):
            for k in range(panels):
                weights = packed.ctypes.data + g * packed.strides[0] + k * packed.strides[1]
                starts = terms.ctypes.data + g * terms.strides[0] + k * COLUMNS * 4
                for at in range(begin, stop):
                    source = p.ctypes.data + (at // lines) * steps[0] + (at % lines) * steps[1] + g * steps[3]
                    target = sums.ctypes.data + (at - begin) * sums.strides[0] + (g * channels + k * COLUMNS) * 4
                    done = 0
                    for t in range(tiles):
                        more = cols * (t + 1) // tiles - done
                        dot_tile(
                            more, p, source + done * steps[2], steps[2], offsets.ctypes.data, offsets.size, words,
                            weights, given.ctypes.data, starts, starts + terms.strides[1], False, F(1), starts, starts,
                            target + done * width, width, channels - k * COLUMNS,
                        )  # fmt: skip
                        done += more
        for at in range(begin, stop):
            _requantize(sums[at - begin], factor, zero[()], low, high, row, y[at // lines], last, at % lines)


@exact
def _convolve_each(
    p: Any, offsets: Any, steps: Any, weights: Any, terms: Any, factor: Any, zero: Any, low: Any, high: Any, sums: Any,
    row: Any, y: Any, last: bool, lines: int, first: int, end: int,
) -> None:  # fmt: skip
    """As `_convolve` a line at a time, where every channel has a window of its own: weights (taps, C), C rounded up to
    whole vectors as in `terms` and `sums`."""
    cols, channels = sums.shape
    for at in range(first, end):
        source = p.ctypes.data + (at // lines) * steps[0] + (at % lines) * steps[1]
        j = 0
        while j < cols:
            pixels = PIXELS if j + PIXELS <= cols else 1
            filter_channels(
                pixels, p, source + j * steps[2], steps[2], offsets.ctypes.data, offsets.size, weights.ctypes.data,
                terms.ctypes.data, sums.ctypes.data + j * channels * 4, channels,
            )  # fmt: skip
            j += pixels
        _requantize(sums, factor, zero[()], low, high, row, y[at // lines], last, at % lines)


def _centred(w: Array, zero: Array) -> Array:
    return np.subtract(w, zero.reshape(-1, *(1,) * (w.ndim - 1)), dtype=np.int16)


def conv2d(
    x: Array,
    point: int,
    w_zero: Array,
    bias: Array | None,
    factor: Array,
    zero: Array,
    y: Array,
    scratch: Scratch,
    *,
    kernel: tuple[int, int, int, int],
    groups: int,
    strides: Pair,
    pads: tuple[Pair, Pair],
    dilations: Pair,
    last: bool,
    pack: Pack,
    parts: int = 1,
    left: DType = LEFT_TYPES[0],
) -> tuple[list[Call], list[list[Call]]]:
    """What comes first, and then in as many parts: y = saturate(round(factor s) + zero), where s is the convolution of
    x - point with the weights less `w_zero`, which are 8-bit integers still, plus the bias.

    8-bit x and y are contiguous, (N, C, H, W), or where channels come `last` (N, H, W, C). `pack` keeps what is made of
    weights of the shape `kernel`, (O, C / groups, KH, KW). `bias` is int32 (O,), `factor` float32 (O,) and `zero`
    float32, 0-d.
    """
    out, inner, kh, kw = kernel
    images, (height, width), channels = len(x), (x.shape[1:3] if last else x.shape[2:]), inner * groups
    lines, cols = y.shape[1:3] if last else y.shape[2:]
    lift = (128 if x.dtype == np.int8 else 0) if left == U8 else -point
    room = (images, height + sum(pads[0]), width + sum(pads[1]), channels)
    size = int(np.prod(room))
    padded = scratch((size + TILE.lanes,), left)[:size].reshape(room)  # vectors reach beyond the last value
    border = (np.int32(point + lift), pads[0][0], pads[1][0])
    calls = [bound(_pad, x, last, np.int32(lift), *border, padded.reshape(images, room[1], -1))]

    each = groups > 1 and inner == 1 and out == groups
    merged = groups == 1 and (dilations[1] == 1 or kw == 1)
    down, right, inward = padded.strides[1:]
    across = range(1) if merged else range(kw)
    offsets = np.array(
        [u * dilations[0] * down + v * dilations[1] * right for u in range(kh) for v in across], np.int64
    )
    steps = np.array([room[1] * down, strides[0] * down, strides[1] * right, inner * inward], np.int64)
    run = (kw if merged else 1) * inner
    words, whole = -(-run // group(left)), -(-out // TILE.lanes) * TILE.lanes

    def weights(w: Array) -> Array:
        made = _centred(w, w_zero).astype(np.int8).transpose(2, 3, 1, 0)  # (KH, KW, C / groups, O)
        if each:
            return np.ascontiguousarray(np.pad(made.reshape(kh * kw, out), ((0, 0), (0, whole - out))))
        runs = np.zeros((len(offsets), words * group(left), out), np.int8)
        runs[:, :run] = made.reshape(len(offsets), run, out)
        matrices = np.split(runs.reshape(-1, out), groups, axis=1)
        return np.stack([integers.pack(m, left) for m in matrices])

    def starts(w: Array) -> Array:
        total = _centred(w, w_zero).reshape(out, -1).sum(1, dtype=np.int32) * np.int32(-(point + lift))
        total = total if bias is None else total + bias
        if each:
            return np.pad(total, (0, whole - out))
        rows = np.zeros((groups, 2, -(-(out // groups) // COLUMNS) * COLUMNS), np.int32)
        rows[:, 0, : out // groups] = total.reshape(groups, -1)
        return rows

    tag = f"windows {groups} {merged} {w_zero.tolist()}"
    packed, terms = pack(tag, weights), pack(f"{tag} {point} {None if bias is None else bias.tolist()}", starts)
    given = np.zeros((ROWS, 4), np.int32)
    given[:, 0] = 1
    info = np.iinfo(y.dtype)
    together = max(1, BLOCK_BYTES // (cols * max(out * 4, channels * left.itemsize * strides[0] * strides[1])))
    made = []
    for first, end in spans(images * lines, parts):
        row = scratch((cols, out), y.dtype)
        sums = scratch((cols, whole) if each else (min(together, end - first), cols, out), np.int32)
        ending = (factor, zero, F(info.min), F(info.max), sums, row, y, last, lines, first, end)
        if each:
            made.append([bound(_convolve_each, padded, offsets, steps, packed, terms, *ending)])
        else:
            made.append([bound(_convolve, padded, offsets, steps, words, packed, terms, given, *ending)])
    return calls, made
