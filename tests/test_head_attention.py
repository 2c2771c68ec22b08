"""Attention of heads that tf2onnx laid out as three axes: masks of other batches, and room for what is put before."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import infera_gpu
from infera_gpu.graph import Node
from infera_gpu.loader import load_graph
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.head_attention import ATTENTION
from tests.text import parse

APART = ATTENTION.example.replace("float[B, 1, T, 1] mask", "float[M, 1, T, 1] mask")
"""Nothing says that the mask's batch is that of the queries."""


def feeds(batch: int, mask: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"q": (batch, 4, 3, 2), "k": (batch, 5, 3, 2), "v": (batch, 5, 3, 2), "mask": (mask, 1, 5, 1)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("batch", "mask"), [(1, 1), (2, 2), (3, 1)])
def test_a_mask_of_a_batch_that_nothing_says_fuses_and_fits_when_run(batch: int, mask: int) -> None:
    fused, parts = (infera_gpu.load(parse(APART, 17), device="cpu", fuse=f) for f in (True, False))
    assert "Attention" in [n.op for n in fused.graph.nodes]
    given = feeds(batch, mask)
    np.testing.assert_allclose(fused.run(given)["y"], parts.run(given)["y"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("batch", "mask"), [(1, 3), (2, 3)])
@pytest.mark.parametrize("fuse", [True, False])
def test_what_was_refused_is_refused_still(batch: int, mask: int, fuse: bool) -> None:
    """Weights of more batches than the values have: as three axes, they do not broadcast."""
    session = infera_gpu.load(parse(APART, 17), device="cpu", fuse=fuse)
    with pytest.raises(infera_gpu.InferaError):
        session.run(feeds(batch, mask))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_nodes_are_put_before_another_where_no_slot_is_empty(count: int) -> None:
    text = "g (float[2] x) => (float[2] y) { a = Neg(x)  b = Abs(a)  y = Relu(b) }"
    draft = Draft(load_graph(parse(text, 17)))
    (old,) = draft.candidates(["Abs"])
    names = ["a", *(f"v{i}" for i in range(count))]
    before = [Node("Sqrt", (v,), (w,), {}) for v, w in itertools.pairwise(names)]
    draft.replace([old], Node("Sign", (names[-1],), ("b",), {}), (), before)
    graph = draft.finished()
    assert [n.op for n in graph.nodes] == ["Neg", *["Sqrt"] * count, "Sign", "Relu"]
    graph.check()
    assert [n.op for n in draft.candidates(["Neg", "Relu"])] == ["Relu", "Neg"]


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize(
    ("axis", "perm", "goes"),
    [
        (1, "[0, 3, 1, 2, 4]", True),
        (2, "[0, 3, 2, 1, 4]", True),
        (-1, "[0, 2, 1, 3, 4]", True),
        (1, "[0, 2, 1, 3, 4]", False),
    ],
)
def test_heads_go_last_past_an_axis_of_one_element(opset: int, axis: int, perm: str, goes: bool) -> None:
    unsqueeze = "Unsqueeze(p, at)" if opset > 11 else f"Unsqueeze <axes = [{axis}]> (p)"
    text = f"""
        g (float[B, 3, S, 2] q, float[B, 3, 2, T] kt, float[B, 3, T, 2] v) => (float[A, C, D, E, F] y)
        <int64[1] at = {{{axis}}}> {{
            a = MatMul(q, kt)
            w = Softmax <axis = -1> (a)
            p = MatMul(w, v)
            u = {unsqueeze}
            y = Transpose <perm = {perm}> (u)
        }}"""
    fused, parts = (infera_gpu.load(parse(text, opset), device="cpu", fuse=f) for f in (True, False))
    (attention,) = (n for n in fused.graph.nodes if n.op == "Attention")
    assert bool(attention.attrs.get("heads_last", 0)) == goes
    assert ("Transpose" in [n.op for n in fused.graph.nodes]) != goes
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 3, 4, 2), "kt": (2, 3, 2, 5), "v": (2, 3, 5, 2)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    np.testing.assert_allclose(fused.run(given)["y"], parts.run(given)["y"], rtol=2e-6, atol=2e-6)
