"""Where a value lies: an operand is a strided window into an arena, or a constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_gpu.graph import HostArray
from infera_gpu.spec import DType, TensorSpec

Space: TypeAlias = Literal["host", "device"]


@lru_cache(maxsize=4096)
def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Row-major strides in bytes."""
    strides: list[int] = []
    step = itemsize
    for d in reversed(shape):
        strides.append(step)
        if d:
            step *= d
    return tuple(strides[::-1])


class Operand(NamedTuple):
    """A typed, strided window. `root` names the block of memory it lies in; `offset` and `strides` are bytes.

    While lowering, `offset` counts from the root's start; in a Plan it counts from the arena's. A constant's root is
    the constant's name.
    """

    root: str
    space: Space
    shape: tuple[int, ...]
    dtype: DType
    strides: tuple[int, ...]
    offset: int = 0
    constant: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Row-major without gaps (dimensions of one element have any stride)."""
        want = contiguous_strides(self.shape, self.dtype.itemsize)
        if self.strides == want or 0 in self.shape:
            return True
        return all(d == 1 or s == w for d, s, w in zip(self.shape, self.strides, want, strict=True))

    def may_become(self, other: Operand | TensorSpec) -> bool:
        """Whether what a kernel makes in place of it, element by element, is a dense array like the other."""
        return self.is_contiguous and (self.shape, self.dtype) == (other.shape, other.dtype)

    def bounds(self) -> tuple[int, int]:
        """First byte and one past the last byte that the window touches."""
        low = high = self.offset
        for d, stride in zip(self.shape, self.strides, strict=True):
            if not d:
                return self.offset, self.offset
            if stride > 0:
                high += (d - 1) * stride
            else:
                low += (d - 1) * stride
        return low, high + self.dtype.itemsize

    def moved(self, by: int) -> Operand:
        """The operand `by` bytes on."""
        root, space, shape, dtype, strides, offset, constant = self
        return operand_of((root, space, shape, dtype, strides, offset + by, constant))


operand_of: Callable[[tuple[Any, ...]], Operand] = partial(tuple.__new__, Operand)
"""The operand of all of its fields, in half the time: planning makes thousands."""


def dense(root: str, space: Space, spec: TensorSpec) -> Operand:
    """A contiguous operand at the start of its root."""
    dims, dtype = spec.dims, spec.dtype
    return operand_of((root, space, dims, dtype, contiguous_strides(dims, dtype.itemsize), 0, False))


@lru_cache(maxsize=16384)
def constant(name: str, space: Space, spec: TensorSpec) -> Operand:
    """The operand of a constant, the same in every plan."""
    return dense(name, space, spec)._replace(constant=True)


@lru_cache(maxsize=4096)
def dummy(shape: tuple[int, ...], dtype: DType, strides: tuple[int, ...]) -> tuple[HostArray, int]:
    """An array of this shape and these strides over no memory, for shape and stride arithmetic only, and its address.

    NumPy's stride tricks write the type down, and what they write for float8_e5m2 is not read again.
    """
    made = as_strided(np.empty(1, f"V{dtype.itemsize}"), shape, strides).view(dtype)
    return made, made.__array_interface__["data"][0]


def views_of(
    operand: Operand, view: Callable[[HostArray], HostArray | Sequence[HostArray]]
) -> tuple[Operand, ...] | None:
    """The operands that `view` makes of this one by shape and stride operations; None where it would have to copy."""
    base, start = dummy(operand.shape, operand.dtype, operand.strides)
    try:
        made = view(base)
    except ValueError:  # reshape(copy=False) of strides that do not allow it
        return None

    def placed(x: HostArray) -> Operand:
        offset = int(x.__array_interface__["data"][0] - start) if x.size else 0
        return Operand(
            operand.root, operand.space, x.shape, x.dtype, x.strides, operand.offset + offset, operand.constant
        )

    return (placed(made),) if isinstance(made, np.ndarray) else tuple(map(placed, made))


def view_of(operand: Operand, view: Callable[[HostArray], HostArray]) -> Operand | None:
    """`views_of`, of one array."""
    made = views_of(operand, view)
    return made[0] if made else None
