"""Recurrences in Triton's interpreter, however they are cut, against float64 NumPy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from infera_kernels.portable import recurrent as portable
from tests.kernels.references import F32
from tests.kernels.support import Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton.recurrent import GATES, Cell, Inputs, States, Tiling, pick_tiling, recurrent

pytestmark = pytest.mark.kernels

STEPS = {"LSTM": portable.lstm_step, "GRU": portable.gru_step, "RNN": portable.rnn_step}
ACTIVATIONS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}
TILINGS = {
    "all_steps": Tiling(1, 4, 16, whole=True),
    "rows": Tiling(1, 4, 16, whole=False),
    "tiles": Tiling(16, 16, 16, whole=False),
}


def reference(cell: Cell, d: int, x: Array, r: Array, bias: Array, lengths: Array, start: list[Array]) -> Any:
    """One direction in float64, of what the inputs give to the gates."""
    activations = [portable.activation(*given) for given in cell.activations]
    plain = portable.Cell(
        activations, lambda xp, given, w: given, portable.product, cell.clip, cell.coupled, cell.linear
    )
    wide = [a.astype(np.float64) for a in (x, r, bias)]
    return portable.over_time(
        np, STEPS[cell.kind], plain, wide[0], np.empty((len(r), 0)), wide[1], wide[2], lengths,
        tuple(s.astype(np.float64) for s in start), None, reverse=cell.reverse or d == 1,
    )  # fmt: skip


@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize(("kind", "linear"), [("LSTM", False), ("GRU", False), ("GRU", True), ("RNN", False)])
def test_every_way_to_cut_a_recurrence(kind: str, linear: bool, name: str, interpreter: InterpreterLauncher) -> None:
    steps, directions, hidden, batch = 2, 2, 18, 17 if name == "tiles" else 2
    tiling, gates = TILINGS[name], GATES[kind]
    x = random((steps, batch, directions, gates, hidden), F32)
    r = random((directions, gates * hidden, hidden), F32, low=-0.3, high=0.3)
    bias = random((directions, 2 * gates * hidden), F32)
    lengths = (np.arange(batch) % 3).astype(np.int32)
    starts = [random((directions, batch, hidden), F32, seed=i) for i in range(1 + (kind == "LSTM"))]
    cell = Cell(kind, [(a, 0.0, 0.0) for a in ACTIVATIONS[kind]], clip=1.5, linear=linear)
    state = (directions, batch, hidden)
    h, c = Guarded((2, *state), F32), Guarded(state, F32) if kind == "LSTM" else None
    saved = Guarded((2, *state), F32) if kind == "GRU" and not linear else None
    y, ends = Guarded((steps, directions, batch, hidden), F32), [Guarded(state, F32) for _ in starts]
    given = Inputs(x, r, bias, lengths, *starts)
    held = States(h.array, c and c.array, saved and saved.array)
    y_c = ends[1].array if kind == "LSTM" else None
    execute(recurrent(cell, given, held, y.array, ends[0].array, y_c, interpreter, tiling))

    begin, *runs = interpreter.launches
    assert begin.kernel == "start_kernel"
    phases = [0] if tiling.whole else [1, 2] * steps if saved else [0] * steps
    assert [run.constexprs["PHASE"] for run in runs] == phases
    for scratch in (h, c, saved):
        if scratch is not None:
            scratch.check_guards()
    parts = [
        reference(cell, d, x[:, :, d].reshape(steps, batch, -1), r[d], bias[d], lengths, [s[d] for s in starts])
        for d in range(directions)
    ]
    assert_close(y, np.stack([made for made, _ in parts], axis=1), error=2e-6)
    for i, end in enumerate(ends):
        assert_close(end, np.stack([last[i] for _, last in parts]), error=2e-6)


@pytest.mark.parametrize(
    ("kind", "batch", "hidden", "want"),
    [
        ("LSTM", 1, 128, Tiling(1, 32, 128, whole=True)),
        ("GRU", 3, 5, Tiling(1, 8, 16, whole=True)),
        ("LSTM", 1, 1024, Tiling(1, 2, 512, whole=False)),
        ("GRU", 64, 256, Tiling(16, 16, 32, whole=False)),
        ("RNN", 600, 32, Tiling(16, 16, 32, whole=False)),
    ],
)
def test_how_a_recurrence_is_cut(kind: str, batch: int, hidden: int, want: Tiling) -> None:
    assert pick_tiling(kind, batch, 1, hidden) == want
