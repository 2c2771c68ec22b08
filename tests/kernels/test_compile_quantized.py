"""Quantised convolutions with all that follows them, compiled for every architecture: registers and instructions."""

from __future__ import annotations

from typing import Any

import pytest

from infera_kernels.launch import CompileLauncher
from tests.kernels.support import EVERY_ARCH, FakeArray, multiplication, tensor_cores
from tests.kernels.test_compile import compiled

pytest.importorskip("triton")

from infera_kernels.triton import quantized_conv as q
from infera_kernels.triton import tiles

pytestmark = pytest.mark.kernels


@pytest.fixture(params=EVERY_ARCH)
def launcher(request: pytest.FixtureRequest) -> CompileLauncher:
    return CompileLauncher(request.param)


def single(dtype: str) -> FakeArray:
    return FakeArray((), dtype)


def finish(channels: int, residual: Any = None, **others: Any) -> q.Finish:
    """Scales, a bias, the residual, ReLU, and quantisation to int8."""
    of_residual = () if residual is None else (single("float32"), single("int8"))
    scale, zero, *rest = (*of_residual, None, None)[:2]
    assert not rest
    floats = FakeArray((channels,), "float32"), FakeArray((channels,), "float32")
    return q.Finish(
        *floats, residual, scale, zero, activation="relu", scale=single("float32"), zero=single("int8"), **others
    )


TILES = tiles.TILES["int8"]


@pytest.mark.parametrize("tile", [TILES[0], TILES[3], TILES[-1]], ids=lambda t: f"{t.m}x{t.n}x{t.k}")
@pytest.mark.parametrize("kernel", [1, 3])
def test_integers_go_in_and_come_out(kernel: int, tile: tiles.Tile, launcher: CompileLauncher) -> None:
    """A layer of a residual network: nothing but tensor cores multiplies, loads pass registers by, stores are wide."""
    x, out, residual = (FakeArray((8, 28, 28, 256), "int8") for _ in range(3))
    added = residual if q.keeps(tile, tiles.LONG, launcher.target) else None
    weight, pads = FakeArray((256, kernel * kernel, 256), "int8"), ((kernel // 2,) * 2,) * 2
    where = q.Places((kernel, kernel), pads=(pads[0], pads[1]))
    q.quantized_conv(x, weight, out, launcher, where, finish(256, added), tile=tile)
    result = compiled(launcher)
    assert tensor_cores(result).keys() == {multiplication(launcher.target.arch, tile.m, integers=True)}
    assert result.count("LDGSTS") > 0, "loads are not pipelined"
    assert (result.count("STG.E.128") > 0) == (tile.m >= 64)
    assert result.spilled_bytes == 0


def test_zero_points_of_borders(launcher: CompileLauncher) -> None:
    """Padding stays a mask of loads: what a zero point adds to it is put right afterwards."""
    x, out = (FakeArray((8, 28, 28, 128), "int8") for _ in range(2))
    corrections = q.Corrections(FakeArray((3, 3, 128), "int32"), FakeArray((28,), "int32"), FakeArray((28,), "int32"))
    q.quantized_conv(
        *(x, FakeArray((128, 9, 128), "int8"), out, launcher, q.Places((3, 3), pads=((1, 1), (1, 1))), finish(128)),
        x_zero=single("int8"),
        corrections=corrections,
        tile=TILES[-1],
    )
    result = compiled(launcher)
    assert result.count("LDGSTS") > 0
    assert tensor_cores(result).keys() == {multiplication(launcher.target.arch, 128, integers=True)}
    assert result.spilled_bytes == 0


def test_images_of_colours_are_loaded_a_pixel_at_a_time(launcher: CompileLauncher) -> None:
    """Four channels are one load: taps lie beside each other in a block of the depth."""
    x, out = FakeArray((8, 224, 224, 4), "int8"), FakeArray((8, 112, 112, 64), "int8")
    where = q.Places((7, 7), (2, 2), pads=((3, 3), (3, 3)))
    q.quantized_conv(x, FakeArray((64, 208), "int8"), out, launcher, where, finish(64))
    result = compiled(launcher)
    assert result.count("LDGSTS") > 0
    assert result.count("LDG.E.U8") + result.count("LDG.E.S8") == 1, "the zero point of the result is one byte"
    assert len(tensor_cores(result)) == 1
    assert result.spilled_bytes == 0


def test_products_of_rows_in_half_precision(launcher: CompileLauncher) -> None:
    """The residual is read, and the result written, as float16."""
    x, out, residual = (
        FakeArray((4096, 1, 1, n), dtype) for n, dtype in ((3072, "int8"), (768, "float16"), (768, "float16"))
    )
    end = q.Finish(FakeArray((768,), "float32"), FakeArray((768,), "float32"), residual)
    q.quantized_conv(x, FakeArray((768, 1, 3072), "int8"), out, launcher, q.Places((1, 1)), end)
    result = compiled(launcher)
    assert result.count("STG.E.128") > 0
    assert len(tensor_cores(result)) == 1
    assert result.spilled_bytes == 0
