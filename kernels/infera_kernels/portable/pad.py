"""Padding, plainly, for NumPy and CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array

Pads = Sequence[tuple[int, int]]
"""(before, after) of each axis; a negative count removes elements."""


def blank(xp: Any, dtype: np.dtype[Any]) -> Array:
    """What fills a tensor of this type where nothing else is said: 0, False or the empty string. 0-d."""
    return np.array("", object) if dtype.kind == "O" else xp.zeros((), dtype)


def crop(x: Array, pads: Pads) -> tuple[Array, tuple[tuple[int, int], ...]]:
    """A view of `x` without what negative pads remove, and the pads that are left."""
    kept = tuple(slice(max(0, -b), n - max(0, -a)) for n, (b, a) in zip(x.shape, pads, strict=True))
    return x[kept], tuple((max(0, b), max(0, a)) for b, a in pads)


def pad(xp: Any, x: Array, pads: Pads, *, mode: str, value: Any = 0) -> Array:
    """`x` padded; `mode` is NumPy's: constant, edge, reflect, wrap. Negative pads are removed first."""
    inner, left = crop(x, pads)
    return xp.pad(inner, left, mode=mode, **({"constant_values": value} if mode == "constant" else {}))
