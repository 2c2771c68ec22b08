"""Convolutions and pools compiled for every architecture: no spills, wide accesses, tensor cores, pipelined loads."""

from __future__ import annotations

from typing import Any

import pytest

from infera_kernels.launch import CompileLauncher, Inspection
from tests.kernels.support import EVERY_ARCH, FakeArray, multiplication, tensor_cores

pytest.importorskip("triton")

from infera_kernels.triton import conv, depthwise, global_pool, pool, tiles

pytestmark = pytest.mark.kernels


@pytest.fixture(params=EVERY_ARCH)
def launcher(request: pytest.FixtureRequest) -> CompileLauncher:
    return CompileLauncher(request.param)


def compiled(launcher: CompileLauncher) -> list[Inspection]:
    """What was compiled, all of it without spills."""
    for result in launcher.compiled:
        assert result.binary.spec.arch == launcher.target.arch
        assert result.spilled_bytes == 0
    return launcher.compiled


SAME = ((1, 1), (1, 1))


def convolve(
    launcher: CompileLauncher,
    dtype: str,
    side: int,
    channels: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    n: int = 8,
    residual: bool = True,
    **options: Any,
) -> list[Inspection]:
    """Square images, padded so that a stride of 1 keeps their size, with a bias, a residual and relu."""
    pad = (kernel - 1) // 2
    out = side * stride if options.get("transposed") else -(-side // stride)
    x, y = FakeArray((n, side, side, channels), dtype), FakeArray((n, out, out, outputs), dtype)
    w, b = FakeArray((outputs, kernel, kernel, channels), dtype), FakeArray((outputs,), dtype)
    where = conv.geometry((kernel,) * 2, (stride,) * 2, (1, 1), ((pad, pad),) * 2)
    shape = None if options.get("transposed") else conv.parts_shape(y, w, 1)
    parts = None if shape is None else FakeArray(shape, "float32")
    finish = conv.Finish(b, y if residual else None, "relu")
    conv.conv(x, w, y, launcher, where, finish=finish, parts=parts, **options)
    return compiled(launcher)


@pytest.mark.parametrize("tile", tiles.TILES["half"][::2], ids=str)
def test_tiles_of_halves(tile: tiles.Tile, launcher: CompileLauncher) -> None:
    if not conv.keeps(tile, "", launcher.target):
        pytest.skip("this tile is chosen only where it is measured to be faster")
    (result,) = convolve(launcher, "float16", 56, 64, 256, tile=tile, residual=conv.keeps(tile, "+", launcher.target))
    assert tensor_cores(result).keys() == {multiplication(launcher.target.arch, tile.m)}
    assert result.count("LDGSTS.E.BYPASS.LTC128B.128") + result.count("LDGSTS.E.BYPASS.128") > 0


@pytest.mark.parametrize("tile", tiles.TILES["ieee"][::2], ids=str)
def test_tiles_of_floats(tile: tiles.Tile, launcher: CompileLauncher) -> None:
    (result,) = convolve(launcher, "float32", 56, 64, 256, tile=tile)
    assert not tensor_cores(result)
    assert result.count("LDGSTS") > 0
    assert result.count("STG.E.128") > 0


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_floats_on_tensor_cores(precision: str, launcher: CompileLauncher) -> None:
    (result,) = convolve(launcher, "float32", 56, 64, 256, precision=precision)
    assert tensor_cores(result)
    assert result.count("LDGSTS") > 0


@pytest.mark.parametrize(("dtype", "channels"), [("float16", 4), ("float32", 3)])
def test_a_stem_copies_asynchronously(dtype: str, channels: int, launcher: CompileLauncher) -> None:
    (result,) = convolve(launcher, dtype, 224, channels, 64, kernel=7, stride=2)
    assert launcher.launches[0].constexprs["FLAT"]
    assert result.count("LDGSTS") > 0
    assert bool(tensor_cores(result)) == (dtype == "float16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_channels_that_are_multiples_of_eight_alone(dtype: str, launcher: CompileLauncher) -> None:
    """Hints of Triton's own know multiples of 16 only."""
    (result,) = convolve(launcher, dtype, 56, 24, 72)
    assert result.count("STG.E.128") > 0
    assert result.count("LDGSTS") > 0
    assert result.count("LDG.E.128") > 0


def test_split_sums(launcher: CompileLauncher) -> None:
    product, join = convolve(launcher, "float16", 7, 512, 512, n=1)
    assert tensor_cores(product)
    assert not tensor_cores(join)
    assert join.count("LDG.E.128") > 0


def test_transposed(launcher: CompileLauncher) -> None:
    (result,) = convolve(launcher, "float16", 28, 64, 64, kernel=4, stride=2, transposed=True)
    assert tensor_cores(result)
    assert result.count("LDGSTS") > 0


@pytest.mark.parametrize(("channels", "kernel", "dtype"), [(72, 3, "float16"), (960, 5, "float32")])
def test_depthwise(channels: int, kernel: int, dtype: str, launcher: CompileLauncher) -> None:
    x, b, pad = FakeArray((8, 28, 28, channels), dtype), FakeArray((channels,), dtype), kernel // 2
    w = FakeArray((channels, kernel, kernel, 1), dtype)
    size = w.dtype.itemsize
    w.strides = (size, kernel * channels * size, channels * size, size)
    where = conv.geometry((kernel,) * 2, (1, 1), (1, 1), ((pad, pad),) * 2)
    depthwise.depthwise(x, w, x, launcher, where, finish=conv.Finish(b, activation="relu"))
    (result,) = compiled(launcher)
    assert result.count("LDG.E.128") >= kernel * 2
    assert result.count("LDG") - result.count("LDG.E.128") <= 2
    assert result.count("STG.E.128") > 0


@pytest.mark.parametrize("kind", pool.KINDS)
def test_pools(kind: str, launcher: CompileLauncher) -> None:
    x, y = FakeArray((8, 56, 56, 72), "float16"), FakeArray((8, 28, 28, 72), "float16")
    pool.pool(kind, x, y, launcher, conv.geometry((3, 3), (2, 2), (1, 1), SAME), p=2)
    (result,) = compiled(launcher)
    assert result.count("LDG.E.128") > 0
    assert result.count("STG.E.128") > 0


def test_maxima_of_bytes_with_positions(launcher: CompileLauncher) -> None:
    x, y, at = (FakeArray((2, s, s, 16), t) for s, t in ((8, "uint8"), (4, "uint8"), (4, "int64")))
    pool.pool("max", x, y, launcher, conv.geometry((2, 2), (2, 2), (1, 1), ((0, 0), (0, 0))), index=at)
    compiled(launcher)


@pytest.mark.parametrize("kind", ["max", "lp"])
def test_global_pools(kind: str, launcher: CompileLauncher) -> None:
    x, y = FakeArray((1, 112, 112, 64), "float16"), FakeArray((1, 64), "float16")
    shape = global_pool.parts_of(x)
    assert shape == (1, 24, 64)
    global_pool.global_pool(kind, x, y, launcher, parts=FakeArray(shape, "float32"), p=3)
    first, second = compiled(launcher)
    assert first.count("LDG.E.128") > 0
    assert second.count("LDG.E.128") > 0
