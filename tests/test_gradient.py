"""Gradient nodes against finite differences in float64."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

import infera_gpu
from infera_gpu.errors import ModelError

TEXT = """g (double[2, 3] a, double[3] b) => (double[2, 3] y, double[2, 3] da, double[3] db) {
    s = Sigmoid(a)  t = Tanh(b)  p = Mul(s, t)  e = Exp(p)  q = Div(e, b)  l = Log(b)  r = Sub(q, l)
    n = Neg(r)  i = Identity(n)  m = Sum(i, a, p)  y = Add(m, s)
}"""


def model(text: str) -> onnx.ModelProto:
    graph = onnx.parser.parse_graph(text)
    domain = "ai.onnx.preview.training"
    graph.node.append(helper.make_node("Gradient", ["a", "b"], ["da", "db"], domain=domain, xs=["a", "b"], y="y"))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13), helper.make_opsetid(domain, 1)])


def test_every_rule_against_finite_differences() -> None:
    rng = np.random.default_rng(0)
    feeds = {"a": rng.uniform(-1, 1, (2, 3)), "b": rng.uniform(0.5, 1.5, 3)}
    session = infera_gpu.load(model(TEXT), device="cpu")
    got = session.run(feeds)
    for name in feeds:
        want = np.zeros_like(feeds[name])
        for at in np.ndindex(want.shape):
            step = np.zeros_like(want)
            step[at] = 1e-6
            high, low = (session.run({**feeds, name: feeds[name] + s})["y"].sum() for s in (step, -step))
            want[at] = (high - low) / 2e-6
        np.testing.assert_allclose(got[f"d{name}"], want, rtol=1e-6, atol=1e-8)


def test_what_has_no_rule_is_named() -> None:
    with pytest.raises(ModelError, match="no derivative of Erf 'y' is known"):
        infera_gpu.load(
            model("g (double[3] a, double[3] b) => (double[3] da, double[3] db) { y = Erf(a) }"), device="cpu"
        )
