"""What follows a matrix product or a convolution, in one pass: bias, activation, residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call
from infera_kernels.jit.codes import (
    CLIP,
    CODES,
    ERF,
    GELU,
    GELU_TANH,
    HARD_SIGMOID,
    HARD_SWISH,
    LEAKY,
    NONE,
    SIGMOID,
    SWISH,
    TANH,
)
from infera_kernels.jit.compiling import bound, compiled, widest_vectors
from infera_kernels.jit.functions import F, clamped, erf, gelu, gelu_tanh, sigmoid, tanh

PIECE = 2048
"""Elements: 8 KB of float32."""


@compiled
def activate(row: Any, code: Any, a: Any, b: Any) -> None:
    """row = activation(row)"""
    widest_vectors()
    n = row.size
    if code == CLIP:
        for c in range(n):
            row[c] = clamped(row[c], a, b)
    elif code == LEAKY:
        for c in range(n):
            row[c] = row[c] * a if row[c] < F(0) else row[c]
    elif code == GELU:
        for c in range(n):
            row[c] = gelu(row[c])
    elif code == GELU_TANH:
        for c in range(n):
            row[c] = gelu_tanh(row[c])
    elif code == SIGMOID:
        for c in range(n):
            row[c] = sigmoid(row[c])
    elif code == SWISH:
        for c in range(n):
            row[c] = row[c] * sigmoid(a * row[c])
    elif code == TANH:
        for c in range(n):
            row[c] = tanh(row[c])
    elif code == HARD_SIGMOID:
        for c in range(n):
            row[c] = clamped(row[c] * a + b, F(0), F(1))
    elif code == HARD_SWISH:
        for c in range(n):
            row[c] = row[c] * clamped(row[c] * F(1 / 6) + F(0.5), F(0), F(1))
    elif code == ERF:
        for c in range(n):
            row[c] = erf(row[c])


@compiled
def _finish(y: Any, bias: Any, before: Any, after: Any, code: Any, a: Any, b: Any) -> None:
    """y = activation(y + bias + before) + after, row by row; operands without rows are left out."""
    widest_vectors()
    for i in range(y.shape[0]):
        row = y[i]
        n = row.size
        if bias.size:
            for c in range(n):
                row[c] += bias[c]
        if before.size:
            more = before[i]
            for c in range(n):
                row[c] += more[c]
        activate(row, code, a, b)
        if after.size:
            more = after[i]
            for c in range(n):
                row[c] += more[c]


@compiled
def _scale(y: Any, scales: Any, bias: Any) -> None:
    """y = y scales + bias, row by row."""
    for i in range(y.shape[0]):
        row = y[i]
        for c in range(row.size):
            row[c] = row[c] * scales[c] + bias[c]


@compiled
def _apply(x: Any, y: Any, code: Any, a: Any, b: Any) -> None:
    """y = activation(x), vectors, a piece at a time that stays in the first-level cache."""
    widest_vectors()
    for start in range(0, x.size, PIECE):
        source, target = x[start : start + PIECE], y[start : start + PIECE]
        for c in range(source.size):
            target[c] = source[c]
        activate(target, code, a, b)


def parameters(activation: str, given: Sequence[float] = ()) -> tuple[int, Any, Any]:
    """Code and two numbers for `activate`. Raises KeyError for an activation that is not in CODES."""
    code, fixed = CODES[activation]
    a, b, *_ = (*(given or fixed), 0.0, 0.0)
    return code, F(a), F(b)


def finish(
    y: Array,
    *,
    bias: Array | None = None,
    before: Array | None = None,
    after: Array | None = None,
    activation: str = "",
    given: Sequence[float] = (),
) -> list[Call]:
    """y = activation(y + bias + before) + after in place; float32, contiguous: y, before, after (R, L), bias (L,)."""
    code, a, b = parameters(activation, given)
    if code == NONE and bias is None and before is None and after is None:
        return []
    none, nothing = np.empty(0, np.float32), np.empty((0, 0), np.float32)
    operands = (none if bias is None else bias, *(nothing if t is None else t for t in (before, after)))
    return [bound(_finish, y, *operands, code, a, b)]


def scale(y: Array, scales: Array, bias: Array) -> list[Call]:
    """y = y scales + bias in place; float32: y (R, L), contiguous, scales and bias (L,)."""
    return [bound(_scale, y, scales, bias)]


def apply(activation: str, x: Array, y: Array, given: Sequence[float] = ()) -> list[Call]:
    """y = activation(x), float32, contiguous; `y` may be `x`."""
    return [bound(_apply, x.reshape(-1), y.reshape(-1), *parameters(activation, given))]
