"""Activations written once for NumPy and CuPy, straight from their definitions, in float64 where that is exact enough.

Every function takes the array module, a floating-point array, and the activation's parameters; it returns x's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from infera_kernels.calls import Array


def erf(xp: Any, x: Array) -> Array:
    """The error function, by the C library on NumPy and by the CUDA library on CuPy."""
    if xp is np:
        return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), np.float64)
    from cupyx.scipy.special import erf as device_erf

    return device_erf(x)


def gelu(xp: Any, x: Array) -> Array:
    return 0.5 * x * (1 + erf(xp, x * math.sqrt(0.5)))


def gelu_tanh(xp: Any, x: Array) -> Array:
    return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(xp: Any, x: Array) -> Array:
    return 1 / (1 + xp.exp(-x))


def swish(xp: Any, x: Array, alpha: float = 1.0) -> Array:
    return x * sigmoid(xp, alpha * x)


def relu(xp: Any, x: Array) -> Array:
    return xp.maximum(x, 0)


def leaky_relu(xp: Any, x: Array, alpha: float) -> Array:
    return xp.where(x < 0, alpha * x, x)


def elu(xp: Any, x: Array, alpha: float) -> Array:
    return xp.where(x < 0, alpha * xp.expm1(x), x)


def selu(xp: Any, x: Array, alpha: float, gamma: float) -> Array:
    return gamma * elu(xp, x, alpha)


def celu(xp: Any, x: Array, alpha: float) -> Array:
    return xp.where(x < 0, alpha * xp.expm1(x / alpha), x)


def hard_sigmoid(xp: Any, x: Array, alpha: float, beta: float) -> Array:
    return xp.minimum(xp.maximum(alpha * x + beta, 0), 1)


def hard_swish(xp: Any, x: Array) -> Array:
    return x * hard_sigmoid(xp, x, 1 / 6, 0.5)


def tanh(xp: Any, x: Array) -> Array:
    return xp.tanh(x)


def softplus(xp: Any, x: Array) -> Array:
    return xp.logaddexp(x, xp.zeros_like(x))


def softsign(xp: Any, x: Array) -> Array:
    return x / (1 + abs(x))


def mish(xp: Any, x: Array) -> Array:
    return x * xp.tanh(softplus(xp, x))


def thresholded_relu(xp: Any, x: Array, alpha: float) -> Array:
    return xp.where(x > alpha, x, xp.zeros_like(x))


def shrink(xp: Any, x: Array, bias: float, lambd: float) -> Array:
    return xp.where(x < -lambd, x + bias, xp.where(x > lambd, x - bias, xp.zeros_like(x)))


FUNCTIONS: Mapping[str, Callable[..., Array]] = MappingProxyType(
    {
        f.__name__: f
        for f in (
            erf,
            gelu,
            gelu_tanh,
            sigmoid,
            swish,
            relu,
            leaky_relu,
            elu,
            selu,
            celu,
            hard_sigmoid,
            hard_swish,
            tanh,
            softplus,
            softsign,
            mish,
            thresholded_relu,
            shrink,
        )
    }
)


def activation(xp: Any, name: str, x: Array, **attrs: float) -> Array:
    """The activation `name` of FUNCTIONS, computed in float64 and rounded once to x's dtype; integers stay integers."""
    if x.dtype.kind in "iu":
        return FUNCTIONS[name](xp, x, **attrs).astype(x.dtype)
    return FUNCTIONS[name](xp, x.astype(xp.float64), **attrs).astype(x.dtype)


def prelu(xp: Any, x: Array, slope: Array) -> Array:
    """x where it is not negative, else slope x"""
    return xp.where(x < 0, slope * x, x)
