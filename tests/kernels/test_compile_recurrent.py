"""Recurrences compiled for every architecture: registers and instructions, without a GPU."""

from __future__ import annotations

import pytest

from infera_kernels.launch import CompileLauncher
from tests.kernels.support import EVERY_ARCH, FakeArray

pytest.importorskip("triton")

from infera_kernels.triton.recurrent import GATES, Cell, Inputs, States, recurrent

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize(
    ("kind", "batch", "hidden", "barriers"),
    [("LSTM", 1, 128, True), ("GRU", 1, 64, True), ("LSTM", 1, 512, False), ("GRU", 64, 256, False)],
)
def test_weights_are_read_in_whole_words(kind: str, batch: int, hidden: int, barriers: bool, arch: int) -> None:
    launcher, state = CompileLauncher(arch), (1, batch, hidden)
    given = Inputs(
        FakeArray((1, batch, 1, GATES[kind], hidden), "float32"),
        FakeArray((1, GATES[kind] * hidden, hidden), "float32"),
        FakeArray((1, 2 * GATES[kind] * hidden), "float32"),
    )
    cells, saved = (FakeArray(s, "float32") for s in (state, (2, *state)))
    held = States(
        FakeArray((2, *state), "float32"), cells if kind == "LSTM" else None, saved if kind == "GRU" else None
    )
    activations = [("sigmoid", 0.0, 0.0), ("tanh", 0.0, 0.0), ("tanh", 0.0, 0.0)]
    recurrent(Cell(kind, activations), given, held, FakeArray((1, *state), "float32"), cells, None, launcher)
    _, *steps = launcher.compiled
    assert len(steps) == (2 if kind == "GRU" and not barriers else 1)
    for step in steps:
        assert step.spilled_bytes == 0
        assert step.count("LDG.E.128") > 0
