"""Views of any strides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_kernels.calls import Array


def strided(a: Array, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> Array:
    """A view of an array with this shape and these strides from an offset on, in bytes, to read.

    All of it lies within the array. NumPy's `as_strided` takes many times as long, of which binding a small convolution
    would notice.
    """
    if a.flags.c_contiguous and a.size:
        return np.ndarray(shape, a.dtype, a, offset, strides)
    start = as_strided(a, (offset // a.itemsize + 1,), (a.itemsize,))[-1:] if offset else a
    return as_strided(start, shape, strides, writeable=False)
