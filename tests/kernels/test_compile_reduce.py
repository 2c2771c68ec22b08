"""Reductions compiled for every architecture: wide loads, no spills, no traffic through shared memory in the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from infera_kernels.launch import CompileLauncher, Inspection
from tests.kernels.support import EVERY_ARCH, FakeArray

pytest.importorskip("triton")

from infera_kernels.triton import reduce as triton_reduce

pytestmark = pytest.mark.kernels


@pytest.fixture(params=EVERY_ARCH)
def launcher(request: pytest.FixtureRequest) -> CompileLauncher:
    return CompileLauncher(request.param)


def scratch(shape: Sequence[int], dtype: Any = "float32") -> FakeArray:
    return FakeArray(shape, dtype)


def reduced(
    launcher: CompileLauncher, kind: str, shape: tuple[int, ...], axes: tuple[int, ...], dtype: str = "float32"
) -> Inspection:
    """The first launch, of a reduction to an array without the axes; nothing spills."""
    kept = tuple(d for a, d in enumerate(shape) if a not in axes)
    out = FakeArray(kept, "int64" if kind in triton_reduce.POSITIONS else dtype)
    triton_reduce.reduce(kind, FakeArray(shape, dtype), axes, out, launcher, scratch)
    assert [i.spilled_bytes for i in launcher.compiled] == [0] * len(launcher.compiled)
    return launcher.compiled[0]


@pytest.mark.parametrize(
    ("shape", "axes", "grid"),
    [
        ((64, 1 << 20), (1,), (64, 9, 1)),
        ((1 << 20, 768), (0,), (12, 22, 1)),
        ((1, 10_000_000), (1,), (1, 489, 1)),
        ((8, 256, 56, 56), (0, 2, 3), (256, 3, 1)),
        ((8, 256, 768), (1,), (192, 1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loads_are_wide(
    dtype: str, shape: tuple[int, ...], axes: tuple[int, ...], grid: Any, launcher: CompileLauncher
) -> None:
    inspection = reduced(launcher, "sum", shape, axes, dtype)
    assert launcher.launches[0].grid == grid
    assert inspection.count("LDG.E.128") == inspection.count("LDG") > 0
    assert inspection.binary.spec.shared_bytes <= 4096


def test_short_rows_share_a_program(launcher: CompileLauncher) -> None:
    reduced(launcher, "max", (10_000_000, 3), (1,))
    (launch,) = launcher.launches
    assert (launch.constexprs["KEPT"], launch.constexprs["REDUCED"]) == (512, 4)


def test_more_than_32_bits_of_elements(launcher: CompileLauncher) -> None:
    inspection = reduced(launcher, "sum", (4, 1 << 30), (1,))
    assert launcher.launches[0].constexprs["WIDE"]
    assert inspection.count("LDG.E.128") > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "float64"])
@pytest.mark.parametrize("kind", ["prod", "max", "l2", "mean", "log_sum_exp", "arg_max", "arg_min_last"])
def test_every_family_fits_in_registers(kind: str, dtype: str) -> None:
    reduced(CompileLauncher(90), kind, (40, 5000), (1,), dtype)
