"""Quantisation in fewer passes than `cpu.quant`: the same floats, whose integers stay float32 less their zero point."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call
from infera_kernels.jit.compiling import bound, exact
from infera_kernels.jit.epilogue import PIECE
from infera_kernels.jit.functions import F, ordered, saturated

_MOST, _LEAST = np.int32(0x7F800000), np.int32(-0x7F800001)
"""The keys of both infinities, beyond which NaN lies."""


@exact
def _dynamic_range(x: Any, scale: Any, limits: Any) -> None:
    """scale, and -zero point and 255 - zero point, of x quantised to uint8 over the range that holds it and 0, whatever
    NaN is among it."""
    bits = x.view(np.int32)
    least, most = np.int32(0), np.int32(0)
    for c in range(bits.size):
        key = ordered(bits[c])
        key = key if key >= _LEAST and key <= _MOST else np.int32(0)
        least, most = min(least, key), max(most, key)
    low = np.int32(ordered(least)).view(np.float32)
    size = (np.int32(most).view(np.float32) - low) / F(255)
    size = F(1) if size == F(0) else size
    point = -(low / size)
    point = np.rint(F(255) if point > F(255) else point)
    scale[()] = size
    limits[0], limits[1] = -point, F(255) - point


@exact
def _centre(x: Any, y: Any, scale: Any, limits: Any, again: bool) -> None:
    """y = round(x / scale) between the limits, vectors, a piece at a time; with `again` times the scale."""
    size, low, high = scale[()], limits[0], limits[1]
    for start in range(0, x.size, PIECE):
        source, row = x[start : start + PIECE], y[start : start + PIECE]
        for c in range(row.size):
            row[c] = source[c]
        for c in range(row.size):
            row[c] = saturated(np.rint(row[c] / size), low, high)
        if again:
            for c in range(row.size):
                row[c] *= size


@exact
def _quantize(x: Any, scale: Any, zero: Any, low: Any, high: Any, q: Any) -> None:
    size, point = scale[()], zero[()]
    for c in range(x.size):
        q[c] = np.int32(saturated(np.rint(x[c] / size) + point, low, high))


@exact
def _requantize(sums: Any, factor: Any, zero: Any, low: Any, high: Any, q: Any) -> None:
    point = zero[()]
    for i in range(sums.shape[0]):
        source, target = sums[i], q[i]
        for c in range(source.size):
            target[c] = np.int32(saturated(np.rint(F(source[c]) * factor[c]) + point, low, high))


def dynamic_range(x: Array, scale: Array, limits: Array) -> Call:
    """`scale` (0-d) and `limits` (2,), for `centre`, of float32 x, contiguous, over the range that holds it and 0."""
    return bound(_dynamic_range, x.reshape(-1), scale, limits)


def centre(x: Array, y: Array, scale: Array, limits: Array, *, dequantize: bool = False) -> list[Call]:
    """y = round(x / scale) clamped to `limits`, float32 vectors; `y` may be `x`. With `dequantize` times `scale`."""
    return [bound(_centre, x, y, scale, limits, dequantize)]


def quantize(x: Array, scale: Array, zero: Array, q: Array) -> list[Call]:
    """q = saturate(round(x / scale) + zero), 8 bits; float32 vectors, scale and `zero` float32, 0-d."""
    info = np.iinfo(q.dtype)
    return [bound(_quantize, x, scale, zero, F(info.min), F(info.max), q)]


def requantize(sums: Array, factor: Array, zero: Array, q: Array) -> list[Call]:
    """q = saturate(round(sums factor) + zero), 8 bits; int32 sums (R, L), float32 factors (L,), and `zero` 0-d."""
    info = np.iinfo(q.dtype)
    return [bound(_requantize, sums, factor, zero, F(info.min), F(info.max), q)]
