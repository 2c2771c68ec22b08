"""Tiles of products, and the choice among them: an estimate for the GPU at hand, not a measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from infera_kernels.launch import Target
from infera_kernels.tuning.choice import REMEMBERED, Problem
from infera_kernels.tuning.cost import Block, product_cycles, resident

HALF, TF32, TF32X3, IEEE, INT8 = "half", "tf32", "tf32x3", "ieee", "int8"
"""How products are computed: half inputs on tensor cores; float32 on tensor cores, rounded to tf32 or split in three
such products; float32 as it is, without tensor cores; integers of 8 bits on tensor cores, exactly."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The part of the output that one block computes, `k` deep at a time, `stages` loads in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def block(self, kind: str) -> Block:
        return Block(self.m, self.n, self.k, self.warps, self.stages, kind)

    def shared_bytes(self, kind: str) -> int:
        """What its input buffers take of shared memory."""
        return self.block(kind).shared_bytes


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
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
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


SIZES = ("m", "batch", "n", "k")
"""Of the problems of all families of products: `batch` of them, (m, k) @ (k, n). The first two follow from batches."""


LIBRARY = Tile(0, 0, 0, 0, 0)
"""No tile: a product by cuBLASLt (`launch.cublaslt`)."""

EITHER = "="
"""Begins the layout of a problem that LIBRARY may solve too."""


def fitting(problem: Problem, target: Target) -> tuple[Tile, ...]:
    """The tiles of a kind of products of which a block fits on a multiprocessor."""
    return tuple(t for t in TILES[problem.kind] if fits(t, problem.kind, target))


def candidates(problem: Problem, target: Target) -> tuple[Tile, ...]:
    """Those, and LIBRARY where it may be."""
    return (*fitting(problem, target), *([LIBRARY] if problem.layout.startswith(EITHER) else []))


def fits(tile: Tile, kind: str, target: Target) -> bool:
    block = tile.block(kind)
    return resident(block.warps, block.registers(target), block.shared_bytes, target) > 0


def cycles(problem: Problem, tile: Tile, target: Target) -> float:
    """Of all of a problem; see `tuning.cost`. LIBRARY takes as long as the best tile, for all that is known."""
    if tile == LIBRARY:
        return min(cycles(problem, t, target) for t in fitting(problem, target))
    m, batch, n, k = problem.sizes[:4]
    return product_cycles(tile.block(problem.kind), m, n, k, batch, target)


LONG = "+"
"""Ends the layout of a problem whose results take registers of their own before they are stored."""

_LIGHT = frozenset({None, "relu"})
_WIDE = 64
"""Sums a thread: tiles that have more are predicted only where compiled kernels are known to keep all in registers."""


def ending(residual: object, activation: str | None) -> str:
    """LONG where something is added to results, or an activation takes more than one instruction."""
    return "" if residual is None and activation in _LIGHT else LONG


def keeps(tile: Tile, layout: str, target: Target) -> bool:
    """Whether all values of a kernel are known to stay in registers; where not, some leave them once, at the end."""
    return tile.m * tile.n <= _WIDE * 32 * tile.warps or (target.arch >= 90 and not layout.endswith(LONG))


@lru_cache(maxsize=REMEMBERED)
def predicted(problem: Problem, target: Target) -> Tile:
    """The tile with the least estimated time, of those that keep all in registers; LIBRARY where it may be: nobody has
    measured tiles of ours that are faster."""
    if problem.layout.startswith(EITHER):
        return LIBRARY
    return least(problem, target, [t for t in fitting(problem, target) if keeps(t, problem.layout, target)])


def least(problem: Problem, target: Target, among: Iterable[Tile]) -> Tile:
    """The tile with the least estimated time, of equals the larger: it loads less."""

    def cost(tile: Tile) -> tuple[float, int, int]:
        return cycles(problem, tile, target), -tile.m * tile.n, -tile.k

    return min(among, key=cost)


def pick_tile(m: int, n: int, k: int, batch: int, kind: str, target: Target) -> Tile:
    """The predicted tile for `batch` products (m, k) @ (k, n)."""
    return predicted(Problem("", kind, (m, batch, n, k)), target)
