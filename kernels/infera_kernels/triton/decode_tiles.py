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
from infera_kernels.tuning.cost import ITEMSIZE, LATENCY, memory_bytes_per_cycle

MOST_ROWS = 16
"""Queries of heads that share keys: rows of the one tile that reads them."""

WIDEST = 256
"""The largest head size: beyond it keys, values and sums leave no registers."""

LAUNCH_CYCLES = 2000
"""Of a second launch in a CUDA graph, which begins when the first has ended: about a microsecond."""

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
"""Kind of products -> the larger head size up to which -> tiles. One of a single row is for single rows."""


def candidates(problem: Problem, target: Target) -> tuple[Cut, ...]:
    """Every tile that holds the rows, with every power of two of parts that has a block of keys each."""
    rows, _, keys, size = problem.sizes
    tiles = next((tiles for most, tiles in TILES[problem.kind].items() if size <= most), TILES[problem.kind][WIDEST])
    return tuple(
        Cut(t.rows, t.keys, t.warps, t.stages, t.depth, 1 << i)
        for t in tiles
        if t.rows > 1 or rows == 1
        for i in range(min(MOST_SPLITS, max(1, keys // t.keys)).bit_length())
    )


def memory_cycles(blocks: int, nbytes: int, flight: int, side_by_side: int, target: Target) -> float:
    """Of `blocks` that move `nbytes` each, with `flight` bytes under way: the memory's time for all of them, and the
    busiest multiprocessor's, which gets no more than its way to L2 and its loads in flight let through."""
    busiest = ceil_div(blocks, target.multiprocessors)
    through = min(busiest, side_by_side) * flight / LATENCY
    rate = min(architecture_of(target.arch).l2_bytes_per_cycle, through)
    return max(blocks * nbytes / memory_bytes_per_cycle(target), busiest * nbytes / rate)


def cycles(problem: Problem, cut: Cut, target: Target) -> float:
    """Of all of a problem: the slower of memory, where keys and values are read and written once, and arithmetic. Then
    a launch to join parts, where there are some."""
    _, matrices, keys, size = problem.sizes
    tile, item = cut.tile, ITEMSIZE[problem.kind]
    side_by_side = tile.resident(problem.kind, size, target)
    blocks, steps = matrices * cut.splits, ceil_div(ceil_div(keys, cut.splits), tile.keys)
    each, flight = 2 * size * item * tile.keys, max(tile.stages - 1, 1)
    moved = memory_cycles(blocks, 2 * steps * each, flight * each, side_by_side, target)
    _, products, weights = tile.step_cycles(problem.kind, size, target)
    computed = ceil_div(blocks, target.multiprocessors) * steps * (products + weights)
    joined = LAUNCH_CYCLES + LATENCY if cut.splits > 1 else 0
    return LATENCY + max(moved, computed) + joined


@lru_cache(maxsize=REMEMBERED)
def predicted(problem: Problem, target: Target) -> Cut:
    """The candidate with the least estimated time, of equals the one with the fewest parts."""
    return min(candidates(problem, target), key=lambda cut: (cycles(problem, cut, target), cut.splits))
