"""Tiles of a decoder's step, and into how many parts its keys are cut: an estimate that goes by memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from infera_kernels.launch import Target
from infera_kernels.launch.devices import architecture_of
from infera_kernels.triton.attention_tiles import MOST_SPLITS, Cut, Tile
from infera_kernels.triton.layout import ceil_div
from infera_kernels.tuning.choice import REMEMBERED, Problem
from infera_kernels.tuning.cost import ITEMSIZE, LATENCY, joining_cycles, memory_bytes_per_cycle

MOST_ROWS = 16
"""Queries of heads that share keys: rows of the one tile that reads them."""

WIDEST = 256
"""The largest head size: beyond it keys, values and sums leave no registers."""

SIZES = ("rows", "matrices", "keys", "size")
"""`rows` of queries stand against the same keys, `matrices` times; `size` is the larger of the head sizes."""

TILES: Mapping[str, Mapping[int, tuple[Tile, ...]]] = MappingProxyType(
    {
        "half": {64: (Tile(16, 64, 4, 3),), 128: (Tile(16, 32, 4, 4),), 256: (Tile(16, 32, 4, 2),)},
        "ieee": {
            64: (Tile(1, 64, 8, 1), Tile(16, 32, 4, 3)),
            128: (Tile(1, 32, 4, 1), Tile(16, 16, 4, 3)),
            256: (Tile(1, 32, 8, 1), Tile(16, 16, 8, 2)),
        },
    }
)
"""Kind of products -> the larger head size up to which -> tiles, the smallest first."""


def candidates(problem: Problem, target: Target) -> tuple[Cut, ...]:
    """The smallest tile that holds the rows, with every power of two of parts that has a block of keys each."""
    rows, _, keys, size = problem.sizes
    tiles = next(tiles for most, tiles in TILES[problem.kind].items() if min(size, WIDEST) <= most)
    t = next((t for t in tiles if t.rows >= rows), tiles[-1])
    parts = min(MOST_SPLITS, max(1, keys // t.keys)).bit_length()
    return tuple(Cut(t.rows, t.keys, t.warps, t.stages, t.depth, 1 << i) for i in range(parts))


def memory_cycles(blocks: int, nbytes: int, flight: int, side_by_side: int, target: Target) -> float:
    """Of `blocks` that move `nbytes` each, with `flight` bytes under way: the longer of the memory's time for all of
    them and the busiest multiprocessor's, which gets no more than its way to L2 and its loads in flight let through,
    and an eighth of the other: neither hides all of it."""
    busiest = ceil_div(blocks, target.multiprocessors)
    through = min(busiest, side_by_side) * flight / LATENCY
    rate = min(architecture_of(target.arch).l2_bytes_per_cycle, through)
    all_of_it, alone = blocks * nbytes / memory_bytes_per_cycle(target), busiest * nbytes / rate
    return max(all_of_it, alone) + min(all_of_it, alone) / 8


def cycles(problem: Problem, cut: Cut, target: Target) -> float:
    """Of all of a problem: the slower of memory, where keys and values are read and written once, and arithmetic. Then
    a launch to join parts, where there are some."""
    rows, matrices, keys, size = problem.sizes
    tile, item = cut.tile, ITEMSIZE[problem.kind]
    side_by_side = tile.resident(problem.kind, size, target)
    blocks, share = matrices * cut.splits, min(ceil_div(keys, cut.splits * tile.keys) * tile.keys, keys)
    each, steps = 2 * size * item, ceil_div(share, tile.keys)
    flight = each * tile.keys * max(tile.stages - 1, 1)
    moved = memory_cycles(blocks, 2 * share * each, flight, side_by_side, target)
    _, products, weights = tile.step_cycles(problem.kind, size, target)
    computed = ceil_div(blocks, target.multiprocessors) * steps * (products + weights)
    return LATENCY + max(moved, computed) + joining_cycles(cut.splits, rows * size * matrices, target)


@lru_cache(maxsize=REMEMBERED)
def predicted(problem: Problem, target: Target) -> Cut:
    """The candidate with the least estimated time, of equals the one with the fewest parts."""
    return min(candidates(problem, target), key=lambda cut: (cycles(problem, cut, target), cut.splits))
