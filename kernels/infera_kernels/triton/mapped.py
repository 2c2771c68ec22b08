"""Elements at positions that tables give, axis by axis: resizing, padding.

An output element is a weighted sum of input elements; along each mapped axis a table says which they are, and how much
each weighs. The tables are made on the host, by the same functions for every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Array, Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import offset_in, store_type, tile_of
from infera_kernels.triton.layout import (
    FLOATS,
    INT32_MAX,
    STORED,
    element_strides,
    few,
    fold,
    name_of,
    span,
)
from infera_kernels.triton.pointwise import pick_tiling
from infera_kernels.triton.terms import AxisMap

_FLOATING = FLOATS | {"float64"}

MOST_TAPS = 16
"""Input elements that one output element may take: the kernel reads them one after the other."""


@triton.jit
def mapped_kernel(
    x,
    index,
    weights,
    fill,
    out,
    dims,
    strides,
    rows,
    starts,
    steps,
    AXES: tl.constexpr,
    PICKS: tl.constexpr,
    FILL: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = sum of x at its own offset plus, for one tap of each axis, its index times the axis' step, weighted.

    Tap n is one of axis AXES[n]; its indices and weights, one for each element of the axis, begin at starts[n]. PICKS
    are the combinations of a tap of each axis. Where an index is negative, the element is `fill`, or FILL where that is
    None. Without `weights` there is one tap for each axis, and x is copied. `strides` has those of x, of the axes'
    tables, and of out.
    """
    tile, row, col, inside = tile_of(dims, rows, ROWS, COLS, WIDE)
    at = offset_in(tile, row, col, dims, strides, ROW_DIMS)
    if WIDE:
        at = at.to(tl.int64)
    found = inside
    offsets = ()
    shares = ()
    for n in tl.static_range(len(AXES)):
        entry = starts[n] + offset_in(tile, row, col, dims, strides, ROW_DIMS, (1 + AXES[n]) * len(dims))
        place = tl.load(index + entry, mask=inside, other=0)
        found = found & (place >= 0)
        if WIDE:
            place = place.to(tl.int64)
        offsets = offsets + (place * steps[AXES[n]],)  # type: ignore[assignment] # noqa: RUF005
        if weights is not None:
            share = tl.load(weights + entry, mask=inside, other=0)
            shares = shares + (share,)  # type: ignore[assignment] # noqa: RUF005
    if weights is None:
        for n in tl.static_range(len(AXES)):
            at += offsets[n]
        value = tl.load(x + at, mask=found, other=0)
    else:
        value = tl.zeros([ROWS, COLS], weights.dtype.element_ty)
        for t in tl.static_range(len(PICKS) // len(steps)):
            there = at + offsets[PICKS[t * len(steps)]]
            weight = shares[PICKS[t * len(steps)]]  # type: ignore[var-annotated]
            for a in tl.static_range(1, len(steps)):
                there += offsets[PICKS[t * len(steps) + a]]
                weight *= shares[PICKS[t * len(steps) + a]]
            value += weight * tl.load(x + there, mask=found, other=0).to(weights.dtype.element_ty)
    if fill is None:
        value = tl.where(found, value, tl.full([ROWS, COLS], FILL, value.dtype))
    else:
        value = tl.where(found, value, tl.load(fill))
    at = offset_in(tile, row, col, dims, strides, ROW_DIMS, (1 + len(steps)) * len(dims))
    tl.store(out + at, store_type(value, out), mask=inside)


def supports_mapped(x: Typed, out: Typed, taps: Sequence[int], *, weighted: bool) -> bool:
    """Anything that can be stored where elements are copied, floats where they are weighted; not too many taps."""
    dtype = name_of(x)
    taken = dtype in (_FLOATING if weighted else STORED)
    return taken and name_of(out) == dtype and few(out.shape) and 0 not in x.shape and math.prod(taps) <= MOST_TAPS


def mapped(
    x: Any,
    out: Any,
    launcher: Launcher,
    maps: Sequence[AxisMap],
    constant: Callable[[Array], Array],
    *,
    fill: Any = 0.0,
) -> list[Call]:
    """out = x mapped along some axes, any strides; `fill` is a number, or an array of one element of x's type.

    `constant` puts the tables where the kernel finds them. Half precision is summed in float32.
    """
    weighted, number = any(m.weights is not None for m in maps), isinstance(fill, (int, float))
    if not supports_mapped(x, out, [m.taps for m in maps], weighted=weighted):
        given = f"{name_of(x)}{list(x.shape)} -> {name_of(out)}{list(out.shape)}"
        raise ValueError(f"mapped: no kernel for {given} along axes {[m.axis for m in maps]}")
    if 0 in out.shape:
        return []
    own, ndim = element_strides(x), len(out.shape)
    axes = [m.axis for m in maps]
    tables = [tuple(int(i == axis) for i in range(ndim)) for axis in axes]
    walked = tuple(0 if i in axes else s for i, s in enumerate(own))
    tiling = pick_tiling(tuple(out.shape), [walked, *tables, element_strides(out)], sum(m.taps for m in maps))
    wide = np.float64 if name_of(x) == "float64" else np.float32
    index = np.concatenate([m.index.T.reshape(-1) for m in maps]).astype(np.int32)
    taps = tuple(m.taps for m in maps)
    lengths = [m.index.shape[0] for m in maps for _ in range(m.taps)]
    args = {
        "x": x,
        "index": constant(index),
        "weights": constant(np.concatenate([_weights(m) for m in maps]).astype(wide)) if weighted else None,
        "fill": None if number else fill,
        "out": out,
        **tiling.arguments,
        "starts": tuple(sum(lengths[:n]) for n in range(len(lengths))),
        "steps": fold(own[axis] for axis in axes),
    }
    constexprs = {
        **tiling.constexprs,
        "AXES": tuple(a for a, count in enumerate(taps) for _ in range(count)),
        "PICKS": tuple(k for combination in product(*_numbered(taps)) for k in combination) if weighted else (),
        "FILL": _number(fill, x) if number else None,
    }
    constexprs["WIDE"] = constexprs["WIDE"] or span(x.shape, own) > INT32_MAX
    return [launcher.launch(mapped_kernel, (tiling.programs,), args, constexprs, num_warps=4)]


def _number(fill: float, x: Typed) -> float:
    """The number as x's type has it: a bool or an integer for these."""
    number: float = fill if name_of(x) in _FLOATING else np.asarray(fill).astype(x.dtype).item()
    return number


def _numbered(taps: Sequence[int]) -> list[range]:
    """The taps of each axis, counted one after the other."""
    return [range(sum(taps[:a]), sum(taps[: a + 1])) for a in range(len(taps))]


def _weights(m: AxisMap) -> Array:
    """Tap by tap."""
    return np.ones(m.index.size) if m.weights is None else np.asarray(m.weights.T.reshape(-1))
