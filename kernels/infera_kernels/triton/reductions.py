"""Reductions by name: what is done to every element, how two results become one, and what is made of the last one.

Functions on elements are f(x, shift, index): the element as it is stored (half precision as float32), one value of its
result's row, and where it stands among what is reduced. What finishes a total is f(total, shift, count, eps).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.triton import arithmetic as f
from infera_kernels.triton.layout import FLOATS

LOWEST, HIGHEST = "lowest", "highest"
"""Identities that depend on the type."""


# ---- of every element


@triton.jit
def element(x, shift, index):
    return x


@triton.jit
def magnitude(x, shift, index):
    return tl.abs(x)


@triton.jit
def square(x, shift, index):
    return x * x


@triton.jit
def wide_square(x, shift, index):
    return x.to(tl.float64) * x.to(tl.float64)


@triton.jit
def shifted_exp(x, shift, index):
    """exp(x - shift); a shift that is not finite counts as 0."""
    return tl.exp(x.to(shift.dtype) - finite(shift))


@triton.jit
def shifted_square(x, shift, index):
    return (x - shift) * (x - shift)


@triton.jit
def finite(x):
    """x, 0 where it is infinite or NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def key(x, index, SMALLEST: tl.constexpr, LAST: tl.constexpr, MISSING_FIRST: tl.constexpr):
    """An int64 that is the larger the better x is, and of equals the earlier (or the LAST) index.

    NaN counts as larger than all, or as best of all where it is MISSING_FIRST. x is no wider than 32 bits, the index
    is below 2**32.
    """
    if x.dtype == tl.float32:
        bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
        order = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    elif x.dtype == tl.uint32:
        order = (x ^ 0x80000000).to(tl.int32, bitcast=True)
    else:
        order = x.to(tl.int32)
    if SMALLEST:
        order = ~order
        if MISSING_FIRST and x.dtype == tl.float32:
            order = tl.where(x != x, 0x7FFFFFFF, order)
    place = index.to(tl.int64)
    if not LAST:
        place = 0xFFFFFFFF - place
    return (order.to(tl.int64) << 32) | place


@triton.jit
def key_largest_first(x, shift, index):
    return key(x, index, False, False, True)


@triton.jit
def key_largest_last(x, shift, index):
    return key(x, index, False, True, True)


@triton.jit
def key_smallest_first(x, shift, index):
    return key(x, index, True, False, True)


@triton.jit
def key_smallest_last(x, shift, index):
    return key(x, index, True, True, True)


@triton.jit
def _is_shift(x, shift):
    return (x == shift) | ((x != x) & (shift != shift))


@triton.jit
def first_place(x, shift, index):
    """The index where x is the shift, else one beyond all."""
    return tl.where(_is_shift(x, shift), index.to(tl.int64), 0x7FFFFFFFFFFFFFFF)


@triton.jit
def last_place(x, shift, index):
    """The index where x is the shift, else -1."""
    return tl.where(_is_shift(x, shift), index.to(tl.int64), -1)


# ---- of the lanes of a tile, along its columns


@triton.jit
def fold_sum(x):
    return tl.sum(x, axis=1)


@triton.jit
def fold_product(x):
    return tl.reduce(x, 1, f.mul)


@triton.jit
def fold_max(x):
    """tl.max drops NaN, and is told of it apart."""
    if x.dtype.is_floating():
        missing = tl.max((x != x).to(tl.int32), axis=1)
        return tl.where(missing > 0, float("nan"), tl.max(tl.where(x != x, float("-inf"), x), axis=1))
    else:
        return tl.max(x, axis=1)


@triton.jit
def fold_min(x):
    if x.dtype.is_floating():
        missing = tl.max((x != x).to(tl.int32), axis=1)
        return tl.where(missing > 0, float("nan"), tl.min(tl.where(x != x, float("inf"), x), axis=1))
    else:
        return tl.min(x, axis=1)


# ---- of the total


@triton.jit
def total(x, shift, count, eps):
    return x


@triton.jit
def _quotient(x, count):
    """x / count: rounded once for floats, truncated for integers, which are divided as float64."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, count.to(tl.float32))
    else:
        return x.to(tl.float64) / count.to(tl.float64)


@triton.jit
def _root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def mean(x, shift, count, eps):
    return _quotient(x, count)


@triton.jit
def root(x, shift, count, eps):
    return _root(x)


@triton.jit
def log(x, shift, count, eps):
    return tl.log(x)


@triton.jit
def log_and_shift(x, shift, count, eps):
    return tl.log(x) + finite(shift)


@triton.jit
def inverse_deviation(x, shift, count, eps):
    """1 / sqrt(x / count + eps)"""
    return 1.0 / _root(_quotient(x, count) + eps)


@triton.jit
def deviation(x, shift, count, eps):
    """sqrt(x / count) + eps"""
    return _root(_quotient(x, count)) + eps


@triton.jit
def some(x, shift, count, eps):
    """x, 1 where it is 0"""
    return tl.where(x == 0, 1.0, x)


@triton.jit
def some_root(x, shift, count, eps):
    return some(_root(x), shift, count, eps)


@triton.jit
def root_at_least(x, shift, count, eps):
    return f.maximum(_root(x), eps)


@triton.jit
def root_of_at_least(x, shift, count, eps):
    return _root(f.maximum(x, eps))


@triton.jit
def root_within(x, shift, count, eps):
    """At least eps, and at most float32's largest number."""
    return f.minimum(f.maximum(_root(x), eps), 3.4028234663852886e38)


