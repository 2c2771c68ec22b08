"""Updates combined with what is at computed positions: added, multiplied, or the larger or smaller of both.

Positions that cannot meet are lanes; updates that can are combined one after the other, in their own order, by one
lane. So every run gives the same bits, those of NumPy, without atomics.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.launch.types import address_of
from infera_kernels.triton.elementwise import BINARY, copy
from infera_kernels.triton.indexing import offset_in, offset_of, store_type, tile_of, widened
from infera_kernels.triton.layout import coalesce, element_strides, fold, fold_one, name_of
from infera_kernels.triton.pointwise import pick_tiling
from infera_kernels.triton.scatter import positions, supports_scatter

LONGEST = 4096
"""Updates that may meet: each waits for the one before it, about a microsecond."""

REDUCTIONS = frozenset({"add", "mul", "max", "min"})


@triton.jit
def fold_kernel(
    updates,
    indices,
    out,
    dims,
    strides,
    rows,
    walk,
    index_steps,
    update_steps,
    count,
    sizes,
    steps,
    part,
    FN: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[position] = FN(out[position], update) for `count` updates of each lane, which `walk` counts.

    `strides` has those of indices, of updates and of out along the lanes' `dims`.
    """
    tile, row, col, inside = tile_of(dims, rows, ROWS, COLS, WIDE)
    first = indices + offset_in(tile, row, col, dims, strides, ROW_DIMS)
    source = updates + offset_in(tile, row, col, dims, strides, ROW_DIMS, len(dims))
    target = out + offset_in(tile, row, col, dims, strides, ROW_DIMS, 2 * len(dims))
    for number in range(count):
        j = tl.full([], 0, tl.int64) + number
        here = first + offset_of(j, walk, index_steps, 0, len(walk))
        at, _, there = positions(here, sizes, steps, steps, part, inside)
        given = tl.load(source + offset_of(j, walk, update_steps, 0, len(walk)), mask=there, other=0)
        held = tl.load(target + at, mask=there, other=0)
        tl.store(target + at, store_type(FN(widened(held), widened(given)), out), mask=there)
        tl.debug_barrier()


def supports_fold(reduction: str, x: Typed, indices: Typed, updates: Typed, out: Typed, axis: int | None) -> bool:
    """What `supports_scatter` says, of numbers, where at most LONGEST updates may meet: along the axis, all tuples."""
    if reduction not in REDUCTIONS or not supports_scatter(x, indices, updates, out):
        return False
    count = math.prod(indices.shape[:-1]) if axis is None else indices.shape[axis]
    return count <= LONGEST and name_of(x) in BINARY[reduction].dtypes


def scatter_fold(
    reduction: str, x: Any, indices: Any, updates: Any, out: Any, launcher: Launcher, *, axis: int | None
) -> list[Call]:
    """out = x, and then out[position] = reduction(out[position], update), update by update, with positions as `scatter`
    has them. Any strides; `out` may be `x`."""
    if not supports_fold(reduction, x, indices, updates, out, axis):
        given = ", ".join(f"{name_of(a)}{list(a.shape)}" for a in (x, indices, updates))
        raise ValueError(f"scatter: no kernel for {reduction} of {given} -> {name_of(out)}{list(out.shape)}")
    same = address_of(x) == address_of(out) and tuple(x.strides) == tuple(out.strides)
    calls = [] if same else copy(x, out, launcher)
    own, chosen, brought = (element_strides(a) for a in (out, indices, updates))
    if axis is None:
        depth, lead = indices.shape[-1], len(indices.shape) - 1
        lanes = tuple(out.shape[depth:])
        walked = [(0,) * len(lanes), brought[lead:], own[depth:]]
        walk, (index_steps, update_steps) = coalesce(tuple(indices.shape[:-1]), [chosen[:-1], brought[:lead]])
        sizes, steps, part = tuple(out.shape[:depth]), own[:depth], chosen[-1]
    else:
        lanes = _without(indices.shape, axis)
        walked = [_without(s, axis) for s in (chosen, brought, own)]
        walk, index_steps, update_steps = (indices.shape[axis],), (chosen[axis],), (brought[axis],)
        sizes, steps, part = (out.shape[axis],), (own[axis],), 0
    tiling = pick_tiling(lanes, walked)
    args = {
        "updates": updates,
        "indices": indices,
        "out": out,
        **tiling.arguments,
        "walk": walk,
        "index_steps": fold(index_steps),
        "update_steps": fold(update_steps),
        "count": math.prod(walk),
        "sizes": sizes,
        "steps": fold(steps),
        "part": fold_one(part),
    }
    known = {"FN": BINARY[reduction].fn, **tiling.constexprs}
    return [*calls, launcher.launch(fold_kernel, (tiling.programs,), args, known, num_warps=4, num_stages=1)]


def _without(values: Any, axis: int) -> tuple[int, ...]:
    return (*values[:axis], *values[axis + 1 :])
