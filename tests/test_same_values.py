"""Nodes that give an input back or compute what another has vanish, and nothing that looks like them does."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from infera_gpu.devices import open_device
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import Fired, optimize
from infera_gpu.passes.same import drop_outputs, remove_identities, share_values
from infera_gpu.session import Session
from infera_gpu.spec import tensors_of
from tests.text import parse

BRANCHES = """<then_branch = t () => (float[2, 3] b) { b = Neg(a) },
                    else_branch = e () => (float[2, 3] d) { d = Abs(a) }>"""
X = "(float[2, 3] x) => (float[2, 3] y)"
GIVEN_BACK = {
    "identity": f"g {X} {{ a = Identity(x)  y = Neg(a) }}",
    "dropout": f"g {X} {{ a = Dropout(x)  y = Neg(a) }}",
    "cast": f"g {X} {{ a = Cast <to = 1> (x)  y = Neg(a) }}",
    "reshape": f"g {X} <int64[2] s = {{2, -1}}> {{ a = Reshape(x, s)  y = Neg(a) }}",
    "reshape_symbols": "g (float[B, 3] x) => (float[B, 3] y) <int64[2] s = {-1, 3}> { a = Reshape(x, s)  y = Neg(a) }",
    "transpose": f"g {X} {{ a = Transpose <perm = [0, 1]> (x)  y = Neg(a) }}",
    "slice": f"g {X} <int64[1] s = {{0}}, int64[1] e = {{9223372036854775807}}> {{ a = Slice(x, s, e)  y = Neg(a) }}",
    "pad": f"g {X} <int64[4] p = {{0, 0, 0, 0}}> {{ a = Pad(x, p)  y = Neg(a) }}",
    "tile": f"g {X} <int64[2] r = {{1, 1}}> {{ a = Tile(x, r)  y = Neg(a) }}",
    "concat": f"g {X} {{ a = Concat <axis = 0> (x)  y = Neg(a) }}",
    "expand": f"g {X} <int64[1] s = {{3}}> {{ a = Expand(x, s)  y = Neg(a) }}",
    "one": f"g {X} <float[1, 1] c = {{1}}> {{ a = Mul(c, x)  y = Neg(a) }}",
    "divided_by_one": f"g {X} <float c = {{1}}> {{ a = Div(x, c)  y = Neg(a) }}",
    "negative_zero": f"g {X} <float c = {{-0.0}}> {{ a = Add(x, c)  y = Neg(a) }}",
    "less_zero": f"g {X} <float c = {{0}}> {{ a = Sub(x, c)  y = Neg(a) }}",
}
NOT_GIVEN_BACK = {
    "an_output": f"g {X} {{ y = Identity(x) }}",
    "other_type": f"g {X} {{ a = Cast <to = 11> (x)  b = Neg(a)  y = Cast <to = 1> (b) }}",
    "other_shape": "g (float[2, 3] x) => (float[3, 2] y) <int64[2] s = {3, -1}> { a = Reshape(x, s)  y = Neg(a) }",
    "two_symbols": "g (float[B, C] x) => (float[B, C] y) <int64[2] s = {-1, 3}> { a = Reshape(x, s)  y = Neg(a) }",
    "training": f"g {X} <bool t = {{1}}, float r = {{0}}> {{ a = Dropout(x, r, t)  y = Neg(a) }}",
    "mask_is_read": "g (float[2, 3] x) => (float[2, 3] y, bool[2, 3] m) { a, m = Dropout(x)  y = Neg(a) }",
    "swapped": "g (float[2, 3] x) => (float[3, 2] y) { a = Transpose <perm = [1, 0]> (x)  y = Neg(a) }",
    "power_of_integers": "g (float[3] x) => (float y) <float c = {2}> { i = ArgMax <keepdims = 0> (x)  p = Pow(i, c)  "
    "a = Cast <to = 1> (p)  y = Neg(a) }",
    "part": "g (float[2] x) => (float[1] y) <int64[1] s = {0}, int64[1] e = {1}> { a = Slice(x, s, e)  y = Neg(a) }",
    "one_adds_an_axis": "g (float[3] x) => (float[1, 3] y) <float[1, 1] c = {1}> { a = Mul(c, x)  y = Neg(a) }",
    "one_over": f"g {X} <float c = {{1}}> {{ a = Div(c, x)  y = Neg(a) }}",
    "zero_turns_negative_zero": f"g {X} <float c = {{0}}> {{ a = Add(x, c)  y = Neg(a) }}",
    "less_negative_zero": f"g {X} <float c = {{-0.0}}> {{ a = Sub(x, c)  y = Neg(a) }}",
    "zero_less": f"g {X} <float c = {{0}}> {{ a = Sub(c, x)  y = Neg(a) }}",
    "captured": f"g (float[2, 3] x, bool c) => (float[2, 3] y) {{ a = Identity(x)  y = If (c) {BRANCHES} }}",
}  # fmt: skip


@pytest.mark.parametrize("text", GIVEN_BACK.values(), ids=GIVEN_BACK)
def test_what_gives_an_input_back_vanishes(text: str) -> None:
    graph = load_graph(parse(text))
    rewritten = remove_identities(graph)
    rewritten.check()
    assert [n.op for n in rewritten.nodes] == ["Neg"]
    x = np.array([[0.0, -0.0, np.inf], [1, -2, np.nan]], np.float32)
    want, got = (Session(g, open_device("cpu"), fuse=False).run({"x": x})["y"] for g in (graph, rewritten))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("text", NOT_GIVEN_BACK.values(), ids=NOT_GIVEN_BACK)
def test_what_only_looks_like_it_stays(text: str) -> None:
    graph = load_graph(parse(text))
    assert remove_identities(graph) == graph


def test_a_cast_stays_where_an_attribute_says_the_type() -> None:
    text = """g (int8[3] q) => (float[3] y) <float s = {0.5}> {
        a = DequantizeLinear <output_dtype = 10> (q, s)
        b = Cast <to = 1> (a)
        y = Neg(b)
    }"""
    graph = load_graph(parse(text, 23, 10))
    assert remove_identities(graph) == graph


SHARED = {
    "operators": ("g (float[3] x) => (float[3] y) { a = Exp(x)  b = Exp(x)  y = Add(a, b) }", 2),
    "chains": (
        "g (float[3] x) => (float[3] y) { a = Exp(x)  b = Exp(x)  c = Neg(a)  d = Neg(b)  y = Add(c, d) }",
        3,
    ),
    "constants": (
        "g (float[3] x) => (float[3] y) <float c = {2}, float d = {2}> { a = Mul(x, c)  b = Mul(x, d)  y = Add(a, b) }",
        2,
    ),
    "attributes_differ": (
        "g (float[3] x) => (float[3] y) { a = Elu <alpha = 1.0> (x)  b = Elu <alpha = 2.0> (x)  y = Add(a, b) }",
        3,
    ),
    "constants_of_other_signs": (
        "g (float[3] x) => (float[3] y) <float c={0}, float d={-0.0}> { a = Mul(x, c)  b = Mul(x, d)  y = Sub(a, b) }",
        3,
    ),
    "outputs_differ": ("g (float[2] x) => (float[2] y, bool[2] m) { y, m = Dropout(x) }", 1),
    "both_are_outputs": ("g (float[2] x) => (float[2] y, float[2] z) { y = Exp(x)  z = Exp(x) }", 2),
    "random": ("g (float[3] x) => (float[3] y) { a = RandomNormalLike(x)  b = RandomNormalLike(x)  y = Sub(a, b) }", 3),
    "training": (
        """g (float[3] x) => (float[3] y) <float r = {0.5}, bool t = {1}> {
            a = Dropout(x, r, t)  b = Dropout(x, r, t)  y = Sub(a, b)
        }""",
        3,
    ),
    "may_train": (
        """g (float[3] x, bool t) => (float[3] y) <float r = {0.5}> {
            a = Dropout(x, r, t)  b = Dropout(x, r, t)  y = Sub(a, b)
        }""",
        3,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "count"), SHARED.values(), ids=SHARED)
def test_what_is_computed_twice_is_computed_once(text: str, count: int) -> None:
    graph = load_graph(parse(text))
    rewritten = share_values(graph, registry())
    rewritten.check()
    assert len(rewritten.nodes) == count
    if "Random" in text or "Dropout(x, r, t)" in text:
        return
    feeds = {k: np.linspace(-1, 1, s.size, dtype=np.float32) for k, s in tensors_of(graph.inputs, "input").items()}
    want, got = (Session(g, open_device("cpu"), fuse=False).run(feeds) for g in (graph, rewritten))
    for name, expected in want.items():
        np.testing.assert_array_equal(got[name], expected)


def test_a_report_tells_what_each_pass_did() -> None:
    text = "g (float[3] x) => (float y) { a = Identity(x)  b = Exp(a)  c = Exp(x)  y = MatMul(b, c) }"
    found: list[Fired] = []
    optimize(load_graph(parse(text)), registry(), found.append)
    loaded = Counter({"Exp": 2, "Identity": 1, "MatMul": 1})
    assert found == [
        Fired("remove_identities", 1, loaded, Counter({"Exp": 2, "MatMul": 1})),
        Fired("share_values", 1, Counter({"Exp": 2, "MatMul": 1}), Counter({"Exp": 1, "MatMul": 1})),
    ]


@pytest.mark.parametrize(
    ("text", "outputs"),
    [
        ("g (float[1, 1, 4] x) => (float[1, 1, 3] y) { y, i = MaxPool <kernel_shape = [2]> (x) }", ("y",)),
        (
            "g (float[1, 1, 4] x) => (float[1, 1, 3] y, int64[1, 1, 3] i) { y, i = MaxPool <kernel_shape = [2]> (x) }",
            ("y", "i"),
        ),
        ("g (float[4] x) => (float[2] y) { y, i = Split <axis = 0> (x) }", ("y", "i")),
    ],
    ids=["unread", "read", "number_of_outputs_counts"],
)
def test_outputs_that_nobody_reads_are_left_out(text: str, outputs: tuple[str, ...]) -> None:
    (node,) = drop_outputs(load_graph(parse(text))).nodes
    assert node.outputs == outputs