@triton.jit
def root_of_within(x, shift, count, eps):
    return _root(f.minimum(f.maximum(x, eps), 3.4028234663852886e38))


@triton.jit
def root_and(x, shift, count, eps):
    return _root(x) + eps


@triton.jit
def root_of_sum(x, shift, count, eps):
    return _root(x + eps)


@triton.jit
def first_of_key(x, shift, count, eps):
    return 0xFFFFFFFF - (x & 0xFFFFFFFF)


@triton.jit
def last_of_key(x, shift, count, eps):
    return x & 0xFFFFFFFF


# ---- families


@dataclass(frozen=True, slots=True)
class Reduction:
    """finish(fold(combine(map(x), map(x), ...))); `start` is the identity of `combine`."""

    map: Any
    combine: Any
    fold: Any
    start: float | str
    finish: Any = total

    @property
    def adds(self) -> bool:
        """Whether rounding errors pile up."""
        return self.combine is f.add


def _sums(map: Any = element, finish: Any = total) -> Reduction:
    return Reduction(map, f.add, fold_sum, 0, finish)


def _largest(map: Any = element, finish: Any = total) -> Reduction:
    return Reduction(map, f.maximum, fold_max, LOWEST, finish)


def _smallest(map: Any = element) -> Reduction:
    return Reduction(map, f.minimum, fold_min, HIGHEST)


REDUCTIONS: Mapping[str, Reduction] = MappingProxyType(
    {
        "sum": _sums(),
        "mean": _sums(finish=mean),
        "max": _largest(),
        "min": _smallest(),
        "prod": Reduction(element, f.mul, fold_product, 1),
        "l1": _sums(magnitude),
        "l2": _sums(square, root),
        "log_sum": _sums(finish=log),
        "sum_square": _sums(square),
        "log_sum_exp": _sums(shifted_exp, log_and_shift),
        "inverse_deviation": _sums(shifted_square, inverse_deviation),
        "inverse_root_mean_square": _sums(square, inverse_deviation),
        "deviation": _sums(shifted_square, deviation),
        "sum_exp": _sums(shifted_exp),
        "length_1": _sums(magnitude, some),
        "length_2": _sums(square, some_root),
        "length_at_least": _sums(square, root_at_least),
        "length_within": _sums(square, root_within),
        "length_and": _sums(square, root_and),
        "root_of_at_least": _sums(square, root_of_at_least),
        "root_of_within": _sums(square, root_of_within),
        "root_of_sum": _sums(square, root_of_sum),
        "largest_first": _largest(key_largest_first, first_of_key),
        "largest_last": _largest(key_largest_last, last_of_key),
        "smallest_first": _largest(key_smallest_first, first_of_key),
        "smallest_last": _largest(key_smallest_last, last_of_key),
        "first_place": _smallest(first_place),
        "last_place": _largest(last_place),
    }
)
"""log_sum_exp and sum_exp take the maximum as their shift, deviations the mean, the places the extremum."""

WIDENED: Mapping[Any, Any] = MappingProxyType({square: wide_square})
"""Functions on elements -> the same on integers that are added up as float64."""


def accumulator(kind: str, dtype: Any) -> str:
    """The type in which elements of `dtype` are reduced.

    Two-byte floats are reduced in float32. Integers wrap around where the result does not fit, not before: means are
    summed in 64 bits, and what a root or a logarithm undoes in float64. Keys and places are int64.
    """
    dtype = np.dtype(dtype)
    if REDUCTIONS[kind].finish in (first_of_key, last_of_key) or kind in ("first_place", "last_place"):
        return "int64"
    if dtype.name in FLOATS:
        return "float32"
    if dtype.kind == "f":
        return "float64"
    if kind in ("l2", "log_sum", "log_sum_exp"):
        return "float64"
    if kind == "mean" and dtype.itemsize < 8:
        return "int64"
    return "int32" if dtype.itemsize < 4 else dtype.name


def identity(start: float | str, name: str) -> float | int:
    """The number that changes nothing, in the accumulator's type."""
    if not isinstance(start, str):
        return start
    if name.startswith("float"):
        return float("-inf" if start == LOWEST else "inf")
    bounds = np.iinfo(name)
    return int(bounds.min if start == LOWEST else bounds.max)
