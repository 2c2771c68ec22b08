"""Grouped-query attention: heads of keys and values that exporters repeat are read where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import infera_gpu
from tests.text import parse

SCORES = {
    "plain": "w = Softmax <axis = -1> (e)",
    "mask": "f = Add(e, m)  w = Softmax <axis = -1> (f)",
    "mask_a_head": "f = Add(e, h)  w = Softmax <axis = -1> (f)",
    "mask_of_keys": "f = Add(n, e)  w = Softmax <axis = -1> (f)",
    "condition": "f = Where(l, e, low)  g = Add(f, m)  w = Softmax <axis = -1> (g)",
}
SWAPPED = "t = Transpose <perm = [0, 1, 3, 2]> (rk)  d = MatMul(q, t)  e = Mul(d, half)"
OPTIMISED = "e = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (q, rk)"


def model(scores: str, products: str) -> Any:
    return parse(
        f"""
        g (float[B, 6, M, 4] q, float[C, 2, N, 4] k, float[B, 2, N, 3] v, float[B, 1, M, N] m, float[B, 6, M, N] h,
           float[N] n, bool[B, 1, M, N] l, int64[5] wide, int64[4] flat) => (float[B, M, 6, 3] y)
        <int64[1] two = {{2}}, float half = {{0.5}}, float low = {{-1e30}}, int64[5] whole = {{1, 1, 3, 1, 1}},
         int64[4] heads = {{0, 6, -1, 3}}> {{
            bk = Unsqueeze(k, two)
            ek = Expand(bk, wide)
            rk = Reshape(ek, flat)
            bv = Unsqueeze(v, two)
            ev = Expand(bv, whole)
            rv = Reshape(ev, heads)
            {products}
            {scores}
            p = MatMul(w, rv)
            y = Transpose <perm = [0, 2, 1, 3]> (p)
        }}"""
    )


def feeds(rows: int, wide: tuple[int, ...], flat: tuple[int, ...], keys: int = 7) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "q": (2, 6, rows, 4),
        "k": (2, 2, keys, 4),
        "v": (2, 2, keys, 3),
        "m": (2, 1, rows, keys),
        "h": (2, 6, rows, keys),
        "n": (keys,),
    }
    given: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    given["l"] = rng.random((2, 1, rows, keys)) < 0.7
    return given | {"wide": np.array(wide), "flat": np.array(flat)}


def check(text: Any, given: dict[str, Any], steps: set[str]) -> None:
    fused, parts = (infera_gpu.load(text, device="cpu", fuse=f) for f in (True, False))
    assert [n.op for n in fused.graph.nodes] == ["Attention"]
    got, want = fused.run(given)["y"], parts.run(given)["y"]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert {step.label.split(" ")[0] for plan in fused.plans(given) for step in plan.steps} >= steps


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("products", [SWAPPED, OPTIMISED], ids=["swapped", "optimised"])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_repeated_heads_are_read_where_they_are(scores: str, products: str, rows: int) -> None:
    check(model(scores, products), feeds(rows, (2, 2, 3, 7, 4), (2, 6, 7, 4)), {"Attention"})


@pytest.mark.parametrize(
    ("wide", "flat"),
    [((2, 2, 3, 7, 4), (2, -1, 7, 4)), ((1, 1, 3, 1, 1), (0, 6, 7, 4)), ((2, 2, 3, 7, 4), (2, 6, 7, -1))],
)
def test_shapes_may_be_left_open(wide: tuple[int, ...], flat: tuple[int, ...]) -> None:
    check(model(SCORES["mask"], SWAPPED), feeds(5, wide, flat), {"Attention"})


def test_heads_that_are_mixed_are_computed_in_parts() -> None:
    """Three copies of two heads of a batch become the six heads of two."""
    given = feeds(5, (2, 2, 3, 7, 4), (2, 6, 7, 4))
    given |= {"k": given["k"][:1], "wide": np.array((1, 2, 6, 7, 4))}
    check(model(SCORES["plain"], SWAPPED), given, {"Softmax"})
