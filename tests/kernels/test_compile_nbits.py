"""Products with weights of few bits compiled for every architecture: registers and instructions, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from infera_kernels.launch import CompileLauncher
from tests.kernels.support import EVERY_ARCH, FakeArray, wide_loads
from tests.kernels.test_compile import compiled

pytest.importorskip("triton")

from infera_kernels.triton import nbits

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bits", "block"), [("float16", 4, 128), ("float16", 4, 32), ("float32", 4, 32), ("float16", 8, 64)]
)
def test_weights_are_read_in_whole_words(dtype: str, bits: int, block: int, fused: bool, arch: int) -> None:
    """Where rows are normalised and a residual is added too."""
    launcher, (n, k) = CompileLauncher(arch), (4096, 4096)
    shape = (n, k // block)
    packed = FakeArray((*shape, block * bits // 8), "uint8")
    weight = nbits.Weight(packed, FakeArray(shape, dtype), FakeArray(shape, "float32"), bits)
    bias, out = FakeArray((n,), dtype), FakeArray((1, n), dtype)
    how: dict[str, Any] = {"gain": FakeArray((k,), dtype), "residual": FakeArray((1, n), dtype)} if fused else {}
    nbits.nbits_matmul(FakeArray((1, k), dtype), weight, bias, out, None, launcher, **how)
    result = compiled(launcher)
    assert wide_loads(result) >= 2
    assert result.count("LDGSTS") >= 8, "loads are not pipelined"
    assert not result.spilled_bytes
    if launcher.target.pdl:
        assert result.waits_first
        assert "CCTL.E.PF2" in result.sass.partition("ACQBULK")[0], "no weights are fetched before it waits"
