"""Pooling of images with channels last: maxima, with their positions where wanted, means and p-norms of windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.arithmetic import maximum, pow
from infera_kernels.triton.conv import Geometry
from infera_kernels.triton.images import (
    SPATIAL,
    UNHINTED,
    constants,
    image_of,
    pixel_of,
    pixel_offset,
    three,
    tile_of,
    unit_of,
    unrolled,
    walked,
    within,
)
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.layout import FLOATS, INT32_MAX, ceil_div, fold_one, name_of

KINDS = ("max", "average", "lp")


@triton.jit(do_not_specialize_on_alignment=UNHINTED)
def pool_kernel(
    x, out, index,
    M, C, size, out_size, ends, kernel, strides, dilations, pads, steps, plane,
    x_strides, x_c, out_strides, out_c, index_strides, index_c,
    KIND: tl.constexpr, LOW: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, C_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, INDEX_UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One number for each window, BM pixels x BN channels a program: M pixels in all images, C channels in C_UNIT.

    Means count elements before `ends` and, unless PADDED, only those of the image. Positions count elements, `steps`
    apart along the axes and `plane` from one channel to the next, in images with channels first.
    """
    C = C * C_UNIT
    m, c, there = walked(M, C, BM, BN)
    n, d, h, v = pixel_of(m, out_size)
    in_d, in_h, in_v = d * strides[0] - pads[0], h * strides[1] - pads[1], v * strides[2] - pads[2]
    x += pixel_offset(n, in_d, in_h, in_v, x_strides, X_UNIT)[:, None] + (c.to(tl.int64) * x_c)[None, :]
    if x.dtype.element_ty.is_floating():
        acc = tl.full((BM, BN), LOW, tl.float32)
    else:
        acc = tl.full((BM, BN), LOW, tl.int32)
    count = tl.zeros((BM,), tl.float32)
    if index is not None:
        start = (n.to(tl.int64) * C)[:, None] + c[None, :]
        start = start * plane + (in_d.to(tl.int64) * steps[0] + in_h * steps[1] + in_v * steps[2])[:, None]
        best = start
    for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
        to_v = tap % kernel[2] * dilations[2]
        to_h = tap // kernel[2] % kernel[1] * dilations[1]
        to_d = tap // (kernel[2] * kernel[1]) * dilations[0]
        at_d, at_h, at_v = in_d + to_d, in_h + to_h, in_v + to_v
        inside = within(at_d, at_h, at_v, size)
        seen = inside[:, None] & there
        other: tl.constexpr = LOW
        value = tl.load(x + pixel_offset(to_d * 0, to_d, to_h, to_v, x_strides, X_UNIT), mask=seen, other=0)
        value = value.to(acc.dtype)
        if KIND == "max":
            value = tl.where(seen, value, other)
            if index is not None:
                better = (value > acc) | ((value != value) & (acc == acc))
                best = tl.where(
                    better, start + (to_d.to(tl.int64) * steps[0] + to_h * steps[1] + to_v * steps[2]), best
                )
            acc = maximum(acc, value)
        elif KIND == "average":
            acc += value
            if PADDED:
                inside = (at_d < ends[0]) & (at_h < ends[1]) & (at_v < ends[2])
            count += inside.to(tl.float32)
        elif P == 1:
            acc += tl.abs(value)
        elif P == 2:
            acc += value * value
        else:
            acc += tl.where(seen, pow(tl.abs(value), tl.full((BM, BN), P, tl.float32)), 0.0)
    if KIND == "average":
        acc = tl.div_rn(acc, tl.broadcast_to(count[:, None], (BM, BN)))
    if KIND == "lp":
        if P == 2:
            acc = tl.sqrt_rn(acc)
        elif P != 1:
            acc = pow(acc, tl.full((BM, BN), 1.0 / P, tl.float32))
    out += pixel_offset(n, d, h, v, out_strides, OUT_UNIT)[:, None] + (c.to(tl.int64) * out_c)[None, :]
    tl.store(out, store_type(acc, out), mask=there)
    if index is not None:
        index += pixel_offset(n, d, h, v, index_strides, INDEX_UNIT)[:, None] + (c.to(tl.int64) * index_c)[None, :]
        tl.store(index, best, mask=there)


def supports_pool(kind: str, x: Typed, out: Typed, index: Typed | None = None) -> bool:
    """A kind of KINDS; x and out (N, spatial..., C), with one to three spatial axes, of one type: float32, float16 or
    bfloat16, for maxima int8 and uint8 too; int64 positions of maxima, of out's shape."""
    types = FLOATS | {"int8", "uint8"} if kind == "max" else FLOATS
    rank = len(x.shape)
    positions = index is None or (kind == "max" and name_of(index) == "int64" and index.shape == out.shape)
    alike = name_of(x) == name_of(out) and name_of(x) in types and len(out.shape) == rank
    small = max(math.prod(x.shape[:-1]), math.prod(out.shape[:-1])) <= INT32_MAX - 1024
    return kind in KINDS and alike and positions and 3 <= rank <= SPATIAL + 2 and small


def pool(
    kind: str,
    x: Any,
    out: Any,
    launcher: Launcher,
    where: Geometry,
    *,
    index: Any = None,
    column_major: bool = False,
    pads_after: Sequence[int] = (),
    include_pad: bool = False,
    p: int = 1,
) -> list[Call]:
    """out = the maximum, mean or p-norm of each window, computed in float32; of any strides.

    Maxima propagate NaN. `index` gets the position of the first maximum in x with channels first, in each plane by
    columns where `column_major`. Means count elements of the image, or those of the padding too (`include_pad`, then
    `pads_after` tells where it ends), but none beyond.
    """
    if not supports_pool(kind, x, out, index):
        raise ValueError(f"pool: no {kind} for {name_of(x)}{list(x.shape)} -> {name_of(out)}{list(out.shape)}")
    if 0 in tuple(out.shape):
        return []
    source, target = image_of(x), image_of(out)
    positions = target if index is None else image_of(index)
    unit, (bm, bn) = unit_of(target.channels, out), tile_of(target)
    d, h, w = source.size
    after = three(pads_after, 0) if include_pad else (0, 0, 0)
    floating = name_of(x) in FLOATS
    args = {
        "x": x,
        "out": out,
        "index": index,
        "M": target.pixels,
        "C": target.channels // unit,
        "size": tuple(map(fold_one, source.size)),
        "out_size": tuple(map(fold_one, target.size)),
        "ends": tuple(fold_one(n + a) for n, a in zip(source.size, after, strict=True)),
        "kernel": constants(where.kernel),
        "strides": constants(where.strides),
        "dilations": constants(where.dilations),
        "pads": constants(where.pads),
        "steps": tuple(map(fold_one, (1, d, d * h) if column_major else (h * w, w, 1))),
        "plane": d * h * w,
        **source.arguments("x"),
        **target.arguments("out"),
        **positions.arguments("index"),
    }
    constexprs = {
        "KIND": kind,
        "LOW": 0 if kind != "max" else -math.inf if floating else int(np.iinfo(np.int32).min),
        "P": p,
        "PADDED": include_pad,
        "TAPS": where.taps,
        "UNROLL": unrolled(where.kernel),
        "C_UNIT": unit,
        "X_UNIT": source.unit,
        "OUT_UNIT": target.unit,
        "INDEX_UNIT": positions.unit,
        "BM": bm,
        "BN": bn,
    }
    grid = (ceil_div(target.pixels, bm) * ceil_div(target.channels, bn),)
    return [launcher.launch(pool_kernel, grid, args, constexprs, num_warps=4)]
