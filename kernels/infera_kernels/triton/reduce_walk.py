"""How a reduction is walked: tiles of results x what is reduced, in parts. Pure functions on shapes and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infera_kernels.triton.invariance import rows_seen
from infera_kernels.triton.layout import Dims, ceil_div, coalesce, element_strides, next_power_of_two

TILE = 4096
"""Elements in flight of one program that loops."""

_SHORT_TILE = 2048
"""Of one that has all it reduces at once."""

_PROGRAMS = 528
"""As many as keep a large GPU busy: four for each of 132 multiprocessors."""

_LINE = 128
"""Results side by side, where they are contiguous and many; at least a quarter of it."""

_STEPS, _LEAST = 8, 2
"""So many tiles, one after the other, take longer than a second launch; parts have a few of them at least."""

_SMALL_ROW = 64
"""A dimension of what is reduced that is shorter is not walked alone, but together with the next."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Dimensions, innermost first, walked by tiles of `block`: of the innermost alone if `split`, else of all."""

    dims: Dims
    split: bool
    block: int

    @property
    def count(self) -> int:
        return math.prod(self.dims)

    @property
    def tiles(self) -> int:
        if self.split:
            return ceil_div(self.dims[0], self.block) * math.prod(self.dims[1:])
        return ceil_div(self.count, self.block)


def most_parts(kept: int, reduced: int, *, invariant: bool = False) -> int:
    """Into how many parts at most a reduction is split, whatever its strides."""
    busy = max(1, ceil_div(rows_seen(kept, invariant=invariant), _LINE // 4))
    return max(1, min(ceil_div(_PROGRAMS, busy), reduced // (_STEPS * _LINE)))


def _side_by_side(dims: Dims, count: int, reduced: Dims, parts: int) -> tuple[Walk, Walk]:
    """Results are contiguous: lanes lie along them, as far as there are any of the `count`."""
    length = math.prod(reduced)
    split = len(dims) > 1 and dims[0] * min(next_power_of_two(length), TILE // _LINE) >= _LINE * 4
    line = next_power_of_two(dims[0] if split else count)
    block = min(line, _LINE)
    depth = min(next_power_of_two(length), TILE // block)
    block = max(block, min(line, _SHORT_TILE // depth))
    while ceil_div(count, block) * parts < _PROGRAMS // 2 and block > _LINE // 4:
        block //= 2
    depth = min(next_power_of_two(length), TILE // block)
    return Walk(dims, split, block), Walk(
        reduced, len(reduced) > 1 and reduced[0] >= _SMALL_ROW and reduced[0] >= depth // 2, depth
    )


def _one_by_one(dims: Dims, count: int, reduced: Dims) -> tuple[Walk, Walk]:
    """What is reduced is contiguous: lanes lie along it; short rows share a program."""
    split = len(reduced) > 1 and reduced[0] >= _SMALL_ROW
    row = reduced[0] if split else math.prod(reduced)
    along = Walk(reduced, split, min(next_power_of_two(row), TILE))
    block = min(next_power_of_two(count), max(1, _SHORT_TILE // along.block))
    while ceil_div(count, block) < _PROGRAMS // 2 and block > 1 and block * along.block > TILE // 8:
        block //= 2
    return Walk(dims, False, block), along


def lies_apart(kept: Dims, x_kept: Dims, x_reduced: Dims, *, invariant: bool) -> bool:
    """Whether results are nearer to each other than what is reduced for one of them: by strides alone if `invariant`,
    which those of a single result tell as well."""
    if invariant:
        return 0 < abs(x_kept[0]) <= abs(x_reduced[0])
    return math.prod(kept) > 1 and abs(x_kept[0]) < abs(x_reduced[0])


def pick_walks(
    kept: Dims, x_kept: Dims, reduced: Dims, x_reduced: Dims, parts: int, *, invariant: bool = False
) -> tuple[Walk, Walk]:
    """How results and what is reduced are walked: lanes lie along the smaller innermost stride."""
    count = rows_seen(math.prod(kept), invariant=invariant)
    if math.prod(reduced) == 1 or lies_apart(kept, x_kept, x_reduced, invariant=invariant):
        return _side_by_side(kept, count, reduced, parts)
    return _one_by_one(kept, count, reduced)


@dataclass(frozen=True, slots=True)
class Operand:
    """An array with one element for each result, seen along the axes that are kept: strides in elements."""

    array: Any
    strides: Dims


@dataclass(frozen=True, slots=True)
class Source:
    """The array to reduce: the dimensions that are kept, then those that are not, and its strides along both."""

    array: Any
    kept: Dims
    kept_strides: Dims
    reduced: Dims
    reduced_strides: Dims

    @property
    def results(self) -> int:
        return math.prod(self.kept)

    @property
    def length(self) -> int:
        return math.prod(self.reduced)


def source(x: Any, axes: Sequence[int]) -> Source:
    """`x`, reduced over `axes`."""
    strides = element_strides(x)
    kept = [a for a in range(len(x.shape)) if a not in axes]
    pick = tuple(tuple(v[a] for a in chosen) for chosen in (kept, sorted(axes)) for v in (x.shape, strides))
    return Source(x, *pick)


def dense(array: Any, shape: Dims) -> Operand:
    """A contiguous array, whose shape may have lost or kept axes of one element."""
    return Operand(array, tuple(math.prod(shape[a + 1 :]) for a in range(len(shape))))


def _inward(shape: Dims, operands: Sequence[Dims], *, ones: bool = False) -> tuple[Dims, tuple[Dims, ...]]:
    """The dimensions, merged where they can be, with the first operand's smallest stride innermost."""
    order = sorted(range(len(shape)), key=lambda a: -abs(operands[0][a]))
    return coalesce(tuple(shape[a] for a in order), [tuple(s[a] for a in order) for s in operands], ones=ones)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a reduction is walked, in how many parts of how many tiles. `strides` are the source's and the operands'."""

    results: Walk
    strides: tuple[Dims, ...]
    along: Walk
    source_strides: Dims
    parts: int
    tiles_a_part: int


def pick_tiling(x: Source, operands: Sequence[Operand], most: int, *, invariant: bool = False) -> Tiling:
    """The tiling of a reduction into at most `most` parts. An `invariant` one is cut up alike whatever the number of
    results, so that each is the same bits."""
    dims, strides = _inward(x.kept, [x.kept_strides, *(o.strides for o in operands)], ones=invariant)
    reduced, (inner,) = _inward(x.reduced, [x.reduced_strides])
    results, along = pick_walks(dims, strides[0], reduced, inner, most, invariant=invariant)
    tiles = ceil_div(rows_seen(results.count, invariant=True), results.block) if invariant else results.tiles
    shared = along.tiles // _LEAST if along.tiles >= _STEPS else 1
    wanted = max(1, min(most, ceil_div(_PROGRAMS, tiles), shared))
    each = max(1, ceil_div(along.tiles, wanted))
    return Tiling(results, strides, along, inner, max(1, ceil_div(along.tiles, each)), each)
