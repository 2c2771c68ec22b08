"""Shapes that a graph computes: what is known of them before a run."""

from __future__ import annotations

import pytest

from infera_gpu.loader import load_graph
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.sizes import Sizes, product, quotient, reshaped
from infera_gpu.spec import Dim
from tests.text import parse


@pytest.mark.parametrize(
    ("dims", "made"),
    [
        ((), 1),
        ((2, 3), 6),
        (("b",), "b"),
        (("s", 4, "b"), "4×b×s"),
        ((2, "4×b×s", "b"), "8×b×b×s"),
        (("b", 0), 0),
        (("b", None), None),
        (("b", -1), None),
    ],
)
def test_products(dims: tuple[Dim, ...], made: Dim) -> None:
    assert product(dims) == made


@pytest.mark.parametrize(
    ("dims", "by", "made"),
    [
        (("b", "s", 64), (64,), "b×s"),
        (("b", "s", 64), ("b", 16), "4×s"),
        (("b", 6), (4,), None),
        (("b", 6), ("s",), None),
        (("b", 6), (0,), None),
        (("b", "b"), ("b",), "b"),
    ],
)
def test_quotients(dims: tuple[Dim, ...], by: tuple[Dim, ...], made: Dim) -> None:
    assert quotient(dims, by) == made


@pytest.mark.parametrize(
    ("target", "made"),
    [
        ((-1, 64), ("b×s", 64)),
        ((0, 0, 4, 16), ("b", "s", 4, 16)),
        (("b", -1, 4, 16), ("b", "s", 4, 16)),
        (("s", -1), ("s", "64×b")),
        ((-1, 7), (None, 7)),
    ],
)
def test_reshapes(target: Sizes, made: Sizes) -> None:
    assert reshaped(("b", "s", 64), target, keeps=True) == made


FORMS = {
    "shape": ("y = Shape(x)", ("B", "S", 8)),
    "part": ("y = Shape <start = 1> (x)", ("S", 8)),
    "casts": ("c = Cast <to = 6> (s)  y = Cast <to = 7> (c)", ("B", "S", 8)),
    "floats": ("c = Cast <to = 1> (s)  y = Cast <to = 7> (c)", ("B", "S", 8)),
    "halves": ("c = Cast <to = 10> (s)  y = Cast <to = 7> (c)", None),
    "fractions": ("c = Cast <to = 1> (s)  m = Max(c, thirds)  y = Cast <to = 7> (m)", None),
    "picked": ("y = Gather(s, i)", (8, "B")),
    "sliced": ("y = Slice(s, one, two)", ("S",)),
    "sliced_along_no_axis": ("y = Slice(s, one, two, one)", None),
    "joined": ("a = Slice(s, one, two)  y = Concat <axis = 0> (two, a, s)", (2, "S", "B", "S", 8)),
    "joined_along_no_axis": ("a = Slice(s, one, two)  y = Concat <axis = 1> (a, a)", None),
    "joined_numbers": ("a = Slice(s, one, two)  b = Squeeze(a)  y = Concat <axis = 0> (b, a)", None),
    "multiplied": ("y = ReduceProd(s)", ("8×B×S",)),
    "multiplied_to_a_number": ("p = ReduceProd <keepdims = 0> (s)  y = Concat <axis = 0> (p, two)", None),
    "not_multiplied": ("y = ReduceProd <noop_with_empty_axes = 1> (s)", None),
    "the_larger_of_equals": ("t = Shape(z)  y = Max(s, t)", ("B", "S", 8)),
    "the_larger_of_others": ("t = Gather(s, i)  u = Slice(s, zero, two)  y = Max(t, u)", ("8∨B", "B∨S")),
    "the_larger_of_numbers": ("t = Gather(s, last)  y = Max(t, two)", (8,)),
    "the_larger_of_nothing": ("y = Max(s, least)", ("B", "S", 8)),
    "the_larger_in_floats": ("c = Cast <to = 1> (s)  m = Max(lowest, c)  y = Cast <to = 7> (m)", ("B", "2∨S", 8)),
    "the_largest_of_unequal_lists": ("t = Gather(s, i)  u = Gather(s, j)  y = Max(t, u)", None),
    "one_as_a_scalar": ("a = Slice(s, one, two)  b = Squeeze(a)  y = Unsqueeze(b, zero)", ("S",)),
    "of_a_reshape": ("a = Gather(s, j)  r = Reshape(x, a)  y = Shape(r)", ("S", "B", 8)),
    "of_a_range": ("a = Gather(s, k)  r = Range(nothing, a, step)  y = Shape(r)", ("S",)),
    "unknown": ("y = Identity(given)", None),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_followed(form: str) -> None:
    text, wanted = FORMS[form]
    model = parse(
        f"""
        g (float[B, S, 8] x, int64[N] given) => (int64[M] y)
        <int64[2] i = {{-1, 0}}, int64[3] j = {{1, 0, 2}}, int64 k = {{1}}, int64[1] last = {{2}},
         int64[1] zero = {{0}}, int64[1] one = {{1}},
         int64[3] least = {{-1, 0, -8}}, float[3] lowest = {{-1, 2, 0}}, float[3] thirds = {{0, 0, 2.5}},
         int64[1] two = {{2}}, int64 nothing = {{0}}, int64 step = {{1}}> {{
            s = Shape(x)
            z = Relu(x)
            {text}
        }}""",
        17,
    )
    assert Draft(load_graph(model)).sizes("y") == wanted


def test_an_unknown_dimension_is_named_by_its_value_and_equal_to_itself_alone() -> None:
    text = """
        g (float[B, 8] x, int64[2] to) => (int64[2] y, int64[2] z)
        {
            a = Reshape(x, to)
            b = Relu(a)
            c = Reshape(x, to)
            y = Shape(b)
            z = Shape(c)
        }"""
    draft = Draft(load_graph(parse(text, 17)))
    known = {name: draft.sizes(name) for name in "yz"}
    assert known["y"] is not None
    assert len(known["y"]) == 2
    assert known["y"] != known["z"]
    shape = draft.spec("a")
    assert shape is not None
    assert shape.shape == known["y"]


def test_lists_that_double_again_and_again_are_given_up() -> None:
    joined = "  ".join(f"v{i + 1} = Concat <axis = 0> (v{i}, v{i})" for i in range(40))
    model = parse(f"g (float[B, 8] x) => (int64[M] v40) {{ v0 = Shape(x)  {joined} }}", 17)
    assert Draft(load_graph(model)).sizes("v40") is None
