"""Rotary embedding in one operator: every way in which exporters write it, and what does not fit it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import infera_gpu
from tests.text import parse

CUTS = {
    "slices": "a = Slice(x, zero, half, axis, one)  b = Slice(x, half, far, axis)",
    "computed_chunks": """
        s = Shape(x)  d = Gather(s, last)  o = Add(d, one)  m = Div(o, two)  e = Mul(m, two)
        a = Slice(x, zero, m, last)  b = Slice(x, m, e, last)""",
    "split": "a, b = Split <axis = -1> (x, halves)",
    "chunks": "a, b = Split <axis = 3, num_outputs = 2> (x)",
}
PAIR_CUTS = {
    "every_second": "a = Slice(x, zero, far, axis, two)  b = Slice(x, one, far, last, two)",
    "unbound": """
        p = Reshape(x, pairs)  u, v = Split <axis = -1> (p, ones)  a = Squeeze(u, last)  b = Squeeze(v, last)""",
    "sliced": """
        p = Reshape(x, pairs)  u = Slice(p, zero, one, last)  v = Slice(p, one, two, last)
        a = Squeeze(u, last)  b = Squeeze(v, last)""",
    "gathered": "p = Reshape(x, pairs)  a = Gather <axis = -1> (p, nought)  b = Gather <axis = 4> (p, unit)",
}
BACK = {
    "flattened": "n = Shape(z)  g = Slice(n, zero, kept, zero)  h = Concat <axis = 0> (g, last)  y = Reshape(z, h)",
    "shape_of_x": "n = Shape(x)  y = Reshape(z, n)",
    "shape": "y = Reshape(z, whole)",
}
FULL = "f = Neg(b)  {join}  k = Mul(y, sin)  l = Mul(x, cos)  t = Add(l, k)"
PER_PAIR = """
    c = Mul(a, cos)  d2 = Mul(b, sin)  f = Sub(c, d2)  i = Mul(b, cos)  j = Mul(a, sin)  w = Add(i, j)  {join}"""
HALVES_JOINED = "y = Concat <axis = -1> (f, {second})"
PAIRS_JOINED = "q = Unsqueeze(f, last)  r = Unsqueeze({second}, last)  z = Concat <axis = -1> (q, r)  {back}"


def model(cut: str, rest: str, out: str, half: int = 4) -> Any:
    return parse(
        f"""
        g (float[B, A, S, 8] x, float[B, T, S, W] cos, float[B, T, S, W] sin) => (float[B, A, S, 8] {out})
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] half = {{{half}}},
         int64[1] far = {{9223372036854775807}}, int64[1] axis = {{3}}, int64[1] last = {{-1}}, int64[1] kept = {{-2}},
         int64[2] halves = {{4, 4}}, int64[2] ones = {{1, 1}}, int64[5] pairs = {{0, 0, 0, -1, 2}},
         int64[4] whole = {{2, 3, -1, 8}}, int64 nought = {{0}}, int64 unit = {{1}}> {{ {cut} {rest} }}""",
        18,
    )


def feeds(width: int = 8, heads: int = 3, tables: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"x": (2, heads, 5, 8), "cos": (2, tables, 5, width), "sin": (2, tables, 5, width)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def check(text: Any, out: str, given: dict[str, Any], *, whole: bool = True, **attrs: int) -> None:
    """One operator takes the place of the graph, but for the shapes that it reads, and computes the same.

    It is planned as one step, or as its parts where not `whole`.
    """
    fused, parts = (infera_gpu.load(text, device="cpu", fuse=f) for f in (True, False))
    (found,) = (n for n in fused.graph.nodes if n.domain == "infera")
    assert (found.op, {k: found.attrs[k] for k in attrs}) == ("Rotary", attrs)
    assert {n.op for n in fused.graph.nodes} <= {"Rotary", "Shape", "Gather", "Add", "Div", "Mul"}
    np.testing.assert_allclose(fused.run(given)[out], parts.run(given)[out], rtol=2e-6, atol=2e-6)
    (plan,) = fused.plans(given)
    assert ([step.label.split(" ")[0] for step in plan.steps] == ["Rotary"]) is whole


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_halves(cut: str) -> None:
    check(model(cut, FULL.format(join=HALVES_JOINED.format(second="a")), "t"), "t", feeds(), interleaved=0, per_pair=0)
    joined = model(cut, PER_PAIR.format(join=HALVES_JOINED.format(second="w")), "y")
    check(joined, "y", feeds(4), interleaved=0, per_pair=1)


@pytest.mark.parametrize("back", BACK.values(), ids=BACK)
@pytest.mark.parametrize("cut", PAIR_CUTS.values(), ids=PAIR_CUTS)
def test_neighbours(cut: str, back: str) -> None:
    whole = model(cut, FULL.format(join=PAIRS_JOINED.format(second="a", back=back)), "t")
    check(whole, "t", feeds(), interleaved=1, per_pair=0)
    per_pair = model(cut, PER_PAIR.format(join=PAIRS_JOINED.format(second="w", back=back)), "y")
    check(per_pair, "y", feeds(4), interleaved=1, per_pair=1)


@pytest.mark.parametrize(("half", "heads", "tables"), [(3, 6, 1), (4, 1, 6)], ids=["uneven", "wider"])
def test_halves_that_do_not_fit_are_computed_in_parts(half: int, heads: int, tables: int) -> None:
    text = model(CUTS["slices"], FULL.format(join=HALVES_JOINED.format(second="a")), "t", half)
    check(text, "t", feeds(heads=heads, tables=tables), whole=False)


@pytest.mark.parametrize("cut", PAIR_CUTS.values(), ids=PAIR_CUTS)
@pytest.mark.parametrize("back", ["flattened", "shape_of_x"])
def test_neighbours_that_do_not_fit_are_computed_in_parts(cut: str, back: str) -> None:
    join = PAIRS_JOINED.format(second="a", back=BACK[back])
    check(model(cut, FULL.format(join=join), "t"), "t", feeds(heads=1, tables=6), whole=False)
    join = PAIRS_JOINED.format(second="w", back=BACK["flattened"])
    check(model(cut, PER_PAIR.format(join=join), "y"), "y", feeds(4, heads=1, tables=6), whole=False)


def test_tables_cut_from_one_value_are_not_what_is_turned() -> None:
    text = parse(
        """
        g (float[B, A, S, 8] x, float[S, 8] t) => (float[B, A, S, 8] y) {
            a, b = Split <axis = -1, num_outputs = 2> (x)
            cos, sin = Split <axis = -1, num_outputs = 2> (t)
            c = Mul(cos, a)
            d = Mul(sin, b)
            f = Sub(c, d)
            i = Mul(cos, b)
            j = Mul(sin, a)
            w = Add(i, j)
            y = Concat <axis = -1> (f, w)
        }""",
        18,
    )
    rng = np.random.default_rng(0)
    given = {"x": rng.standard_normal((2, 3, 5, 8)), "t": rng.standard_normal((5, 8))}
    given = {name: value.astype(np.float32) for name, value in given.items()}
    fused, parts = (infera_gpu.load(text, device="cpu", fuse=f) for f in (True, False))
    assert [(n.op, n.inputs[0]) for n in fused.graph.nodes] == [("Split", "t"), ("Rotary", "x")]
    np.testing.assert_allclose(fused.run(given)["y"], parts.run(given)["y"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("fuse", [True, False])
def test_tables_of_another_type_are_refused_as_written(fuse: bool) -> None:
    text = """
        g (float[2, 3, 5, 8] x, int64[2, 1, 5, 8] cos, float[2, 1, 5, 8] sin) => (float[2, 3, 5, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] far = {9223372036854775807}, int64[1] axis = {3}> {
            a = Slice(x, zero, half, axis)
            b = Slice(x, half, far, axis)
            c = Neg(b)
            d = Concat <axis = -1> (c, a)
            e = Mul(d, sin)
            f = Mul(x, cos)
            y = Add(f, e)
        }"""
    session = infera_gpu.load(parse(text, 17), device="cpu", fuse=fuse)
    x = np.ones((2, 3, 5, 8), np.float32)
    with pytest.raises(infera_gpu.InferaError, match="differ in type"):
        session.run({"x": x, "cos": x[:, :1].astype(np.int64), "sin": x[:, :1]})
