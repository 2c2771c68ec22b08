"""Attention tiles, and the choice among them: an estimate for the GPU at hand, not a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from infera_kernels.launch import Target, nominal_target
from infera_kernels.launch.devices import architecture_of
from infera_kernels.triton.layout import ceil_div, next_power_of_two
from infera_kernels.tuning.choice import REMEMBERED, Problem
from infera_kernels.tuning.cost import ITEMSIZE, LATENCY, SHARED_BYTES_PER_CYCLE, products_per_cycle, resident

SLOTS = 132
"""Programs that fill a GPU: the multiprocessors of the largest one in use. Not the target's own: how much scratch a
kernel needs is asked before there is a target."""

SPLIT_KEYS = 256
"""The fewest keys that are worth a program of their own."""

MOST_SPLITS = 32
SINGLES = 4
"""The most rows that are computed one by one: each reads all keys, and nothing overlaps loading."""

WIDEST = 512
"""The largest head size: beyond it the sums of a tile leave no registers."""

_EXPONENTIALS_PER_CYCLE = 16
"""Of a multiprocessor (CUDA C++ Programming Guide, table 'Throughput of Native Arithmetic Instructions')."""

_OTHERS_A_WEIGHT = 8
"""Operations in float32 that a weight takes beside its exponential, about."""

_OTHER_REGISTERS = 72
"""Of a thread, beside its sums and weights. Compiled kernels have 60 to 90."""


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows` of queries that one program works on, `keys` at a time, `depth` elements of both at a time. A single row
    is no product of matrices: it takes no shared memory.

    A depth of 0 takes heads whole, as powers of two; the queries then stay in the program for good.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    depth: int = 0

    def step_cycles(self, kind: str, size: int, target: Target) -> tuple[float, float, float]:
        """Of one multiprocessor for `keys` keys: loading them, both products, and weights."""
        rate = products_per_cycle(kind, target, self.rows, self.warps)
        weight = 1 / _EXPONENTIALS_PER_CYCLE + _OTHERS_A_WEIGHT / products_per_cycle("ieee", target)
        nbytes = 2 * self.keys * size * ITEMSIZE[kind]
        rows = 64 if target.arch >= 90 and self.rows >= 64 else 16  # that read keys and values together
        readers = min(self.warps, ceil_div(self.rows, rows))
        shared = 0 if self.rows == 1 else nbytes * (1 + readers) / SHARED_BYTES_PER_CYCLE
        loading = max(shared, nbytes / architecture_of(target.arch).l2_bytes_per_cycle)
        return loading, 2 * self.rows * self.keys * size / rate, self.rows * self.keys * weight

    def resident(self, kind: str, size: int, target: Target) -> int:
        """Blocks that fit on a multiprocessor beside each other, at least 1: what is listed compiles and fits."""
        wide = padded(size)
        held = self.rows * (wide + self.keys) // (32 * self.warps) + _OTHER_REGISTERS
        loaded = 0 if self.rows == 1 else (2 * self.keys * self.stages + self.rows) * wide * ITEMSIZE[kind]
        return max(1, resident(self.warps, min(held, 255), min(loaded, target.shared_bytes), target))

    def padded(self, size: int) -> int:
        """Elements of a head as the products of queries and keys see it."""
        return ceil_div(size, self.depth) * self.depth if self.depth else padded(size)


TILES: Mapping[str, Mapping[int, tuple[Tile, ...]]] = MappingProxyType(
    {
        "half": {
            64: (Tile(16, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
            128: (Tile(16, 32, 4, 4), Tile(64, 32, 8, 3), Tile(128, 32, 8, 3)),
            256: (Tile(16, 32, 4, 2), Tile(64, 32, 8, 2)),
            512: (Tile(16, 32, 8, 2), Tile(32, 16, 8, 2)),
        },
        "ieee": {
            64: (Tile(1, 128, 8, 1), Tile(16, 32, 4, 3, 16), Tile(32, 32, 4, 3, 32), Tile(64, 32, 8, 3, 32)),
            128: (Tile(1, 64, 8, 1), Tile(16, 32, 4, 2, 32), Tile(32, 32, 8, 2, 32), Tile(64, 16, 8, 3, 32)),
            256: (Tile(1, 32, 8, 1), Tile(16, 16, 4, 3, 32), Tile(32, 16, 8, 2, 16)),
            512: (Tile(1, 16, 8, 1), Tile(16, 16, 8, 2, 32)),
        },
    }
)
"""Kind of products -> the larger head size up to which -> tiles, the smallest first."""


_TWO = frozenset((Tile(16, 32, 4, 2),))
"""Tiles of heads of 256: where blocks have little shared memory, two of them fit beside each other, and not three."""

_ALONE = frozenset((Tile(64, 64, 4, 3),))
"""Tiles of which shared memory lets two blocks in, and which the assembler gives the registers of as many by itself:
under a bound of its own a causal one with masks spills."""

_HELD: Mapping[Tile, int] = MappingProxyType(
    {
        Tile(1, 128, 8, 1): 126,
        Tile(1, 32, 8, 1): 118,
        Tile(16, 32, 4, 2, 32): 128,
        Tile(64, 16, 8, 3, 32): 128,
        Tile(16, 16, 8, 2, 32): 128,
    }
)
"""Tiles in float32 for which the assembler, left alone, saves registers and spills a few; told that it has so many, it
finds another order and spills none (Triton 3.6 to 3.9, sm_90 and sm_100), with masks and without."""

_HELD_BEFORE_90: Mapping[Tile, int] = MappingProxyType({Tile(1, 128, 8, 1): 120})
"""The same, on sm_80 to sm_89."""


def registers(tile: Tile, target: Target) -> dict[str, int]:
    """The compiler's option for a tile where registers would spill.

    Where blocks leave each other little shared memory, the assembler, which knows nothing of that memory, saves
    registers for more blocks than fit. It is told to take what three blocks of four warps, or two, leave each other.
    """
    if target.shared_bytes < 100 * 1024 and tile.warps == 4 and tile not in _ALONE:
        blocks = 2 if tile in _TWO else 3
        return {"maxnreg": min(65536 // (blocks * 32 * tile.warps) // 8 * 8, 248)}
    held = (_HELD if target.arch >= 90 else _HELD_BEFORE_90).get(tile)
    return {} if held is None else {"maxnreg": held}


def padded(size: int) -> int:
    """A head's elements as a power of two that `tl.dot` takes."""
    return max(16, next_power_of_two(size))


