"""Images that lie within a border, where what comes before wrote them: who reads them sets the border, and no more."""

from __future__ import annotations

import numpy as np

from infera_kernels.calls import Array, Call
from infera_kernels.cpu.conv_planes import Pair


def border(whole: Array, before: Pair, size: Pair, value: float) -> list[Call]:
    """Sets what of `whole` (N, H', W', C), contiguous, is none of the images of `size` (H, W) that start at `before`.

    The right of one row and the left of the next lie together. What lies before an image and what lies after it are
    set by one call where they are of a size, as they mostly are: small images feel a call.
    """
    count, _, width, c = whole.shape
    line, inner = width * c, size[1] * c
    first = before[0] * line + before[1] * c
    last = first + (size[0] - 1) * line
    end = last + inner
    flat, fill = whole.reshape(count, -1, copy=False), whole.dtype.type(value)
    between = flat[:, first:last].reshape(count, -1, line, copy=False)[..., inner:]
    ends = [flat[:, :first], flat[:, end:]]
    if first == flat.shape[1] - end:
        steps = (flat.strides[0], end * flat.itemsize, flat.itemsize)
        ends = [np.ndarray((count, 2, first), flat.dtype, flat, 0, steps)] if first else []
    return [(np.copyto, (part, fill)) for part in (*ends, between) if part.size]


def whole_tiles(size: Pair, out: Pair, pads: tuple[Pair, Pair], tile: int) -> tuple[Pair, Pair]:
    """The border around images of `size` that windows of whole tiles of 3x3 see."""
    down, across = ((p[0], -(-o // tile) * tile + 2 - n - p[0]) for n, o, p in zip(size, out, pads, strict=True))
    return down, across


def joined(y: Array) -> bool:
    """Whether the rows of y (N, H, W, C) lie one behind the other: it has no border."""
    (count, height, width, _), (image, line, pixel, _) = y.shape, y.strides
    return bool((count == 1 or image == height * width * pixel) and (height == 1 or line == width * pixel))
