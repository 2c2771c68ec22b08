"""What fusions must not change: which models are refused, and what unknown sizes turn out to be."""

from __future__ import annotations

import numpy as np
import pytest

import infera_gpu
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
