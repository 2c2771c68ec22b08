"""Values between pixels, at points that a grid gives: nearest, linear or cubic, along one to three axes."""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import offset_in, store_type, tile_of
from infera_kernels.triton.layout import FLOATS, INT32_MAX, element_strides, few, fold, fold_one, name_of, span
from infera_kernels.triton.mapped import MOST_TAPS
from infera_kernels.triton.pointwise import pick_tiling

TAPS = {"nearest": 1, "linear": 2, "cubic": 4}
ZEROS, BORDER, REFLECTION = (tl.constexpr(i) for i in range(3))
PADDINGS = {"zeros": 0, "border": 1, "reflection": 2}


@triton.jit
def _rounded(p):
    """To the nearest whole number, of two to the even one."""
    below = tl.floor(p)
    rest = p - below
    odd = tl.floor(below * 0.5) * 2.0 != below
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), below + 1.0, below)


@triton.jit
def _reflected(p, size, ALIGNED: tl.constexpr):
    """Positions mirrored at the borders of an axis until they lie inside."""
    if ALIGNED:
        low = 0.0
        span = size - 1.0
    else:
        low = -0.5
        span = size * 1.0
    away = tl.abs(p - low)
    period = tl.maximum(span * 2.0, 1.0)
    away = away - tl.floor(away / period) * period
    return tl.where(span > 0, tl.where(away > span, span * 2.0 - away, away) + low, p * 0.0)


@triton.jit
def _cubic(d):
    """Keys' cubic convolution kernel with a = -0.75 at distance d, from 0 to 2."""
    near = ((d * 1.25 - 2.25) * d) * d + 1.0
    far = ((d * -0.75 + 3.75) * d - 6.0) * d + 3.0
    return tl.where(d <= 1.0, near, far)


@triton.jit
def grid_sample_kernel(
    x,
    grid,
    out,
    dims,
    strides,
    rows,
    sizes,
    steps,
    part,
    COUNT: tl.constexpr,
    PICKS: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = sum of x at COUNT positions of each axis around the point that the grid gives, weighted.

    A point's coordinates lie `part` apart, the last axis first. PICKS are the combinations of a position of each axis,
    the axes' positions counted one after the other. `strides` has those of x, of the grid and of out.
    """
    tile, row, col, inside = tile_of(dims, rows, ROWS, COLS, WIDE)
    base = offset_in(tile, row, col, dims, strides, ROW_DIMS)
    if WIDE:
        base = base.to(tl.int64)
    point = grid + offset_in(tile, row, col, dims, strides, ROW_DIMS, len(dims))
    offsets = ()
    shares = ()
    there = ()
    for a in tl.static_range(len(sizes)):
        size = sizes[a].to(tl.float32)
        p = tl.load(point + (len(sizes) - 1 - a) * part, mask=inside, other=0).to(tl.float32)
        if ALIGNED:
            p = (p + 1.0) * 0.5 * (size - 1.0)
        else:
            p = ((p + 1.0) * size - 1.0) * 0.5
        if COUNT < 4 and PADDING != ZEROS:
            if PADDING == REFLECTION:
                p = _reflected(p, size, ALIGNED)
            p = tl.minimum(tl.maximum(p, 0.0), size - 1.0)
        if COUNT == 1:
            first = _rounded(p)
        else:
            first = tl.floor(p) - (COUNT // 2 - 1)
        for k in tl.static_range(COUNT):
            q = first + k
            if COUNT == 2:
                share = 1.0 - tl.abs(p - q)
            else:
                share = _cubic(tl.abs(p - q))
            found = inside
            if PADDING == REFLECTION:
                q = _rounded(_reflected(q, size, ALIGNED))
            elif PADDING == ZEROS:
                found = inside & (q >= 0) & (q < size)
            index = tl.minimum(tl.maximum(q, 0.0), size - 1.0).to(tl.int32)
            if WIDE:
                index = index.to(tl.int64)
            offsets = offsets + (index * steps[a],)  # type: ignore[assignment] # noqa: RUF005
            shares = shares + (share,)  # type: ignore[assignment] # noqa: RUF005
            there = there + (found,)  # type: ignore[assignment] # noqa: RUF005
    value = tl.zeros([ROWS, COLS], tl.float32)
    for t in tl.static_range(len(PICKS) // len(sizes)):
        source = x + base
        mask = inside
        weight = tl.full([ROWS, COLS], 1.0, tl.float32)
        for a in tl.static_range(len(sizes)):
            source += offsets[PICKS[t * len(sizes) + a]]
            mask = mask & there[PICKS[t * len(sizes) + a]]
            if COUNT > 1:
                weight *= shares[PICKS[t * len(sizes) + a]]
        value += weight * tl.load(source, mask=mask, other=0).to(tl.float32)
    tl.store(
        out + offset_in(tile, row, col, dims, strides, ROW_DIMS, 2 * len(dims)), store_type(value, out), mask=inside
    )


def supports_grid_sample(x: Typed, grid: Typed, out: Typed, *, mode: str) -> bool:
    """float32 and half precision, with elements; a grid of floats; no more than MOST_TAPS positions around a point.

    Axes below 2**24, since positions are float32.
    """
    spatial = tuple(x.shape[2:])
    floats = name_of(x) in FLOATS and name_of(out) == name_of(x) and name_of(grid) in FLOATS
    fits = 0 not in x.shape and few(out.shape) and max(spatial) < 2**24
    return floats and fits and TAPS[mode] ** len(spatial) <= MOST_TAPS


def grid_sample(
    x: Any, grid: Any, out: Any, launcher: Launcher, *, mode: str, padding: str, aligned: bool
) -> list[Call]:
    """x (batch, channels, *spatial) at the points of grid (batch, *points, axes), whose last axis counts backwards.

    `mode` is nearest, linear or cubic, `padding` zeros, border or reflection. Any strides; summed in float32.
    """
    if not supports_grid_sample(x, grid, out, mode=mode):
        given = f"{name_of(x)}{list(x.shape)}, {name_of(grid)}{list(grid.shape)}"
        raise ValueError(f"grid_sample: no kernel for {given} and mode '{mode}'")
    if 0 in out.shape:
        return []
    own, points = element_strides(x), element_strides(grid)
    count, axes = TAPS[mode], len(x.shape) - 2
    walked = (*own[:2], *(0,) * (len(out.shape) - 2)), (points[0], 0, *points[1:-1]), element_strides(out)
    tiling = pick_tiling(tuple(out.shape), walked, 3 * count * axes)
    args = {
        **tiling.arguments,
        "x": x,
        "grid": grid,
        "out": out,
        "sizes": tuple(x.shape[2:]),
        "steps": fold(own[2:]),
        "part": fold_one(points[-1]),
    }
    numbered = [range(a * count, (a + 1) * count) for a in range(axes)]
    constexprs = {
        **tiling.constexprs,
        "COUNT": count,
        "PICKS": tuple(k for combination in product(*numbered) for k in combination),
        "PADDING": PADDINGS[padding],
        "ALIGNED": aligned,
    }
    reach = span(x.shape, own)
    constexprs["WIDE"] = constexprs["WIDE"] or reach > INT32_MAX
    return [launcher.launch(grid_sample_kernel, (tiling.programs,), args, constexprs, num_warps=4)]
