"""Running sums and products along an axis of arrays of any strides.

A program goes along its rows tile by tile and carries the total. Where rows are few and long it has a part of them: a
first launch finds the totals of the parts, a second, the same scan again, what comes before each of them, and a third
scans the parts from there. There is one order, so results are the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call, Scratch
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton import arithmetic as f
from infera_kernels.triton.indexing import store_type, widened
from infera_kernels.triton.invariance import of_batch
from infera_kernels.triton.layout import INT32_MAX, Dims, fold, fold_one, name_of, span
from infera_kernels.triton.reduce import filled, offset_at, placed
from infera_kernels.triton.reduce_walk import TILE, Operand, Source, Tiling, dense, most_parts, pick_tiling, source
from infera_kernels.triton.reductions import accumulator


@triton.jit
def running_sum(x):
    return tl.cumsum(x, axis=1)


@triton.jit
def running_product(x):
    return tl.cumprod(x, axis=1)


@dataclass(frozen=True, slots=True)
class Scan:
    """run(x) combines along the columns of a tile; `start` is the identity of `combine`."""

    run: Any
    combine: Any
    start: int


SCANS: Mapping[str, Scan] = MappingProxyType(
    {
        "sum": Scan(running_sum, f.add, 0),
        "prod": Scan(running_product, f.mul, 1),
    }
)

TYPES = frozenset({"float32", "float16", "bfloat16", "float64", "int32", "int64", "uint32", "uint64"})


@triton.jit
def scan_kernel(
    x,
    before,
    out,
    kept,
    x_kept,
    before_kept,
    out_kept,
    kept_count,
    length,
    x_step,
    out_step,
    tiles,
    tiles_a_part,
    part_stride,
    RUN: tl.constexpr,
    COMBINE: tl.constexpr,
    START: tl.constexpr,
    TYPE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    TOTALS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """KEPT rows of one part. TOTALS of parts alone are stored, in order of parts; else `before` holds what precedes
    each part, where there are several."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    lane = tl.arange(0, BLOCK)[None, :]
    if WIDE:
        tile = tile.to(tl.int64)
        part = part.to(tl.int64)
        lane = lane.to(tl.int64)
    outer, at, inside = placed(tile, tl.arange(0, KEPT)[:, None], kept, kept_count, KEPT, KEPT_SPLIT)
    x += offset_at(outer, at, kept, x_kept, KEPT_SPLIT)
    out += offset_at(outer, at, kept, out_kept, KEPT_SPLIT)
    start = filled(KEPT, BLOCK, START, TYPE)
    carry = filled(KEPT, 1, START, TYPE)
    if before is not None:
        here = part * part_stride + offset_at(outer, at, kept, before_kept, KEPT_SPLIT)
        carry = tl.load(before + here, mask=inside, other=START)
    for step in range(part * tiles_a_part, tl.minimum((part + 1) * tiles_a_part, tiles)):
        place = step * BLOCK + lane
        there = inside & (place < length)
        if EXCLUSIVE:
            given = there & (place > 0)
            v = tl.load(x + (place - 1) * x_step, mask=given, other=0)
        else:
            given = there
            v = tl.load(x + place * x_step, mask=given, other=0)
        run = RUN(tl.where(given, widened(v).to(start.dtype), start))
        if not TOTALS:
            tl.store(out + place * out_step, store_type(COMBINE(carry, run), out), mask=there)
        last = tl.sum(tl.where(tl.arange(0, BLOCK)[None, :] == BLOCK - 1, run, filled(1, 1, 0, TYPE)), axis=1)
        carry = COMBINE(carry, last[:, None])
    if TOTALS:
        tl.store(out + part * part_stride, carry, mask=inside)


def supports_scan(kind: str, x: Typed, out: Typed) -> bool:
    """A name in SCANS, x of a type in TYPES and `out` like it, in type and shape."""
    return kind in SCANS and name_of(x) in TYPES and name_of(x) == name_of(out) and tuple(x.shape) == tuple(out.shape)


def scratch_of(x: Typed, axis: int, *, invariant: bool = False) -> list[tuple[Dims, str]]:
    """Shape and type of each scratch array that `scan` asks for, in order: totals of parts, and what precedes them."""
    rows = 1
    for a, d in enumerate(x.shape):
        rows *= 1 if a == axis else d
    parts = most_parts(rows, x.shape[axis], invariant=invariant) if x.shape else 1
    return [((parts, rows), accumulator("sum", x.dtype))] * 2 if parts > 1 and rows else []


