"""Convolution as products of windows that are laid out where they lie, channels last: no columns are made.

The taps of a kernel's row and their channels lie one behind the other in an image, and the windows of a line of pixels
a fixed distance apart: a matrix, of which OpenBLAS' own loops take any distance between rows. There is one product for
each row of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from infera_kernels.calls import Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.blas import Inner
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.nhwc_epilogue import Blocks
from infera_kernels.cpu.nhwc_pointwise import BLOCK_PIXELS, laid_out
from infera_kernels.cpu.nhwc_product import gains
from infera_kernels.cpu.nhwc_rows import Window, images, in_parts, padded, room_for, spans
from infera_kernels.cpu.packed import PANEL, added, depths, room
from infera_kernels.cpu.strides import strided

_REST = (0, 7, 7, 13)
"""What 0 to 3 rows behind the last whole panel cost OpenBLAS' loops, as so many rows of whole panels do."""

_ROW_NS, _PIECE_NS = 0.01, 150
"""What a row takes for each of its elements and columns of weights, and to lay out a piece of rows, about."""


def reads(w: Sequence[int], window: Window) -> bool:
    """Whether `windows` is made for weights (O, C, KH, KW): taps must lie side by side, and be many."""
    return window.dilations[1] == 1 and window.out[1] >= PANEL and gains(w[1] * w[3], w[0])


def windows(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split,
    pack: Pack,
    window: Window,
    *,
    loops: Inner,
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual) with w (O, C, KH, KW), float32, that `reads` takes; see `conv2d`.

    Lines of pixels are as long as whole panels, or as the image's where these are one behind the other and that is
    faster: what lies between is computed too, and left out. So is what the last line needs for whole panels, where
    there is an image, or room, to read it from.
    """
    height = window.out[0]
    (kh, kw), c = window.kernel, x.shape[3]
    pixel, taps = c * x.itemsize, kw * c
    lies = x.strides[2] == pixel
    if (whole := whole_panels(window)).fits(x) or not (lies and window.fits(x)):
        window = whole
    down = window.seen(1, window.out[1]) * pixel
    if lies and window.fits(x):
        down = x.strides[1] if x.shape[1] > 1 else x.shape[2] * pixel
    line = whole.out[1]
    if window.strides == (1, 1) and down % pixel == 0:
        line = min(
            line, down // pixel, key=lambda n: _nanoseconds(n, window, taps, y.shape[3], joined=n * pixel == down)
        )
    tail = min(line, window.out[1])
    most = _most(line)
    weights = laid_out(pack, loops, runs=kh)

    def part(start: int, stop: int) -> Iterator[Call]:
        step = min(most, height, stop - start)
        blocks = Blocks(activation, b, residual, y, scratch, most=step, line=line, before=True)
        inside = room_for(x, window, step, scratch, dense=True)
        space = room(step * line, taps, scratch)

        def calls() -> Iterator[Call]:
            yield from blocks.once
            for i, row, end, _ in images(start, stop, height):
                for first, last in spans(row, end, step):
                    band, load = padded(x[i], inside, window, first, last)
                    yield from load
                    numbers = i * height + first, i * height + last
                    yield from blocks.begin(*numbers)
                    sums = blocks.sums(*numbers)[: (last - first - 1) * line + tail]
                    seen = [_lines(band, tap, last - first, window) for tap in range(kh)]
                    ranges = [pieces for lines in seen for pieces in _ranges(lines, taps, down, window, line, tail)]
                    yield added(ranges, weights, sums, space, loops)
                    yield from blocks.finish(*numbers)

        return calls()

    return in_parts(y.shape[0] * height, split, part)


def whole_panels(window: Window) -> Window:
    """With lines of whole panels."""
    return window._replace(out=(window.out[0], -(-window.out[1] // PANEL) * PANEL))


def _most(line: int) -> int:
    """Lines of a block."""
    return max(1, round(BLOCK_PIXELS / line))


def _nanoseconds(line: int, window: Window, taps: int, columns: int, *, joined: bool) -> float:
    """A line takes so long, about."""
    count = min(_most(line), window.out[0])
    rows = (count - 1) * line + min(line, window.out[1])
    rest = rows % PANEL
    laying = len(depths(taps)) * (1 if joined else count) * _PIECE_NS
    return window.kernel[0] * ((rows - rest + _REST[rest]) * taps * columns * _ROW_NS + laying) / count


def _lines(band: Array, tap: int, count: int, window: Window) -> Array:
    """(count, columns, C): what a row of the kernel sees of a band."""
    start = tap * window.dilations[0]
    return band[start : start + (count - 1) * window.strides[0] + 1 : window.strides[0]]


def _ranges(lines: Array, taps: int, down: int, window: Window, line: int, tail: int) -> Iterator[list[Array]]:
    """The windows of lines (count, columns, C) as pieces for `added`, for each of the depths of `taps`.

    The image's lines lie `down` bytes apart. Those of its windows are one piece where they are one behind the other,
    which `line` then is; else each is one, of whole panels. The last line has `tail` rows in either case. No distance
    is asked of an axis, which may say anything where it has one element.
    """
    count, item = len(lines), lines.itemsize
    pixel, down = lines.shape[2] * item * window.strides[1], down * window.strides[0]
    joined = down == line * pixel
    pixels = [(count - 1) * line + tail] if joined else [line] * (count - 1) + [tail]
    for start, stop in pairwise(depths(taps)):
        yield [
            strided(lines, (many, stop - start), (pixel, item), i * down + start * item)
            for i, many in enumerate(pixels)
        ]
