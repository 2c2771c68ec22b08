"""Gated products, of which the feed-forward of Llama consists: one value times two matrices, joined as it is stored.

Both matrices are read where they lie. Tiles and strips are those of products with the columns of both side by side.
Sums are always whole: networks that gate have some thousands of columns, which are programs enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Target, Typed, target_of
from infera_kernels.triton.ahead import ahead
from infera_kernels.triton.elementwise import UNARY
from infera_kernels.triton.gated_kernels import gated_kernel, gated_row_kernel
from infera_kernels.triton.invariance import rows_seen
from infera_kernels.triton.layout import ceil_div, coalesce, element_strides, fold, name_of
from infera_kernels.triton.matmul import check_gain, launched, layout_of, normalizes, normalizing, supports_matmul
from infera_kernels.triton.products import GROUP
from infera_kernels.triton.skinny import ALONG_K, ALONG_N, SHAPES, least_strip, strips
from infera_kernels.triton.tiles import HALF, IEEE, SIZES, TF32, TILES, Tile, fits, keeps, kind_of, least
from infera_kernels.tuning import Family, Problem, Tuned, choose
from infera_kernels.tuning.choice import REMEMBERED
from infera_kernels.tuning.cost import ITEMSIZE, ROW_WARPS, Strip, product_cycles, row_cycles

MATRICES = 2

GATED_TILES: Mapping[str, tuple[Tile, ...]] = MappingProxyType(
    {
        HALF: (Tile(16, 64, 128, 4, 4), Tile(32, 128, 64, 4, 4), *(t for t in TILES[HALF] if t.m >= 64)),
        TF32: (Tile(16, 64, 64, 4, 4), Tile(32, 128, 32, 4, 4), *(t for t in TILES[TF32] if t.m >= 64)),
        IEEE: TILES[IEEE],
    }
)
"""By how products are computed. Half of a tile's columns are of one matrix, half of the other. Where two products share
a factor, Triton puts all warps along the longer side of each: there are rows, or columns, for all of them."""

_PIECE = 32
"""Bytes of a row of a matrix that memory gives in one piece."""
_WORD = 16
"""Bytes that a thread loads at once."""


def gated_shapes(kind: str, layout: str) -> tuple[tuple[int, int], ...]:
    """Those of strips, columns of both matrices and how deep, that have whole pieces of each, or some columns that are
    pieces (two of 1,024 leave registers on sm_100), and a word of each for every thread."""
    item = ITEMSIZE[kind]
    least = 4 if layout == ALONG_K else _PIECE // item
    shapes = ((n, k) for n, k in SHAPES[layout] if n // MATRICES >= least)
    return tuple((n, k) for n, k in shapes if n // MATRICES * k * item >= _WORD * 32 * ROW_WARPS)


def gated_candidates(problem: Problem, target: Target) -> tuple[Strip, ...]:
    """Strips of these shapes."""
    return strips(problem, gated_shapes(problem.kind, problem.layout or ALONG_N))


def gated_strip_cycles(problem: Problem, strip: Strip, target: Target) -> float:
    """Of all of a problem; see `tuning.cost`."""
    programs, n, k = problem.sizes
    how: dict[str, Any] = {"along_k": problem.layout == ALONG_K, "target": target, "matrices": MATRICES}
    return row_cycles(n, k, 8 * ITEMSIZE[problem.kind], strip, batch=programs, **how)


@lru_cache(maxsize=REMEMBERED)
def gated_strip(problem: Problem, target: Target) -> Strip:
    """The predicted one."""
    return least_strip(problem, target, gated_candidates(problem, target), gated_strip_cycles)


def gated_tiles(problem: Problem, target: Target) -> tuple[Tile, ...]:
    """Tiles of which a block fits on a multiprocessor."""
    return tuple(t for t in GATED_TILES[problem.kind] if fits(t, problem.kind, target))


def gated_cycles(problem: Problem, tile: Tile, target: Target) -> float:
    """Of all of a problem; see `tuning.cost`."""
    m, batch, n, k = problem.sizes
    return product_cycles(replace(tile.block(problem.kind), matrices=MATRICES), m, n, k, batch, target)


@lru_cache(maxsize=REMEMBERED)
def gated_tile(problem: Problem, target: Target) -> Tile:
    """The tile with the least estimated time, of those that keep all in registers."""
    among = [t for t in gated_tiles(problem, target) if keeps(t, problem.layout, target)]
    return least(problem, target, among, gated_cycles)


GATED_ROW = Family(
    *("gated_row", ("programs", "n", "k"), 1, Strip, gated_candidates, gated_strip),
    (gated_row_kernel,),
    gated_strip_cycles,
)
"""Gated products of one row; n, of strips too, counts columns of both matrices. `layout` is as MATVEC's."""

