"""Transposed convolution on NumPy and its BLAS: one GEMM an image, its columns added up where the taps reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import const
from infera_kernels.portable.conv import transposed_tap
from infera_kernels.portable.windows import Pads


def conv_transpose(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    *,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    group: int,
) -> list[Call]:
    """x (N, C, *in), w (C, O / group, *kernel), b (O,) or None, y (N, O, *out); contiguous, of one floating dtype."""
    channels, size, kernel = x.shape[1], x.shape[2:], w.shape[2:]
    filters, out = y.shape[1], y.shape[2:]
    taps, pixels = math.prod(kernel), math.prod(size)
    weights = w.reshape(group, channels // group, -1).swapaxes(1, 2)
    columns = scratch((group, filters // group * taps, pixels), x.dtype)
    grid = columns.reshape(filters, *kernel, *size)
    base = const(0, y) if b is None else b.reshape(-1, *(1,) * len(out))
    calls: list[Call] = []
    for source, target in zip(x, y, strict=True):
        calls.append((np.matmul, (weights, source.reshape(group, -1, pixels), columns)))
        calls.append((np.copyto, (target, base)))
        for tap in product(*map(range, kernel)):
            to, at = transposed_tap(size, out, tap, strides=strides, pads=pads, dilations=dilations)
            part = target[(slice(None), *to)]
            if part.size:
                calls.append((np.add, (part, grid[(slice(None), *tap, *at)], part)))
    return calls
