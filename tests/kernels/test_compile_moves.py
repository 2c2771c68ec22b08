"""Gathers and maps by tables compiled for every architecture: no spills, and wide loads where rows are contiguous."""

from __future__ import annotations

import numpy as np
import pytest

from infera_kernels.launch import CompileLauncher, Inspection
from tests.kernels.support import EVERY_ARCH, Array, FakeArray

pytest.importorskip("triton")

from infera_kernels.triton import gather, grid_sample, mapped, scatter
from infera_kernels.triton.terms import AxisMap

pytestmark = pytest.mark.kernels


@pytest.fixture(params=EVERY_ARCH)
def launcher(request: pytest.FixtureRequest) -> CompileLauncher:
    return CompileLauncher(request.param)


def compiled(launcher: CompileLauncher) -> Inspection:
    """The one kernel that was compiled, without spills."""
    (result,) = launcher.compiled
    assert result.spilled_bytes == 0
    return result


def held(table: Array) -> FakeArray:
    return FakeArray(table.shape, table.dtype)


def doubled(axis: int, size: int, taps: int) -> AxisMap:
    index = np.zeros((2 * size, taps), np.int64)
    return AxisMap(axis, index, np.ones(index.shape) if taps > 1 else None)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_of_an_embedding_are_read_and_written_wide(dtype: str, launcher: CompileLauncher) -> None:
    table, out = FakeArray((30522, 768), dtype), FakeArray((4, 128, 768), dtype)
    gather.gather(table, FakeArray((4, 128), "int64"), out, launcher, axis=0)
    result = compiled(launcher)
    assert result.count("LDG.E.128") > 0
    assert result.count("STG.E.128") > 0


def test_tuples(launcher: CompileLauncher) -> None:
    x, out = FakeArray((4, 300, 768), "float32"), FakeArray((4, 7, 5), "float32")
    gather.gather_nd(x, FakeArray((4, 7, 5, 2), "int32"), out, launcher, batch_dims=1)
    compiled(launcher)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_images_with_channels_last_are_resized_wide(taps: int, launcher: CompileLauncher) -> None:
    x, out = FakeArray((2, 40, 40, 64), "float32"), FakeArray((2, 80, 80, 64), "float32")
    mapped.mapped(x, out, launcher, [doubled(1, 40, taps), doubled(2, 40, taps)], held)
    result = compiled(launcher)
    assert result.count("LDG.E.128") > 0
    assert result.count("STG.E.128") > 0


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_images_with_channels_first(taps: int, launcher: CompileLauncher) -> None:
    x, out = FakeArray((2, 64, 40, 40), "float16"), FakeArray((2, 64, 80, 80), "float16")
    mapped.mapped(x, out, launcher, [doubled(2, 40, taps), doubled(3, 40, taps)], held)
    assert compiled(launcher).count("STG.E.128") + launcher.compiled[0].count("STG.E.64") > 0


def test_padding_with_a_computed_value(launcher: CompileLauncher) -> None:
    x, out = FakeArray((2, 40, 64), "bool"), FakeArray((2, 80, 64), "bool")
    mapped.mapped(x, out, launcher, [doubled(1, 40, 1)], held, fill=FakeArray((), "bool"))
    compiled(launcher)


@pytest.mark.parametrize("numbered", [False, True])
def test_updates_of_rows_are_written_wide(numbered: bool, launcher: CompileLauncher) -> None:
    x, updates = FakeArray((8, 2048, 128), "float16"), FakeArray((8, 4, 128), "float16", address=0x7F1000000000)
    last, unset = FakeArray((8 * 2048,), "int32"), FakeArray((), "int32")
    numbers = scatter.Numbers(last, unset) if numbered else None
    scatter.scatter(x, FakeArray((8, 4, 2), "int64"), updates, x, launcher, numbers=numbers)
    assert len(launcher.compiled) == (3 if numbered else 1)
    assert all(result.spilled_bytes == 0 for result in launcher.compiled)
    assert launcher.compiled[-1].count("STG.E.128") > 0
    if numbered:
        assert launcher.compiled[1].count("RED") + launcher.compiled[1].count("REDG") > 0


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "bfloat16", "float64"])
def test_padding_with_a_number(dtype: str, launcher: CompileLauncher) -> None:
    x, out = FakeArray((2, 40, 64), dtype), FakeArray((2, 80, 64), dtype)
    mapped.mapped(x, out, launcher, [doubled(1, 40, 1)], held, fill=9.0)
    compiled(launcher)


@pytest.mark.parametrize("padding", grid_sample.PADDINGS)
@pytest.mark.parametrize("mode", grid_sample.TAPS)
def test_values_between_pixels(mode: str, padding: str, launcher: CompileLauncher) -> None:
    x, grid, out = (FakeArray(s, "float16") for s in ((2, 64, 40, 40), (2, 80, 80, 2), (2, 64, 80, 80)))
    grid_sample.grid_sample(x, grid, out, launcher, mode=mode, padding=padding, aligned=False)
    compiled(launcher)
