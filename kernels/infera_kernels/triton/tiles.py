"""Matmul tiles, and the choice among them. The choice is a model of one GPU block, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from infera_kernels.launch import Target
from infera_kernels.triton.layout import ceil_div

HALF, TF32, TF32X3, IEEE, INT8 = "half", "tf32", "tf32x3", "ieee", "int8"
"""How products are computed: half inputs on tensor cores; float32 on tensor cores, rounded to tf32 or split in three
such products; float32 as it is, without tensor cores; integers of 8 bits on tensor cores, exactly."""

_ITEMSIZE = {HALF: 2, TF32: 4, TF32X3: 4, IEEE: 4, INT8: 1}

_PRODUCTS_PER_CYCLE = {HALF: 1024, TF32: 512, TF32X3: 512 / 3, IEEE: 64, INT8: 2048}
"""Multiply-adds a cycle and multiprocessor (A100 whitepaper, table 1); other architectures keep the proportions."""

_LOADED_PER_CYCLE = 64
"""Bytes a cycle and multiprocessor from L2 (the same source: 5120 bytes a cycle over 108, rounded up)."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The part of the output that one block computes, `k` deep at a time, `stages` loads in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def shared_bytes(self, kind: str) -> int:
        """What its input buffers take of shared memory."""
        return (self.m + self.n) * self.k * self.stages * _ITEMSIZE[kind]

    def cycles(self, kind: str) -> float:
        """Of one multiprocessor, for one unit of depth: computing and loading, as if they did not overlap."""
        computing = self.m * self.n / _PRODUCTS_PER_CYCLE[kind]
        loading = (self.m + self.n) * _ITEMSIZE[kind] / _LOADED_PER_CYCLE
        return computing + loading


_TF32 = (
    Tile(16, 32, 64, 4, 4),
    Tile(32, 64, 32, 4, 4),
    Tile(64, 64, 32, 4, 4),
    Tile(128, 64, 32, 8, 3),
)

TILES: dict[str, tuple[Tile, ...]] = {
    HALF: (
        Tile(16, 32, 128, 4, 4),
        Tile(16, 64, 128, 4, 4),
        Tile(32, 64, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 64, 64, 4, 4),
        Tile(128, 128, 32, 8, 4),
        Tile(128, 128, 64, 8, 4),
    ),
    TF32: (*_TF32, Tile(128, 128, 32, 8, 3)),
    TF32X3: _TF32,
    IEEE: (
        Tile(16, 32, 32, 4, 3),
        Tile(32, 32, 32, 4, 3),
        Tile(64, 64, 16, 4, 3),
    ),
    INT8: (
        Tile(16, 32, 128, 4, 4),
        Tile(16, 64, 128, 4, 4),
        Tile(32, 64, 64, 4, 4),
        Tile(64, 64, 128, 4, 4),
        Tile(128, 64, 128, 4, 4),
        Tile(128, 128, 128, 8, 4),
    ),
}


def pick_tile(m: int, n: int, batch: int, kind: str, target: Target) -> Tile:
    """The tile with the least estimated time on `target` for an output of `batch` times m x n.

    Every multiprocessor computes ceil(tiles / multiprocessors) of them, one after the other. Of equals the larger wins:
    it loads less. Only tiles whose buffers fit in the target's shared memory are considered.
    """

    def cost(tile: Tile) -> tuple[float, int, int]:
        tiles = batch * ceil_div(m, tile.m) * ceil_div(n, tile.n)
        return ceil_div(tiles, target.multiprocessors) * tile.cycles(kind), -tile.m * tile.n, -tile.k

    fitting = [t for t in TILES[kind] if t.shared_bytes(kind) <= target.shared_bytes]
    return min(fitting, key=cost)
