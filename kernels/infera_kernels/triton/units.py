"""Strides told in units: a compiler that knows that a stride is 8 n knows that rows are aligned, whatever n is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from infera_kernels.launch import Const
from infera_kernels.triton.layout import fold


def unit(strides: Iterable[int]) -> int:
    """The largest power of two up to 16 that divides every stride; 16 of none."""
    return math.gcd(16, *strides)


def in_units(strides: Sequence[int]) -> tuple[tuple[int | Const, ...], int]:
    """Strides in a unit common to them, and the unit."""
    common = unit(strides)
    return fold(s // common for s in strides), common


def each_in_units(strides: Sequence[int]) -> tuple[tuple[int | Const, ...], tuple[int, ...]]:
    """Each stride in a unit of its own, and the units."""
    units = tuple(unit((s,)) for s in strides)
    return fold(s // u for s, u in zip(strides, units, strict=True)), units