def _launch(
    family: Scan,
    x: Source,
    out: tuple[Any, Dims, int],
    before: tuple[Any, Dims] | None,
    tiling: Tiling,
    launcher: Launcher,
    *,
    exclusive: bool,
    totals: bool = False,
    of_parts: bool = False,
    invariant: bool,
) -> Call:
    """One launch over x. `out` and `before` are arrays, their strides along the tiling's results, and `out`'s along the
    axis. `of_parts` says that steps along the axis are as long as there are results."""
    results, along = tiling.results, tiling.along
    (x_step,) = tiling.source_strides
    array, out_kept, out_step = out
    reach = along.count * max(abs(x_step), abs(out_step))
    spans = [*(span(results.dims, s) for s in tiling.strides), reach]
    args = {
        "x": x.array,
        "before": None if before is None else before[0],
        "out": array,
        "kept": results.dims,
        "x_kept": fold(tiling.strides[0]),
        "before_kept": None if before is None else fold(before[1]),
        "out_kept": fold(out_kept),
        "kept_count": results.count,
        "length": x.length,
        "x_step": fold_one(x_step),
        "out_step": fold_one(out_step),
        "tiles": along.tiles,
        "tiles_a_part": tiling.tiles_a_part,
        "part_stride": x.results,
    }
    constexprs = {
        "RUN": family.run,
        "COMBINE": family.combine,
        "START": family.start,
        "TYPE": accumulator("sum", x.array.dtype),
        "EXCLUSIVE": exclusive,
        "TOTALS": totals,
        "KEPT": results.block,
        "KEPT_SPLIT": results.split,
        "BLOCK": along.block,
        "WIDE": max(*spans, results.count, along.count) > INT32_MAX - TILE,
    }
    warps = max(1, min(16, results.block * along.block // 256))
    apart = ("x_step", "out_step") if of_parts else ()
    args = of_batch(args, "kept", "kept_count", "part_stride", *apart, invariant=invariant)
    return launcher.launch(scan_kernel, (results.tiles, tiling.parts), args, constexprs, num_warps=warps)


def _backwards(array: Any, axis: int) -> Any:
    return array[(*(slice(None),) * axis, slice(None, None, -1))]


def scan(
    kind: str,
    x: Any,
    axis: int,
    out: Any,
    launcher: Launcher,
    scratch: Scratch,
    *,
    exclusive: bool,
    reverse: bool,
    invariant: bool = False,
) -> list[Call]:
    """out = what the elements up to each one along the non-negative `axis` add or multiply up to, the element itself
    left out if `exclusive`, from the end if `reverse`. Any strides; `out` must not overlap x. `invariant` rows are the
    same bits however many there are."""
    if not supports_scan(kind, x, out):
        raise ValueError(f"{kind}: no scan for {name_of(x)}{list(x.shape)} -> {name_of(out)}{list(out.shape)}")
    if 0 in x.shape:
        return []
    made = [scratch(*piece) for piece in scratch_of(x, axis, invariant=invariant)]
    of, to = (source(_backwards(a, axis) if reverse else a, (axis,)) for a in (x, out))
    family, target, (out_step,) = SCANS[kind], Operand(out, to.kept_strides), to.reduced_strides
    if made:
        totals, before = made
        tiling = pick_tiling(of, [target, dense(before, of.kept)], totals.shape[0], invariant=invariant)
        _, out_kept, dense_kept = tiling.strides
        rest = Source(totals, (of.results,), (1,), (tiling.parts,), (of.results,))
        between = pick_tiling(rest, [dense(before, rest.kept)], 1, invariant=invariant)
        if tiling.parts > 1:
            first, last = (totals, dense_kept, 0), (to.array, out_kept, out_step)
            whole = {"exclusive": exclusive, "invariant": invariant}
            parts = {"exclusive": True, "of_parts": True, "invariant": invariant}
            return [
                _launch(family, of, first, None, tiling, launcher, totals=True, **whole),
                _launch(family, rest, (before, between.strides[1], of.results), None, between, launcher, **parts),
                _launch(family, of, last, (before, dense_kept), tiling, launcher, **whole),
            ]
    tiling = pick_tiling(of, [target], 1, invariant=invariant)
    whole_out = to.array, tiling.strides[1], out_step
    return [_launch(family, of, whole_out, None, tiling, launcher, exclusive=exclusive, invariant=invariant)]
