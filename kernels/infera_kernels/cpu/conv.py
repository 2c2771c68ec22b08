"""Two-dimensional convolution on NumPy and its BLAS, channels first.

Four strategies, by shape: pointwise (a GEMM straight from x), depthwise (shifted multiply-adds), Winograd (3x3), and
for the rest a block of columns (im2col) and a GEMM. Every one applies the epilogue to a block while it is in cache.
Work is split by images; of a single image by output channels (pointwise, depthwise) or rows (im2col).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from infera_kernels.calls import SERIAL, Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.conv_depthwise import depthwise
from infera_kernels.cpu.conv_epilogue import Activation, Epilogue, epilogue
from infera_kernels.cpu.conv_planes import Pair, planes
from infera_kernels.cpu.conv_winograd import tile_of, winograd
from infera_kernels.cpu.parts import parts
from infera_kernels.cpu.strides import strided

COLUMN_BYTES = 1 << 21
"""Columns of one im2col block. Smaller blocks make BLAS repack the weights more often than the cache saves."""

FLOPS = 50.0
"""Operations a nanosecond, about."""

FEW_PIXELS = 128
"""Output pixels of an unpadded image below which one copy and one product serve several images."""


def conv2d(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split = SERIAL,
    *,
    strides: Pair,
    pads: tuple[Pair, Pair],
    dilations: Pair,
    group: int,
    activation: Activation | None = None,
    residual: Array | None = None,
    pack: Pack | None = None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual).

    x (N, C, H, W), w (O, C / group, KH, KW), b (O,) or None, y and residual (N, O, OH, OW); all contiguous, of one
    floating dtype. `pads` are (before, after) of each axis and at least 0. `pack` is given where w never changes.
    """
    kernel = w.shape[2:]
    if not y.size:
        return []
    ns = 2 * y.size * w[0].size / FLOPS + y.size
    if len(cuts := parts(y.shape[0], ns, split)) > 1:
        return split.parallel(
            [
                conv2d(
                    x[p], w, b, y[p], scratch, strides=strides, pads=pads, dilations=dilations, group=group,
                    activation=activation, residual=None if residual is None else residual[p], pack=pack,
                )
                for p in cuts
            ]
        )  # fmt: skip
    every = slice(None)
    channels = parts(y.shape[1], ns, split) if y.shape[0] == 1 else [every]
    if group > 1 and w.shape[:2] == (group, 1):
        return split.parallel(
            [
                depthwise(
                    x[:, p], w[p], None if b is None else b[p], y[:, p], scratch, strides=strides, pads=pads,
                    dilations=dilations, activation=activation, residual=None if residual is None else residual[:, p],
                )
                for p in channels
            ]
        )  # fmt: skip
    if kernel == (1, 1) and not any(map(any, pads)):
        return split.parallel(
            [
                _pointwise(
                    x, w[p], None if b is None else b[p], y[:, p], scratch, strides, group, activation,
                    None if residual is None else residual[:, p],
                )
                for p in (channels if group == 1 else [every])
            ]
        )  # fmt: skip
    tile = tile_of(w.shape, y.shape[2:], strides, dilations, group) if pack is not None else 0
    if tile and pack is not None:
        return winograd(x, w, b, y, scratch, pack, tile, pads=pads, activation=activation, residual=residual)
    rows = parts(y.shape[2], ns, split) if y.shape[0] == 1 else [slice(0, y.shape[2])]
    return _im2col(x, w, b, y, scratch, split, rows, strides, pads, dilations, group, activation, residual)


