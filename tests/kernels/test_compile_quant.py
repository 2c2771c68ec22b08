"""Kernels of quantised tensors compiled for sm_80 and sm_90: registers and instructions, without a GPU."""

from __future__ import annotations

import pytest

from infera_kernels.launch import CompileLauncher
from tests.kernels.support import FakeArray
from tests.kernels.test_compile import ARCHS, compiled

pytest.importorskip("triton")

from infera_kernels.triton import quantise

pytestmark = pytest.mark.kernels


@pytest.fixture(params=ARCHS, ids=lambda a: f"sm_{a}")
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
    parts = quantise.range_parts(size)
    ranges = FakeArray((2, parts), "float32") if parts else None
    scale, zero = FakeArray((), "float32"), FakeArray((), "uint8")
    quantise.dynamic_quantise(x, out, scale, zero, ranges, launcher)
    assert len(launcher.compiled) == (2 if parts else 1)
    for result in launcher.compiled:
        assert result.spilled_bytes == 0
        assert result.count("LDG.E.128") > 0 or size == 700
