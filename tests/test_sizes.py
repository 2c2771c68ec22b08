"""Shapes that a graph computes: what is known of them before a run."""

from __future__ import annotations

import pytest

from infera_gpu.graph import made_name
from infera_gpu.loader import load_graph
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.known import broadcast
from infera_gpu.passes.sizes import Sizes, larger, lesser, product, quotient, reshaped
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
    ("a", "b", "made"),
    [
        ("b", 1, "1∨b"),
        ("b", 0, "b"),
        ("b", "b", "b"),
        (2, 3, 3),
        ("s", "b", "b∨s"),
        ("4×b", "s", None),
        ("b", None, None),
    ],
)
def test_the_larger_of_two(a: Dim, b: Dim, made: Dim) -> None:
    assert larger(a, b) == larger(b, a) == made


def test_the_larger_of_two_is_no_product() -> None:
    """Which a name with a factor in it would be taken for."""
    assert quotient((larger("4×b", "s"),), (4,)) is None
    assert quotient((lesser(64, "4×b"),), ("b",)) is None


def test_what_is_no_more_than_a_number_fits_beside_what_it_may_be() -> None:
    """A table of 64 positions cut to the length of a sequence is as long as the sequence, or refused beside it."""
    least = lesser(64, "s")
    assert broadcast([("b", "s", 8), (1, least, 8)]) == ("b", "s", 8)
    assert broadcast([("b", least, 8), (1, least, 8)]) == ("b", least, 8)
    assert broadcast([("t",), (least,)]) == (None,)
    assert lesser("s", "s") == "s"
    assert lesser("t", "s") is None


@pytest.mark.parametrize(
    ("part", "size"),
    [
        ("Slice(table, zero, length, one)", lesser(64, "S")),
        ("Slice(table, one, length, one)", None),
        ("Slice(table, zero, length, one, two)", None),
        ("Slice(x, zero, length, one)", "S"),
        ("Slice(table, zero, seven, one)", 7),
    ],
)
def test_parts_up_to_a_size(part: str, size: Dim) -> None:
    graph = load_graph(
        parse(f"""
        g (float[1, S] x, float[1, 64] table) => (float[1, N] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] seven = {{7}}> {{
            whole = Shape(x)
            length = Slice(whole, one, two)
            y = {part}
        }}""")
    )
    spec = Draft(graph).spec("y")
    assert spec is not None
    found = spec.shape[1]
    assert found == (size if size is not None else made_name("y", "1"))


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
    "of_a_pad": ("p = Pad(x, pads)  y = Shape(p)", ("B", "p⁄1", 11)),
    "of_a_computed_pad": (
        "a = Neg(one)  c = Concat <axis = 0> (zero, zero, zero, zero, a, zero)  p = Pad(x, c)  y = Shape(p)",
        ("B", "p⁄1", 8),
    ),
    "of_a_slice": ("p = Slice(x, one, two, two)  y = Shape(p)", ("B", "S", 1)),
    "of_a_slice_of_unknown_bounds": ("p = Slice(x, given, two, two)  y = Shape(p)", ("B", "S", "p⁄2")),
    "of_a_backward_slice": ("p = Slice(x, two, far, two, back)  y = Shape(p)", ("B", "S", 3)),
    "of_the_parts_of_a_split": (
        "p, r = Split <axis = 2> (x)  t = Shape(p)  u = Shape(r)  y = Concat <axis = 0> (t, u)",
        ("B", "S", 4, "B", "S", 4),
    ),
    "of_unequal_parts": (
        "p, r = Split <axis = 2> (x, parts)  t = Shape(p)  u = Shape(r)  y = Concat <axis = 0> (t, u)",
        ("B", "S", "p⁄2", "B", "S", "r⁄2"),
    ),
    "equal_parts_of_given_sizes": ("p, r = Split <axis = 2> (x, halves)  y = Shape(r)", ("B", "S", 4)),
    "unequal_parts_of_a_list": (
        "a, b = Split <axis = 0> (s, one_and_two)  y = Concat <axis = 0> (b, a)",
        ("S", 8, "B"),
    ),
    "parts_of_another_list": ("a, b = Split <axis = 0> (s, halves)  y = Concat <axis = 0> (b, a)", (None,) * 8),
    "parts_of_a_list": ("a, b, c = Split <axis = 0> (s)  y = Concat <axis = 0> (c, a)", (8, "B")),
    "divided": ("c = Slice(s, two, three)  y = Div(c, three)", (2,)),
    "divided_by_a_factor": ("a = ReduceProd(s)  y = Div(a, two)", ("4×B×S",)),
    "not_divided": ("c = Slice(s, one, two)  y = Div(c, three)", (None,)),
    "divided_in_floats": (
        "c = Slice(s, two, three)  f = Cast <to = 1> (c)  d = Div(f, thirds1)  y = Cast <to = 7> (d)",
        (None,),
    ),
    "a_shape_in_floats": ("y = Cast <to = 1> (s)", None),
    "of_a_constant": ("a = Gather(s, i)  c = ConstantOfShape(a)  y = Shape(c)", (8, "B")),
    "of_a_join": (
        "t = Gather(s, j)  r = Reshape(x, t)  q = Reshape(given2, q3)  c = Concat <axis = 0> (q, r)  y = Shape(c)",
        ("c⁄0", "B", 8),
    ),
    "of_a_convolution": ("c = Conv <group = 2, pads = [1, 0], strides = [2]> (z4, w)  y = Shape(c)", ("P", 4, 5)),
    "of_a_dilated_convolution": ("c = Conv <dilations = [2], pads = [2, 2]> (x4, w3)  y = Shape(c)", ("P", 4, "S")),
    "of_a_convolution_of_unknown_size": ("c = Conv <pads = [2, 1]> (x4, w3)  y = Shape(c)", ("P", 4, "c⁄2")),
    "of_a_convolution_padded_by_itself": (
        'c = Conv <auto_pad = "SAME_LOWER", strides = [3]> (z4, w1)  y = Shape(c)',
        ("P", 4, 3),
    ),
    "of_a_pool": ("c = MaxPool <kernel_shape = [3], strides = [2]> (z4)  y = Shape(c)", ("P", 3, 3)),
    "of_a_pool_rounded_up": (
        "c = MaxPool <kernel_shape = [3], strides = [2], ceil_mode = 1> (z4)  y = Shape(c)",
        ("P", 3, "c⁄2"),
    ),
    "of_a_transposed_convolution": ("c = ConvTranspose <group = 2> (x, w)  y = Shape(c)", ("B", 6, "c⁄2")),
    "unknown": ("y = Identity(given)", None),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_followed(form: str) -> None:
    text, wanted = FORMS[form]
    model = parse(
        f"""
        g (float[B, S, 8] x, int64[N] given, float[N] given2, int64[3] q3, float[4, 3, 1] w,
           float[P, 3, S] x4, float[P, 3, 8] z4, float[4, 3, 3] w3, float[4, 3, 1] w1) => (int64[M] y)
        <int64[2] i = {{-1, 0}}, int64[3] j = {{1, 0, 2}}, int64 k = {{1}}, int64[1] last = {{2}},
         int64[1] zero = {{0}}, int64[1] one = {{1}},
         int64[6] pads = {{0, 1, 1, 0, 0, 2}}, int64[1] far = {{-9}}, int64[1] back = {{-1}},
         int64[1] three = {{3}}, float[1] thirds1 = {{3}}, int64[2] parts = {{3, 5}},
         int64[2] halves = {{4, 4}}, int64[2] one_and_two = {{1, 2}},
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
