"""Products of one input become one product where every node is a launch, and their parts are read where they lie."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

import infera_gpu
from infera_gpu.graph import Graph, HostArray
from infera_gpu.loader import load_graph
from infera_gpu.passes import siblings
from infera_gpu.passes.products import SHARED_INPUT
from infera_gpu.passes.products_integer import SHARED_DYNAMIC
from infera_gpu.passes.siblings import joined
from infera_gpu.session import Session
from tests.text import parse

WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "wq": (8, 8),
    "wk": (8, 4),
    "wv": (8, 4),
    "bq": (8,),
    "bv": (4,),
    "wo": (8, 6),
}

GROUPED = """
    g (float[B, S, 8] x, float[B, S, 6] r) => (float[B, S, 6] y)
    <int64[4] four = {0, 0, 4, 2}, int64[4] two = {0, 0, 2, 2}, int64[3] flat = {0, 0, 8},
     int64[5] wide = {0, 2, 1, -1, 2}, int64[5] spread = {1, 1, 2, 1, 1}, int64[4] heads = {0, 4, -1, 2}> {
        k = MatMul(x, wk)
        q0 = MatMul(x, wq)
        q = Add(q0, bq)
        v0 = MatMul(x, wv)
        v = Add(v0, bv)
        qr = Reshape(q, four)
        kr = Reshape(k, two)
        vr = Reshape(v, two)
        qh = Transpose <perm = [0, 2, 1, 3]> (qr)
        kh = Transpose <perm = [0, 2, 1, 3]> (kr)
        vh = Transpose <perm = [0, 2, 1, 3]> (vr)
        kw = Reshape(kh, wide)
        ke = Tile(kw, spread)
        kk = Reshape(ke, heads)
        vw = Reshape(vh, wide)
        ve = Tile(vw, spread)
        vv = Reshape(ve, heads)
        kt = Transpose <perm = [0, 1, 3, 2]> (kk)
        s = MatMul(qh, kt)
        p = Softmax <axis = -1> (s)
        c = MatMul(p, vv)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cr = Reshape(ct, flat)
        o = MatMul(cr, wo)
        y = Add(o, r)
    }"""
"""Attention whose keys and values have fewer heads than its queries; the keys have no bias."""


def weights(shapes: Mapping[str, tuple[int, ...]] = WEIGHTS) -> dict[str, HostArray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def model(text: str, constants: Mapping[str, HostArray]) -> bytes:
    from onnx import numpy_helper

    proto = parse(text)
    proto.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items())
    return bytes(proto.SerializeToString())


def ops(session: Session) -> list[str]:
    return [n.op for n in session.graph.nodes]


def feeds(batch: int = 2, length: int = 5) -> dict[str, HostArray]:
    rng = np.random.default_rng(1)
    return {k: rng.standard_normal((batch, length, n)).astype(np.float32) for k, n in (("x", 8), ("r", 6))}


def test_queries_keys_and_values_are_one_product_whose_parts_are_read_where_they_lie() -> None:
    payload = model(GROUPED, weights())
    session, parts = (infera_gpu.load(payload, device="recording", fuse=f) for f in (True, False))
    assert ops(session).count("Split") == 1
    plan = session.plan_for(feeds())
    (split,) = [p.site for p in plan.segment.nodes if p.site.node.op == "Split"]
    assert [s.dims[-1] for s in split.outs] == [4, 8, 4]
    lying = split.node.inputs[0]
    assert lying in {o.root for s in plan.steps for o in s.outs}
    assert not any(o and o.root == lying for s in plan.steps if s.kind == "copy" for o in s.ins)
    given = feeds()
    np.testing.assert_allclose(session.run(given)["y"], parts.run(given)["y"], rtol=1e-5, atol=1e-5)


def test_what_is_joined_takes_the_place_of_its_parts() -> None:
    given = weights()
    session = infera_gpu.load(model(GROUPED, given), device="recording")
    floats = [a for a in session.graph.constants.values() if a.dtype == np.float32]
    missing = 4  # the bias that the keys have not
    assert sum(a.size for a in floats) == sum(a.size for a in given.values()) + missing
    assert given.keys() & session.graph.constants.keys() == {"wo"}


@pytest.mark.parametrize(("device", "accuracy"), [("cpu", "fast"), ("recording", "strict")])
def test_products_stay_apart_on_the_cpu_and_in_strict_sessions(device: str, accuracy: str) -> None:
    session = infera_gpu.load(model(GROUPED, weights()), device=device, accuracy=accuracy)  # type: ignore[arg-type]
    assert "Split" not in ops(session)


def graph(nodes: str) -> Graph:
    return load_graph(
        parse(
            f"""
            g (float[2, 3] x, bool c) => (float[2, 2] y)
            <float[3, 2] u = {{1, 2, 3, 4, 5, 6}}, float[3, 2] v = {{-1, 7, 0.5, 4, -2, 8}},
             float[2] b = {{0.5, -1}}> {{
                {nodes}
            }}"""
        )
    )


def test_a_missing_bias_changes_no_sign_of_a_zero() -> None:
    rewritten, times = joined(graph("q = infera.FusedMatMul(x, u, b)  k = MatMul(x, v)  y = Mul(q, k)"), SHARED_INPUT)
    assert times == 1
    (bias,) = (a for name, a in rewritten.constants.items() if name.endswith("bias"))
    assert bias.tolist() == [0.5, -1, 0, 0]
    assert np.signbit(bias[2:]).all()  # -0 + -0 is -0, and 0 + -0 is 0


def test_siblings_that_a_layer_lies_between_stay_apart() -> None:
    for count, times in ((siblings.NEAR - 1, 1), (siblings.NEAR, 0)):
        between = " ".join(f"a{i + 1} = Tanh(a{i})" for i in range(count))
        found = graph(f"a0 = MatMul(x, u)  {between}  k = MatMul(x, v)  y = Mul(a{count}, k)")
        assert joined(found, SHARED_INPUT)[1] == times


def test_what_is_joined_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = graph("q = MatMul(x, u)  k = MatMul(x, v)  y = Mul(q, k)")
    monkeypatch.setattr(siblings, "FOLD_LIMIT", 2 * 24 - 1)
    assert joined(apart, SHARED_INPUT) == (apart, 0)
    monkeypatch.setattr(siblings, "FOLD_LIMIT", 2 * 24)
    assert joined(apart, SHARED_INPUT)[1] == 1


def test_a_subgraph_reads_what_siblings_made() -> None:
    text = """
        g (float[2, 3] x, bool c) => (float[2, 2] y)
        <float[3, 2] u = {1, 2, 3, 4, 5, 6}, float[3, 2] v = {-1, 7, 0.5, 4, -2, 8}> {
            q = MatMul(x, u)
            k = MatMul(x, v)
            y = If (c) <
                then_branch = yes () => (float[2, 2] t) { t = Sub(q, k) },
                else_branch = no () => (float[2, 2] e) { e = Identity(k) }
            >
        }"""
    session, parts = (infera_gpu.load(parse(text), device="recording", fuse=f) for f in (True, False))
    assert "Split" in ops(session)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for c in (True, False):
        given = {"x": x, "c": np.array(c)}
        np.testing.assert_array_equal(session.run(given)["y"], parts.run(given)["y"])


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_parts_are_cut_alike_at_every_opset(opset: int) -> None:
    text = """
        g (float[B, 3] x) => (float[B, 2] y)
        <float[3, 2] u = {1, 2, 3, 4, 5, 6}, float[3, 1] v = {-1, 7, 0.5}> {
            q = MatMul(x, u)
            k = MatMul(x, v)
            y = Sub(q, k)
        }"""
    session, parts = (infera_gpu.load(parse(text, opset), device="recording", fuse=f) for f in (True, False))
    assert "Split" in ops(session)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(session.run({"x": x})["y"], parts.run({"x": x})["y"])


@pytest.mark.parametrize(("scale", "times"), [("s", 1), ("t", 0)])
def test_siblings_read_what_the_maker_of_their_value_makes(scale: str, times: int) -> None:
    """The scale that a value was quantised with, not another's."""
    text = f"""
        g (float[2, 3] x, float[2, 3] v) => (float[2, 2] y)
        <int8[3, 2] u = {{1, 2, 3, 4, 5, 6}}, int8[3, 2] w = {{-1, 7, 0, 4, -2, 8}}, float[2] f = {{0.5, 0.25}}> {{
            q, s, z = DynamicQuantizeLinear(x)
            r, t, p = DynamicQuantizeLinear(v)
            h = com.microsoft.MatMulIntegerToFloat(q, u, s, f, z)
            k = com.microsoft.MatMulIntegerToFloat(q, w, {scale}, f, z)
            y = Mul(h, k)
        }}"""
    assert joined(load_graph(parse(text)), SHARED_DYNAMIC)[1] == times
