"""The k extreme values along an axis and where they stand, in order; of equals the lower index comes first.

Every element becomes a 64-bit key of its value and its index, so that no two are equal and any sort is a stable one.
Rows are sorted in registers. Of longer ones each chunk gives its best, and the best of those are found the same way.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Call, Scratch
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import offset_of, widened
from infera_kernels.triton.layout import (
    INT32_MAX,
    Dims,
    ceil_div,
    coalesce,
    fold,
    fold_one,
    name_of,
    next_power_of_two,
    span,
)
from infera_kernels.triton.reduce import NUMBERS
from infera_kernels.triton.reduce_walk import source
from infera_kernels.triton.reductions import key

_LONGEST = 4096
"""The longest row that is sorted at once."""

_CHUNK = 2048
"""Elements of longer rows that are searched at once, at least: a sort of more takes many seconds to compile."""

_MOST = 1024
"""The largest k that longer rows are searched for."""

_TILE = 1024


@triton.jit
def top_k_kernel(
    x,
    keys,
    values,
    places,
    kept,
    x_kept,
    values_kept,
    places_kept,
    rows,
    length,
    chunks,
    x_step,
    values_step,
    places_step,
    k,
    SMALLEST: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The best TOP keys of a chunk: of x if FIRST, else of the keys before, (rows, length). The LAST launch writes
    values and places, the others keys to `values`, (rows, chunks * TOP)."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile // chunks * ROWS + tl.arange(0, ROWS)[:, None]
    chunk = tile % chunks
    column = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    if not WIDE:
        row = row.to(tl.int32)
        column = column.to(tl.int32)
    inside = row < rows
    there = inside & (column < length)
    x += offset_of(row, kept, x_kept, 0, len(kept))
    if FIRST:
        v = widened(tl.load(x + column * x_step, mask=there, other=0))
        found = tl.where(there, key(v, column, SMALLEST, False, False), -0x8000000000000000)
    else:
        found = tl.load(keys + row.to(tl.int64) * length + column, mask=there, other=-0x8000000000000000)
    best = tl.topk(found, TOP)
    lane = tl.arange(0, TOP)[None, :]
    if LAST:
        place = 0xFFFFFFFF - (best & 0xFFFFFFFF)
        wanted = inside & (lane < k)
        value = tl.load(x + place * x_step, mask=wanted, other=0)
        tl.store(values + offset_of(row, kept, values_kept, 0, len(kept)) + lane * values_step, value, mask=wanted)
        tl.store(places + offset_of(row, kept, places_kept, 0, len(kept)) + lane * places_step, place, mask=wanted)
    else:
        tl.store(values + (row.to(tl.int64) * chunks + chunk) * TOP + lane, best, mask=inside)


def supports_top_k(x: Typed, k: int, axis: int) -> bool:
    """Numbers of up to 32 bits, and rows that can be sorted at once or are searched for few."""
    length = x.shape[axis] if x.shape else 0
    narrow = name_of(x) in NUMBERS and np.dtype(x.dtype).itemsize <= 4
    return narrow and 0 < length <= INT32_MAX - _LONGEST and (length <= _LONGEST or k <= _MOST)


def _passes(length: int, k: int) -> list[tuple[int, int, int]]:
    """(length, chunk, chunks) of each launch, the last one of one chunk."""
    top, found = max(2, next_power_of_two(k)), []
    while True:
        chunk = max(_CHUNK, 4 * top) if length > _LONGEST else max(top, next_power_of_two(length))
        found.append((length, chunk, ceil_div(length, chunk)))
        if found[-1][2] == 1:
            return found
        length = found[-1][2] * top


def scratch_of(x: Typed, k: int, axis: int) -> list[tuple[Dims, str]]:
    """Shape and type of each scratch array that `top_k` asks for, in order."""
    rows = math.prod(d for a, d in enumerate(x.shape) if a != axis)
    if not rows * k:
        return []
    return [((rows, length), "int64") for length, _, _ in _passes(x.shape[axis], k)[1:]]


def top_k(
    x: Any, k: int, axis: int, values: Any, places: Any, launcher: Launcher, scratch: Scratch, *, largest: bool
) -> list[Call]:
    """`values` and `places` (int64) = the k best along the non-negative `axis`; NaN counts as larger than all. Any
    strides."""
    if not supports_top_k(x, k, axis):
        raise ValueError(f"top_k: no kernel for {k} of {name_of(x)}{list(x.shape)} along axis {axis}")
    of, *to = (source(a, (axis,)) for a in (x, values, places))
    if not of.results * k:
        return []
    kept, strides = coalesce(of.kept, [s.kept_strides for s in (of, *to)])
    (x_step,), *steps = (s.reduced_strides for s in (of, *to))
    passes = _passes(of.length, k)
    spans = [span(kept, s) for s in strides]
    calls, keys = [], None
    for i, (length, chunk, chunks) in enumerate(passes):
        last = chunks == 1
        made = None if last else scratch((of.results, passes[i + 1][0]), np.int64)
        rows = max(1, min(_TILE // chunk, next_power_of_two(of.results)))
        args = {
            "x": x,
            "keys": keys,
            "values": values if last else made,
            "places": places if last else None,
            "kept": kept,
            "x_kept": fold(strides[0]),
            "values_kept": fold(strides[1]),
            "places_kept": fold(strides[2]),
            "rows": of.results,
            "length": length,
            "chunks": chunks,
            "x_step": fold_one(x_step),
            "values_step": fold_one(steps[0][0]),
            "places_step": fold_one(steps[1][0]),
            "k": k,
        }
        constexprs = {
            "SMALLEST": not largest,
            "FIRST": i == 0,
            "LAST": last,
            "ROWS": rows,
            "CHUNK": chunk,
            "TOP": max(2, next_power_of_two(k)),
            "WIDE": max(*spans, of.results, of.length * abs(x_step)) > INT32_MAX - _LONGEST,
        }
        grid = (ceil_div(of.results, rows) * chunks,)
        warps = max(1, min(8, rows * chunk // 256))
        calls.append(launcher.launch(top_k_kernel, grid, args, constexprs, num_warps=warps))
        keys = made
    return calls
