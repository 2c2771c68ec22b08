"""Convolution and its transpose, plainly, for NumPy and CuPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from infera_kernels.calls import Array
from infera_kernels.portable.windows import Pads, windows


def convolution(
    xp: Any,
    x: Array,
    w: Array,
    b: Array | None,
    out: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    group: int,
) -> Array:
    """(N, C, *in) * (O, C / group, *kernel) [+ (O,)] -> (N, O, *out). Half precision accumulates in float32."""
    kernel, spatial = w.shape[2:], len(out)
    n, o = x.shape[0], w.shape[0]
    seen = windows(xp, x, out, kernel=kernel, strides=strides, dilations=dilations, pads=pads)
    axes = (0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
    wide = _accumulator(xp, w.dtype)
    taps = w.shape[1] * math.prod(kernel)
    cols = seen.transpose(axes).reshape(n, group, taps, math.prod(out)).astype(wide, copy=False)
    y = xp.matmul(w.reshape(group, o // group, taps).astype(wide, copy=False), cols).reshape(n, o, *out)
    return (y if b is None else y + _column(b, spatial)).astype(w.dtype, copy=False)


def transposed_convolution(
    xp: Any,
    x: Array,
    w: Array,
    b: Array | None,
    out: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    group: int,
) -> Array:
    """(N, C, *in) and (C, O / group, *kernel) [and (O,)] -> (N, O, *out): the gradient of `convolution`, cropped."""
    kernel, spatial = w.shape[2:], len(out)
    n, c, o = x.shape[0], x.shape[1], w.shape[1] * group
    wide = _accumulator(xp, x.dtype)
    taps = w.reshape(group, c // group, -1).swapaxes(1, 2).astype(wide, copy=False)
    cols = xp.matmul(taps, x.reshape(n, group, c // group, -1).astype(wide, copy=False))
    cols = cols.reshape(n, o, *kernel, *x.shape[2:])
    y = xp.zeros((n, o, *out), wide)
    for tap in product(*map(range, kernel)):
        target, source = transposed_tap(x.shape[2:], out, tap, strides=strides, pads=pads, dilations=dilations)
        y[(slice(None), slice(None), *target)] += cols[(slice(None), slice(None), *tap, *source)]
    return (y if b is None else y + _column(b, spatial)).astype(x.dtype, copy=False)


def transposed_tap(
    size: Sequence[int],
    out: Sequence[int],
    tap: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the output that one kernel tap reaches, and of the input elements that reach them."""
    target, source = [], []
    for n, m, t, s, (before, _), d in zip(size, out, tap, strides, pads, dilations, strict=True):
        shift = t * d - before
        first = max(0, -(shift // s))
        last = min(n, (m - 1 - shift) // s + 1)
        count = max(0, last - first)
        start = first * s + shift if count else 0
        target.append(slice(start, start + (count - 1) * s + 1 if count else 0, s))
        source.append(slice(first, first + count) if count else slice(0, 0))
    return tuple(target), tuple(source)


def _accumulator(xp: Any, dtype: Any) -> Any:
    """The dtype to sum products of `dtype` in."""
    return xp.dtype("float32") if dtype.itemsize == 2 and dtype.kind not in "iu" else dtype


def _column(b: Array, spatial: int) -> Array:
    return b.reshape(-1, *(1,) * spatial)
