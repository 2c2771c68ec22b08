"""Normalisation along one axis in one operator: every way in which exporters write it."""

from __future__ import annotations

import numpy as np
import pytest

import infera_gpu
from tests import layout_support
from tests.text import parse

SQUARES = {"Pow": "s = Pow({of}, two)", "Mul": "s = Mul({of}, {of})"}
OVER = {
    "Div": "r = Sqrt(a)  n = Div({of}, r)",
    "Reciprocal": "r = Sqrt(a)  i = Reciprocal(r)  n = Mul({of}, i)",
    "Pow": "i = Pow(a, low)  n = Mul({of}, i)",
}


CONSTANTS = """
    float two = {2}, float low = {-0.5}, float e = {0.01}, float[4, 1, 1] g = {1, -2, 0.5, 3},
    float[1, 4, 1, 1] b = {0.5, 1, 2, -3}"""


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("centred", [True, False])
def test_every_form_is_one_operator(centred: bool, square: str, over: str) -> None:
    of = "c" if centred else "x"
    text = parse(
        f"""
        g (float[B, 4, H, W] x) => (float[B, 4, H, W] y) <{CONSTANTS}> {{
            {"m = ReduceMean <axes = [1]> (x)  c = Sub(x, m)" if centred else ""}
            {SQUARES[square].format(of=of)}
            v = ReduceMean <axes = [-3]> (s)
            a = Add(v, e)
            {OVER[over].format(of=of)}
            p = Mul(g, n)
            y = Add(p, b)
        }}""",
        13,
    )
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 3)).astype(np.float32)
    fused, parts = (infera_gpu.load(text, device="cpu", fuse=f) for f in (True, False))
    (found,) = fused.graph.nodes
    assert (found.op, found.attrs["axis"], found.attrs["center"]) == ("AxisNormalization", 1, int(centred))
    got, want = fused.run({"x": x})["y"], parts.run({"x": x})["y"]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("op", ["AxisNormalization <axis = 1> (a, g, b)", "L2Normalization <axis = -3> (a)"])
def test_a_transpose_moves_past_it(op: str) -> None:
    made = layout_support.check(
        f"""
        g (float[2, 5, 3, 4] x) => (float[2, 5, 3, 4] y)
        <float[4] g = {{1, -2, 0.5, 3}}, float[4] b = {{1, 2, 3, 4}}> {{
            a = Transpose <perm = [0, 3, 1, 2]> (x)
            n = infera.{op}
            y = Transpose <perm = [0, 2, 3, 1]> (n)
        }}""",
        left=0,
    )
    (found,) = (n for n in made.nodes if n.domain == "infera")
    assert found.attrs["axis"] == 3
