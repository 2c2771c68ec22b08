"""Kernels of quantised tensors compiled for every architecture: registers and instructions, without a GPU."""

from __future__ import annotations

import pytest

from infera_kernels.launch import CompileLauncher, Inspection
from tests.kernels.support import EVERY_ARCH, FakeArray, multiplication, tensor_cores
from tests.kernels.test_compile import compiled

pytest.importorskip("triton")

from infera_kernels.triton import dynamic, integer_conv, integer_matmul, integer_sums, integer_weight, quantise, tiles

pytestmark = pytest.mark.kernels


class FakeImage(FakeArray):
    """An image seen with its channels second, which lie last in memory."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: str) -> None:
        n, c, h, w = shape
        super().__init__((n, h, w, c), dtype)
        self.shape = shape
        self.strides = tuple(self.strides[i] for i in (0, 3, 1, 2))


@pytest.fixture(params=EVERY_ARCH)
def launcher(request: pytest.FixtureRequest) -> CompileLauncher:
    return CompileLauncher(request.param)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16"])
def test_quantise_reads_and_writes_whole_words(dtype: str, launcher: CompileLauncher) -> None:
    x, out = FakeArray((64, 2048), "float32"), FakeArray((64, 2048), dtype)
    quantise.quantise(x, FakeArray((), "float32"), FakeArray((), dtype), out, launcher)
    result = compiled(launcher)
    assert result.count("LDG.E.128") > 0
    assert result.count("STG.E.64" if dtype != "int16" else "STG.E.128") > 0


def test_dequantise_by_columns(launcher: CompileLauncher) -> None:
    scales, zeros = FakeArray((2048,), "float32"), FakeArray((2048,), "int8")
    q, out = FakeArray((64, 2048), "int8"), FakeArray((64, 2048), "float32")
    quantise.dequantise(q, scales, zeros, out, launcher)
    result = compiled(launcher)
    assert result.count("STG.E.128") > 0
    assert result.count("FFMA") == 0


@pytest.mark.parametrize("size", [700, 8192, 10**6])
def test_dynamic_quantise(size: int, launcher: CompileLauncher) -> None:
    x, out = FakeArray((size,), "float32"), FakeArray((size,), "uint8")
    parts = dynamic.range_parts(size)
    ranges = FakeArray((2, parts), "float32") if parts else None
    scale, zero = FakeArray((), "float32"), FakeArray((), "uint8")
    dynamic.dynamic_quantise(x, out, scale, zero, ranges, launcher)
    assert len(launcher.compiled) == (2 if parts else 1)
    for result in launcher.compiled:
        assert result.spilled_bytes == 0
        assert result.count("LDG.E.128") > 0 or size == 700


def integer_product(launcher: CompileLauncher, tile: tiles.Tile, left: str) -> Inspection:
    """What is multiplied by packed weights of 1024 x 1024, scaled and quantised again."""
    packed = integer_weight.Weight(FakeArray((1024, 1024), "int8"), FakeArray((1024,), "int32"), unsigned=False)
    single, point = FakeArray((), "float32"), FakeArray((), "uint8")
    scaling = integer_sums.Scaling(single, FakeArray((1024,), "float32"), single, point)
    a, out = FakeArray((1024, 1024), left), FakeArray((1024, 1024), "uint8")
    integer_matmul.integer_matmul(
        *(a, packed, out, launcher), a_zero=FakeArray((), left), scaling=scaling, tile=tile, signed_zeros=True
    )
    return compiled(launcher)


_FEW, _SOME, _MANY = (tiles.TILES["int8"][i] for i in (0, 3, -1))
PRODUCTS = [(_FEW, "uint8"), (_SOME, "int8"), (_MANY, "uint8")]


@pytest.mark.parametrize(("tile", "left"), PRODUCTS, ids=[f"{t.m}x{t.n}x{t.k}-{left}" for t, left in PRODUCTS])
def test_integers_are_multiplied_on_tensor_cores(tile: tiles.Tile, left: str, launcher: CompileLauncher) -> None:
    result = integer_product(launcher, tile, left)
    assert result.count("LDGSTS") > 0, "loads are not pipelined"
    assert (result.count("STG.E.128") > 0) == (tile.m >= 64)
    assert tensor_cores(result).keys() == {multiplication(launcher.target.arch, tile.m, integers=True)}


@pytest.mark.parametrize("tile", [_FEW, _MANY], ids=lambda t: f"{t.m}x{t.n}x{t.k}")
def test_convolutions_of_channels_last(tile: tiles.Tile, launcher: CompileLauncher) -> None:
    x, out = (FakeImage((8, 256, 28, 28), "uint8") for _ in range(2))
    filters = integer_conv.Filters(
        FakeArray((256, 9, 256), "int8"), FakeArray((256,), "int32"), (256, 256, 3, 3), unsigned=False
    )
    single, point = FakeArray((), "float32"), FakeArray((), "uint8")
    scaling = integer_sums.Scaling(single, FakeArray((256,), "float32"), single, point)
    integer_conv.integer_conv(
        *(x, filters, out, launcher),
        strides=(1, 1),
        dilations=(1, 1),
        pads=((1, 1), (1, 1)),
        group=1,
        x_zero=point,
        signed_zeros=True,
        scaling=scaling,
        bias=FakeArray((256,), "int32"),
        tile=tile,
    )
    result = compiled(launcher)
    assert tensor_cores(result).keys() == {multiplication(launcher.target.arch, tile.m, integers=True)}
    assert result.count("LDGSTS") > 0
