"""What follows a convolution's sums: bias, residual, activation, in place while they are in cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from infera_kernels.calls import Array, Call, Scratch, maximum, minimum

Activation: TypeAlias = tuple[str | float, ...]
"""A name of `ACTIVATIONS`, then its parameters."""


def _relu(y: Array, scratch: Scratch) -> list[Call]:
    return [maximum(y, y.dtype.type(0), y)]


def _clip(y: Array, scratch: Scratch, low: float, high: float) -> list[Call]:
    return [maximum(y, y.dtype.type(low), y), minimum(y, y.dtype.type(high), y)]


def _leaky_relu(y: Array, scratch: Scratch, alpha: float) -> list[Call]:
    t = scratch(y.shape, y.dtype)
    zero = y.dtype.type(0)
    return [
        minimum(y, zero, t),
        (np.multiply, (t, y.dtype.type(alpha), t)),
        maximum(y, zero, y),
        (np.add, (y, t, y)),
    ]


def _hard_sigmoid(y: Array, scratch: Scratch, alpha: float, beta: float) -> list[Call]:
    number = y.dtype.type
    return [(np.multiply, (y, number(alpha), y)), (np.add, (y, number(beta), y)), *_clip(y, scratch, 0.0, 1.0)]


def _sigmoid(y: Array, scratch: Scratch) -> list[Call]:
    half = y.dtype.type(0.5)
    return [(np.multiply, (y, half, y)), (np.tanh, (y, y)), (np.multiply, (y, half, y)), (np.add, (y, half, y))]


def _tanh(y: Array, scratch: Scratch) -> list[Call]:
    return [(np.tanh, (y, y))]


def _gated(gate: Callable[..., list[Call]]) -> Callable[..., list[Call]]:
    """y * gate(y)"""

    def calls(y: Array, scratch: Scratch, *params: float) -> list[Call]:
        t = scratch(y.shape, y.dtype)
        return [(np.copyto, (t, y)), *gate(t, scratch, *params), (np.multiply, (y, t, y))]

    return calls


ACTIVATIONS: dict[str, tuple[int, Callable[..., list[Call]]]] = {
    "relu": (0, _relu),
    "clip": (2, _clip),
    "leaky_relu": (1, _leaky_relu),
    "hard_sigmoid": (2, _hard_sigmoid),
    "sigmoid": (0, _sigmoid),
    "tanh": (0, _tanh),
    "silu": (0, _gated(_sigmoid)),
    "hard_swish": (0, _gated(lambda y, scratch: _hard_sigmoid(y, scratch, 1 / 6, 0.5))),
}
"""Name -> (number of parameters, calls that apply it in place)."""


def activate(y: Array, activation: Activation | None, scratch: Scratch) -> list[Call]:
    """Applies an activation in place. Raises KeyError for an unknown name, TypeError for missing parameters."""
    if activation is None:
        return []
    name, *params = activation
    return ACTIVATIONS[str(name)][1](y, scratch, *params)


def epilogue(
    y: Array, b: Array | None, residual: Array | None, activation: Activation | None, scratch: Scratch
) -> list[Call]:
    """y = activation(y + b + residual) in place; `b` broadcasts."""
    added: list[Call] = [(np.add, (y, term, y)) for term in (b, residual) if term is not None]
    return added + activate(y, activation, scratch)


def reuse(scratch: Scratch) -> Scratch:
    """Scratch that hands the same memory to every ask, for blocks that run one after another.

    Each ask must fit into the largest before it, so bind the largest block first.
    """
    held: dict[Any, Array] = {}

    def take(shape: Any, dtype: Any = np.float32) -> Array:
        size = int(np.prod(shape))
        key = np.dtype(dtype)
        if key not in held or held[key].size < size:
            held[key] = scratch((size,), dtype)
        return held[key][:size].reshape(shape)

    return take
