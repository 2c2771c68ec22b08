"""Updates written to computed positions: by element and by tuple. `scatter_fold` combines them with what is there.

Where two updates have one position the later one counts, as in NumPy, in every run: each position first finds out, by
integer maxima, which update is its last. A negative index counts from the end; one that is out of range writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.launch.types import address_of
from infera_kernels.triton.elementwise import copy
from infera_kernels.triton.indexing import offset_in, tile_of
from infera_kernels.triton.layout import INDICES, INT32_MAX, STORED, Dims, element_strides, few, fold, fold_one, name_of
from infera_kernels.triton.pointwise import pick_tiling


@triton.jit
def positions(first, sizes, steps, own_steps, part, inside):
    """(offset in the output, offset among the positions, whether in range): what the indices add to both."""
    at = tl.zeros(inside.shape, tl.int64)
    place = tl.zeros(inside.shape, tl.int64)
    for k in tl.static_range(len(sizes)):
        index = tl.load(first + k * part, mask=inside, other=0).to(tl.int64)
        index = tl.where(index < 0, index + sizes[k], index)
        inside = inside & (index >= 0) & (index < sizes[k])
        at += index * steps[k]
        place += index * own_steps[k]
    return at, place, inside


@triton.jit
def claim_kernel(
    indices,
    last,
    dims,
    strides,
    rows,
    sizes,
    own_steps,
    part,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """last[position] = the greatest number of an update there. `strides`: of indices, of updates' numbers, of last."""
    tile, row, col, inside = tile_of(dims, rows, ROWS, COLS, WIDE)
    first = indices + offset_in(tile, row, col, dims, strides, ROW_DIMS)
    _, place, inside = positions(first, sizes, own_steps, own_steps, part, inside)
    number = offset_in(tile, row, col, dims, strides, ROW_DIMS, len(dims)).to(tl.int32)
    place += offset_in(tile, row, col, dims, strides, ROW_DIMS, 2 * len(dims))
    tl.atomic_max(last + place, number + tl.zeros(inside.shape, tl.int32), mask=inside, sem="relaxed")


@triton.jit
def scatter_kernel(
    updates,
    indices,
    last,
    out,
    dims,
    strides,
    rows,
    sizes,
    steps,
    own_steps,
    part,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[position] = update, where `last` says that it is the last one there, or is None: all positions differ.

    `strides` has those of indices, of updates' numbers, of last, of updates and of out.
    """
    tile, row, col, inside = tile_of(dims, rows, ROWS, COLS, WIDE)
    first = indices + offset_in(tile, row, col, dims, strides, ROW_DIMS)
    at, place, inside = positions(first, sizes, steps, own_steps, part, inside)
    if last is not None:
        number = offset_in(tile, row, col, dims, strides, ROW_DIMS, len(dims))
        place += offset_in(tile, row, col, dims, strides, ROW_DIMS, 2 * len(dims))
        inside = inside & (tl.load(last + place, mask=inside, other=-1) == number)
    source = updates + offset_in(tile, row, col, dims, strides, ROW_DIMS, 3 * len(dims))
    at += offset_in(tile, row, col, dims, strides, ROW_DIMS, 4 * len(dims))
    tl.store(out + at, tl.load(source, mask=inside, other=0), mask=inside)


@dataclass(frozen=True, slots=True)
class Numbers:
    """How positions are told apart: `last`, int32 for every position there can be, and -1 to fill it with."""

    last: Any
    unset: Any


def supports_scatter(x: Typed, indices: Typed, updates: Typed, out: Typed) -> bool:
    """Anything that can be stored, by int32 or int64; from 1 to 2**31 - 1 elements; few enough dimensions."""
    dtypes = {name_of(a) for a in (x, updates, out)}
    movable = len(dtypes) == 1 and dtypes <= STORED and name_of(indices) in INDICES
    small = math.prod(indices.shape) <= INT32_MAX and math.prod(x.shape) <= INT32_MAX
    return movable and small and few(out.shape) and few(updates.shape) and 0 not in (*x.shape, *updates.shape)


def _dense(shape: Sequence[int]) -> Dims:
    """Strides of a contiguous array of this shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def scatter(
    x: Any,
    indices: Any,
    updates: Any,
    out: Any,
    launcher: Launcher,
    *,
    axis: int | None = None,
    numbers: Numbers | None,
) -> list[Call]:
    """out = x, but for out[indices[i][j]][j] = updates[i][j] along an `axis` (and so for any rank), or, where that is
    None, out[indices[i]] = updates[i] for tuples in the last axis. Any strides; `out` may be `x`.

    `numbers` is None where no two updates have one position.
    """
    if not supports_scatter(x, indices, updates, out):
        given = ", ".join(f"{name_of(a)}{list(a.shape)}" for a in (x, indices, updates))
        raise ValueError(f"scatter: no kernel for {given} -> {name_of(out)}{list(out.shape)}")
    same = address_of(x) == address_of(out) and tuple(x.strides) == tuple(out.strides)
    calls = [] if same else copy(x, out, launcher)
    own, chosen, shape = element_strides(out), element_strides(indices), tuple(out.shape)
    if axis is None:
        depth = indices.shape[-1]
        lead, inner = tuple(indices.shape[:-1]), (0,) * (len(shape) - depth)
        walked = (*chosen[:-1], *inner), (*_dense(lead), *inner), (0,) * len(updates.shape)
        there = (*(0,) * len(lead), *own[depth:])
        sizes, steps, own_steps, part = shape[:depth], own[:depth], _dense(shape[:depth]), chosen[-1]
    else:
        dense = _dense(shape)
        walked = chosen, _dense(indices.shape), tuple(0 if i == axis else s for i, s in enumerate(dense))
        lead, there = tuple(indices.shape), tuple(0 if i == axis else s for i, s in enumerate(own))
        sizes, steps, own_steps, part = (shape[axis],), (own[axis],), (dense[axis],), 0
    common = {"indices": indices, "sizes": sizes, "own_steps": fold(own_steps), "part": fold_one(part)}
    if numbers is not None:
        calls += copy(numbers.unset, numbers.last, launcher)
        tiling = pick_tiling(lead, [s[: len(lead)] for s in walked])
        args = {**common, **tiling.arguments, "last": numbers.last}
        calls.append(launcher.launch(claim_kernel, (tiling.programs,), args, tiling.constexprs, num_warps=4))
    tiling = pick_tiling(tuple(updates.shape), [*walked, element_strides(updates), there])
    args = {**common, **tiling.arguments, "updates": updates, "out": out, "steps": fold(steps)}
    args["last"] = None if numbers is None else numbers.last
    calls.append(launcher.launch(scatter_kernel, (tiling.programs,), args, tiling.constexprs, num_warps=4))
    return calls
