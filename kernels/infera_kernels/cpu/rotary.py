"""Rotary position embedding on NumPy."""

from __future__ import annotations

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import call


def rotate_halves(x: Array, cos: Array, sin: Array, out: Array, scratch: Scratch) -> list[Call]:
    """out = x cos + (-b, a) sin, where x is (a, b) along its last axis; cos and sin broadcast to `x`.

    RoFormer, arXiv 2104.09864, with its pairs half a head apart.
    """
    half = x.shape[-1] // 2
    turned = scratch((*x.shape[:-1], half), x.dtype)
    sin = np.broadcast_to(sin, x.shape)
    calls = [call(np.multiply, x, cos, out)]
    for ufunc, to, given in (
        (np.subtract, slice(half), slice(half, None)),
        (np.add, slice(half, None), slice(half)),
    ):
        calls += [
            call(np.multiply, x[..., given], sin[..., to], turned),
            call(ufunc, out[..., to], turned, out[..., to]),
        ]
    return calls
