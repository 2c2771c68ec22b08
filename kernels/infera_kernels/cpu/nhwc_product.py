"""Products with weights as batches of small ones, which BLAS computes from its operands as they lie.

Larger ones it lays out anew first, which costs the more the fewer rows there are.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from infera_kernels.calls import Array, Call
from infera_kernels.cpu.blas import reads_as_it_lies
from infera_kernels.cpu.caches import block_of

SLICES = (64, 48, 40, 32, 16)
"""Columns that a slice of the weights may have."""

FEWEST_ROWS = 14
"""Rows of a small product that is worth a call."""


BLOCK_BYTES, SMALL_BLOCK_BYTES = 1 << 21, 1 << 19
"""What one block of a convolution's products reads or writes, and where they are small ones. Smaller blocks stay in the
cache for what follows, but make BLAS lay out the weights more often."""


def block_bytes() -> int:
    """Of the products that `product` makes."""
    return block_of(SMALL_BLOCK_BYTES) if small_product() else BLOCK_BYTES


@cache
def small_product() -> int:
    """Multiply-adds up to which NumPy's BLAS takes operands as they lie; 0 where it never does."""
    return 10**6 if reads_as_it_lies() else 0


def gains(depth: int, columns: int) -> bool:
    """Whether a product with weights (depth, columns) is faster where both sides are laid out, the weights once.

    Few columns use what is laid out little: small products take it as it lies.
    """
    return small_product() == 0 or (depth >= SLICES[0] and columns > SLICES[0])


def slice_of(rows: int, depth: int, columns: int) -> int:
    """Columns of a slice of weights (depth, columns) that `rows` rows are multiplied with: all if none is small."""
    small, fewest = small_product(), min(rows, FEWEST_ROWS)
    possible = [n for n in (columns, *SLICES) if columns % n == 0 and fewest * depth * n <= small]
    at_once = [n for n in possible if n >= 32 and rows * depth * n <= small]
    return next(iter([*at_once, *possible, columns]))


def product(x: Array, weights: Array, y: Array) -> list[Call]:
    """y (groups, rows, N) = x (groups, rows, depth) @ weights (groups, N / columns, depth, columns).

    Transposed weights are laid out anew in any case: then it is one product.
    """
    groups, _, depth, columns = weights.shape
    most = small_product() // (depth * columns) if weights.strides[-1] == weights.itemsize else 0
    count = min(most, x.shape[1]) if most >= FEWEST_ROWS else x.shape[1]
    whole = x.shape[1] - x.shape[1] % count
    calls: list[Call] = []
    for part in (slice(0, whole), slice(whole, x.shape[1])):
        rows = x[:, part]
        if rows.shape[1]:
            source = rows.reshape(groups, -1, 1, min(count, rows.shape[1]), depth, copy=False)
            target = y[:, part].reshape(*source.shape[:2], source.shape[3], -1, columns, copy=False)
            calls.append((np.matmul, (source, weights[:, None], target.transpose(0, 1, 3, 2, 4))))
    return calls
