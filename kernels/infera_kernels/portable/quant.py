"""Linear quantisation, and products of quantised matrices, written once for NumPy and CuPy.

q = saturate(round(x / scale) + zero point), halves rounded to even, NaN the lowest; x = (q - zero point) scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from infera_kernels.calls import Array
from infera_kernels.portable.cast import cast


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Whether it is an integer type, ml_dtypes' four-bit ones included."""
    return dtype.kind in "iu" or dtype.name in ("int4", "uint4", "int2", "uint2")


def bounds(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The smallest and the largest value of an integer type."""
    info = ml_dtypes.iinfo(dtype)
    return int(info.min), int(info.max)


def aligned(xp: Any, parameter: Array, shape: tuple[int, ...], axis: int, block: int = 0) -> Array:
    """A scale or zero point laid out to broadcast with a tensor of `shape`.

    One value for the whole tensor, one for each entry along `axis`, or with `block` one for each run of so many.
    """
    if block:
        return xp.take(xp.repeat(parameter, block, axis=axis), xp.arange(shape[axis]), axis=axis)
    if parameter.size == 1:
        return parameter.reshape(())
    return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def unpacked(xp: Any, packed: Array, bits: int) -> Array:
    """(..., bytes) -> (..., values) of 2, 4 or 8 bits: the lowest bits of a byte come first."""
    shifts = xp.arange(8 // bits, dtype=xp.uint8) * bits
    made = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return made.astype(xp.uint8).reshape(*packed.shape[:-1], packed.shape[-1] * (8 // bits))


def quantize(
    xp: Any, x: Array, scale: Array, zero: Array | None, dtype: np.dtype[Any], *, saturate: bool = True
) -> Array:
    """x as `dtype`; scale and zero point broadcast to it. `saturate` is asked for float8 only."""
    q = x.astype(xp.float32) / scale.astype(xp.float32)
    if not is_integer(dtype):
        return cast(xp, q, dtype, saturate=saturate)
    q = xp.rint(q)
    if zero is not None:
        q = q + zero.astype(xp.float32)
    return saturated(xp, q, dtype)


def saturated(xp: Any, q: Array, dtype: np.dtype[Any]) -> Array:
    """Whole float32 numbers as an integer type: what is beyond it is its lowest or highest value, NaN the lowest."""
    low, high = bounds(dtype)
    return xp.fmin(xp.fmax(q, xp.float32(low)), xp.float32(high)).astype(dtype)


def dequantize(xp: Any, q: Array, scale: Array, zero: Array | None, dtype: np.dtype[Any]) -> Array:
    """q as the floating-point `dtype`; scale and zero point broadcast to it."""
    exact = q.dtype.itemsize <= 2 or not is_integer(q.dtype)  # differences of 16-bit integers are, in float32
    x = q.astype(xp.float32 if exact else xp.int32)
    if zero is not None:
        x -= zero.astype(x.dtype)
    x = x.astype(xp.float32, copy=False)
    x *= scale.astype(xp.float32)
    return x.astype(dtype, copy=False)


def dynamic_quantize(xp: Any, x: Array) -> tuple[Array, Array, Array]:
    """x as uint8 over the range that holds it and 0, its scale and zero point. NaN counts for nothing in the range."""
    zero = xp.zeros((1,), x.dtype)
    flat = xp.concatenate([xp.where(xp.isnan(x), zero, x).reshape(-1), zero])
    low, high = flat.min(), flat.max()
    scale = ((high - low) / xp.asarray(255, x.dtype)).astype(x.dtype)
    scale = xp.where(scale == 0, xp.ones_like(scale), scale)
    point = xp.rint(xp.clip(-low / scale, 0, 255)).astype(xp.uint8)
    return quantize(xp, x, scale, point, np.dtype(np.uint8)), scale, point


def centred(xp: Any, q: Array, zero: Array | None, axis: int) -> Array:
    """q less its zero point, int32, float32 for floats.

    A zero point of one dimension has one value for each entry along `axis`.
    """
    wide = q.astype(xp.int32 if is_integer(q.dtype) else xp.float32)
    if zero is None:
        return wide
    zero = zero.astype(wide.dtype)
    if zero.ndim == 1 and zero.size > 1:
        zero = zero.reshape([-1 if i == axis % q.ndim else 1 for i in range(q.ndim)])
    return wide - (zero.reshape(()) if zero.size == 1 else zero)


_INT32_MAX, _WIDEST = 2**31 - 1, 255
"""The largest sum of integers, and the largest difference between two bytes."""


def sums_fit(weight: Array, axis: int, zero: Array | None = None) -> bool:
    """Whether all sums of 8-bit weights, less a zero point, times activations less theirs are int32, for each entry of
    an axis. Only thousands of terms are more, of a model that means floats: they do not wrap around.

    `zero` is one value, or one for each entry.
    """
    channels = weight.shape[axis]
    if weight.size * _WIDEST**2 <= channels * _INT32_MAX:
        return True
    wide = np.moveaxis(weight, axis, -1).reshape(-1, channels).astype(np.int16)
    if zero is not None:
        wide -= zero.reshape(-1).astype(np.int16)
    return int(np.abs(wide).sum(axis=0, dtype=np.int64).max(initial=0)) * _WIDEST <= _INT32_MAX


def matmul_integer(xp: Any, a: Array, b: Array, a_zero: Array | None, b_zero: Array | None) -> Array:
    """(a - a_zero) @ (b - b_zero) in int32, in floating point for floats; zero points of rows of `a` and of columns
    of `b`.

    Integers are summed in float64, exact below 2**53, because their products have no BLAS; int32 wraps around.
    """
    rows, columns = max(a.ndim - 2, 0), b.ndim - 1
    left, right = centred(xp, a, a_zero, rows), centred(xp, b, b_zero, columns)
    if "f" in (left.dtype.kind, right.dtype.kind):
        return xp.matmul(left, right)
    return xp.matmul(left.astype(xp.float64), right.astype(xp.float64)).astype(xp.int64).astype(xp.int32)


def dynamic_matmul(xp: Any, a: Array, b: Array, scale: Array, zero: Array | None) -> Array:
    """a @ b in float32: `a` float, quantised over its own range, `b` by `scale` and `zero`, single or by columns."""
    q, a_scale, a_zero = dynamic_quantize(xp, a)
    return matmul_integer(xp, q, b, a_zero, zero).astype(xp.float32) * (a_scale * scale)


def added(xp: Any, operands: Sequence[tuple[Array, Array | None]], factors: Sequence[Array], zero: Array) -> Array:
    """The sum of (quantised, zero point) times float32 factors, plus the output's zero point, rounded to its type.

    The last bit decides what lies halfway between two integers, so the order is that of onnxruntime's kernel: zero
    points, then operands that repeat along the last axis, then the others.
    """
    f32 = xp.float32
    points = [f * (0 if p is None else p.reshape(()).astype(f32)) for (_, p), f in zip(operands, factors, strict=True)]
    total = zero.astype(f32) - sum(points[1:], start=points[0])
    pairs = list(zip(operands, factors, strict=True))
    for (q, _), factor in sorted(pairs, key=lambda pair: pair[0][0].shape[-1:] not in ((), (1,))):
        total = total + q.astype(f32) * factor
    return saturated(xp, xp.rint(total), zero.dtype)


def requantize(xp: Any, sums: Array, factor: Array, zero: Array) -> Array:
    """Sums times `factor`, plus the zero point, as zero's type."""
    q = sums.astype(xp.float32) * factor.astype(xp.float32)
    if not is_integer(zero.dtype):
        return cast(xp, q + zero.astype(xp.float32), zero.dtype)
    return saturated(xp, xp.rint(q) + zero.astype(xp.float32), zero.dtype)