def pick_splits(tile: Tile, rows: int, keys: int, matrices: int) -> int:
    """Into how many parts the keys are split, for programs to all slots."""
    programs = max(1, matrices * ceil_div(rows, tile.rows))
    return max(1, min(SLOTS // programs, ceil_div(keys, SPLIT_KEYS), MOST_SPLITS))


@dataclass(frozen=True, slots=True)
class Cut:
    """How attention is cut up: a tile, and the parts that the keys are split into."""

    rows: int
    keys: int
    warps: int
    stages: int
    depth: int
    splits: int

    @property
    def tile(self) -> Tile:
        return Tile(self.rows, self.keys, self.warps, self.stages, self.depth)


def _cut(tile: Tile, splits: int) -> Cut:
    return Cut(tile.rows, tile.keys, tile.warps, tile.stages, tile.depth, splits)


SIZES = ("rows", "matrices", "keys", "size")
"""`rows` of queries stand against the same keys, `matrices` times; `size` is the larger of the head sizes."""


def _tiles(problem: Problem) -> list[Tile]:
    rows, _, _, size = problem.sizes
    tiles = next(tiles for most, tiles in TILES[problem.kind].items() if size <= most)
    return [t for t in tiles if t.rows > 1 or rows <= SINGLES]


def candidates(problem: Problem, target: Target) -> tuple[Cut, ...]:
    """Every tile, with the usual number of splits, half of it, twice it and one."""
    rows, matrices, keys, _ = problem.sizes
    most = min(ceil_div(keys, SPLIT_KEYS), MOST_SPLITS)
    made: dict[Cut, None] = {}
    for tile in _tiles(problem):
        usual = pick_splits(tile, rows, keys, matrices)
        for splits in (usual, usual // 2, 2 * usual, 1):
            if 1 <= splits <= max(most, usual):
                made[_cut(tile, splits)] = None
    return tuple(made)


def cycles(problem: Problem, cut: Cut, target: Target) -> float:
    """Of all of a problem. Alone on its multiprocessor a block waits for its products and then for its weights; of
    several one computes while others wait."""
    rows, matrices, keys, size = problem.sizes
    tile = cut.tile
    loading, products, weights = tile.step_cycles(problem.kind, size, target)
    loading *= min(1.0, keys / tile.keys)
    side_by_side = tile.resident(problem.kind, size, target)
    steps = ceil_div(ceil_div(keys, cut.splits), tile.keys)
    hidden = LATENCY / max(tile.stages - 1, 1)

    def round_of(blocks: int) -> float:
        alone = loading + products + weights
        busy = max(blocks * max(loading, products, weights), alone)
        return LATENCY + max(steps * busy, (steps - 1) * hidden) + steps * alone / 8

    blocks = matrices * cut.splits * ceil_div(rows, tile.rows)
    full, rest = divmod(ceil_div(blocks, target.multiprocessors), side_by_side)
    return full * round_of(side_by_side) + (round_of(rest) if rest else 0.0)


@lru_cache(maxsize=REMEMBERED)
def predicted(problem: Problem, target: Target) -> Cut:
    """The tile with the least estimated time, of equals the larger, and the usual number of splits."""
    rows, matrices, keys, _ = problem.sizes
    usual = [_cut(tile, pick_splits(tile, rows, keys, matrices)) for tile in _tiles(problem)]
    return min(usual, key=lambda cut: (cycles(problem, cut, target), -cut.rows))


def pick_tile(kind: str, size: int, rows: int, keys: int, matrices: int, target: Target | None = None) -> Tile:
    """The predicted tile."""
    problem = Problem("", kind, (rows, matrices, keys, size))
    return predicted(problem, nominal_target(90) if target is None else target).tile
