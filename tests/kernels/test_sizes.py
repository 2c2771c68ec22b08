"""What has more rows than a grid has blocks beside its first dimension: 65,535."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import infera_gpu
from infera_gpu.errors import InvarianceError
from tests.text import parse

pytestmark = pytest.mark.kernels

ROWS = 1 << 16

EMBEDDING = f"""
    g (int64[N, 2048] i) => (float[N, 2048, 32] y)
    <uint8[3, 32] table = {{{", ".join(map(str, range(96)))}}}, float[3, 2] scale = {{1, 2, 3, 4, 5, 6}}> {{
        y = com.microsoft.GatherBlockQuantized <bits = 8, block_size = 16> (table, i, scale)
    }}"""

RECURRENT = """
    g (float[1, N, 1] x) => (float[1, 1, N, 1] y)
    <float[1, 1, 1] w = {0.5}, float[1, 1, 1] r = {0.25}> {
        y = RNN <hidden_size = 1> (x, w, r)
    }"""


def kinds(text: str, shape: Mapping[str, tuple[int, ...]], dtype: Any, *, batch_invariant: bool = False) -> list[str]:
    session = infera_gpu.load(parse(text), device="recording", batch_invariant=batch_invariant)
    plan = session.plan_for({name: np.zeros(s, dtype) for name, s in shape.items()})
    return [step.via for step in plan.steps]


@pytest.mark.parametrize("batch", [1, ROWS // 2048])
def test_tokens_are_as_many_as_memory_holds(batch: int) -> None:
    assert kinds(EMBEDDING, {"i": (batch, 2048)}, np.int64) == ["triton"]


@pytest.mark.parametrize(("batch", "kind"), [(16 * ROWS - 16, "triton"), (16 * ROWS, "portable")])
def test_sequences_have_a_kernel_as_far_as_grids_go(batch: int, kind: str) -> None:
    """A program has 16 of them."""
    assert kinds(RECURRENT, {"x": (1, batch, 1)}, np.float32) == [kind]


def test_sequences_of_a_program_each_are_refused_beyond_that() -> None:
    assert kinds(RECURRENT, {"x": (1, ROWS - 1, 1)}, np.float32, batch_invariant=True) == ["triton"]
    with pytest.raises(InvarianceError):
        kinds(RECURRENT, {"x": (1, ROWS, 1)}, np.float32, batch_invariant=True)
