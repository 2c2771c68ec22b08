"""Tiles of products, and the choice among them: an estimate for the GPU at hand, not a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from infera_kernels.launch import Target, Typed
from infera_kernels.launch.descriptors import FIRST_ARCH
from infera_kernels.triton.layout import name_of
from infera_kernels.tuning.choice import REMEMBERED, Problem
from infera_kernels.tuning.cost import Block, product_cycles, resident

HALF, TF32, TF32X3, IEEE, INT8 = "half", "tf32", "tf32x3", "ieee", "int8"
"""How products are computed: half inputs on tensor cores; float32 on tensor cores, rounded to tf32 or split in three
such products; float32 as it is, without tensor cores; integers of 8 bits on tensor cores, exactly."""


def kind_of(x: Typed, *, tf32: bool) -> str:
    """How products of its type are computed, where float32 is rounded to `tf32` or is not."""
    if name_of(x) != "float32":
        return HALF
    return TF32 if tf32 else IEEE


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


_AHEAD, _JOINED, _SPECIALISED = 1, 2, 3


@dataclass(frozen=True, slots=True)
class TmaTile(Tile):
    """A tile whose factors TMA reads. `tma` says how far loads run ahead: 1 within a tile, 2 from one tile into the
    next, 3 as 2, by warps that do nothing else, beside `warps`."""

    tma: int

    @property
    def joined(self) -> bool:
        return self.tma != _AHEAD

    @property
    def specialised(self) -> bool:
        return self.tma == _SPECIALISED

    @property
    def room(self) -> int:
        """Bytes of shared memory: sums go through those of the factors, or, where these are in use, through others: all
        at once where 64 rows leave tensor memory to warps that do nothing else."""
        strip = self.n if self.specialised and self.m == 64 else STRIP
        return self.shared_bytes(HALF) + _BARRIERS + (self.m * strip * 4 if self.joined else 0)

    def beside(self, target: Target) -> int:
        """How many run at a time on a multiprocessor, 1 at least: specialised warps share out all its registers."""
        block = self.block(HALF)
        fit = resident(block.warps, block.registers(target), self.room, target)
        return 1 if self.specialised else max(fit, 1)


STRIP = 64
"""Columns that a TmaTile finishes and stores at a time."""

_BARRIERS = 1024
"""Bytes of shared memory beside factors and sums, at most."""

TMA_TILES = (
    TmaTile(64, 128, 64, 4, 4, _AHEAD),
    TmaTile(64, 128, 64, 4, 4, _JOINED),
    TmaTile(128, 128, 64, 8, 4, _AHEAD),
    TmaTile(128, 128, 64, 8, 4, _JOINED),
    TmaTile(128, 128, 128, 8, 3, _AHEAD),
    TmaTile(128, 256, 64, 8, 3, _AHEAD),
    TmaTile(128, 256, 64, 8, 4, _AHEAD),
    TmaTile(128, 256, 64, 8, 3, _JOINED),
    TmaTile(128, 256, 64, 8, 4, _JOINED),
    TmaTile(64, 128, 64, 4, 4, _SPECIALISED),
    TmaTile(128, 128, 64, 8, 4, _SPECIALISED),
    TmaTile(128, 256, 64, 8, 3, _SPECIALISED),
    TmaTile(128, 256, 64, 8, 4, _SPECIALISED),
)
"""Of half inputs. Which one is fastest is for measurements: none is ever predicted."""

SPECIALISING = (100, 103)
"""Architectures for which Triton 3.6 to 3.9 specialise warps that load by a descriptor of the host: for sm_90 they
refuse, load amiss or have two groups of warps compute the same."""


def tma_tiles(arch: int) -> tuple[TmaTile, ...]:
    """Those of TMA_TILES that an architecture has. On sm_90 and sm_100 Triton 3.9 keeps all in registers, unless an
    activation is as long as acosh and sin are (`tests/kernels/test_compile_tma.py`)."""
    if arch < FIRST_ARCH:
        return ()
    if arch in SPECIALISING:
        return tuple(t for t in TMA_TILES if t.specialised or (t.joined and t.m >= 128))
    return tuple(t for t in TMA_TILES if not t.specialised)


SIZES = ("m", "batch", "n", "k")
"""Of the problems of all families of products: `batch` of them, (m, k) @ (k, n). The first two follow from batches."""


LIBRARY = Tile(0, 0, 0, 0, 0)
"""No tile: a product by cuBLASLt (`launch.cublaslt`)."""

EITHER = "="
"""Begins the layout of a problem that LIBRARY may solve too."""


DESCRIBED = "@"
"""In the layout of a problem of whose factors TMA reads blocks."""


def fitting(problem: Problem, target: Target) -> tuple[Tile, ...]:
    """The tiles of a kind of products of which a block fits on a multiprocessor."""
    return tuple(t for t in TILES[problem.kind] if fits(t, problem.kind, target))


def candidates(problem: Problem, target: Target) -> tuple[Tile, ...]:
    """Those, and tiles for TMA and LIBRARY where they may be."""
    found = fitting(problem, target)
    if DESCRIBED in problem.layout and problem.kind == HALF:
        found += tuple(t for t in tma_tiles(target.arch) if t.room <= target.shared_bytes)
    return (*found, *([LIBRARY] if problem.layout.startswith(EITHER) else []))


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


def least(
    problem: Problem,
    target: Target,
    among: Iterable[Tile],
    estimate: Callable[[Problem, Tile, Target], float] = cycles,
) -> Tile:
    """The tile with the least estimated time, of equals the larger: it loads less."""

    def cost(tile: Tile) -> tuple[float, int, int]:
        return estimate(problem, tile, target), -tile.m * tile.n, -tile.k

    return min(among, key=cost)


def least_cycles(problem: Problem, target: Target) -> float:
    """Of the predicted tile; it is none of the library's."""
    return cycles(problem, predicted(problem, target), target)


def pick_tile(m: int, n: int, k: int, batch: int, kind: str, target: Target) -> Tile:
    """The predicted tile for `batch` products (m, k) @ (k, n)."""
    return predicted(Problem("", kind, (m, batch, n, k)), target)
