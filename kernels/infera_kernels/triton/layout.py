"""How arrays lie in memory, and how that is told to a kernel: pure functions on shapes and strides in elements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from infera_kernels.launch import Const, Typed

Dims = tuple[int, ...]

MAX_DIMS = 6
INT32_MAX = 2**31 - 1

FLOATS = frozenset({"float32", "float16", "bfloat16"})
INDICES = frozenset({"int32", "int64"})
STORED = FLOATS | INDICES | {"bool", "int8", "uint8", "int16", "uint16", "uint32", "uint64", "float64"}
"""Types that can be moved, whatever can be computed with them."""


def name_of(x: Typed) -> str:
    """The dtype's name."""
    return np.dtype(x.dtype).name


def next_power_of_two(n: int) -> int:
    """The least power of two not below n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()


def few(shape: Iterable[int]) -> bool:
    """Whether axes of these sizes are no more than kernels walk: those of size 1 do not count."""
    return sum(d != 1 for d in shape) <= MAX_DIMS


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)


def element_strides(array: Any) -> Dims:
    """Strides in elements. Raises ValueError where one is not a whole number of them."""
    itemsize = np.dtype(array.dtype).itemsize
    if any(s % itemsize for s in array.strides):
        raise ValueError(f"strides {tuple(array.strides)} are not multiples of the item size {itemsize}")
    return tuple(s // itemsize for s in array.strides)


def broadcast_strides(array: Any, shape: Dims) -> Dims:
    """The array's strides as seen from the shape it broadcasts to: 0 along stretched dimensions."""
    if len(array.shape) > len(shape):
        raise ValueError(f"shape {tuple(array.shape)} does not broadcast to {shape}")
    missing = len(shape) - len(array.shape)
    strides = [0] * missing
    for have, want, stride in zip(array.shape, shape[missing:], element_strides(array), strict=True):
        if have not in (1, want):
            raise ValueError(f"shape {tuple(array.shape)} does not broadcast to {shape}")
        strides.append(stride if have == want else 0)
    return tuple(strides)


def coalesce(shape: Dims, operands: Sequence[Dims], *, ones: bool = False) -> tuple[Dims, tuple[Dims, ...]]:
    """Fewest dimensions that walk the same elements in the same order, innermost first.

    Dimensions of size 1 vanish; two neighbours merge where that is one stride for every operand. At least one
    dimension remains. With `ones` those of size 1 are like others: how many remain then depends on strides alone.
    """
    dims: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for axis in reversed(range(len(shape))):
        if shape[axis] == 1 and not ones:
            continue
        if dims and all(o[axis] == s[-1] * dims[-1] for o, s in zip(operands, strides, strict=True)):
            dims[-1] *= shape[axis]
            continue
        dims.append(shape[axis])
        for operand, s in zip(operands, strides, strict=True):
            s.append(operand[axis])
    if not dims:
        return (1,), tuple((0,) for _ in operands)
    return tuple(dims), tuple(tuple(s) for s in strides)


def rows_of(array: Any, axis: int = -1) -> tuple[int, int, int]:
    """(rows, columns, elements from one row to the next): dimensions from `axis` on are the columns.

    Raises ValueError where a row is not contiguous, or where rows are not evenly spaced.
    """
    shape, strides = tuple(array.shape), element_strides(array)
    axis %= len(shape)
    columns, inner = coalesce(shape[axis:], [strides[axis:]])
    rows, outer = coalesce(shape[:axis], [strides[:axis]])
    if math.prod(shape) and (len(columns) > 1 or (columns[0] > 1 and inner[0][0] != 1) or len(rows) > 1):
        raise ValueError(f"rows of shape {shape} and strides {strides} are not contiguous and evenly spaced")
    return math.prod(shape[:axis]), math.prod(shape[axis:]), outer[0][0]


def span(dims: Iterable[int], strides: Iterable[int]) -> int:
    """The largest offset, in elements and away from the first one either way."""
    return sum((d - 1) * abs(s) for d, s in zip(dims, strides, strict=True))


def fold(values: Iterable[int]) -> tuple[int | Const, ...]:
    """Strides for a kernel: 0 and 1 are compiled in, for the loads they make possible; the rest stay arguments."""
    return tuple(Const(v) if v in (0, 1) else v for v in values)


def fold_one(value: int) -> int | Const:
    return fold((value,))[0]
