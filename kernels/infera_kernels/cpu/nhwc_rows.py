"""What the channels-last kernels share: output rows in parts and blocks, and the padded input rows of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from infera_kernels.calls import Array, Call, Scratch, Split
from infera_kernels.cpu.conv_planes import Pair


def in_parts(count: int, split: Split, emit: Callable[[int, int], Iterable[Call]]) -> list[Call]:
    """The calls of `emit(start, stop)` over parts of nearly equal size that together cover range(count).

    What takes long to make is best made by a generator, once scratch has been asked for: see `Split.parallel`.
    """
    parts = min(count, split.threads)
    edges = [count * i // parts for i in range(parts + 1)]
    return split.parallel([emit(start, stop) for start, stop in pairwise(edges)])


def spans(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of nearly equal size, at most `most` (but at least 1), that cover range(start, stop)."""
    blocks = -(-(stop - start) // max(1, most))
    edges = [start + (stop - start) * i // blocks for i in range(blocks + 1)]
    return pairwise(edges)


def longest(start: int, stop: int, most: int) -> int:
    """The size of the largest of `spans`."""
    return max(b - a for a, b in spans(start, stop, most))


def images(start: int, stop: int, height: int) -> Iterator[tuple[int, int, int, slice]]:
    """What range(start, stop) holds of each image of `height` rows, where rows are numbered through all images.

    (image, first row, last row + 1, where these rows lie in the range)
    """
    done = start
    while done < stop:
        image, row = divmod(done, height)
        end = min(height, row + stop - done)
        yield image, row, end, slice(done - start, done - start + end - row)
        done += end - row


def flat(a: Array) -> Array:
    """(..., C) as (pixels, C), a view: `a` is contiguous or a channel slice of a contiguous array."""
    return a.reshape(-1, a.shape[-1], copy=False)


def is_slice(y: Array) -> bool:
    """Whether the pixels of y (N, H, W, C) lie apart: loops over channels are short there."""
    return bool(y.strides[2] != y.shape[3] * y.itemsize and y.shape[2] > 1)


def moved(target: Array, source: Array) -> Call:
    """target[...] = source, (..., C) each, where pixels are far apart: one item a pixel, not an inner loop over C.

    C is a contiguous axis of both.
    """
    pixel = np.dtype((np.void, target.shape[-1] * target.itemsize))
    return np.copyto, (target.view(pixel)[..., 0], source.view(pixel)[..., 0])


class Window(NamedTuple):
    """How the output's pixels see the input's: (vertical, horizontal) each. `before` is the padding above and left."""

    out: Pair
    kernel: Pair
    strides: Pair
    dilations: Pair
    before: Pair

    def seen(self, axis: int, count: int) -> int:
        """Padded input rows (axis 0) or columns (1) under `count` output ones."""
        return (count - 1) * self.strides[axis] + (self.kernel[axis] - 1) * self.dilations[axis] + 1

    def fits(self, x: Array) -> bool:
        """Whether no window of x (N, H, W, C) reaches into padding."""
        return self.before == (0, 0) and all(self.seen(i, self.out[i]) <= x.shape[1 + i] for i in range(2))


def padded(x: Array, room: Array | None, window: Window, start: int, stop: int) -> tuple[Array, list[Call]]:
    """What output rows start..stop see of an image x (H, W, C), padded with zeros, and the calls that load it.

    (rows, columns, C), in `room`, which has as many rows or more; without one a view of x, where nothing is padded.
    """
    rows, cols = window.seen(0, stop - start), window.seen(1, window.out[1])
    top, left = start * window.strides[0] - window.before[0], window.before[1]
    if room is None:
        return x[top : top + rows, :cols], []
    zero = room.dtype.type(0)
    target = room[:rows]
    first, last = min(rows, max(0, -top)), max(0, min(rows, x.shape[0] - top))
    width = max(0, min(x.shape[1], cols - left))
    inside = slice(first, max(first, last))
    borders = target[:first], target[inside.stop :], target[inside, :left], target[inside, left + width :]
    calls: list[Call] = [(np.copyto, (part, zero)) for part in borders if part.size]
    if inside.stop > first and width:
        image = x[first + top : inside.stop + top, :width]
        inner = target[inside, left : left + width]
        apart = image.strides[1] != inner.strides[1] and image.strides[2] == inner.strides[2] == image.itemsize
        calls.append(moved(inner, image) if apart else (np.copyto, (inner, image)))
    return target, calls


def room_for(x: Array, window: Window, rows: int, scratch: Scratch, *, dense: bool = False) -> Array | None:
    """Room for `padded` with blocks of `rows` output rows; None where views of x do (`dense`: of dense pixels).

    Where x has its channels as planes, the room has too.
    """
    if window.fits(x) and not (dense and x.strides[2] != x.shape[3] * x.itemsize):
        return None
    size = window.seen(0, rows), window.seen(1, window.out[1])
    if x.strides[3] > x.strides[2]:
        return scratch((x.shape[3], *size), x.dtype).transpose(1, 2, 0)
    return scratch((*size, x.shape[3]), x.dtype)
