"""Constant matrices of 8-bit integers, laid out once as tensor cores take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from infera_kernels.calls import Array

ALIGN = 16
"""Rows of packed weights are as many bytes long, or a multiple: what one load takes."""


def signed(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """8-bit integers as signed ones, u - 128 of unsigned u."""
    return weight if weight.dtype == np.int8 else (weight ^ np.uint8(128)).view(np.int8)


def packed_weight(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(..., K, N) 8-bit weights as signed (..., N, K'), zeros past K, K' a multiple of ALIGN: see `Weight`."""
    k = weight.shape[-2]
    made = np.zeros((*weight.shape[:-2], weight.shape[-1], max(-(-k // ALIGN), 1) * ALIGN), np.int8)
    made[..., :k] = signed(weight).swapaxes(-1, -2)
    return made


def column_sums(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The int32 sums of the columns of what `packed_weight` makes of a matrix."""
    sums: np.ndarray[Any, Any] = signed(weight).sum(axis=-2, dtype=np.int32)
    return sums


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant matrix (K, N): what `packed_weight` and `column_sums` made of it, and whether it was unsigned."""

    packed: Array
    sums: Array
    unsigned: bool
