"""Normalisation whose means are pools, as tf2onnx writes the mean along the last of three axes, and Keras' batch norms
of rows."""

from __future__ import annotations

import numpy as np
import pytest

import infera_gpu
from infera_gpu.passes.engine import changed
from infera_gpu.passes.norm_batch import LAYER_NORM_AS_BATCH_NORM
from tests.text import parse

AFFINE = """
    r = Sqrt(a)
    i = Reciprocal(r)
    f = Mul(i, g)"""
FORMS = {
    "LayerNormalization": f"""
        m = GlobalAveragePool(x)
        c = Sub(x, m)
        s = Mul(c, c)
        v = GlobalAveragePool(s)
        a = Add(v, e)
        {AFFINE}
        n = Mul(m, f)
        t = Sub(b, n)
        p = Mul(x, f)
        y = Add(p, t)""",
    "LayerNormalization without shift": f"""
        m = GlobalAveragePool(x)
        c = Sub(x, m)
        s = Mul(c, c)
        v = GlobalAveragePool(s)
        a = Add(v, e)
        {AFFINE}
        o = Neg(m)
        n = Mul(o, f)
        p = Mul(x, f)
        y = Add(p, n)""",
    "LayerNormalization alone": """
        m = GlobalAveragePool(x)
        c = Sub(x, m)
        s = Mul(c, c)
        v = GlobalAveragePool(s)
        a = Add(v, e)
        r = Sqrt(a)
        f = Reciprocal(r)
        o = Neg(m)
        n = Mul(o, f)
        p = Mul(x, f)
        y = Add(n, p)""",
    "RMSNormalization": f"""
        s = Mul(x, x)
        v = GlobalAveragePool(s)
        a = Add(v, e)
        {AFFINE}
        y = Mul(x, f)""",
}


def loaded(form: str, x: str, before: str, *, fuse: bool = True) -> infera_gpu.Session:
    text = f"""
        g ({x}, int64[N] to) => (float[B, S, 8] y)
        <float[8] g = {{1, -2, 0.5, 3, 1, 2, 3, 4}}, float[8] b = {{0.5, 1, 2, -1, 0, 1, 2, 3}}, float e = {{1e-6}}> {{
            {before}
            {FORMS[form]}
        }}"""
    return infera_gpu.load(parse(text, 15), device="cpu", fuse=fuse)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("x", "before", "fires"),
    [
        ("float[B, S, 8] x", "", True),
        ("float[B, 24] z", "x = Reshape(z, to)", False),
    ],
    ids=["three axes", "unknown axes"],
)
def test_pools_are_means_where_three_axes_are_known(form: str, x: str, before: str, fires: bool) -> None:
    session, parts = (loaded(form, x, before, fuse=f) for f in (True, False))
    assert ([n.op for n in session.graph.nodes] == form.split()[:1]) == fires
    feeds = {"to": np.array([2, 3, 8])}
    feeds |= {k: np.random.default_rng(0).standard_normal((2, 3, 8), np.float32) for k in ("x",) if fires}
    feeds |= {k: np.random.default_rng(0).standard_normal((2, 24), np.float32) for k in ("z",) if not fires}
    given = {name: feeds[name] for name in session.inputs}
    want = parts.run(given)["y"]
    np.testing.assert_allclose(session.run(given)["y"], want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(("count", "fires"), [("4", True), ("8", False)])
def test_keras_norms_whose_rows_have_a_known_length(count: str, fires: bool) -> None:
    text = changed(
        LAYER_NORM_AS_BATCH_NORM.example,
        ("float none = {0},", f"float none = {{0}}, float count = {{{count}}},"),
        ("            count = Cast <to = 1> (v)\n", ""),
    )
    fused, parts = (infera_gpu.load(parse(text, 15), device="cpu", fuse=f) for f in (True, False))
    assert ([n.op for n in fused.graph.nodes] == ["LayerNormalization"]) == fires
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)}
    np.testing.assert_allclose(fused.run(feeds)["y"], parts.run(feeds)["y"], rtol=2e-5, atol=2e-6)
