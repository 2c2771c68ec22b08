"""Products whose factors TMA reads, compiled for sm_90 and sm_100: registers, instructions and encodings."""

from __future__ import annotations

from typing import Any

import pytest

from infera_kernels.launch import CompileLauncher, Inspection
from tests.kernels.support import FakeArray, multiplication, tensor_cores

pytest.importorskip("triton")

from infera_kernels.triton import matmul, tiles
from infera_kernels.tuning.cost import resident

pytestmark = pytest.mark.kernels

ARCHITECTURES = (90, 100)
CASES = [
    pytest.param(arch, tile, id=f"sm_{arch}-{tile.m}x{tile.n}x{tile.k}-w{tile.warps}-s{tile.stages}-{tile.tma}")
    for arch in ARCHITECTURES
    for tile in tiles.tma_tiles(arch)
]


def multiply(arch: int, tile: tiles.TmaTile, dtype: str = "float16", **options: Any) -> Inspection:
    """1024 cubed, a batch if there is one, without spills."""
    launcher = CompileLauncher(arch)
    shape = (*options.pop("batch", ()), 1024, 1024)
    turned = options.pop("turned", (False, False))
    a, b, out = (FakeArray(shape, dtype) for _ in range(3))
    for x, is_turned in zip((a, b), turned, strict=True):
        if is_turned:
            x.strides = (*x.strides[:-2], *x.strides[:-3:-1])
    if options.pop("added", False):
        options["residual"] = out
    matmul.matmul(a, b, out, launcher, bias=FakeArray((1024,), dtype), tile=tile, **options)
    (result,) = launcher.compiled
    assert launcher.launches[0].kernel == "tma_kernel"
    assert result.spilled_bytes == 0
    assert tensor_cores(result).keys() == {multiplication(arch, tile.m)}
    assert result.count("UTMALDG") >= 2
    assert result.count("LDGSTS") == 0
    assert result.count("STG.E.128") > 0
    assert result.binary.spec.shared_bytes <= min(tile.room, launcher.target.shared_bytes)
    warps = result.binary.spec.threads // 32
    assert warps > tile.warps if tile.specialised else warps == tile.warps
    return result


@pytest.mark.parametrize(("arch", "tile"), CASES)
@pytest.mark.parametrize("added", [False, True], ids=["relu", "residual and gelu"])
def test_tiles(added: bool, arch: int, tile: tiles.TmaTile) -> None:
    result = multiply(arch, tile, activation="gelu" if added else "relu", added=added)
    a, b = result.binary.spec.encodings
    assert (a.box, a.swizzle) == ((tile.m, 64), 3)
    assert (b.box, b.swizzle) == ((tile.k, 64), 3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("turned", [(True, False), (False, True), (True, True)], ids=["TN", "NT", "TT"])
def test_orders_in_a_batch(turned: tuple[bool, bool], arch: int) -> None:
    tile = tiles.tma_tiles(arch)[-1]
    result = multiply(arch, tile, "bfloat16", turned=turned, batch=(3,), activation="silu", added=True)
    a, b = result.binary.spec.encodings
    assert a.box == (1, tile.k if turned[0] else tile.m, 64)
    assert b.box == (1, tile.n if turned[1] else tile.k, 64)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_pair_of_loads_is_enough_for_wide_tiles(arch: int) -> None:
    """More registers are left than the kernel with pointers leaves, of which half are addresses."""
    tile = max(tiles.tma_tiles(arch), key=lambda t: (t.m * t.n, t.stages))
    plain = CompileLauncher(arch)
    x = FakeArray((1024, 1024), "float16")
    options: dict[str, Any] = {"bias": FakeArray((1024,), "float16"), "activation": "relu"}
    matmul.matmul(x, x, x, plain, tile=tiles.Tile(128, 256, 64, 8, 3), **options)
    assert multiply(arch, tile, activation="relu").registers < plain.compiled[0].registers


@pytest.mark.parametrize(
    ("arch", "tile"),
    [(90, t) for t in tiles.tma_tiles(90)[:2]] + [(100, t) for t in tiles.tma_tiles(100) if t.n == 128],
    ids=str,
)
def test_programs_are_as_many_as_run_at_a_time(arch: int, tile: tiles.TmaTile) -> None:
    """By the shared memory and registers of a kernel whose sums are stored as they are, which may need more room."""
    launcher = CompileLauncher(arch)
    x = FakeArray((4096, 4096), "float16")
    matmul.matmul(x, x, x, launcher, tile=tile)
    (launch,), (result,) = launcher.launches, launcher.compiled
    spec, target = result.binary.spec, launcher.target
    assert spec.shared_bytes <= tile.room
    fit = resident(spec.threads // 32, result.registers, spec.shared_bytes, target)
    assert launch.grid == (fit * target.multiprocessors, 1, 1)


def test_every_tile_is_of_some_architecture() -> None:
    assert {t for arch in ARCHITECTURES for t in tiles.tma_tiles(arch)} == set(tiles.TMA_TILES)
    assert not tiles.tma_tiles(89)
