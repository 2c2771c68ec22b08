"""Elementwise arithmetic written once for NumPy and CuPy: plain and correct, free to allocate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from infera_kernels.calls import Array


def divide(xp: Any, a: Array, b: Array) -> Array:
    """a / b; integers round towards zero, as in C."""
    if a.dtype.kind not in "iu":
        return xp.true_divide(a, b)
    return xp.floor_divide(a - modulo(xp, a, b, fmod=True), b)


def power(xp: Any, base: Array, exponent: Array) -> Array:
    """base ** exponent in the base's dtype; an integer to a negative or fractional power is truncated."""
    if base.dtype.kind not in "iu":
        return xp.power(base, exponent.astype(base.dtype))
    real = xp.power(base.astype(xp.float64), exponent.astype(xp.float64)).astype(base.dtype)
    if exponent.dtype.kind not in "iu":
        return real
    exact = xp.power(base, xp.maximum(exponent, exponent.dtype.type(0)).astype(base.dtype))
    return xp.where(exponent < 0, real, exact)


def modulo(xp: Any, a: Array, b: Array, *, fmod: bool) -> Array:
    """The remainder with the dividend's sign (`fmod`, as in C) or the divisor's (as in Python).

    That of integers is not left to CuPy 14's fmod, which goes through float64.
    """
    if fmod and a.dtype.kind not in "iu":
        return xp.fmod(a, b)
    rest = xp.remainder(a, b)
    return xp.where((rest != 0) & ((a < 0) != (b < 0)), rest - b, rest) if fmod else rest


def combine(xp: Any, ufunc: str, ins: Sequence[Array]) -> Array:
    """The inputs combined from left to right by the named binary ufunc."""
    return reduce(getattr(xp, ufunc), ins)


def mean(xp: Any, ins: Sequence[Array]) -> Array:
    """The inputs' elementwise mean."""
    total = combine(xp, "add", ins)
    return total / xp.asarray(len(ins), total.dtype)


def is_inf(xp: Any, x: Array, *, negative: bool, positive: bool) -> Array:
    """Where x is infinite with one of the wanted signs."""
    found = xp.isinf(x)
    if not negative:
        found = found & (x > 0)
    if not positive:
        found = found & (x < 0)
    return found


def clip(xp: Any, x: Array, low: Array | None, high: Array | None) -> Array:
    """min(max(x, low), high); a bound left out does not bound."""
    if low is not None:
        x = xp.maximum(x, low)
    return x if high is None else xp.minimum(x, high)
