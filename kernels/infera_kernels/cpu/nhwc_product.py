"""Products with weights, of few rows: sliced so that BLAS takes them without laying out its operands anew."""

from __future__ import annotations

import numpy as np

from infera_kernels.calls import Array, Call

SMALL_PRODUCT = 10**6
"""Multiply-adds up to which OpenBLAS computes from the operands as they lie, on CPUs with AVX-512."""


def slice_of(rows: int, depth: int, columns: int) -> int:
    """Columns of a slice of the weights (depth, columns), for which x has so many rows: all where none is small."""
    if rows * depth * columns <= SMALL_PRODUCT:
        return columns
    return next((n for n in (64, 32, 16) if columns % n == 0 and rows * depth * n <= SMALL_PRODUCT), columns)


def sliced(weights: Array, columns: int) -> Array:
    """(..., depth, N) as (..., N / columns, depth, columns), contiguous."""
    parts = weights.reshape(*weights.shape[:-1], -1, columns)
    return np.ascontiguousarray(np.moveaxis(parts, -2, -3))


def product(x: Array, weights: Array, y: Array) -> Call:
    """y (..., rows, N) = x (..., rows, depth) @ weights, `sliced`."""
    parts = y.reshape(*y.shape[:-1], -1, weights.shape[-1], copy=False)
    return np.matmul, (x[..., None, :, :], weights, np.moveaxis(parts, -2, -3))
