"""Padding, plainly, for NumPy and CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from infera_kernels.calls import Array

Pads = Sequence[tuple[int, int]]
"""(before, after) of each axis; a negative count removes elements."""

Mode = Literal["constant", "edge", "reflect", "wrap"]


def blank(xp: Any, dtype: np.dtype[Any]) -> Array:
    """What fills a tensor of this type where nothing else is said: 0, False or the empty string. 0-d."""
    return np.array("", object) if dtype.kind == "O" else xp.zeros((), dtype)


def crop(x: Array, pads: Pads) -> tuple[Array, tuple[tuple[int, int], ...]]:
    """A view of `x` without what negative pads remove, and the pads that are left."""
    kept = tuple(slice(max(0, -b), n - max(0, -a)) for n, (b, a) in zip(x.shape, pads, strict=True))
    return x[kept], tuple((max(0, b), max(0, a)) for b, a in pads)


def pad(xp: Any, x: Array, pads: Pads, *, mode: Mode, value: Any = 0) -> Array:
    """`x` padded; `mode` is NumPy's. Negative pads are removed first.

    Not by the pad of CuPy 14: it takes no constant that lies on the GPU, and what it repeats more than once it may
    repeat out of turn.
    """
    inner, left = crop(x, pads)
    if mode == "constant":
        return framed(xp, inner, left, value)
    for axis, sides in enumerate(left):
        if any(sides):
            inner = xp.take(inner, xp.asarray(np.pad(np.arange(inner.shape[axis]), sides, mode=mode)), axis=axis)
    return inner


def framed(xp: Any, x: Array, pads: Pads, value: Any) -> Array:
    """A copy of `x` within a border of `value`, which may be a 0-d array."""
    made = xp.full([b + n + a for n, (b, a) in zip(x.shape, pads, strict=True)], value, x.dtype)
    made[tuple(slice(b, b + n) for n, (b, _) in zip(x.shape, pads, strict=True))] = x
    return made