GATED = Family("gated", SIZES, 2, Tile, gated_tiles, gated_tile, (gated_kernel,), gated_cycles)
"""Those of several rows, n as there. `layout` says which axes of the value and of both matrices are contiguous."""


def supports_gated(a: Typed, gate: Typed, up: Typed, out: Typed, activation: str | None = None) -> bool:
    """a (..., M, K), two matrices (K, N) -> out (..., M, N); types and the activation are as `supports_matmul` says."""
    alike = tuple(up.shape) == tuple(gate.shape) and name_of(up) == name_of(gate)
    return alike and len(gate.shape) == 2 and supports_matmul(a, gate, out, activation=activation)


def gated(
    a: Any,
    gate: Any,
    up: Any,
    out: Any,
    launcher: Launcher,
    *,
    activation: str | None = None,
    gain: Any = None,
    epsilon: float = 0.0,
    precision: str = IEEE,
    tile: Tile | None = None,
    invariant: bool = False,
    tuned: Tuned | None = None,
) -> list[Call]:
    """out = activation(a @ gate) * (a @ up), summed and joined in float32 and rounded once.

    Strides are arbitrary. `precision` is for float32 inputs: "ieee" or "tf32". `tile`, whose columns are half of one
    matrix and half of the other, overrides what is `tuned`, or predicted. `invariant` rows are the same bits however
    many there are; nothing is tuned for them. `gain` and `epsilon` normalise one row first, as in `matmul`.
    """
    if not supports_gated(a, gate, up, out, activation):
        given = ", ".join(f"{name_of(x)}{list(x.shape)}" for x in (a, gate, up, out))
        raise ValueError(f"gated: no kernel for {given} with activation {activation}")
    if gain is not None:
        check_gain("gated", gain, a, tile is None and normalizes(out, invariant=invariant))
    shape = tuple(out.shape)
    if 0 in shape:
        return []
    n, k = shape[-1], a.shape[-1]
    strides = [element_strides(x) for x in (a, out)]
    rows, walked = coalesce(shape[:-1], [s[:-1] for s in strides], ones=invariant)
    m, batch = rows[0], rows[1:]
    entry = UNARY[activation] if activation else None
    args = {
        "a": a,
        "gate": gate,
        "up": up,
        "out": out,
        "M": m,
        "N": n,
        "K": k,
        "batch": batch or None,
        **dict(zip(("a_batch", "out_batch"), (fold(w[1:]) for w in walked), strict=True)),
        **dict(zip(("a_m", "out_m"), fold(w[0] for w in walked), strict=True)),
        **dict(zip(("a_k", "out_n"), fold(s[-1] for s in strides), strict=True)),
        **dict(zip(("gate_k", "gate_n"), fold(element_strides(gate)), strict=True)),
        **dict(zip(("up_k", "up_n"), fold(element_strides(up)), strict=True)),
        **normalizing(gain, epsilon),
        "act_alpha": entry and entry.alpha,
        "act_beta": entry and entry.beta,
    }
    act, products = entry.fn if entry else None, math.prod(batch)
    seen, target = rows_seen(m, invariant=invariant), target_of(launcher)
    kind, tuned = kind_of(a, tf32=precision == TF32), None if invariant else tuned
    layout = layout_of(args, "gate", "up")
    if seen == 1 and tile is None:
        sizes = {"programs": products, "n": MATRICES * n, "k": k}
        along = ALONG_K if layout.endswith("k") and n > 1 else ALONG_N
        strip = choose(GATED_ROW, GATED_ROW.problem(kind, sizes, along), target, tuned)
        wide = strip.n // MATRICES
        grid = (products * ceil_div(n, wide),)
        fetched = ahead(launcher, MATRICES * grid[0], wide, ITEMSIZE[kind], layout[-1])
        known: dict[str, Any] = {"ACT": act, "BN": wide, "BK": strip.k, "STAGES": strip.stages, "AHEAD": fetched}
        return [launched(launcher, gated_row_kernel, grid, args, known, num_warps=ROW_WARPS)]
    if tile is None:
        sizes = {"m": seen, "batch": 1 if invariant else products, "n": MATRICES * n, "k": k}
        tile = choose(GATED, GATED.problem(kind, sizes, layout), target, tuned)
    wide = tile.n // MATRICES
    known = {"ACT": act, "PRECISION": precision, "GROUP": GROUP, "BM": tile.m, "BN": wide, "BK": tile.k}
    grid = (products * ceil_div(m, tile.m) * ceil_div(n, wide),)
    programs = MATRICES * grid[0]
    fetched = ahead(launcher, programs, wide, ITEMSIZE[kind], layout[-1], rows=m, invariant=invariant)
    known |= {"WHOLE_K": k % tile.k == 0, "AHEAD": fetched}
    how = {"num_warps": tile.warps, "num_stages": tile.stages}
    return [launched(launcher, gated_kernel, grid, args, known, invariant=invariant, **how)]
