"""Copies that interleave a few channels, as images need whose channels come first: a channel at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from infera_kernels.calls import Array

MOST_CHANNELS = 6
"""Elements side by side in the target up to which NumPy's copy, whose inner loop goes over them, is slower."""

BLOCK_BYTES = 1 << 18
"""What of the target is written at a time, which the next channel finds in the cache."""


def interleaved(source: Array, target: Array) -> Iterator[tuple[Array, Array]]:
    """(source, target) of the copies that make target[...] = source, of one shape: views of both."""
    if not _interleaves(source, target):
        yield source, target
        return
    sizes = [target.itemsize * math.prod(target.shape[axis:]) for axis in range(1, target.ndim)]
    axis = next(i for i, size in enumerate(sizes) if size <= BLOCK_BYTES)
    step = max(1, BLOCK_BYTES // sizes[axis])
    for index in np.ndindex(target.shape[:axis]):
        for start in range(0, target.shape[axis], step):
            block = *index, slice(start, start + step)
            for channel in range(target.shape[-1]):
                yield source[block][..., channel], target[block][..., channel]


def _interleaves(source: Array, target: Array) -> bool:
    """Whether few elements lie side by side in the target, and others in the source."""
    if target.ndim < 2 or not 1 < target.shape[-1] <= MOST_CHANNELS or target.strides[-1] != target.itemsize:
        return False
    others = [stride for n, stride in zip(source.shape[:-1], source.strides[:-1], strict=True) if n > MOST_CHANNELS]
    return source.itemsize in others and source.strides[-1] > source.itemsize
