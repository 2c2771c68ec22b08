"""Kernels that move elements without computing: every one a few strided copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import call, const, copy, copy_where


def parts(x: Array, axis: int, sizes: Sequence[int]) -> list[Array]:
    """Views of `x` cut along `axis` into parts of these sizes."""
    found, start = [], 0
    for size in sizes:
        found.append(x[(slice(None),) * axis + (slice(start, start + size),)])
        start += size
    return found


def triangle(x: Array, k: int, out: Array, scratch: Scratch, *, upper: bool) -> list[Call]:
    """x with what lies below (`upper`) or above its k-th diagonal set to 0; `out` may be `x`."""
    rows, cols = out.shape[-2:]
    drop = scratch((rows, cols), np.bool_)
    i, j = np.arange(rows)[:, None] + k, np.arange(cols)
    return [
        call(np.less if upper else np.greater, j, i, drop),
        copy(out, x),
        copy_where(out, const(0, out), drop),
    ]
