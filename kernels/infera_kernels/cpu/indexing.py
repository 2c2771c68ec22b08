"""Gathers and scatters without temporaries: indices are turned into offsets of a flat array in scratch.

Negative indices count from the end. An index out of range raises IndexError when the calls run, before anything is
read or written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import call, const, converted, copy, copy_where


def _require_range(indices: Array, size: int) -> None:
    """Raises IndexError naming the first index outside [-size, size)."""
    if indices.size:
        low, high = np.minimum.reduce(indices, None), np.maximum.reduce(indices, None)
        if low < -size or high >= size:
            raise IndexError(f"index {low if low < -size else high} is out of range for an axis of {size}")


_require_range.sendable = True  # type: ignore[attr-defined]


def take(x: Array, indices: Array, axis: int, out: Array, scratch: Scratch) -> list[Call]:
    """out = x's entries along `axis` at `indices`; all arrays are contiguous."""
    indices, calls = converted(indices, np.int64, scratch)
    return [*calls, (_require_range, (indices, x.shape[axis])), (np.ndarray.take, (x, indices, axis, out, "wrap"))]


def lookup(table: Array, rows: Array, out: Array, scratch: Scratch) -> list[Call]:
    """out = table's rows at `rows` (count,); the last one for whatever is no index of those before it."""
    offsets = scratch(rows.shape, np.int64)
    unsigned = offsets.view(np.uint64)
    return [
        copy(offsets, rows),
        call(np.minimum, unsigned, const(len(table) - 1, unsigned), unsigned),
        (np.ndarray.take, (table, offsets, 0, out, "clip")),
    ]


def _strides(shape: Sequence[int]) -> list[int]:
    """Elements from one entry to the next along each axis of a contiguous array."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _counted(indices: Array, size: int, stride: int, offsets: Array, negative: Array) -> list[Call]:
    """offsets = stride times indices, those below 0 counted from the end; `negative` is a mask to work with."""
    calls: list[Call] = [
        copy(offsets, indices),
        (_require_range, (offsets, size)),
        call(np.less, offsets, const(0, offsets), negative),
        (partial(np.add, where=negative), (offsets, const(size, offsets), offsets)),
    ]
    return calls if stride == 1 else [*calls, call(np.multiply, offsets, const(stride, offsets), offsets)]


def _add_position(offsets: Array, axis: int, stride: int) -> Call:
    """Adds each entry's own position along `axis`."""
    shape = [1] * offsets.ndim
    shape[axis] = -1
    return call(np.add, offsets, (np.arange(offsets.shape[axis]) * stride).reshape(shape), offsets)


def _element_offsets(shape: Sequence[int], indices: Array, axis: int, scratch: Scratch) -> tuple[Array, list[Call]]:
    """Offsets into an array of `shape` of the elements that GatherElements reads at `indices`."""
    offsets, negative = scratch(indices.shape, np.int64), scratch(indices.shape, np.bool_)
    strides = _strides(shape)
    calls = _counted(indices, shape[axis], strides[axis], offsets, negative)
    others = [i for i in range(len(shape)) if i != axis]
    return offsets, [*calls, *(_add_position(offsets, i, strides[i]) for i in others)]


def _row_offsets(
    shape: Sequence[int], indices: Array, scratch: Scratch, *, batch_dims: int, stride: int
) -> tuple[Array, list[Call]]:
    """Offsets, in units of `stride` trailing elements, of what the index tuples in the last axis point at."""
    depth = indices.shape[-1]
    outer = shape[: batch_dims + depth]
    strides = [s * stride for s in _strides(outer)]
    offsets, term = scratch(indices.shape[:-1], np.int64), scratch(indices.shape[:-1], np.int64)
    negative = scratch(indices.shape[:-1], np.bool_)
    calls = [copy(offsets, const(0, offsets))]
    for j in range(depth):
        axis = batch_dims + j
        calls += _counted(indices[..., j], outer[axis], strides[axis], term, negative)
        calls.append(call(np.add, offsets, term, offsets))
    return offsets, [*calls, *(_add_position(offsets, i, strides[i]) for i in range(batch_dims))]


def gather_elements(x: Array, indices: Array, axis: int, out: Array, scratch: Scratch) -> list[Call]:
    """out[i][j] = x[indices[i][j]][j] for axis 0, and so for any axis and rank."""
    if not out.size:
        return []
    offsets, calls = _element_offsets(x.shape, indices, axis, scratch)
    return [*calls, (np.ndarray.take, (x.reshape(-1), offsets, 0, out, "wrap"))]


def gather_nd(x: Array, indices: Array, out: Array, scratch: Scratch, *, batch_dims: int) -> list[Call]:
    """out[i] = x[indices[i]] for index tuples in the last axis, within each of the leading `batch_dims` axes."""
    if not out.size:
        return []
    offsets, calls = _row_offsets(x.shape, indices, scratch, batch_dims=batch_dims, stride=1)
    inner = x.shape[batch_dims + indices.shape[-1] :]
    rows = x.reshape(-1, *inner)
    return [*calls, (np.ndarray.take, (rows, offsets, 0, out, "wrap"))]


_COMBINE: dict[str, Any] = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _write(out: Array, offsets: Array, updates: Array, reduction: str) -> Call:
    """out.flat[offsets] = updates, or combined with what is there; of equal offsets the last one wins."""
    flat, where, values = out.reshape(-1), offsets.reshape(-1), updates.reshape(-1)
    if reduction == "none":
        return np.ndarray.put, (flat, where, values, "wrap")
    return _COMBINE[reduction].at, (flat, where, values)


def scatter_elements(
    x: Array, indices: Array, updates: Array, axis: int, out: Array, scratch: Scratch, *, reduction: str
) -> list[Call]:
    """out = x, then out[indices[i][j]][j] = updates[i][j] for axis 0, and so for any axis and rank."""
    if not updates.size:
        return [copy(out, x)]
    offsets, calls = _element_offsets(out.shape, indices, axis, scratch)
    return [copy(out, x), *calls, _write(out, offsets, updates, reduction)]


def scatter_nd(x: Array, indices: Array, updates: Array, out: Array, scratch: Scratch, *, reduction: str) -> list[Call]:
    """out = x, then out[indices[i]] = updates[i] for index tuples in the last axis."""
    if not updates.size:
        return [copy(out, x)]
    inner = math.prod(out.shape[indices.shape[-1] :])
    rows, calls = _row_offsets(out.shape, indices, scratch, batch_dims=0, stride=inner)
    offsets = scratch((rows.size, inner), np.int64)
    calls.append(call(np.add, rows.reshape(-1, 1), np.arange(inner), offsets))
    return [copy(out, x), *calls, _write(out, offsets, updates, reduction)]


def one_hot(indices: Array, values: Array, axis: int, out: Array, scratch: Scratch) -> list[Call]:
    """out holds values[1] where its position along `axis` is the index, else values[0]."""
    depth = out.shape[axis]
    wanted, flag = scratch(indices.shape, np.int64), scratch(indices.shape, np.bool_)
    shifted, hot = scratch(indices.shape, np.int64), scratch(out.shape, np.bool_)
    position = np.arange(depth).reshape([-1 if i == axis else 1 for i in range(out.ndim)])
    return [
        copy(wanted, indices),
        call(np.less, wanted, const(0, wanted), flag),
        call(np.add, wanted, const(depth, wanted), shifted),
        copy_where(wanted, shifted, flag),
        call(np.equal, position, np.expand_dims(wanted, axis), hot),
        copy(out, values[0:1].reshape(())),
        copy_where(out, values[1:2].reshape(()), hot),
    ]
