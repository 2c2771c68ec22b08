"""Reductions over any axes of arrays of any strides, and the positions of extrema.

One kernel walks tiles of results x what is reduced. Lanes lie along whichever of the two is contiguous in memory. A
lane combines what it meets, and the lanes of a row are combined at the end, as a tree. Where results are few and what
is reduced is long, several programs share it: each writes its part to scratch, and a second launch combines the parts,
so that results are the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Call, Scratch
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import offset_of, store_type, widened
from infera_kernels.triton.invariance import of_batch
from infera_kernels.triton.layout import INT32_MAX, STORED, Dims, element_strides, fold, name_of, span
from infera_kernels.triton.reduce_walk import TILE, Operand, Source, Tiling, dense, most_parts, pick_tiling, source
from infera_kernels.triton.reductions import REDUCTIONS, WIDENED, Reduction, accumulator, element, identity, total

_CHUNK = 32
"""Tiles combined one after the other, before what they made is combined with the rest: roundings do not pile up."""

PLAIN = frozenset({"sum", "mean", "max", "min", "prod", "l1", "l2", "log_sum", "log_sum_exp", "sum_square"})
"""What needs nothing but the array."""

NUMBERS = STORED - {"bool"}


@triton.jit
def filled(ROWS: tl.constexpr, COLS: tl.constexpr, VALUE: tl.constexpr, TYPE: tl.constexpr):
    """A tile of one value, in the type of that name."""
    if TYPE == "float32":
        return tl.full([ROWS, COLS], VALUE, tl.float32)
    elif TYPE == "float64":
        return tl.full([ROWS, COLS], VALUE, tl.float64)
    elif TYPE == "int32":
        return tl.full([ROWS, COLS], VALUE, tl.int32)
    elif TYPE == "uint32":
        return tl.full([ROWS, COLS], VALUE, tl.uint32)
    elif TYPE == "uint64":
        return tl.full([ROWS, COLS], VALUE, tl.uint64)
    else:
        tl.static_assert(TYPE == "int64")
        return tl.full([ROWS, COLS], VALUE, tl.int64)


@triton.jit
def placed(tile, lane, dims, count, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """Where a tile's lanes lie: the index over dims[1:] and over dims[0] if SPLIT, else 0 and the index over all."""
    if SPLIT:
        across = tl.cdiv(dims[0], BLOCK)
        at = (tile % across) * BLOCK + lane
        return tile // across, at, at < dims[0]
    else:
        at = tile * BLOCK + lane
        return tile * 0, at, at < count


@triton.jit
def offset_at(outer, at, dims, strides, SPLIT: tl.constexpr):
    """The offset of what `placed` found."""
    LAST: tl.constexpr = len(dims)
    if SPLIT:
        return offset_of(outer, dims, strides, 1, LAST) + at * strides[0]
    elif LAST == 1:
        return at * strides[0]
    else:
        return offset_of(at, dims, strides, 0, LAST)


