"""Normalisations, plainly, for NumPy and CuPy; statistics in at least float32."""

from __future__ import annotations

from typing import Any

from infera_kernels.calls import Array


def standardized(
    xp: Any, x: Array, axes: tuple[int, ...], epsilon: float, *, center: bool = True
) -> tuple[Array, Array, Array]:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) over `axes`, the mean and the reciprocal root, axes kept.

    All in float64 for float64, else statistics in float64 and results in float32. Without `center` the mean is 0.
    """
    made = xp.promote_types(x.dtype, xp.float32)
    wide = x.astype(xp.float64)
    mean = wide.mean(axis=axes, keepdims=True) if center else xp.zeros((1,) * x.ndim)
    wide = wide - mean
    inverse = 1 / xp.sqrt((wide * wide).mean(axis=axes, keepdims=True) + epsilon)
    return (wide * inverse).astype(made), mean.astype(made), inverse.astype(made)


def affine(y: Array, scale: Array | None, bias: Array | None, dtype: Any) -> Array:
    """y * scale + bias, rounded to `dtype` at the end."""
    if scale is not None:
        y = y * scale.astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.astype(dtype, copy=False)


def channel_column(a: Array, ndim: int) -> Array:
    """(C,) as (C, 1...) to broadcast over (N, C, *spatial) of `ndim` axes."""
    return a.reshape(-1, *(1,) * (ndim - 2))


def lp_normalized(xp: Any, x: Array, axis: int, p: int) -> Array:
    """x over its p-norm along `axis`, 0 where the norm is 0."""
    wide = x.astype(xp.promote_types(x.dtype, xp.float32), copy=False)
    norm = (
        xp.abs(wide).sum(axis=axis, keepdims=True) if p == 1 else xp.sqrt((wide * wide).sum(axis=axis, keepdims=True))
    )
    return (wide / xp.where(norm == 0, 1, norm)).astype(x.dtype, copy=False)


def l2_normalized(
    xp: Any, x: Array, axis: int, *, epsilon: float, bound: str, squared: bool, finite: bool = False
) -> Array:
    """x over the root of its sum of squares along `axis`: the root, or where `squared` the sum, is at least `epsilon`,
    and where `finite` at most the largest number, or with `bound` "add" greater by that."""
    wide = x.astype(xp.promote_types(x.dtype, xp.float32), copy=False)

    def bounded(n: Array) -> Array:
        if bound == "add":
            return n + n.dtype.type(epsilon)
        n = xp.maximum(n, n.dtype.type(epsilon))
        return xp.minimum(n, xp.finfo(n.dtype).max) if finite else n

    total = (wide * wide).sum(axis=axis, keepdims=True)
    return (wide / (xp.sqrt(bounded(total)) if squared else bounded(xp.sqrt(total)))).astype(x.dtype, copy=False)


def neighbours(size: int, channels: int) -> range:
    """How far the `size` channels around a channel lie from it, as far as there are any."""
    return range(max(-((size - 1) // 2), 1 - channels), min(size // 2, channels - 1) + 1)


def local_response(xp: Any, x: Array, *, size: int, alpha: float, beta: float, bias: float) -> Array:
    """x / (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""
    channels = x.shape[1]
    wide = x.astype(xp.promote_types(x.dtype, xp.float32), copy=False)
    sums = xp.zeros_like(wide)
    for shift in neighbours(size, channels):
        low, high = max(0, -shift), min(channels, channels - shift)
        sums[:, low:high] += wide[:, low + shift : high + shift] ** 2
    return (wide / (bias + alpha / size * sums) ** beta).astype(x.dtype, copy=False)
