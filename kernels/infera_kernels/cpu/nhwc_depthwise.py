"""Depthwise convolution, channels last: multiply-adds of many channels at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from infera_kernels.calls import Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.aligned import aligned
from infera_kernels.cpu.caches import block_of
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.conv_planes import Pair
from infera_kernels.cpu.nhwc_epilogue import epilogue
from infera_kernels.cpu.nhwc_rows import Window, flat, images, in_parts, longest, padded, room_for, spans
from infera_kernels.cpu.strides import strided

BLOCK_BYTES = 1 << 19
"""Output of one block, which what follows the sums finds in the cache."""

WEIGHT_BYTES = 3 << 15
"""What the weights of all taps may take, repeated for the pixels of one inner loop: more push what they are multiplied
with out of the cache."""

SHORTEST_BYTES = 1 << 10
"""What one inner loop reads at least, where a row is as long: a shorter one takes hardly less time."""

LARGE_BYTES = 1 << 20
"""Images from which on what reaches into padding is summed apart, instead of from a padded copy, and ..."""

FEW_TAPS = 3
"""... horizontal taps up to which: of more, many columns would be summed one by one."""

SHORT_LOOP = 96
"""Channels below which two pixels that lie apart are read with what lies between them."""


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

    np.einsum multiplies and adds in one pass, where np.multiply and np.add make two; see `Loop`.
    """
    height, width = window.out
    c, fold = x.shape[3], folded(x.shape[3], window.strides, window.dilations)
    window = _whole(window, fold)
    columns = _kinds(window, 1, x.shape[2], 0, width) if fold == 1 and _is_read_apart(x, window) else None
    inner = width if columns is None else max(kind.last - kind.first for kind in columns)
    loop = _loop(window, fold, inner, c * x.itemsize)
    once, weights = _weights(w, loop, scratch, pack)
    target, rest = flat(y), None if residual is None else flat(residual)
    most = max(1, block_of(BLOCK_BYTES) // (width * fold * c * y.itemsize))

    def part(start: int, stop: int) -> Iterator[Call]:
        step = longest(start, stop, most)
        first_of_all, finish = epilogue(activation, b, step * width, c, y, scratch)
        dense = loop != Loop(1, 1)
        room = None if columns else room_for(x, window, min(step, height), scratch, dense=dense)
        sums = None if y.flags.c_contiguous and rest is None else scratch((step * width, c), y.dtype)
        halves = None if fold == 1 else scratch((step * width, fold * c), y.dtype)
        at_once, by_block = ([], columns) if sums is not None else _edges(columns)

        def calls() -> Iterator[Call]:
            yield from first_of_all
            for i, row, _, at in images(start, stop, height) if at_once else ():
                into = target[start * width : stop * width].reshape(stop - start, width, -1)[at]
                yield from _apart(x[i], weights, into, window, loop, row, at_once)
            for first, last in spans(start, stop, step):
                pixels = slice(first * width, last * width)
                block = target[pixels] if sums is None else sums[: (last - first) * width]
                made = block if halves is None else halves[: block.shape[0]]
                for i, row, end, at in images(first, last, height):
                    into = made.reshape(last - first, width, -1)[at]
                    if by_block:
                        yield from _apart(x[i], weights, into, window, loop, row, by_block)
                    else:
                        band, load = padded(x[i], room, window, row, end)
                        yield from load
                        yield from _multiply_add(band, weights, into, window, loop)
                if halves is not None:
                    yield np.add, (made[:, :c], made[:, c:], block)
                yield from finish(block, None if rest is None else rest[pixels])
                if sums is not None:
                    yield np.copyto, (target[pixels], block)

        return calls()

    return [*once, *in_parts(y.shape[0] * height, split, part)]


class Loop(NamedTuple):
    """What an inner loop goes over: the channels of `fold` columns of x, for each of `together` pixels of y.

    The pixels lie one behind the other, and so do what they see; the weights are repeated for each. What is left of a
    row is a shorter loop.
    """

    fold: int
    together: int


def folded(channels: int, strides: Pair, dilations: Pair) -> int:
    """Columns of x that count as one pixel of more channels: 2 where pixels of few channels are read two apart, so that
    what is seen lies together, else 1.

    A kernel that ends within such a pixel has weights of 0 for the rest. What is summed for each column is added up.
    """
    return 2 if strides[1] == 2 and dilations[1] == 1 and channels < SHORT_LOOP else 1


def whole_folds(
    size: Pair, w: Sequence[int], out: Pair, *, strides: Pair, pads: tuple[Pair, Pair], dilations: Pair
) -> tuple[Pair, Pair]:
    """The border, (before, after) of each axis, around images of `size` (H, W) that `depthwise` reads as they are."""
    window = Window(out, (w[2], w[3]), strides, dilations, (0, 0))
    seen = _whole(window, folded(w[0], strides, dilations)).seen(1, out[1])
    before, after = pads[1]
    return pads[0], (before, max(after, seen - size[1] - before))


def _whole(window: Window, fold: int) -> Window:
    """The window whose kernel is as wide as whole folds of columns."""
    return window._replace(kernel=(window.kernel[0], -(-window.kernel[1] // fold) * fold))


def _loop(window: Window, fold: int, width: int, pixel: int) -> Loop:
    """The pixels of an inner loop, of `pixel` bytes each, for `width` of them: as many as their weights allow.

    They divide `width`, or else they are about as many in each loop.
    """
    if fold == 1 and window.strides[1] > 1:
        return Loop(1, 1)
    pixel *= fold
    most = _most(window.kernel[0] * window.kernel[1] // fold * pixel)
    possible = [n for n in range(1, min(most, width) + 1) if width % n == 0 and n * pixel >= SHORTEST_BYTES]
    return Loop(fold, max(possible, default=-(-width // -(-width // most))))


def _most(nbytes: int) -> int:
    """Pixels of an inner loop, beside weights of so many bytes for each."""
    return max(1, WEIGHT_BYTES // nbytes)


def _multiply_add(
    band: Array, weights: Array, y: Array, window: Window, loop: Loop, start: Pair = (0, 0)
) -> Iterator[Call]:
    """y (rows, pixels, fold * C) = the weighted sums of what they see of a band, from its row and column `start` on."""
    down, right, one = band.strides
    whole = y.shape[1] - y.shape[1] % loop.together
    for first, last in ((0, whole), (whole, y.shape[1])):
        together = min(loop.together, last - first)
        if not together:
            continue
        steps = (
            down * window.strides[0],
            down * window.dilations[0],
            right * (window.dilations[1] if loop.fold == 1 else loop.fold),
            right * window.strides[1] * together,
            one,
        )
        target = y[:, first:last].reshape(y.shape[0], (last - first) // together, together * y.shape[2], copy=False)
        corner = start[0] * down + (start[1] + first * window.strides[1]) * right
        seen = strided(band, (y.shape[0], *weights.shape[:2], *target.shape[1:]), steps, corner)
        yield partial(np.einsum, out=target), ("rijpx,ijx->rpx", seen, weights[:, :, : target.shape[2]])


class Kind(NamedTuple):
    """Rows or columns first..last of the output, and the taps low..high with which they do not reach into padding."""

    first: int
    last: int
    low: int
    high: int


def _is_read_apart(x: Array, window: Window) -> bool:
    """Whether what reaches into padding is summed apart, which spares large images a padded copy."""
    return (
        x[0].nbytes >= LARGE_BYTES
        and window.kernel[1] <= FEW_TAPS
        and x.strides[2] == x.shape[3] * x.itemsize
        and not window.fits(x)
    )


def _kinds(window: Window, axis: int, size: int, start: int, stop: int) -> list[Kind]:
    """The kinds that rows (axis 0) or columns (1) start..stop of the output are, of an image of `size` ones."""
    stride, dilation, before = window.strides[axis], window.dilations[axis], window.before[axis]

    def taps(at: int) -> Pair:
        first = at * stride - before
        return max(0, -(first // dilation)), max(0, min(window.kernel[axis], (size - 1 - first) // dilation + 1))

    low = -(-before // stride)
    high = (size - 1 - (window.kernel[axis] - 1) * dilation + before) // stride + 1
    inner = range(max(start, low), min(stop, high))  # most of them, which all have all taps
    some = [*range(start, inner.start), inner.start, *range(inner.stop, stop)] if inner else range(start, stop)
    kinds = [(next(alike), seen) for seen, alike in groupby(some, taps)]
    ends = [*(first for first, _ in kinds[1:]), stop]
    return [Kind(first, last, *seen) for (first, seen), last in zip(kinds, ends, strict=True)]


def _edges(columns: Sequence[Kind] | None) -> tuple[Sequence[Kind], Sequence[Kind] | None]:
    """What there is beside most columns, and those: few columns of all rows are as few calls as those of a block."""
    if columns is None:
        return [], None
    most = max(columns, key=lambda kind: kind.last - kind.first)
    return [kind for kind in columns if kind is not most], [most]


def _apart(
    x: Array, weights: Array, y: Array, window: Window, loop: Loop, start: int, columns: Sequence[Kind]
) -> Iterator[Call]:
    """y (rows, OW, C) = the weighted sums of what rows `start` on see of an image x (H, W, C)."""
    for down in _kinds(window, 0, x.shape[0], start, start + y.shape[0]):
        for across in columns:
            target = y[down.first - start : down.last - start, across.first : across.last]
            some = weights[down.low : down.high, across.low : across.high]
            corner = [
                kind.first * window.strides[i] - window.before[i] + kind.low * window.dilations[i]
                for i, kind in enumerate((down, across))
            ]
            if some.size:
                yield from _multiply_add(x, some, target, window, loop, (corner[0], corner[1]))
            else:
                yield np.copyto, (target, y.dtype.type(0))


def _weights(w: Array, loop: Loop, scratch: Scratch, pack: Pack | None) -> tuple[list[Call], Array]:
    """(KH, KW / fold, together * fold * C), and the calls that make it.

    What is packed is long enough for the next power of four: of images of many widths few forms are kept.
    """
    fold, together = loop
    c, _, rows, columns = w.shape
    steps, repeat = -(-columns // fold), together
    if pack is not None:
        repeat = 1 << ((together - 1).bit_length() + 1) // 2 * 2
        repeat = max(together, min(repeat, _most(rows * steps * fold * c * w.itemsize)))
    shape = rows, steps, repeat, fold, c

    def packed(w: Array) -> Array:
        made = aligned(shape, w.dtype)
        for fn, args in _repeated(w, made):
            fn(*args)
        return made

    if pack is not None:
        made, once = pack(f"depthwise{fold}x{repeat}", packed), []
    else:
        made = scratch(shape, w.dtype)
        once = _repeated(w, made)
    return once, made.reshape(*shape[:2], -1)[:, :, : together * fold * c]


def _repeated(w: Array, made: Array) -> list[Call]:
    """Writes w (C, 1, KH, KW) to (KH, KW / fold, pixels, fold, C), and zeros to where the kernel ends before."""
    taps = w[:, 0].transpose(1, 2, 0)[:, :, None]
    phases = [(made[:, :, :, i], taps[:, i :: made.shape[3]]) for i in range(made.shape[3])]
    ends = w.shape[3] < made.shape[1] * made.shape[3]
    return [
        *([(np.copyto, (made, w.dtype.type(0)))] if ends else []),
        *((np.copyto, (target[:, : phase.shape[1]], phase)) for target, phase in phases),
    ]
