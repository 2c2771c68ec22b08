"""Rotary position embedding on NumPy: RoFormer, arXiv 2104.09864."""

from __future__ import annotations

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import call, copy


def members(x: Array, *, interleaved: bool) -> tuple[Array, Array]:
    """The first and the second elements of all pairs: neighbours on the last axis, or half of it apart."""
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def rotate(
    x: Array,
    cos: Array,
    sin: Array,
    out: Array,
    scratch: Scratch,
    *,
    interleaved: bool,
    per_pair: bool,
    strict: bool = False,
) -> list[Call]:
    """out = x cos + turned sin, where `turned` has -b and a in the places of the members a and b of each pair of x.

    cos and sin broadcast to `x`, or with `per_pair` to one element for each pair. Unless `strict`, neighbours that
    share them are complex numbers, whose product NumPy may round once where two operations round twice.
    """
    calls: list[Call] = []
    if per_pair and interleaved and not strict and all(a.strides[-1] == a.itemsize for a in (x, out)):
        kind = np.result_type(x.dtype, np.complex64)
        table = scratch(np.broadcast_shapes(cos.shape, sin.shape), kind)
        return [
            copy(table.real, cos),
            copy(table.imag, sin),
            call(np.multiply, x.view(kind), table, out.view(kind)),
        ]
    if per_pair:
        tables = []
        for given in (cos, sin):
            wide = scratch((*given.shape[:-1], x.shape[-1]), x.dtype)
            calls += [copy(member, given) for member in members(wide, interleaved=interleaved)]
            tables.append(wide)
        cos, sin = tables
    turned = scratch(x.shape, x.dtype)
    (first, second), (a, b) = (members(array, interleaved=interleaved) for array in (turned, x))
    return [
        *calls,
        call(np.negative, b, first),
        copy(second, a),
        call(np.multiply, turned, sin, turned),
        call(np.multiply, x, cos, out),
        call(np.add, out, turned, out),
    ]
