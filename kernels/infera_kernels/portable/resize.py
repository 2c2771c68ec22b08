"""Resizing by interpolation along one axis after the other, for NumPy and CuPy.

Every mode is a table for each axis: which source elements each output element takes, and their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from infera_kernels.calls import Array
from infera_kernels.record import Record


def _unrounded(scale: float, size: int, out: int) -> float:
    """What the size of the output would be without rounding: ONNX aligns the corners of that."""
    length = float(scale) * size
    return out if abs(length - out) < 1e-4 * out else length


# name -> f(x, scale, size, out, roi): the source coordinate of output element x. `out` is the output's size and
# `scale * size` what it would be without rounding. In float32, because ties must fall as in other runtimes.
COORDINATES: Mapping[str, Callable[[Array, Any, int, int, tuple[float, float]], Array]] = MappingProxyType(
    {
        "half_pixel": lambda x, scale, size, out, roi: (x + 0.5) / scale - 0.5,
        "half_pixel_symmetric": lambda x, scale, size, out, roi: (
            size / 2 * (1 - out / (scale * size)) + (x + 0.5) / scale - 0.5
        ),
        "pytorch_half_pixel": lambda x, scale, size, out, roi: (x + 0.5) / scale - 0.5 if out > 1 else 0 * x,
        "align_corners": lambda x, scale, size, out, roi: x * (size - 1) / (out - 1) if out > 1 else 0 * x,
        "align_unrounded_corners": lambda x, scale, size, out, roi: (
            x * (size - 1) / (_unrounded(scale, size, out) - 1) if out > 1 else 0 * x
        ),
        "asymmetric": lambda x, scale, size, out, roi: x / scale,
        "tf_half_pixel_for_nn": lambda x, scale, size, out, roi: (x + 0.5) / scale,
        "tf_crop_and_resize": lambda x, scale, size, out, roi: (
            roi[0] * (size - 1) + x * (roi[1] - roi[0]) * (size - 1) / (out - 1)
            if out > 1
            else 0 * x + 0.5 * (roi[0] + roi[1]) * (size - 1)
        ),
    }
)

# name -> f(coordinate, whether the axis shrinks): the nearest source element. "simple" is that of the first opsets.
NEAREST: Mapping[str, Callable[[Array, bool], Array]] = MappingProxyType(
    {
        "round_prefer_floor": lambda x, shrinks: np.ceil(x - np.float32(0.5)),
        "round_prefer_ceil": lambda x, shrinks: np.floor(x + np.float32(0.5)),
        "floor": lambda x, shrinks: np.floor(x),
        "ceil": lambda x, shrinks: np.ceil(x),
        "simple": lambda x, shrinks: np.ceil(x) if shrinks else np.floor(x),
    }
)


class Filter(Record):
    """How to interpolate. `mode` is nearest, linear or cubic; the names are keys of `NEAREST` and `COORDINATES`."""

    mode: str
    coordinates: str
    nearest: str = "round_prefer_floor"
    cubic_a: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0


class AxisTable(Record):
    """Along `axis`, output element i is sum over k of weights[i, k] * source[index[i, k]] (int64, float64; (out, k)).

    `outside` marks the output elements that lie outside a cropped region; None where there are none.
    """

    axis: int
    size: int
    index: Array
    weights: Array
    outside: Array | None = None


def axis_table(
    axis: int, size: int, out: int, scale: float, how: Filter, roi: tuple[float, float] = (0, 1)
) -> AxisTable:
    """The table of one axis of `size` elements resized to `out`; `scale` is out / size before rounding."""
    steps = np.arange(out, dtype=np.float32)
    x = np.asarray(COORDINATES[how.coordinates](steps, np.float32(scale), size, out, roi), np.float32)
    outside = (x < 0) | (x > size - 1) if how.coordinates == "tf_crop_and_resize" else None
    if how.mode == "nearest":
        index = np.clip(NEAREST[how.nearest](x, scale < 1), 0, size - 1).astype(np.int64)[:, None]
        return AxisTable(axis, size, index, np.ones(index.shape), _if_any(outside))
    position = x.astype(np.float64)
    if how.mode == "linear" and not how.antialias:
        position = np.clip(position, 0, size - 1)
    stretch = min(1.0, scale) if how.antialias else 1.0
    reach = (1 if how.mode == "linear" else 2) / stretch
    count = 2 * math.ceil(reach)
    index = np.floor(position).astype(np.int64)[:, None] + np.arange(1 - count // 2, count // 2 + 1)
    distance = np.abs(index - position[:, None]) * stretch
    weights = np.maximum(0, 1 - distance) if how.mode == "linear" else _cubic(distance, how.cubic_a)
    if how.exclude_outside:
        weights = np.where((index < 0) | (index >= size), 0, weights)
    if how.exclude_outside or how.antialias:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return AxisTable(axis, size, np.clip(index, 0, size - 1), weights, _if_any(outside))


def _if_any(outside: Array | None) -> Array | None:
    return outside if outside is not None and outside.any() else None


def _cubic(d: Array, a: float) -> Array:
    """Keys' cubic convolution kernel at distance `d`."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def resize(xp: Any, x: Array, tables: Sequence[AxisTable], how: Filter) -> Array:
    """`x` resized along the axes of `tables`. Nearest copies elements of any dtype; else sums in double precision,
    which integers cut off towards zero."""
    y = x if how.mode == "nearest" else x.astype(xp.complex128 if x.dtype.kind == "c" else xp.float64)
    for table in tables:
        column = (-1, *(1,) * (x.ndim - table.axis - 1))
        if how.mode == "nearest":
            y = xp.take(y, xp.asarray(table.index[:, 0]), axis=table.axis)
            continue
        taps = zip(table.index.T, table.weights.T, strict=True)
        y = sum(xp.take(y, xp.asarray(i), axis=table.axis) * xp.asarray(w).reshape(column) for i, w in taps)
    for table in tables:
        if table.outside is not None:
            column = (-1, *(1,) * (x.ndim - table.axis - 1))
            y = xp.where(xp.asarray(table.outside).reshape(column), xp.asarray(how.extrapolation, y.dtype), y)
    if x.dtype.kind in "iu" and how.mode != "nearest":
        bounds = xp.iinfo(x.dtype)
        y = xp.clip(xp.trunc(y), bounds.min, bounds.max)
    return y.astype(x.dtype, copy=False)