@triton.jit
def reduce_kernel(
    x,
    shift,
    out,
    kept,
    x_kept,
    shift_kept,
    out_kept,
    kept_count,
    reduced,
    x_reduced,
    reduced_count,
    tiles,
    tiles_a_part,
    part_stride,
    length,
    eps,
    MAP: tl.constexpr,
    COMBINE: tl.constexpr,
    FOLD: tl.constexpr,
    FINISH: tl.constexpr,
    START: tl.constexpr,
    TYPE: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_SPLIT: tl.constexpr,
    REDUCED: tl.constexpr,
    REDUCED_SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """KEPT results of one part: `kept` and `reduced` are dimensions, innermost first, each with the arrays' strides
    along them. `length` counts what is reduced in all passes together."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    lane = tl.arange(0, REDUCED)[None, :]
    if WIDE:
        tile = tile.to(tl.int64)
        part = part.to(tl.int64)
        lane = lane.to(tl.int64)
    outer, at, inside = placed(tile, tl.arange(0, KEPT)[:, None], kept, kept_count, KEPT, KEPT_SPLIT)
    x += offset_at(outer, at, kept, x_kept, KEPT_SPLIT)
    beside = None
    if shift is not None:
        beside = tl.load(shift + offset_at(outer, at, kept, shift_kept, KEPT_SPLIT), mask=inside, other=0)
    start = filled(KEPT, REDUCED, START, TYPE)
    combined = start
    first = part * tiles_a_part
    last = tl.minimum(first + tiles_a_part, tiles)
    for begin in range(first, last, CHUNK):
        chunk = start
        for step in range(begin, tl.minimum(begin + CHUNK, last)):
            block, place, along = placed(step, lane, reduced, reduced_count, REDUCED, REDUCED_SPLIT)
            there = inside & along
            v = tl.load(x + offset_at(block, place, reduced, x_reduced, REDUCED_SPLIT), mask=there, other=0)
            chunk = COMBINE(chunk, tl.where(there, MAP(widened(v), beside, place).to(start.dtype), start))
        combined = COMBINE(combined, chunk)
    result = FINISH(FOLD(combined)[:, None], beside, length, eps)
    out += part * part_stride + offset_at(outer, at, kept, out_kept, KEPT_SPLIT)
    tl.store(out, store_type(result, out), mask=inside)


def launch_pass(
    family: Reduction,
    name: str,
    x: Source,
    operands: Sequence[Operand],
    tiling: Tiling,
    launcher: Launcher,
    length: int,
    eps: float,
    *,
    of_parts: bool = False,
    invariant: bool = False,
) -> Call:
    """The launch of one pass over `x`; operands are what it writes, and the shift where there is one.

    `x` may be parts of results: those lie as far apart as there are results.
    """
    out, shift = (*operands, None)[:2]
    assert out is not None
    results, along = tiling.results, tiling.along
    spans = [*(span(results.dims, s) for s in tiling.strides), span(along.dims, tiling.source_strides)]
    args = {
        "x": x.array,
        "shift": None if shift is None else shift.array,
        "out": out.array,
        "kept": results.dims,
        "x_kept": fold(tiling.strides[0]),
        "shift_kept": None if shift is None else fold(tiling.strides[2]),
        "out_kept": fold(tiling.strides[1]),
        "kept_count": results.count,
        "reduced": along.dims,
        "x_reduced": fold(tiling.source_strides),
        "reduced_count": x.length,
        "tiles": along.tiles,
        "tiles_a_part": tiling.tiles_a_part,
        "part_stride": x.results,
        "length": length,
        "eps": eps,
    }
    constexprs = {
        "MAP": family.map,
        "COMBINE": family.combine,
        "FOLD": family.fold,
        "FINISH": family.finish,
        "START": identity(family.start, name),
        "TYPE": name,
        "KEPT": results.block,
        "KEPT_SPLIT": results.split,
        "REDUCED": along.block,
        "REDUCED_SPLIT": along.split,
        "CHUNK": _CHUNK,
        "WIDE": max(*spans, results.count, along.count) > INT32_MAX - TILE,
    }
    warps = max(1, min(8, results.block * along.block // 256))
    apart = ("x_reduced",) if of_parts else ()
    args = of_batch(args, "kept", "kept_count", "part_stride", *apart, invariant=invariant)
    return launcher.launch(reduce_kernel, (results.tiles, tiling.parts), args, constexprs, num_warps=warps)


def passes(
    kind: str,
    x: Source,
    operands: Sequence[Operand],
    parts: Any,
    launcher: Launcher,
    eps: float,
    *,
    invariant: bool = False,
) -> list[Call]:
    """One launch that writes operands[0], or two by way of `parts`, an array (parts, results)."""
    family, name = REDUCTIONS[kind], accumulator(kind, x.array.dtype)
    if name == "float64" and np.dtype(x.array.dtype).kind in "iu":
        family = replace(family, map=WIDENED.get(family.map, family.map))
    tiling = pick_tiling(x, operands, 1 if parts is None else parts.shape[0], invariant=invariant)
    if tiling.parts == 1:
        return [launch_pass(family, name, x, operands, tiling, launcher, x.length, eps, invariant=invariant)]
    partial = [dense(parts, x.kept), *operands[1:]]
    tiling = pick_tiling(x, partial, parts.shape[0], invariant=invariant)
    rest = Source(parts, x.kept, partial[0].strides, (tiling.parts,), (x.results,))
    last = pick_tiling(rest, operands, 1, invariant=invariant)
    return [
        launch_pass(
            replace(family, finish=total), name, x, partial, tiling, launcher, x.length, eps, invariant=invariant
        ),
        launch_pass(
            replace(family, map=element),
            name,
            rest,
            operands,
            last,
            launcher,
            x.length,
            eps,
            of_parts=True,
            invariant=invariant,
        ),
    ]


POSITIONS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "arg_max": ("largest_first", "max", "first_place"),
        "arg_max_last": ("largest_last", "max", "last_place"),
        "arg_min": ("smallest_first", "min", "first_place"),
        "arg_min_last": ("smallest_last", "min", "last_place"),
    }
)
"""Where an extremum stands: found at once by a key, or, of types too wide for one, the extremum and then its place."""


def _steps(kind: str, x: Typed) -> tuple[str, ...]:
    """The reductions that make one: the first of two gives the shift of the second."""
    if kind in POSITIONS:
        at_once, extremum, place = POSITIONS[kind]
        return (at_once,) if np.dtype(x.dtype).itemsize <= 4 else (extremum, place)
    return ("max", kind) if kind == "log_sum_exp" else (kind,)


def scratch_of(kind: str, x: Typed, axes: Sequence[int], *, invariant: bool = False) -> list[tuple[Dims, str]]:
    """Shape and type of each scratch array that `reduce` asks for, in order."""
    results = math.prod(d for a, d in enumerate(x.shape) if a not in axes)
    parts, steps = most_parts(results, math.prod(x.shape[a] for a in axes), invariant=invariant), _steps(kind, x)
    if not results:
        return []
    pieces = [((parts, results), accumulator(step, x.dtype)) for step in steps if parts > 1]
    shift = "log_sum_exp" if kind == "log_sum_exp" else steps[0]
    return [*pieces, *([((results,), accumulator(shift, x.dtype))] if len(steps) > 1 else [])]


def supports_reduction(kind: str, x: Typed, out: Typed, axes: Sequence[int]) -> bool:
    """A name in REDUCTIONS without a shift, log_sum_exp, or one in POSITIONS, whose result is int64; else the result
    has x's type. Floats and integers; bools have extrema alone. Means of integers and positions need elements."""
    length = math.prod(x.shape[a] for a in axes)
    name = name_of(x)
    if kind in POSITIONS:
        return name in NUMBERS and name_of(out) == "int64" and 0 < length <= INT32_MAX and len(axes) <= 1
    if kind == "mean" and np.dtype(x.dtype).kind in "iu" and not length:
        return False
    return kind in PLAIN and name_of(out) == name and (name in NUMBERS or (name == "bool" and kind in ("max", "min")))


def reduce(
    kind: str,
    x: Any,
    axes: Sequence[int],
    out: Any,
    launcher: Launcher,
    scratch: Scratch,
    *,
    invariant: bool = False,
) -> list[Call]:
    """out = `x` reduced over `axes`, non-negative ones; `out` may keep them with one element. Any strides.

    `invariant` results are the same bits however many there are.
    """
    if not supports_reduction(kind, x, out, axes):
        raise ValueError(f"{kind}: no kernel for {name_of(x)}{list(x.shape)} -> {name_of(out)} over axes {list(axes)}")
    of = source(x, axes)
    if not of.results:
        return []
    arrays = [scratch(shape, name) for shape, name in scratch_of(kind, x, axes, invariant=invariant)]
    strides = element_strides(out)
    whole = len(strides) == len(x.shape)
    target = Operand(out, tuple(s for a, s in enumerate(strides) if a not in axes) if whole else strides)
    *first, last = _steps(kind, x)
    parts = arrays if len(arrays) > len(first) else [None, None]
    if not first:
        return passes(last, of, [target], parts[0], launcher, 0.0, invariant=invariant)
    shift = dense(arrays[-1], of.kept)
    made = passes(first[0], of, [shift], parts[0], launcher, 0.0, invariant=invariant)
    return made + passes(last, of, [target, shift], parts[1], launcher, 0.0, invariant=invariant)