def _matrices(w: Array, group: int) -> Array:
    """w as (O, taps), or (group, O / group, taps)."""
    return w.reshape(w.shape[0], -1) if group == 1 else w.reshape(group, w.shape[0] // group, -1)


def _grouped(a: Array, group: int) -> Array:
    """(rows, columns) as (group, rows / group, columns)."""
    return a if group == 1 else a.reshape(group, a.shape[0] // group, a.shape[1])


def _pointwise(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    strides: Pair,
    group: int,
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    n, c = x.shape[:2]
    o, pixels = y.shape[1], y.shape[2] * y.shape[3]
    weights = _matrices(w, group)
    if pixels == 1 and group == 1 and strides == (1, 1):
        flat = y.reshape(n, o)
        flat_residual = None if residual is None else residual.reshape(n, o)
        calls, finish = epilogue(activation, y.size, y.dtype, scratch)
        return [*calls, (np.matmul, (x.reshape(n, c), weights.T, flat)), *finish(flat, b, flat_residual)]
    gathered = None if strides == (1, 1) else scratch((c, *y.shape[2:]), x.dtype)
    calls, finish = epilogue(activation, y[0].size, y.dtype, scratch)
    column = None if b is None else b.reshape(o, 1)
    for i in range(n):
        if gathered is not None:
            calls.append((np.copyto, (gathered, x[i, :, :: strides[0], :: strides[1]])))
        source = (x[i] if gathered is None else gathered).reshape(c, pixels)
        image = y[i].reshape(o, pixels)
        rest = None if residual is None else residual[i].reshape(o, pixels)
        calls.append((np.matmul, (weights, _grouped(source, group), _grouped(image, group))))
        calls += finish(image, column, rest)
    return calls


def _im2col(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split,
    cuts: Sequence[slice],
    strides: Pair,
    pads: tuple[Pair, Pair],
    dilations: Pair,
    group: int,
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """`cuts` are the parts of the output's rows, the same for every image."""
    n, c = x.shape[:2]
    o, height, width = y.shape[1:]
    kh, kw = w.shape[2:]
    out = (height, width)
    weights = _matrices(w, group)
    column = None if b is None else b.reshape(o, 1)
    taps = c * kh * kw
    if group == 1 and height * width < FEW_PIXELS and not any(map(any, pads)):
        windows = _windows(x, (kh, kw), out, strides, dilations)
        return _small_images(windows, weights, column, y, scratch, activation, residual)
    before = (pads[0][0], pads[1][0])
    padded = planes(scratch, c, out, (kh, kw), x.dtype, strides=strides, dilations=dilations, before=before)
    calls = [padded.clear()]

    def part(image: int, spans: Sequence[slice], room: Array, finish: Epilogue) -> list[Call]:
        made: list[Call] = []
        for rows in spans:
            count = (rows.stop - rows.start) * width
            p = slice(rows.start * width, rows.start * width + count)
            cols = room[: taps * count].reshape(c, kh, kw, rows.stop - rows.start, width)
            made += [(np.copyto, (cols[:, a, e], padded.tap(a, e, rows, width))) for a in range(kh) for e in range(kw)]
            block = y[image].reshape(o, -1)[:, p]
            rest = None if residual is None else residual[image].reshape(o, -1)[:, p]
            made.append((np.matmul, (weights, _grouped(cols.reshape(taps, count), group), _grouped(block, group))))
            made += finish(block, column, rest)
        return made

    given: list[tuple[list[slice], Array, Epilogue]] = []
    for cut in cuts:
        step = _block(cut.stop - cut.start, taps * width * x.itemsize, COLUMN_BYTES)
        room = scratch((taps * step * width,), x.dtype)
        once, finish = epilogue(activation, o * step * width, y.dtype, scratch)
        calls += once
        given.append((list(_spans(cut, step)), room, finish))
    for i in range(n):
        calls += [*padded.load(x[i]), *split.parallel([part(i, *own) for own in given])]
    return calls


def _windows(x: Array, kernel: Pair, out: Pair, strides: Pair, dilations: Pair) -> Array:
    """(C, KH, KW, N, OH, OW): what every kernel tap meets, as a view of an unpadded x (N, C, H, W)."""
    n, c = x.shape[:2]
    image, channel, down, right = x.strides
    steps = (down * dilations[0], right * dilations[1], image, down * strides[0], right * strides[1])
    return strided(x, (c, *kernel, n, *out), (channel, *steps))


def _small_images(
    windows: Array,
    weights: Array,
    column: Array | None,
    y: Array,
    scratch: Scratch,
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """im2col of several images at once: their few columns side by side make a product that BLAS is good at."""
    n, o, height, width = y.shape
    pixels, taps = height * width, weights.shape[1]
    step = _block(n, taps * pixels * y.itemsize, COLUMN_BYTES)
    room, sums = scratch((taps * step * pixels,), y.dtype), scratch((o * step * pixels,), y.dtype)
    calls, finish = epilogue(activation, sums.size, y.dtype, scratch)
    for images in _spans(slice(0, n), step):
        columns = (images.stop - images.start) * pixels
        cols = room[: taps * columns].reshape(*windows.shape[:3], -1, height, width)
        block = sums[: o * columns].reshape(o, columns)
        spread = block.reshape(o, -1, pixels)
        calls += [(np.copyto, (cols, windows[:, :, :, images])), (np.matmul, (weights, cols.reshape(taps, -1), block))]
        if residual is not None:
            calls.append((np.add, (spread, _by_channel(residual[images]), spread)))
        calls += finish(block, column, None)
        calls.append((np.copyto, (_by_channel(y[images]), spread)))
    return calls


def _by_channel(y: Array) -> Array:
    """(N, C, H, W) seen as (C, N, pixels)."""
    return y.reshape(*y.shape[:2], -1).transpose(1, 0, 2)


def _block(count: int, nbytes: int, budget: int) -> int:
    """Items of a block: `budget` bytes' worth, the blocks of nearly equal size."""
    blocks = max(1, -(-count * nbytes // max(budget, nbytes)))
    return -(-count // blocks)


def _spans(part: slice, step: int) -> Iterator[slice]:
    for start in range(part.start, part.stop, step):
        yield slice(start, min(start + step, part.stop))
