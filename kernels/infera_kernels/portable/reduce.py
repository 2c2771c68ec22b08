"""Reductions, scans and selections along an axis, written once for NumPy and CuPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array


def _extremum(name: str) -> Callable[..., Array]:
    def reduced(xp: Any, x: Array, axes: tuple[int, ...]) -> Array:
        if 0 not in (x.shape[a] for a in axes):
            return getattr(xp, name)(x, axis=axes, keepdims=True)
        shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
        return xp.full(shape, _worst(x.dtype, highest=name == "amin"), x.dtype)

    return reduced


def _worst(dtype: Any, *, highest: bool) -> Any:
    if dtype.kind == "b":
        return highest
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return info.max if highest else info.min
    return math.inf if highest else -math.inf


def _sum(xp: Any, x: Array, axes: tuple[int, ...]) -> Array:
    return xp.sum(x, axis=axes, keepdims=True, dtype=x.dtype)


def _mean(xp: Any, x: Array, axes: tuple[int, ...]) -> Array:
    count = math.prod(x.shape[a] for a in axes)
    total = _sum(xp, x, axes)
    return xp.trunc(total / count).astype(x.dtype) if x.dtype.kind in "iu" else total / count


def _log_sum_exp(xp: Any, x: Array, axes: tuple[int, ...]) -> Array:
    highest = _REDUCTIONS["max"](xp, x, axes)
    shift = xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest))
    return xp.log(_sum(xp, xp.exp(x - shift), axes)) + shift


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "sum": _sum,
    "prod": lambda xp, x, axes: xp.prod(x, axis=axes, keepdims=True, dtype=x.dtype),
    "max": _extremum("amax"),
    "min": _extremum("amin"),
    "mean": _mean,
    "l1": lambda xp, x, axes: _sum(xp, abs(x), axes),
    "l2": lambda xp, x, axes: xp.sqrt(_sum(xp, x * x, axes)),
    "log_sum": lambda xp, x, axes: xp.log(_sum(xp, x, axes)),
    "log_sum_exp": _log_sum_exp,
    "sum_square": lambda xp, x, axes: _sum(xp, x * x, axes),
}


def reduction(xp: Any, kind: str, x: Array, axes: Sequence[int], shape: Sequence[int]) -> Array:
    """`x` reduced over `axes`, as `shape`.

    Two-byte floats are reduced in float32. Integers wrap around where the result does not fit, not before: means are
    summed in 64 bits, and squares and exponentials that a root or a logarithm undoes are float64.
    """
    wide = x
    if x.dtype.kind not in "iu":
        wide = x.astype(xp.float32) if x.dtype.itemsize == 2 else x
    elif kind in ("l2", "log_sum", "log_sum_exp"):
        wide = x.astype(xp.float64)
    elif kind == "mean" and x.dtype.itemsize < 8:
        wide = x.astype(xp.int64)
    return _REDUCTIONS[kind](xp, wide, tuple(axes)).astype(x.dtype).reshape(shape)


def arg_extremum(xp: Any, x: Array, axis: int, *, largest: bool, last: bool) -> Array:
    """int64 index of the extremum along `axis`, which is kept; the first or the last among equals."""
    find = xp.argmax if largest else xp.argmin
    if last:
        return x.shape[axis] - 1 - xp.expand_dims(find(xp.flip(x, axis), axis=axis), axis)
    return xp.expand_dims(find(x, axis=axis), axis)


def scan(xp: Any, name: str, x: Array, axis: int, *, exclusive: bool, reverse: bool, identity: int) -> Array:
    """`cumsum` or `cumprod` along `axis`; `exclusive` leaves out the element itself, `reverse` runs backwards."""
    if reverse:
        x = xp.flip(x, axis)
    y = getattr(xp, name)(x, axis=axis, dtype=x.dtype)
    if exclusive:
        first = [slice(None)] * x.ndim
        first[axis] = slice(0, -1)
        edge = list(x.shape)
        edge[axis] = min(1, x.shape[axis])
        y = xp.concatenate([xp.full(edge, identity, x.dtype), y[tuple(first)]], axis)
    return xp.flip(y, axis) if reverse else y


def top_k(xp: Any, x: Array, k: int, axis: int, *, largest: bool) -> tuple[Array, Array]:
    """The k extreme values along `axis` in order, and their int64 indices; of equals the lower index comes first."""
    n = x.shape[axis]
    keys = x.astype(xp.float32) if x.dtype.name == "bfloat16" else x  # which CuPy does not sort
    if largest:
        order = n - 1 - xp.flip(xp.argsort(xp.flip(keys, axis), axis=axis, kind="stable"), axis)
    else:
        order = xp.argsort(keys, axis=axis, kind="stable")
    index = xp.take(order, xp.arange(k), axis=axis)
    return xp.take_along_axis(x, index, axis), index.astype(xp.int64)
