"""Sliding windows over the spatial axes of (N, C, *spatial) arrays, for NumPy and CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infera_kernels.calls import Array
from infera_kernels.portable.pad import Pads as Pads
from infera_kernels.portable.pad import framed


def extent(kernel: int, dilation: int) -> int:
    """Input elements that a dilated kernel spans."""
    return (kernel - 1) * dilation + 1


def pad_spatial(xp: Any, x: Array, pads: Pads, value: float) -> Array:
    """`x` with its spatial axes padded by `value`; `x` itself where there is nothing to pad."""
    return framed(xp, x, ((0, 0), (0, 0), *pads), value) if any(map(any, pads)) else x


def windows(
    xp: Any,
    x: Array,
    out: Sequence[int],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
    value: float = 0.0,
) -> Array:
    """A read-only view (N, C, *out, *kernel) of padded `x`; the padding is widened where `out` needs more of it."""
    wanted = [
        (before, max(after, (o - 1) * s + extent(k, d) - n - before))
        for n, o, k, s, d, (before, after) in zip(x.shape[2:], out, kernel, strides, dilations, pads, strict=True)
    ]
    x = pad_spatial(xp, x, wanted, value)
    steps = x.strides[2:]
    return xp.lib.stride_tricks.as_strided(
        x,
        (*x.shape[:2], *out, *kernel),
        (
            *x.strides[:2],
            *(step * s for step, s in zip(steps, strides, strict=True)),
            *(step * d for step, d in zip(steps, dilations, strict=True)),
        ),
    )
