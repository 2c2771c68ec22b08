"""Softmax and layer normalisation of rows, each row read while it is in the first-level cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call
from infera_kernels.jit.compiling import bound, compiled
from infera_kernels.jit.functions import F, exp, ordered

FLAT_BELOW = F(-80)
"""Powers below 2e-35 are 0: times the share they could be subnormal, which slow processors down a hundredfold."""


@compiled
def _softmax(x: Any, y: Any, apart: bool) -> None:
    rows, length = x.shape
    for i in range(rows):
        row = y[i]
        if apart:
            source = x[i]
            for c in range(length):
                row[c] = source[c]
        most = np.int32(-0x80000000)
        for c in range(length):
            # it may pass over a NaN, which the sum then meets
            most = max(most, ordered(np.float32(row[c]).view(np.int32)))
        top = np.int32(ordered(most)).view(np.float32)
        total = F(0)
        for c in range(length):
            below = row[c] - top
            power = F(0) if below < FLAT_BELOW else exp(below)
            row[c] = power
            total += power
        share = F(1) / total
        for c in range(length):
            row[c] *= share


@compiled
def _standardize(x: Any, y: Any, apart: bool, scale: Any, bias: Any, epsilon: Any, center: bool) -> None:
    rows, length = x.shape
    share = F(1) / F(length)
    for i in range(rows):
        row = y[i]
        if apart:
            source = x[i]
            for c in range(length):
                row[c] = source[c]
        mean = F(0)
        if center:
            for c in range(length):
                mean += row[c]
            mean *= share
            rest = F(0)
            for c in range(length):  # what rounding left of it: much, where numbers are large and alike
                rest += row[c] - mean
            mean += rest * share
        square = F(0)
        for c in range(length):
            square += (row[c] - mean) * (row[c] - mean)
        inverse = F(1) / np.sqrt(square * share + epsilon)
        for c in range(length):
            row[c] = (row[c] - mean) * inverse
        if scale.size:
            for c in range(length):
                row[c] *= scale[c]
        if bias.size:
            for c in range(length):
                row[c] += bias[c]


def _apart(x: Array, y: Array) -> bool:
    """Whether x must be copied to y. Loops work on one array: where two may overlap, LLVM's SIMD gives way."""
    return bool(x.ctypes.data != y.ctypes.data)


def softmax(x: Array, y: Array) -> list[Call]:
    """y = softmax(x) along the rows of (R, L), float32, contiguous; `y` may be `x`."""
    return [bound(_softmax, x, y, _apart(x, y))] if x.size else []


def standardize(
    x: Array, y: Array, scale: Array | None, bias: Array | None, *, epsilon: float, center: bool = True
) -> list[Call]:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias along the rows of (R, L), float32, contiguous;
    `y` may be `x`. Without `center` the mean is 0."""
    none = np.empty(0, np.float32)
    operands = (none if a is None else a for a in (scale, bias))
    return [bound(_standardize, x, y, _apart(x, y), *operands, F(epsilon), center)] if x.size else []
