"""Rearranging elements, written once for NumPy and CuPy and for views as for copies."""

from __future__ import annotations

from typing import Any

from infera_kernels.calls import Array
from infera_kernels.portable.pad import blank


def depth_to_space(x: Array, block: int, mode: str) -> Array:
    """(N, C, H, W) seen as (N, C / b², H, b, W, b), b = `block`; "DCR" takes the block from the outer channels."""
    n, c, h, w = x.shape
    depth = c // (block * block)
    if mode == "DCR":
        return x.reshape(n, block, block, depth, h, w).transpose(0, 3, 4, 1, 5, 2)
    return x.reshape(n, depth, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)


def space_to_depth(x: Array, block: int, mode: str) -> Array:
    """(N, C, H, W) seen as (N, b, b, C, H / b, W / b), or for "CRD" as (N, C, b, b, H / b, W / b), b = `block`."""
    n, c, h, w = x.shape
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // block, block, w // block, block).transpose(order)


def triangle(xp: Any, x: Array, k: int, *, upper: bool) -> Array:
    """x with what lies below (`upper`) or above its k-th diagonal blank: 0, or empty strings."""
    rows, cols = x.shape[-2:]
    i, j = xp.arange(rows)[:, None], xp.arange(cols)
    keep = j - i >= k if upper else j - i <= k
    return xp.where(keep, x, blank(xp, x.dtype))


def reverse_sequence(xp: Any, x: Array, lengths: Array, *, time_axis: int, batch_axis: int) -> Array:
    """The first lengths[b] elements along the time axis of each batch entry b turned round, the rest as they are."""
    rows = xp.moveaxis(x, (batch_axis, time_axis), (0, 1))
    t = xp.arange(rows.shape[1])
    n = lengths.reshape(-1, 1)
    source = xp.where(t < n, n - 1 - t, t)
    turned = rows[xp.arange(rows.shape[0])[:, None], source]
    return xp.moveaxis(turned, (0, 1), (batch_axis, time_axis))
