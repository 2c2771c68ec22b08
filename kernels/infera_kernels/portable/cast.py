"""Conversion between element types, with what NumPy's astype does otherwise than wanted."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from infera_kernels.calls import Array


def cast(xp: Any, x: Array, dtype: np.dtype[Any], *, saturate: bool = True, rounding: str = "up") -> Array:
    """`x` as `dtype`. Into float8, values out of range become the largest finite one (`saturate`) or inf or NaN.

    Into float8_e8m0, powers of two, values are rounded "up", "down" or to the "nearest".
    Text is read as numbers, and numbers are written as text with as many digits as tell their values apart.
    Raises ValueError where a text is not a number.
    """
    if x.dtype.kind == "O" and dtype.kind != "O":
        x = _parsed(x, dtype)
    if dtype.kind == "O":
        return x.copy() if x.dtype.kind == "O" else _written(x)
    if dtype.name == "float8_e8m0fnu":
        return _power_of_two(xp, x.astype(np.float32), saturate=saturate, rounding=rounding).view(dtype)
    if dtype.name.startswith("float8"):
        return _float8(xp, x.astype(np.float32), dtype, saturate=saturate)
    if x.dtype.isbuiltin != 1 and dtype.isbuiltin != 1:  # ml_dtypes has few conversions between types of its own
        x = x.astype(np.float32)  # holds them all
    return x.astype(dtype)


def _power_of_two(xp: Any, x: Array, *, saturate: bool, rounding: str) -> Array:
    """float32 values as bits of float8_e8m0, 2^-127 to 2^127; the sign is lost. The table of ONNX's Cast-24.

    What lies outside, infinities too, becomes the nearest of these with `saturate`, else NaN (255), as NaN does.
    """
    bits = x.view(np.uint32) & 0x7FFFFFFF
    exponent, rest = bits >> 23, bits & 0x7FFFFF
    rest = xp.where(exponent == 0, (rest - 0x400000) << 1, rest)  # float32 holds 2^-127 without its leading one
    half = 0x400000
    if rounding == "up":
        more = rest > 0
    elif rounding == "nearest":
        more = rest >= half
    else:
        more = xp.zeros(bits.shape, np.bool_)
    code = xp.where(bits < 0x400000, 0 if saturate else 0xFF, exponent + more)
    code = xp.where(bits > 0x7F000000, 0xFE if saturate else 0xFF, code)
    return xp.where(bits > 0x7F800000, 0xFF, code).astype(np.uint8)


def _float8(xp: Any, x: Array, dtype: np.dtype[Any], *, saturate: bool) -> Array:
    if saturate:
        largest = float(ml_dtypes.finfo(dtype).max)
        x = xp.clip(x, -largest, largest)
    return x.astype(dtype)


def _parsed(x: Array, dtype: np.dtype[Any]) -> Array:
    """As numbers of the type, or, of ml_dtypes' types, in float64."""
    read = int if dtype.kind in "iu" else float
    numbers = np.array([read(v) for v in x.reshape(-1)]).reshape(x.shape)
    return numbers.astype(dtype) if dtype.isbuiltin == 1 else numbers.astype(np.float64)


def _written(x: Array) -> Array:
    def text(v: Any) -> str:
        if not isinstance(v, float):
            return str(int(v))
        if v != v:
            return "NaN"
        return f"{v:.{digits}g}".upper() if abs(v) == float("inf") else f"{v:.{digits}g}"

    digits = 17 if x.dtype == np.float64 else 8
    written = np.empty(x.size, object)
    written[:] = [text(v) for v in x.reshape(-1).tolist()]
    return written.reshape(x.shape)
