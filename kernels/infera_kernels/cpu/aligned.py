"""Where arrays begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array

LINE = 64
"""Bytes of a cache line. A vector of AVX-512 that lies in two of them is read twice."""


def address(x: Array) -> int:
    """Of its first element."""
    return int(x.__array_interface__["data"][0])


def aligned(shape: Sequence[int], dtype: Any = np.float32, slack: int = 0) -> Array:
    """An uninitialised array that begins with a cache line, with `slack` bytes behind it. NumPy aligns to 16 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + slack + LINE, np.uint8)
    return np.ndarray(shape, dtype, raw, -address(raw) % LINE)
