"""Rotary position embedding (RoFormer, arXiv 2104.09864), the angles' tables given or looked up by position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import offset_of, store_type
from infera_kernels.triton.layout import (
    FLOATS,
    INDICES,
    INT32_MAX,
    MAX_DIMS,
    broadcast_strides,
    ceil_div,
    coalesce,
    element_strides,
    fold,
    fold_one,
    name_of,
    next_power_of_two,
)
from infera_kernels.triton.units import in_units

_TILE = 1024
_MOST_PAIRS = 2048


@triton.jit
def _members(at, half, known, WHOLE: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr):
    """Both members of each pair in float32: `half` apart, or neighbours; of what is not WHOLE one for both."""
    if not WHOLE:
        a = tl.load(at, mask=known, other=0.0).to(tl.float32)
        return a, a
    elif INTERLEAVED:
        return tl.split(tl.load(at, mask=known, other=0.0).to(tl.float32).reshape(ROWS, at.shape[1] // 2, 2))
    else:
        a = tl.load(at, mask=known, other=0.0).to(tl.float32)
        return a, tl.load(at + half, mask=known, other=0.0).to(tl.float32)


@triton.jit
def rotary_kernel(
    x,
    cos,
    sin,
    out,
    places,
    dims,
    x_strides,
    cos_strides,
    sin_strides,
    out_strides,
    place_strides,
    step_strides,
    x_column,
    cos_column,
    sin_column,
    out_column,
    cos_row,
    sin_row,
    table_rows,
    shift,
    rows,
    HALF: tl.constexpr,
    X_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    COS_UNIT: tl.constexpr,
    SIN_UNIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PER_PAIR: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """out = (a cos - b sin, b cos + a sin) for the pairs (a, b) of ROWS rows of x."""
    DIMS: tl.constexpr = len(dims)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :].to(tl.int64)
    known = (row < rows) & (pair < HALF)
    column, filled = pair, known
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :].to(tl.int64)
        filled = (row < rows) & (column < 2 * HALF)
    if PER_PAIR:
        at, there = pair, known
    else:
        at, there = column, filled
    if places is None:
        cos_at = cos + offset_of(row, dims, cos_strides, 0, DIMS) * COS_UNIT
        sin_at = sin + offset_of(row, dims, sin_strides, 0, DIMS) * SIN_UNIT
    else:
        first = tl.load(places + offset_of(row, dims, place_strides, 0, DIMS), mask=row < rows, other=0).to(tl.int64)
        place = tl.maximum(first + shift, 0) + offset_of(row, dims, step_strides, 0, DIMS)
        place = tl.minimum(place, table_rows - 1)
        cos_at = cos + place * cos_row * COS_UNIT
        sin_at = sin + place * sin_row * SIN_UNIT
    x += offset_of(row, dims, x_strides, 0, DIMS) * X_UNIT
    out += offset_of(row, dims, out_strides, 0, DIMS) * OUT_UNIT
    a, b = _members(x + column * x_column, HALF * x_column, filled, True, INTERLEAVED, ROWS)
    c, d = _members(cos_at + at * cos_column, HALF * cos_column, there, not PER_PAIR, INTERLEAVED, ROWS)
    s, t = _members(sin_at + at * sin_column, HALF * sin_column, there, not PER_PAIR, INTERLEAVED, ROWS)
    first = a * c - b * s
    second = b * d + a * t
    out += column * out_column
    if INTERLEAVED:
        tl.store(out, store_type(tl.join(first, second).reshape(ROWS, 2 * PAIRS), out), mask=filled)
    else:
        tl.store(out, store_type(first, out), mask=known)
        tl.store(out + HALF * out_column, store_type(second, out), mask=known)


def supports_rotary(x: Typed, cos: Typed, sin: Typed, out: Typed, places: Typed | None = None) -> bool:
    """x and out (..., D) with even D, of one type out of float32, float16 and bfloat16, as cos and sin are.

    Tables have D elements along the last axis, or D / 2, both as many. Without places they broadcast to x; places
    (int32 or int64) broadcast to (...), and the tables then have two axes.
    """
    if len({name_of(v) for v in (x, cos, sin, out)}) != 1 or name_of(x) not in FLOATS:
        return False
    *lead, size = shape = tuple(x.shape)
    if not lead or len(shape) > MAX_DIMS or tuple(out.shape) != shape or size % 2 or not 0 < size <= 2 * _MOST_PAIRS:
        return False
    if min(len(cos.shape), len(sin.shape)) < 1 or cos.shape[-1] != sin.shape[-1]:
        return False
    if cos.shape[-1] not in (size, size // 2) or 0 in (*cos.shape, *sin.shape):
        return False
    if places is not None and (name_of(places) not in INDICES or 0 in places.shape):
        return False
    try:
        if places is None:
            given = [tuple(t.shape[:-1]) for t in (cos, sin)]
        else:
            given = [tuple(places.shape)]
            if len(cos.shape) != 2 or tuple(cos.shape) != tuple(sin.shape):
                return False
        return all(np.broadcast_shapes(tuple(lead), g) == tuple(lead) for g in given) and math.prod(lead) <= INT32_MAX
    except ValueError:
        return False


def rotary(
    x: Any,
    cos: Any,
    sin: Any,
    out: Any,
    launcher: Launcher,
    *,
    interleaved: bool,
    places: Any = None,
    shift: int = 0,
    along: int | None = None,
) -> list[Call]:
    """The pairs of x turned, in float32: pairs half an axis apart, or neighbours where `interleaved`.

    With places a row is turned by the tables' row max(place + `shift`, 0), plus its index along axis `along` where one
    is given; beyond the last it is the last. Strides are arbitrary. `out` may not be x.
    """
    if not supports_rotary(x, cos, sin, out, places):
        given = ", ".join(f"{name_of(v)}{list(v.shape)}" for v in (x, cos, sin, places, out) if v is not None)
        raise ValueError(f"rotary: no kernel for {given}")
    *lead, size = shape = tuple(x.shape)
    if 0 in shape:
        return []
    half, none = size // 2, (0,) * len(lead)
    steps = tuple(int(i == along) for i in range(len(lead)))
    tables = [none if places is not None else broadcast_strides(t, (*lead, t.shape[-1]))[:-1] for t in (cos, sin)]
    placed = none if places is None else broadcast_strides(places, tuple(lead))
    x_strides, out_strides = element_strides(x), element_strides(out)
    dims, walked = coalesce(tuple(lead), [x_strides[:-1], *tables, out_strides[:-1], placed, steps])
    (x_lead, x_unit), (out_lead, out_unit) = in_units(walked[0]), in_units(walked[3])
    looked_up = [(0,) if places is None else element_strides(t)[:1] for t in (cos, sin)]
    (cos_all, cos_unit), (sin_all, sin_unit) = (
        in_units((*row, *step)) for row, step in zip(looked_up, walked[1:3], strict=True)
    )
    pairs = next_power_of_two(half)
    rows = math.prod(lead)
    tile = max(1, min(_TILE // pairs, next_power_of_two(rows)))
    columns = [fold_one(element_strides(v)[-1]) for v in (x, cos, sin, out)]
    args = {
        "x": x,
        "cos": cos,
        "sin": sin,
        "out": out,
        "places": places,
        "dims": dims,
        "x_strides": x_lead,
        "cos_strides": cos_all[1:],
        "sin_strides": sin_all[1:],
        "out_strides": out_lead,
        "place_strides": fold(walked[4]),
        "step_strides": fold(walked[5]),
        **dict(zip(("x_column", "cos_column", "sin_column", "out_column"), columns, strict=True)),
        "cos_row": cos_all[0],
        "sin_row": sin_all[0],
        "table_rows": cos.shape[0],
        "shift": shift,
        "rows": rows,
    }
    constexprs = {
        "HALF": half,
        "X_UNIT": x_unit,
        "OUT_UNIT": out_unit,
        "COS_UNIT": cos_unit,
        "SIN_UNIT": sin_unit,
        "INTERLEAVED": interleaved,
        "PER_PAIR": cos.shape[-1] == half,
        "ROWS": tile,
        "PAIRS": pairs,
    }
    return [launcher.launch(rotary_kernel, (ceil_div(rows, tile),), args, constexprs, num_warps=4)]
