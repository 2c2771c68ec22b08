"""Transposed convolution on NumPy and its BLAS, channels last: a product an image, added up where the taps reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from infera_kernels.calls import Array, Call, Pack, Scratch
from infera_kernels.cpu.elementwise import const
from infera_kernels.portable.conv import transposed_tap
from infera_kernels.portable.windows import Pads

FEW_FILTERS = 8
"""Filters of a group below which what one tap adds is written pixel by pixel, and not filter by filter."""


def conv_transpose(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    pack: Pack | None,
    *,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    group: int,
) -> list[Call]:
    """x (N, *in, C), w (C, O / group, *kernel), b (O,) or None, y (N, *out, O); contiguous, of one floating dtype.

    `pack` is given where w never changes.
    """
    size, out, kernel = x.shape[1:-1], y.shape[1:-1], w.shape[2:]
    taps, pixels, filters = math.prod(kernel), math.prod(size), w.shape[1]

    def apart(weights: Array) -> Array:
        """(group, taps, O / group, C / group)"""
        return weights.reshape(group, -1, filters, taps).transpose(0, 3, 2, 1)

    calls: list[Call] = []
    if pack is not None:
        weights = pack("transposed", lambda made: np.ascontiguousarray(apart(made)))
    else:
        weights = scratch((group, taps, filters, x.shape[-1] // group), w.dtype)
        calls.append((np.copyto, (weights, apart(w))))
    rows = weights.reshape(group, taps * filters, -1)
    columns = scratch((group, pixels * taps * filters), x.dtype)
    if filters < FEW_FILTERS:
        grid = columns.reshape(group, *kernel, filters, *size).transpose(_pixels_first(len(size)))
    else:
        grid = np.moveaxis(columns.reshape(group, *size, *kernel, filters), 0, -2)
    base = const(0, y) if b is None else b.reshape(group, filters)
    everywhere = (slice(None),) * len(size)
    for source, target in zip(x, y.reshape(*y.shape[:-1], group, filters), strict=True):
        images = source.reshape(pixels, group, -1).swapaxes(0, 1)
        if filters < FEW_FILTERS:
            calls.append((np.matmul, (rows, images.swapaxes(1, 2), columns.reshape(group, -1, pixels))))
        else:
            calls.append((np.matmul, (images, rows.swapaxes(1, 2), columns.reshape(group, pixels, -1))))
        calls.append((np.copyto, (target, base)))
        for tap in product(*map(range, kernel)):
            to, at = transposed_tap(size, out, tap, strides=strides, pads=pads, dilations=dilations)
            part = target[to]
            if part.size:
                calls.append((np.add, (part, grid[everywhere + tap][at], part)))
    return calls


def _pixels_first(rank: int) -> tuple[int, ...]:
    """From (group, *kernel, filters, *size) to (*size, *kernel, group, filters)."""
    return (*range(rank + 2, 2 * rank + 2), *range(1, rank + 1), 0, rank + 1)
