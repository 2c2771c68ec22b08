"""Views of any strides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_kernels.calls import Array


def strided(a: Array, shape: Sequence[int], strides: Sequence[int]) -> Array:
    """A view of an array with this shape and these strides, in bytes, to read.

    All of it lies within the array. NumPy's `as_strided` takes many times as long, of which binding a small convolution
    would notice.
    """
    if a.flags.c_contiguous and a.size:
        return np.ndarray(shape, a.dtype, a, 0, strides)
    return as_strided(a, shape, strides, writeable=False)
