"""Vectors over their length in one operator: every way in which exporters write it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import infera_gpu
from tests.text import parse

SUMS = {
    "ReduceSum": "q = Mul(x, x)  s = ReduceSum(q, axis)",
    "of_powers": "q = Pow(x, two)  s = ReduceSum(q, axis)",
    "of_absolute_values": "p = Abs(x)  q = Pow(p, two)  s = ReduceSum(q, axis)",
    "ReduceSumSquare": "s = ReduceSumSquare(x, axis)",
}
LENGTHS = {"ReduceL2": "n = ReduceL2(x, axis)", **{k: f"{v}  n = Sqrt(s)" for k, v in SUMS.items()}}
BOUNDS = {"Max": "{to} = Max(e, {of})", "Add": "{to} = Add({of}, e)", "Clip": "{to} = Clip({of}, e)"}
OVER = {
    "Div": "y = Div(x, c)",
    "Reciprocal": "i = Reciprocal(c)  y = Mul(x, i)",
    "inverse": "i = Div(one, c)  y = Mul(i, x)",
    "Expand": "w = Shape(x)  v = Expand(c, w)  y = Div(x, v)",
}


def bounded(kind: str, of: str, to: str) -> str:
    return BOUNDS[kind].format(of=of, to=to)


FORMS = {
    **{
        f"{length}-{bound}-{over}": f"{LENGTHS[length]} {bounded(bound, 'n', 'c')} {OVER[over]}"
        for length, bound, over in itertools.product(LENGTHS, BOUNDS, OVER)
    },
    **{
        f"{sums}-{bound}-of_squares": f"{SUMS[sums]} {bounded(bound, 's', 'b')} c = Sqrt(b) {OVER['Reciprocal']}"
        for sums, bound in itertools.product(SUMS, BOUNDS)
    },
    "unbounded": "c = ReduceL2(x, axis)  y = Div(x, c)",
    "inverse_root": "q = Mul(x, x)  s = ReduceSum(q, axis)  b = Add(s, e)  i = Pow(b, low)  y = Mul(x, i)",
    "no_upper_bound": "n = ReduceL2(x, axis)  c = Clip(n, e, )  y = Div(x, c)",
    "largest_upper_bound": "n = ReduceL2(x, axis)  c = Clip(n, e, largest)  y = Div(x, c)",
    "largest_sum": "s = ReduceSumSquare(x, axis)  b = Clip(s, e, largest)  c = Sqrt(b)  y = Div(x, c)",
}


def model(text: str, axis: int = 1, width: str = "5") -> Any:
    return parse(
        f"""
        g (float[A, 4, {width}] x, int64[3] wide) => (float[A, 4, M] y)
        <int64[1] axis = {{{axis}}}, float two = {{2}}, float one = {{1}}, float low = {{-0.5}}, float e = {{0.25}},
         float largest = {{3.4028234663852886e38}}> {{
            {text}
        }}""",
        18,
    )


def check(text: Any, shape: tuple[int, ...], wide: tuple[int, ...] = (1, 1, 1), first: float = 0) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[0, :, 0] = 0
    x[0, 0, 0] = first
    given = {"x": x, "wide": np.array(wide)}
    fused, parts = (infera_gpu.load(text, device="cpu", fuse=f) for f in (True, False))
    assert [n.op for n in fused.graph.nodes if n.op != "Shape"] == ["L2Normalization"]
    np.testing.assert_allclose(fused.run(given)["y"], parts.run(given)["y"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_one_operator(form: str, axis: int) -> None:
    check(model(form, axis), (3, 4, 5))


@pytest.mark.parametrize("element", [np.inf, -np.inf, np.nan, 1e30])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_element_of_infinite_length_gives_what_the_parts_give(form: str, element: float) -> None:
    check(model(form), (3, 4, 5), first=element)


def test_lengths_wider_than_the_vectors_widen_the_result() -> None:
    text = "n = ReduceL2(x, axis)  c = Clip(n, e)  v = Expand(c, wide)  y = Div(x, v)"
    for wide in ((1, 1, 1), (1, 4, 6), (3, 1, 1)):
        check(model(text, width="W"), (1, 4, 1), wide)
