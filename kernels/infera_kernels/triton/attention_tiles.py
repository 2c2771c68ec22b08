"""Attention tiles, and the choice among them: a model of one GPU block, not a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from infera_kernels.launch import Target
from infera_kernels.triton.layout import ceil_div, next_power_of_two

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

_ITEMSIZE = {"half": 2, "ieee": 4}

_PRODUCTS_PER_CYCLE = {"half": 1024, "ieee": 64}
"""Multiply-adds a cycle and multiprocessor (A100 whitepaper, table 1); other architectures keep the proportions."""

_LOADED_PER_CYCLE = 64
"""Bytes a cycle and multiprocessor from L2 (the same source)."""

_CYCLES_A_WEIGHT = 1 / 16 + 8 / 64
"""An exponential, 16 a cycle and multiprocessor, and some eight other operations."""


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

    def cycles(self, kind: str, size: int) -> float:
        """Of one multiprocessor for one key: loading it, both products, and weights, as if they did not overlap."""
        loading = 2 * size * _ITEMSIZE[kind] / _LOADED_PER_CYCLE
        return loading + self.rows * (2 * size / _PRODUCTS_PER_CYCLE[kind] + _CYCLES_A_WEIGHT)

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


def registers(tile: Tile, target: Target) -> dict[str, int]:
    """The compiler's option for a tile where blocks leave each other little shared memory.

    The assembler knows nothing of that memory: it saves registers for more blocks than fit, and spills. It is told to
    take what three blocks of four warps leave each other.
    """
    few = target.shared_bytes < 100 * 1024 and tile.warps == 4
    return {"maxnreg": 65536 // (3 * 32 * tile.warps) // 8 * 8} if few else {}


def padded(size: int) -> int:
    """A head's elements as a power of two that `tl.dot` takes."""
    return max(16, next_power_of_two(size))


def pick_splits(tile: Tile, rows: int, keys: int, matrices: int) -> int:
    """Into how many parts the keys are split, for programs to all slots."""
    programs = max(1, matrices * ceil_div(rows, tile.rows))
    return max(1, min(SLOTS // programs, ceil_div(keys, SPLIT_KEYS), MOST_SPLITS))


def pick_tile(kind: str, size: int, rows: int, keys: int, matrices: int) -> Tile:
    """The tile with the least estimated time, of equals the larger.

    `size` is the larger of the head sizes; `rows` of queries stand against the same keys, `matrices` times. Every slot
    runs ceil(programs / slots) of them, one after the other.
    """
    tiles = next(tiles for most, tiles in TILES[kind].items() if size <= most)

    def cost(tile: Tile) -> tuple[float, int]:
        splits = pick_splits(tile, rows, keys, matrices)
        waves = ceil_div(matrices * splits * ceil_div(rows, tile.rows), SLOTS)
        return waves * ceil_div(keys, splits) * tile.cycles(kind, size), -tile.rows

    return min((t for t in tiles if t.rows > 1 or rows <= SINGLES), key=cost)
