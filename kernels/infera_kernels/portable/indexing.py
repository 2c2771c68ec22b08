"""Gathers, scatters and selections written once for NumPy and CuPy.

Negative indices count from the end. Raises IndexError on NumPy where an index is out of range.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_kernels.calls import Array


def gather(xp: Any, x: Array, indices: Array, axis: int) -> Array:
    """x's entries along `axis` at `indices`: on the host a view of x where these are rows that follow each other.

    So do positions index their embedding: what planning computes for every length of a text then takes no memory.
    """
    if axis == 0 and x.ndim and indices.size and isinstance(indices, np.ndarray):
        flat = indices.reshape(-1)
        first, last = int(flat[0]), int(flat[0]) + flat.size
        if first >= 0 and last <= x.shape[0] and (flat == np.arange(first, last)).all():
            return x[first:last].reshape((*indices.shape, *x.shape[1:]))
    return xp.take(x, indices, axis=axis)


def gather_elements(xp: Any, x: Array, indices: Array, axis: int) -> Array:
    """out[i][j] = x[indices[i][j]][j] for axis 0, and so for any axis and rank."""
    return x[_positions(xp, indices, axis)]


def _positions(xp: Any, indices: Array, axis: int) -> tuple[Array, ...]:
    grid = [
        xp.arange(d).reshape([-1 if i == k else 1 for k in range(indices.ndim)]) for i, d in enumerate(indices.shape)
    ]
    grid[axis] = indices
    return tuple(grid)


def gather_nd(xp: Any, x: Array, indices: Array, batch_dims: int) -> Array:
    """out[i] = x[indices[i]] for index tuples in the last axis, within each of the leading `batch_dims` axes."""
    lead = indices.ndim - 1
    batch = [xp.arange(x.shape[i]).reshape([-1 if i == k else 1 for k in range(lead)]) for i in range(batch_dims)]
    return x[(*batch, *xp.moveaxis(indices, -1, 0))]


def _scatter(xp: Any, out: Array, where: tuple[Array, ...], updates: Array, reduction: str) -> Array:
    if reduction == "none":
        out[where] = updates
        return out
    combine = {"add": xp.add, "mul": xp.multiply, "max": xp.maximum, "min": xp.minimum}[reduction]
    if xp is np or (reduction == "add" and out.dtype.name in _ATOMICALLY_ADDED):
        combine.at(out, where, updates)
    elif updates.size:
        _meet(xp, combine, out, where, updates)
    return out


_ATOMICALLY_ADDED = frozenset({"int32", "uint32", "int64", "uint64"})
"""What CuPy 14's `add.at` adds in any order. Floats would have other last bits every time. Its `multiply.at` takes
nothing; `maximum.at` and `minimum.at` drop NaN, and compare float64 as float32."""


def _meet(xp: Any, combine: Any, out: Array, where: tuple[Array, ...], updates: Array) -> None:
    """`combine.at(out, where, updates)`, of a dense `out`.

    The updates of a place are combined in pairs, these in pairs, and so on, and then with what lies there.
    """
    sizes, rest = out.shape[: len(where)], out.shape[len(where) :]
    place = xp.zeros((), np.int64)
    for at, size in zip(where, sizes, strict=True):
        place = place * size + at % size
    place = place.reshape(-1)
    order = xp.argsort(place, kind="stable")
    place, new = place[order], updates.reshape(-1, *rest)[order]
    reach = 1
    while reach < len(place):  # new[i] is that of update i and the next reach - 1 of its place
        met = (place[reach:] == place[:-reach]).reshape(-1, *(1,) * len(rest))
        new[:-reach] = xp.where(met, combine(new[:-reach], new[reach:]), new[:-reach])
        reach *= 2
    rows = out.reshape(-1, *rest)
    rows[place] = combine(rows[place], new[xp.searchsorted(place, place)])


def scatter_elements(xp: Any, x: Array, indices: Array, updates: Array, axis: int, reduction: str) -> Array:
    """x, then out[indices[i][j]][j] = updates[i][j] for axis 0, and so for any axis and rank."""
    where = tuple(xp.broadcast_arrays(*_positions(xp, indices, axis)))
    return _scatter(xp, x.copy(), where, updates, reduction)


def scatter_nd(xp: Any, x: Array, indices: Array, updates: Array, reduction: str) -> Array:
    """x, then out[indices[i]] = updates[i] for index tuples in the last axis."""
    return _scatter(xp, x.copy(), tuple(xp.moveaxis(indices, -1, 0)), updates, reduction)


def one_hot(xp: Any, indices: Array, depth: int, values: Array, axis: int) -> Array:
    """values[1] where the position along `axis` is the index, else values[0]."""
    wanted = indices.astype(xp.int64)
    wanted = xp.expand_dims(xp.where(wanted < 0, wanted + depth, wanted), axis)
    position = xp.arange(depth).reshape([-1 if i == axis else 1 for i in range(wanted.ndim)])
    return xp.where(position == wanted, values[1], values[0])


def unique(xp: Any, x: Array, axis: int | None, *, in_order: bool) -> tuple[Array, Array, Array, Array]:
    """The distinct entries, where each first is, which one each entry is, how often each is there.

    Sorted, or with `in_order` as they first appear. NumPy only: CuPy's unique takes no axis with an inverse.
    """
    y, first, inverse, counts = np.unique(x, return_index=True, return_inverse=True, return_counts=True, axis=axis)
    inverse = inverse.reshape(-1)
    if in_order:
        order = np.argsort(first, kind="stable")
        rank = np.argsort(order, kind="stable")
        y, first, counts = np.take(y, order, axis=axis or 0), first[order], counts[order]
        inverse = rank[inverse]
    return y, first.astype(np.int64), inverse.astype(np.int64), counts.astype(np.int64)


def non_max_suppression(
    boxes: Array, scores: Array, limit: int, iou_threshold: float, score_threshold: float | None, *, centered: bool
) -> Array:
    """(selected, 3) int64 rows (batch, class, box): the best boxes of each class that do not overlap a better one.

    boxes (batch, n, 4) hold two opposite corners, y first, or, `centered`, x and y of the centre, width and height.
    scores (batch, classes, n). At most `limit` boxes of a class; NumPy only.
    """
    found: list[tuple[int, int, int]] = []
    for b in range(scores.shape[0]):
        low, high = _corners(boxes[b], centered=centered)
        areas = np.prod(high - low, axis=1)
        for c in range(scores.shape[1]):
            order = np.argsort(-scores[b, c], kind="stable")
            if score_threshold is not None:
                order = order[scores[b, c, order] > score_threshold]
            kept = 0
            while order.size and kept < limit:
                best, order = order[0], order[1:]
                found.append((b, c, int(best)))
                kept += 1
                sides = np.minimum(high[order], high[best]) - np.maximum(low[order], low[best])
                shared = np.prod(np.maximum(sides, 0), axis=1)
                union = areas[order] + areas[best] - shared
                iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
                order = order[iou <= iou_threshold]
    return np.array(found, np.int64).reshape(-1, 3)


def _corners(boxes: Array, *, centered: bool) -> tuple[Array, Array]:
    """Lower and upper corners, (n, 2) each."""
    if centered:
        middle, half = boxes[:, :2], boxes[:, 2:] / 2
        return middle - half, middle + half
    return np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
