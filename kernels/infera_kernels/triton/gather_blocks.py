"""Rows of a table of integers of few bits, quantised in blocks along them: only what is gathered is widened."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Array, Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.layout import FLOATS, INT32_MAX, ceil_div, name_of, next_power_of_two

_TILE = 1024
TABLES = {"uint8": 0, "int4": 8, "uint4": 0}
"""Types that a table may be stored as, and the highest bit of their values where it is a sign. A byte of uint8 holds
several values, the first in the lowest bits, one of the others a single one."""


@triton.jit
def _value(table, at, k, width, inside, VALUES: tl.constexpr, MASK: tl.constexpr, SIGN: tl.constexpr):
    """Value k of a row of `width` bytes at `at`, as int32."""
    held = tl.load(table + at * width + k // VALUES, mask=inside, other=0).to(tl.int32)
    return (((held >> (k % VALUES * (8 // VALUES))) & MASK) ^ SIGN) - SIGN


@triton.jit
def gather_blocks_kernel(
    table,
    indices,
    scale,
    zero,
    out,
    rows,
    lines,
    K,
    width,
    zero_width,
    blocks,
    middle,
    BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
    MASK: tl.constexpr,
    SIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE values of the row that an index names, of `lines` times K, dequantised; 0 outside of the table.

    Programs follow each other along a row, then from index to index. Without `zero` the zero point is `middle`.
    """
    tiles = (lines * K + TILE - 1) // TILE
    at = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    row = tl.full((TILE,), 0, tl.int64) + tl.load(indices + at)
    row = tl.where(row < 0, row + rows, row)
    inside = (e < lines * K) & (row >= 0) & (row < rows)
    k = e % K
    line = row * lines + e // K
    q = _value(table, line, k, width, inside, VALUES, MASK, SIGN)
    block = k // BLOCK
    s = tl.load(scale + line * blocks + block, mask=inside, other=0.0).to(tl.float32)
    if zero is None:
        q -= middle
    else:
        q -= _value(zero, line, block, zero_width, inside, VALUES, MASK, SIGN)
    made = q.to(tl.float32) * s
    tl.store(out + at * (lines * K) + e, store_type(made, out), mask=e < lines * K)


def _tile(row: int) -> int:
    """Of a row of so many values those that one program makes."""
    return min(next_power_of_two(row), _TILE)


def _programs(count: int, row: int) -> int:
    """How many make `count` rows of so many values."""
    return count * ceil_div(row, _tile(row)) if row else 0


def supports_gather_blocks(table: Typed, indices: Typed, scale: Typed, zero: Typed | None, out: Typed) -> bool:
    """A table of a type of TABLES, its zero points of the same, int32 or int64 indices into its first axis, scales of
    float32, float16 or bfloat16, the output's type."""
    return (
        name_of(table) in TABLES
        and (zero is None or name_of(zero) == name_of(table))
        and name_of(indices) in ("int32", "int64")
        and name_of(scale) in FLOATS
        and name_of(out) == name_of(scale)
        and math.prod(out.shape[len(indices.shape) :]) <= INT32_MAX - _TILE
        and _programs(math.prod(indices.shape), math.prod(out.shape[len(indices.shape) :])) <= INT32_MAX
    )


def gather_blocks(
    table: Array,
    indices: Array,
    scale: Array,
    zero: Array | None,
    out: Array,
    launcher: Launcher,
    *,
    bits: int,
    block: int,
) -> list[Call]:
    """out (..., lines, K) = the rows of the table that `indices` name, dequantised: values of `bits` bits, scales and
    zero points for every `block` of them along the last axis. All are contiguous."""
    if not out.size:
        return []
    packed = name_of(table) == "uint8"
    values = 8 // bits if packed else 1
    count = indices.size
    k, lines = out.shape[-1], out.size // (count * out.shape[-1])

    def held(array: Any) -> Any:
        return array if array is None or packed else array.view(np.uint8)

    args = {
        "table": held(table),
        "indices": indices,
        "scale": scale,
        "zero": held(zero),
        "out": out,
        "rows": table.shape[0],
        "lines": lines,
        "K": k,
        "width": table.shape[-1],
        "zero_width": 0 if zero is None else zero.shape[-1],
        "blocks": scale.shape[-1],
        "middle": 1 << (bits - 1) if packed else 0,
    }
    known = {
        "BLOCK": block,
        "VALUES": values,
        "MASK": (1 << (bits if packed else 4)) - 1,
        "SIGN": TABLES[name_of(table)],
        "TILE": _tile(lines * k),
    }
    grid = (_programs(count, lines * k),)
    return [launcher.launch(gather_blocks_kernel, grid, args, known, num_warps=4)]
