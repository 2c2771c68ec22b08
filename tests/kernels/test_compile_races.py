"""What orders the threads of a program in compiled kernels: the barriers that are asked for, and no others."""

from __future__ import annotations

import re
from typing import Any

import pytest

from infera_kernels.launch import CompileLauncher
from tests.kernels.support import EVERY_ARCH, FakeArray

pytest.importorskip("triton")

from infera_kernels.triton.scatter_fold import scatter_fold
from tests.kernels import racing_kernels as racing

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("kernel", [racing.back, racing.reversed_in_place, racing.kept])
def test_triton_makes_no_barriers_for_memory(kernel: Any) -> None:
    launcher, x = CompileLauncher(90), FakeArray((128,), "float32")
    for barrier in (False, True):
        launcher.launch(kernel, (1,), {"x": x, "out": x}, {"N": 128, "BARRIER": barrier})
    assert [compiled.count("BAR") for compiled in launcher.compiled] == [0, 1]


@pytest.mark.parametrize("arch", EVERY_ARCH)
def test_updates_of_an_element_wait_for_each_other(arch: int) -> None:
    launcher, x = CompileLauncher(arch), FakeArray((8, 64), "float32")
    updates, indices = FakeArray((300, 64), "float32"), FakeArray((300, 64), "int64")
    scatter_fold("add", x, indices, updates, x, launcher, axis=0)
    (compiled,) = launcher.compiled
    assert re.findall(r"\b(?:LDG|STG|BAR)\b", compiled.sass) == ["LDG", "LDG", "LDG", "STG", "BAR"]
