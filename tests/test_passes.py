"""Generated from the declarations: a fusion fires once on its example, never on a near miss, and changes no result."""

from __future__ import annotations

import numpy as np
import pytest

import infera_gpu
from infera_gpu.devices import open_device
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import FUSIONS
from infera_gpu.passes.engine import Fusion, apply
from infera_gpu.session import Session
from infera_gpu.spec import tensors_of
from tests.text import parse

EXAMPLES = [pytest.param(f, id=f.name) for f in FUSIONS]
NEAR_MISSES = [
    pytest.param(f, text, id=f"{f.name}-{text.split('(')[0].strip()}") for f in FUSIONS for text in f.near_misses
]


def test_fusions_have_names_of_their_own() -> None:
    assert len({f.name for f in FUSIONS}) == len(FUSIONS) > 0


@pytest.mark.parametrize("fusion", EXAMPLES)
def test_fires_once_on_its_example_and_changes_no_result(fusion: Fusion) -> None:
    graph = load_graph(parse(fusion.example, fusion.opset))
    rewritten, times = apply(graph, fusion)
    assert times == 1
    rewritten.check()
    assert apply(rewritten, fusion)[1] == 0
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal([d if isinstance(d, int) else 2 for d in spec.shape]).astype(spec.dtype)
        for name, spec in tensors_of(graph.inputs, "input").items()
    }
    want = Session(graph, open_device("cpu"), fuse=False).run(feeds)
    got = Session(rewritten, open_device("cpu"), fuse=False).run(feeds)
    for name, expected in want.items():
        np.testing.assert_allclose(got[name], expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("fusion", "text"), NEAR_MISSES)
def test_never_fires_on_a_near_miss(fusion: Fusion, text: str) -> None:
    graph = load_graph(parse(text, fusion.opset))
    assert apply(graph, fusion) == (graph, 0)


def test_every_fused_operator_is_declared() -> None:
    for fusion in FUSIONS:
        rewritten, _ = apply(load_graph(parse(fusion.example, fusion.opset)), fusion)
        for node in rewritten.nodes:
            assert registry().find(node.domain, node.op, rewritten.opset_of(node)), node.qualified


def test_identities_vanish_but_outputs_keep_their_names() -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Identity(x)  b = Relu(a)  y = Identity(b) }")
    session = infera_gpu.load(model, device="cpu")
    assert [n.op for n in session.graph.nodes] == ["Relu", "Identity"]
    np.testing.assert_array_equal(session.run({"x": np.array([-1, 2], np.float32)})["y"], [0, 2])


def test_constant_arithmetic_is_folded_and_dead_nodes_dropped() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { b = Add(a, a)  y = Mul(x, b)  dead = Neg(x) }"
    )
    session = infera_gpu.load(model, device="cpu")
    assert [n.op for n in session.graph.nodes] == ["Mul"]
    np.testing.assert_array_equal(session.run({"x": np.array([1, 1], np.float32)})["y"], [2, 4])
