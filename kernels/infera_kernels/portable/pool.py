"""Pooling, plainly, for NumPy and CuPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from infera_kernels.calls import Array
from infera_kernels.portable.windows import Pads, pad_spatial, windows


def lowest(xp: Any, dtype: Any) -> Any:
    """The value that no maximum picks over another."""
    return xp.iinfo(dtype).min if dtype.kind in "iu" else -math.inf


def max_pool(
    xp: Any,
    x: Array,
    out: Sequence[int],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
    column_major: bool = False,
) -> tuple[Array, Array]:
    """The maxima (N, C, *out) of the windows, and the int64 index of each in flat `x` (in each plane by columns where
    `column_major`)."""
    spatial = len(out)
    seen = windows(
        xp, x, out, kernel=kernel, strides=strides, dilations=dilations, pads=pads, value=lowest(xp, x.dtype)
    )
    seen = seen.reshape(*x.shape[:2], *out, math.prod(kernel))
    at = seen.argmax(axis=-1)
    y = xp.take_along_axis(seen, at[..., None], axis=-1)[..., 0]
    size = x.shape[2:]
    steps = [math.prod(size[:i]) if column_major else math.prod(size[i + 1 :]) for i in range(spatial)]
    planes = xp.arange(x.shape[0] * x.shape[1], dtype=xp.int64).reshape(*x.shape[:2], *(1,) * spatial)
    index = planes * math.prod(size)
    for i, tap in enumerate(xp.unravel_index(at, tuple(kernel))):
        start = (xp.arange(out[i], dtype=xp.int64) * strides[i] - pads[i][0]).reshape(-1, *(1,) * (spatial - 1 - i))
        index = index + (start + tap * dilations[i]) * steps[i]
    return y, index


def counts(
    xp: Any,
    size: Sequence[int],
    out: Sequence[int],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
    include_pad: bool,
) -> Array:
    """(*out): the elements of each window, padding counted or not; what hangs over the padding never counts."""
    ones = xp.ones((1, 1, *size), xp.float32)
    if include_pad:
        ones, pads = pad_spatial(xp, ones, pads, 1.0), ((0, 0),) * len(pads)
    seen = windows(xp, ones, out, kernel=kernel, strides=strides, dilations=dilations, pads=pads)
    return seen.sum(axis=tuple(range(-len(out), 0)))[0, 0]


def average_pool(
    xp: Any,
    x: Array,
    out: Sequence[int],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
    include_pad: bool,
    in_order: bool = False,
) -> Array:
    """The means (N, C, *out) of the windows; `in_order` adds one tap after the other, for what the last bit decides."""
    geometry: dict[str, Any] = {"kernel": kernel, "strides": strides, "dilations": dilations, "pads": pads}
    wide = x.astype(xp.promote_types(x.dtype, xp.float32), copy=False)
    seen = windows(xp, wide, out, **geometry)
    if in_order:
        sums = sum(seen[(..., *tap)] for tap in product(*map(range, kernel)))
    else:
        sums = seen.sum(axis=tuple(range(-len(out), 0)))
    return (sums / counts(xp, x.shape[2:], out, include_pad=include_pad, **geometry)).astype(x.dtype, copy=False)


def lp_pool(
    xp: Any,
    x: Array,
    out: Sequence[int],
    *,
    p: float,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
) -> Array:
    """The p-norms (N, C, *out) of the windows."""
    wide = xp.abs(x.astype(xp.promote_types(x.dtype, xp.float32), copy=False)) ** p
    seen = windows(xp, wide, out, kernel=kernel, strides=strides, dilations=dilations, pads=pads)
    return (seen.sum(axis=tuple(range(-len(out), 0))) ** (1 / p)).astype(x.dtype, copy=False)
