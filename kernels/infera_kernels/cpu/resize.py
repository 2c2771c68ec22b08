"""Resizing on NumPy: nearest as gathers, interpolation as products with banded matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.portable.resize import AxisTable

BAND = 64
"""Output elements of one product: wide enough for BLAS, narrow enough that few weights are zero."""


def resize(x: Array, y: Array, scratch: Scratch, tables: Sequence[AxisTable], *, nearest: bool) -> list[Call]:
    """y = x resized along the axes of `tables`, which have no `outside`; contiguous.

    `nearest` takes any dtype, else floating ones. An infinity spreads to a band's neighbours as NaN.
    """
    order = sorted(tables, key=lambda t: (len(t.index) / t.size, -t.axis))
    calls: list[Call] = [] if order else [(np.copyto, (y, x))]
    source = x
    for i, table in enumerate(order):
        shape = (*source.shape[: table.axis], len(table.index), *source.shape[table.axis + 1 :])
        target = y if i == len(order) - 1 else scratch(shape, x.dtype)
        outer, inner = math.prod(shape[: table.axis]), math.prod(shape[table.axis + 1 :])
        before, after = source.reshape(outer, -1, inner), target.reshape(outer, -1, inner)
        if nearest:
            calls.append((before.take, (table.index[:, 0], 1, after, "clip")))
        else:
            calls += _interpolate(before, after, table)
        source = target
    return calls


def _interpolate(x: Array, y: Array, table: AxisTable) -> list[Call]:
    """(outer, size, inner) -> (outer, out, inner)"""
    calls: list[Call] = []
    for start in range(0, y.shape[1], BAND):
        rows = slice(start, min(start + BAND, y.shape[1]))
        index, weights = table.index[rows], table.weights[rows]
        low, high = int(index.min()), int(index.max()) + 1
        band = np.zeros((rows.stop - start, high - low))
        np.add.at(band, (np.arange(len(band))[:, None], index - low), weights)
        matrix = np.ascontiguousarray(band, x.dtype)
        if x.shape[2] == 1:
            calls.append((np.matmul, (x[:, low:high, 0], matrix.T, y[:, rows, 0])))
        else:
            calls.append((np.matmul, (matrix, x[:, low:high], y[:, rows])))
    return calls
