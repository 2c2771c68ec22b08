"""What fusions must not change: which models are refused, and what unknown sizes turn out to be."""

from __future__ import annotations

import numpy as np
import pytest

import infera_gpu
from infera_gpu.errors import PlanError
from tests.text import parse

VARIANCE = "q = Pow({0}, two)  v = ReduceMean <axes = [{1}]> (q)  a = Add(v, e)  r = Sqrt(a)  n = Div({0}, r)"
LAYER = "m = ReduceMean <axes = [{0}]> (x)  c = Sub(x, m)  " + VARIANCE.format("c", "{0}")
AFFINE = "s = Mul(g, n)  y = Add(s, b)"
NORMS = {
    "layer": ("[B, N]", "[4]", f"{LAYER.format(-1)}  {AFFINE}", {"WidenedNormalization"}),
    "rms": ("[B, N]", "[4]", f"{VARIANCE.format('x', -1)}  y = Mul(n, g)", {"WidenedNormalization"}),
    "trailing": ("[B, N, M]", "[4, 4]", f"{LAYER.format('-2, -1')}  {AFFINE}", {"WidenedNormalization"}),
    "channels": ("[B, N, 3]", "[4, 1]", f"{LAYER.format(1)}  {AFFINE}", {"AxisNormalization"}),
    "group": (
        "[B, N, 3]",
        "[4, 1]",
        f"t = Reshape(x, groups)  i = InstanceNormalization(t, one, zero)  o = Shape(x)  n = Reshape(i, o)  {AFFINE}",
        {"InstanceNormalization"},
    ),
}
"""Norms over an axis whose length is not known, then scaled: x's shape, the scale's, nodes, operators that remain."""


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("name", NORMS)
def test_a_scale_may_widen_what_is_normalised(name: str, length: int) -> None:
    x, scale, nodes, left = NORMS[name]
    values = ", ".join(f"{v}" for v in np.linspace(-1, 2, 16 if scale == "[4, 4]" else 4))
    model = parse(f"""
        g (float{x} x) => (float{x.replace("N", "P").replace("M", "Q")} y)
        <float two = {{2}}, float e = {{1e-5}}, int64[3] groups = {{0, 1, -1}},
         float[1] one = {{1}}, float[1] zero = {{0}}, float{scale} g = {{{values}}}, float{scale} b = {{{values}}}> {{
            {nodes}
        }}""")
    dims = [{"B": 2, "N": length, "M": length}.get(d, 3) for d in x.strip("[]").split(", ")]
    feeds = {"x": np.random.default_rng(0).standard_normal(dims).astype(np.float32)}
    want = infera_gpu.load(model, device="cpu", fuse=False).run(feeds)["y"]
    for device in ("cpu", "recording"):
        session = infera_gpu.load(model, device=device)
        assert left <= {n.op for n in session.graph.nodes}, session.graph.nodes
        np.testing.assert_allclose(session.run(feeds)["y"], want, rtol=1e-5, atol=1e-6)


WEIGHTS = ", ".join(f"{v:.2f}" for v in np.linspace(-1, 1, 48))
IMPOSSIBLE = {
    "reshape": "(float[B, 3, 4] x) => (float[4, N] y) <int64[2] s = {6, 4}, int64[2] t = {4, -1}> "
    "{ a = Reshape(x, s)  y = Reshape(a, t) }",
    "squeeze": "(float[B, 3, 4] x) => (float[4, N] y) <int64[1] s = {1}, int64[2] t = {4, -1}> "
    "{ a = Squeeze(x, s)  y = Reshape(a, t) }",
    "unsqueeze": "(float[B, 3, 4] x) => (float[4, N] y) <int64[2] s = {1, 1}, int64[2] t = {4, -1}> "
    "{ a = Unsqueeze(x, s)  y = Reshape(a, t) }",
    "unsqueeze_twice": "(float[B, 3, 4] x) => (float[B, 3, 1, 1, 4] y) <int64[2] s = {2, 2}, int64[2] t = {1, 1}> "
    "{ a = Unsqueeze(x, s)  y = Expand(a, t) }",
    "quantised_twice": "(float[B, 3, 4] x) => (float[B, 3, 4] y) <float s = {0.5}, uint8 z = {3}> "
    "{ q = QuantizeLinear(x, s, z)  p = QuantizeLinear(q, s, z)  y = DequantizeLinear(p, s, z) }",
    "softmax": "(float[B, 3, 4] x) => (float[B, 3, 4] y) <int64[1] s = {3}> "
    "{ e = Exp(x)  t = ReduceSum(e, s)  y = Div(e, t) }",
    "scale": "(float[3, 3, N] x) => (float[3, 3, M] y) <float[2] s = {1, 2}> "
    "{ n = LayerNormalization(x, s)  y = Add(n, s) }",
    "layer_norm": "(float[B, 3, 4] x) => (float[B, 3, 4] y) <float two = {2}, float e = {1}> "
    "{ m = ReduceMean <axes = [5]> (x)  c = Sub(x, m)  q = Pow(c, two)  v = ReduceMean <axes = [5]> (q)"
    "  a = Add(v, e)  r = Sqrt(a)  y = Div(c, r) }",
    "rows_with_weights_of_images": f"(float[B, 3, 4] x) => (float[B, 8, N, M] y) <float[8, 3, 1, 2] w = {{{WEIGHTS}}}> "
    "{ y = Conv(x, w) }",
    "gemm_of_what_is_no_matrix": f"(float[B, 3, 4] x) => (float[B, 3, 6] y) <float[8, 6] w = {{{WEIGHTS}}}, "
    "int64[3] n = {1, 1, 2}> { t = Tile(x, n)  p = Gemm(t, w)  y = Relu(p) }",
}


@pytest.mark.parametrize("device", ["cpu", "recording"])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_a_model_asks_in_vain_is_refused(name: str, device: str) -> None:
    """A fusion that drops a node must not drop the error that it would have been."""
    model = parse(f"g {IMPOSSIBLE[name]}")
    for fuse in (False, True):
        with infera_gpu.load(model, device=device, fuse=fuse) as session, pytest.raises(PlanError):
            session.run({"x": np.ones((3, 3, 4), np.float32)})


def test_gemm_of_an_unknown_rank_is_one_node_with_its_activation() -> None:
    model = parse(f"""
        g (float[B, N] x) => (float[M, 6] y) <float[8, 6] w = {{{WEIGHTS}}}, int64[2] n = {{1, 2}}> {{
            t = Tile(x, n)
            p = Gemm(t, w)
            y = Relu(p)
        }}""")
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}
    with infera_gpu.load(model, device="cpu") as fused, infera_gpu.load(model, device="cpu", fuse=False) as written:
        assert [n.op for n in fused.graph.nodes] == ["Tile", "FusedMatMul"]
        np.testing.assert_allclose(fused.run(feeds)["y"], written.run(feeds)["y"], rtol=1e-5, atol=1e-6)
