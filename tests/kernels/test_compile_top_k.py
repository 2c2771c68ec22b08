"""The k best and running sums compiled for every architecture: wide loads, and rows sorted in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from infera_kernels.launch import CompileLauncher
from tests.kernels.support import EVERY_ARCH, FakeArray

pytest.importorskip("triton")

from infera_kernels.triton.scan import scan
from infera_kernels.triton.top_k import top_k

pytestmark = pytest.mark.kernels


def scratch(shape: Sequence[int], dtype: Any = "float32") -> FakeArray:
    return FakeArray(shape, dtype)


@pytest.mark.parametrize(
    ("shape", "k", "launches"), [((4096, 8), 2, [(32, 1, 1)]), ((4, 50272), 50, [(100, 1, 1), (4, 1, 1)])], ids=str
)
@pytest.mark.parametrize("arch", EVERY_ARCH)
def test_top_k(arch: int, shape: tuple[int, int], k: int, launches: list[Any]) -> None:
    launcher = CompileLauncher(arch)
    outs = FakeArray((shape[0], k), "float32"), FakeArray((shape[0], k), "int64")
    top_k(FakeArray(shape, "float32"), k, 1, *outs, launcher, scratch, largest=True)
    assert [launch.grid for launch in launcher.launches] == launches
    for inspection in launcher.compiled:
        assert inspection.spilled_bytes == 0
    if len(launches) > 1:
        assert launcher.compiled[0].count("LDG.E.128") > 0


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize(
    ("shape", "axis", "launches"),
    [
        ((1, 10_000_000), 1, [(1, 489, 1), (1, 1, 1), (1, 489, 1)]),
        ((4096, 1024), 1, [(2048, 1, 1)]),
        ((8, 512, 256), 1, [(64, 1, 1)]),
    ],
    ids=str,
)
def test_scan(shape: tuple[int, ...], axis: int, launches: list[Any], arch: int) -> None:
    launcher = CompileLauncher(arch)
    x, out = FakeArray(shape, "float32"), FakeArray(shape, "float32")
    scan("sum", x, axis, out, launcher, scratch, exclusive=False, reverse=False)
    assert [launch.grid for launch in launcher.launches] == launches
    for inspection in launcher.compiled[:: len(launches) - 1 or 1]:
        assert inspection.spilled_bytes == 0
        assert inspection.count("LDG.E.128") > 0
    assert launcher.compiled[-1].count("STG.E.128") > 0
