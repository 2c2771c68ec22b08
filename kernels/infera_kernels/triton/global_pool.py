"""Pooling of whole images with channels last. Large images are shared by several programs, whose results are joined."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.arithmetic import maximum, pow
from infera_kernels.triton.images import SPATIAL, UNHINTED, Image, image_of, pixel_of, pixel_offset, unit_of
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.invariance import entries_seen
from infera_kernels.triton.layout import (
    FLOATS,
    INT32_MAX,
    Dims,
    ceil_div,
    element_strides,
    fold_one,
    name_of,
    next_power_of_two,
)

_BUSY = 128
"""Programs that keep a GPU busy. Of no GPU in particular: scratch is announced before there is one."""

_SHARE = 512
"""Pixels that a program should at least have, to be worth one more pass."""

_CHANNELS = 64
_TILE = 2048


@triton.jit(do_not_specialize_on_alignment=UNHINTED)
def global_pool_kernel(
    x, out, C, pixels, size, parts, count, x_strides, x_c, out_n, out_part, out_c,
    KIND: tl.constexpr, LOW: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    C_UNIT: tl.constexpr, X_UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN channels of one image of so many `pixels`, or of one of its `parts`, a program. C counts in C_UNIT.

    The FIRST launch sees the image itself, the LAST one divides by `count`, or takes the root.
    """
    C = C * C_UNIT
    tiles_n = tl.cdiv(C, BN)
    tile = tl.program_id(0)
    c = tile % tiles_n * BN + tl.arange(0, BN)
    part = tile // tiles_n % parts
    n = tile // tiles_n // parts
    share = tl.cdiv(pixels, parts)
    first = part * share
    last = tl.minimum(first + share, pixels)
    x += (c.to(tl.int64) * x_c)[None, :]
    acc = tl.full((BM, BN), LOW, tl.float32)
    for at in range(first, last, BM):
        pixel = at + tl.arange(0, BM)
        seen = (pixel < last)[:, None] & (c < C)[None, :]
        _, d, h, v = pixel_of(pixel, size)
        value = tl.load(x + pixel_offset(n, d, h, v, x_strides, X_UNIT)[:, None], mask=seen, other=0.0).to(tl.float32)
        if KIND == "max":
            acc = maximum(acc, tl.where(seen, value, LOW))
        elif KIND == "average" or P == 1 or not FIRST:
            acc += tl.abs(value) if KIND == "lp" else value
        elif P == 2:
            acc += value * value
        else:
            acc += tl.where(seen, pow(tl.abs(value), tl.full((BM, BN), P, tl.float32)), 0.0)
    if KIND == "max":
        unknown = tl.max((acc != acc).to(tl.int32), 0) > 0
        result = tl.where(unknown, float("nan"), tl.max(acc, 0))
    else:
        result = tl.sum(acc, 0)
    if LAST and KIND == "average":
        result = tl.div_rn(result, tl.full((BN,), count, tl.float32))
    if LAST and KIND == "lp":
        if P == 2:
            result = tl.sqrt_rn(result)
        elif P != 1:
            result = pow(result, tl.full((BN,), 1.0 / P, tl.float32))
    out += n.to(tl.int64) * out_n + part.to(tl.int64) * out_part
    tl.store(out + c.to(tl.int64) * out_c, store_type(result, out), mask=c < C)


def supports_global_pool(x: Typed, out: Typed) -> bool:
    """x (N, spatial..., C) with one to three spatial axes, out (N, C), of one type of float32, float16 and bfloat16."""
    shape = tuple(x.shape)
    fits = 3 <= len(shape) <= SPATIAL + 2 and tuple(out.shape) == (shape[0], shape[-1])
    return fits and name_of(x) == name_of(out) and name_of(x) in FLOATS and math.prod(shape[1:-1]) <= INT32_MAX - _TILE


def parts_of(x: Typed, *, invariant: bool = False) -> Dims | None:
    """The scratch, in float32, of images that are shared: (N, parts, C). None where they are not.

    `invariant` images are the same bits however many there are.
    """
    shape = tuple(x.shape)
    programs = entries_seen(shape[0], invariant=invariant) * ceil_div(shape[-1], _CHANNELS)
    parts = min(_BUSY // max(programs, 1), math.prod(shape[1:-1]) // _SHARE)
    return (shape[0], parts, shape[-1]) if parts > 1 else None


def global_pool(kind: str, x: Any, out: Any, launcher: Launcher, *, parts: Any = None, p: int = 1) -> list[Call]:
    """out = the maximum, mean or p-norm of every channel of every image, as `pool` defines them; any strides.

    `parts` is the scratch of `parts_of`.
    """
    if not supports_global_pool(x, out):
        raise ValueError(f"global_pool: none for {name_of(x)}{list(x.shape)} -> {name_of(out)}{list(out.shape)}")
    if 0 in tuple(out.shape):
        return []
    source = image_of(x).in_lines()
    count = float(math.prod(source.size))
    if parts is None:
        return [_launch(kind, source, x, out, 1, launcher, count, p, first=True, last=True)]
    return [
        _launch(kind, source, x, parts, parts.shape[1], launcher, count, p, first=True, last=False),
        _launch(kind, image_of(parts).in_lines(), parts, out, 1, launcher, count, p, first=False, last=True),
    ]


def _launch(
    kind: str,
    source: Image,
    x: Any,
    out: Any,
    parts: int,
    launcher: Launcher,
    count: float,
    p: int,
    *,
    first: bool,
    last: bool,
) -> Call:
    strides = element_strides(out)
    pixels, unit = math.prod(source.size), unit_of(source.channels, x)
    bn = min(next_power_of_two(source.channels), _CHANNELS if source.strides[4] == 1 else 4)
    bm = min(next_power_of_two(ceil_div(pixels, parts)), _TILE // bn)
    args = {
        "x": x,
        "out": out,
        "C": source.channels // unit,
        "pixels": pixels,
        "size": tuple(map(fold_one, source.size)),
        "parts": fold_one(parts),
        "count": count,
        **source.arguments("x"),
        "out_n": strides[0],
        "out_part": fold_one(strides[1] if parts > 1 else 0),
        "out_c": fold_one(strides[-1]),
    }
    constexprs = {
        "KIND": kind,
        "LOW": -math.inf if kind == "max" else 0.0,
        "P": p,
        "FIRST": first,
        "LAST": last,
        "C_UNIT": unit,
        "X_UNIT": source.unit,
        "BM": bm,
        "BN": bn,
    }
    grid = (source.dims[0] * parts * ceil_div(source.channels, bn),)
    return launcher.launch(global_pool_kernel, grid, args, constexprs, num_warps=4)
