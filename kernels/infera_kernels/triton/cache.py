"""Caches of keys and values that grow: what is kept of the past, then what is new, then zeros."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import offset_of
from infera_kernels.triton.layout import (
    INDICES,
    MAX_DIMS,
    STORED,
    broadcast_strides,
    ceil_div,
    coalesce,
    element_strides,
    fold,
    name_of,
    next_power_of_two,
)
from infera_kernels.triton.units import each_in_units, in_units

_TILE = 2048


@triton.jit
def _rows(base, matrix, row, column, lead, strides, steps, UNITS: tl.constexpr):
    """The addresses of rows of a matrix."""
    base += offset_of(matrix, lead, strides, 0, len(lead)) * UNITS[0]
    return base + (row * steps[0] * UNITS[1] + column * steps[1] * UNITS[2])


@triton.jit
def append_kernel(
    past,
    new,
    out,
    lengths,
    lead,
    past_lead,
    new_lead,
    out_lead,
    lengths_lead,
    past_steps,
    new_steps,
    out_steps,
    kept,
    added,
    rows,
    size,
    shift,
    PAST_UNITS: tl.constexpr,
    NEW_UNITS: tl.constexpr,
    OUT_UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """ROWS rows of one matrix of `out`: of `past` those before the first new one, `added` of `new`, then zeros."""
    tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)
    row = (program % tiles * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, SIZE)[None, :].to(tl.int64)
    at = shift
    if lengths is not None:
        at += tl.load(lengths + offset_of(matrix, lead, lengths_lead, 0, len(lead))).to(tl.int32)
        at = tl.maximum(at, 0)
    inside = (row < rows) & (column < size)
    values = tl.load(
        _rows(new, matrix, row - at, column, lead, new_lead, new_steps, NEW_UNITS),
        mask=inside & (row >= at) & (row < at + added),
        other=0.0,
    )
    if past is not None:
        before = tl.load(
            _rows(past, matrix, row, column, lead, past_lead, past_steps, PAST_UNITS),
            mask=inside & (row < at) & (row < kept),
            other=0.0,
        )
        values = tl.where(row < at, before, values)
    tl.store(_rows(out, matrix, row, column, lead, out_lead, out_steps, OUT_UNITS), values, mask=inside)


def supports_append(past: Typed | None, new: Typed, out: Typed, lengths: Typed | None = None) -> bool:
    """past (..., P, D), new (..., L, D) and out (..., N, D) of one type that can be stored, leading axes alike; lengths
    (int32 or int64) broadcasting to (..., 1, 1)."""
    given = [x for x in (past, new, out) if x is not None]
    if len({name_of(x) for x in given}) != 1 or name_of(out) not in STORED or not 2 <= len(out.shape) <= MAX_DIMS:
        return False
    *lead, _, size = tuple(out.shape)
    if any((*x.shape[:-2], x.shape[-1]) != (*lead, size) for x in given) or not 0 < size <= _TILE:
        return False
    if lengths is None:
        return True
    try:
        whole = np.broadcast_shapes(tuple(lengths.shape), (*lead, 1, 1)) == (*lead, 1, 1)
    except ValueError:
        return False
    return whole and name_of(lengths) in INDICES


def append(past: Any, new: Any, out: Any, launcher: Launcher, *, lengths: Any = None, shift: int = 0) -> list[Call]:
    """out = past up to row a, new from row a on, then zeros; a is `shift`, plus the matrix's length, at least 0, where
    there are lengths. Rows of the past that it does not have are zeros. Any strides; nothing may overlap `out`."""
    if not supports_append(past, new, out, lengths):
        given = ", ".join(f"{name_of(x)}{list(x.shape)}" for x in (past, new, out) if x is not None)
        raise ValueError(f"append: no kernel for {given}")
    if 0 in out.shape:
        return []
    *lead, rows, size = tuple(out.shape)
    none = (0,) * len(out.shape)
    strides = [none if x is None else element_strides(x) for x in (past, new, out)]
    counted = none if lengths is None else broadcast_strides(lengths, (*lead, 1, 1))
    dims, walked = coalesce(tuple(lead), [s[:-2] for s in (*strides, counted)])
    args: dict[str, Any] = {"past": past, "new": new, "out": out, "lengths": lengths, "lead": dims}
    units: dict[str, Any] = {}
    for name, outer, s in zip(("past", "new", "out"), walked, strides, strict=False):
        args[f"{name}_lead"], common = in_units(outer)
        args[f"{name}_steps"], each = each_in_units(s[-2:])
        units[f"{name.upper()}_UNITS"] = (common, *each)
    width = next_power_of_two(size)
    tile = max(1, min(_TILE // width, next_power_of_two(rows)))
    args |= {
        "lengths_lead": fold(walked[3]),
        "kept": 0 if past is None else past.shape[-2],
        "added": new.shape[-2],
        "rows": rows,
        "size": size,
        "shift": shift,
    }
    grid = (math.prod(lead) * ceil_div(rows, tile),)
    return [launcher.launch(append_kernel, grid, args, {**units, "ROWS": tile, "SIZE": width}, num_warps=4)]
