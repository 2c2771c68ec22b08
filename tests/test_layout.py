"""Tensors whose axes take another order: what is left of two Transposes around every operator that has a rule."""

from __future__ import annotations

from typing import Any

import pytest

from infera_gpu.devices import open_device
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes.layout import convert
from infera_gpu.session import Session
from tests.layout_support import check
from tests.text import parse

OPERATORS: tuple[tuple[str, str, str], ...] = (
    ("relu", "", "u = Relu(t)"),
    ("leaky", "", "u = LeakyRelu <alpha = 0.3> (t)"),
    ("clip", "float low = {-0.5}, float high = {0.5}", "u = Clip(t, low, high)"),
    ("clip-below", "float low = {-0.5}", "u = Clip(t, low)"),
    ("cast", "", "i = Cast <to = 7> (t)  u = Cast <to = 1> (i)"),
    ("gelu", "", "u = infera.Gelu(t)"),
    ("dropout", "", "u = Dropout(t)"),
    ("scalar", "float c = {2}", "u = Mul(c, t)"),
    ("one", "float[1] c = {2}", "u = Mul(t, c)"),
    ("one-of-every-axis", "float[1,1,1,1] c = {2}", "u = Mul(t, c)"),
    ("channels", "float[1,3,1,1] c = {1, 2, 3}", "u = Add(t, c)"),
    ("channels-of-rank-3", "float[3,1,1] c = {1, 2, 3}", "u = Sub(c, t)"),
    ("columns", "float[5] c = {1, 2, 3, 4, 5}", "u = Div(t, c)"),
    ("images", "float[2,1,4,1] c = {1, 2, 3, 4, 5, 6, 7, 8}", "u = Max(t, c)"),
    ("itself", "", "u = Mul(t, t)"),
    ("where", "float z = {0}", "g = Greater(t, z)  n = Neg(t)  u = Where(g, t, n)"),
    ("prelu", "float[3,1,1] c = {0.1, 0.2, 0.3}", "u = PRelu(t, c)"),
    ("quantized", "float s = {0.1}, uint8 z = {7}", "q = QuantizeLinear(t, s, z)  u = DequantizeLinear(q, s, z)"),
    (
        "quantized-by-channel",
        "float[3] s = {0.1, 0.2, 0.3}, int8[3] z = {0, 1, 2}",
        "q = QuantizeLinear(t, s, z)  u = DequantizeLinear <axis = -3> (q, s, z)",
    ),
    ("softmax", "", "u = Softmax <axis = 1> (t)"),
    ("softmax-over-columns", "", "u = LogSoftmax(t)"),
    ("normalized", "", "u = LpNormalization <axis = 1> (t)"),
    *((f"concat-{axis}", "", f"v = Neg(t)  u = Concat <axis = {axis}> (t, v, t)") for axis in (0, 1, 2, 3, -3)),
    ("split", "int64[2] n = {1, 2}", "a, b = Split <axis = 1> (t, n)  u = Concat <axis = 1> (b, a)"),
    ("argmax", "", "i = ArgMax <axis = 1> (t)  u = Cast <to = 1> (i)"),
    ("reduced", "", "u = ReduceMean <axes = [2, 3]> (t)"),
    ("reduced-from-the-end", "", "u = ReduceMax <axes = [-3]> (t)"),
    ("summed", "int64[2] a = {3, 1}", "u = ReduceSum(t, a)"),
    ("slice", "int64[1] s = {1}, int64[1] e = {9}, int64[1] a = {-2}", "u = Slice(t, s, e, a)"),
    ("slice-without-axes", "int64[2] s = {0, 1}, int64[2] e = {1, 3}", "u = Slice(t, s, e)"),
    (
        "slice-with-steps",
        "int64[2] s = {0, -1}, int64[2] e = {3, -9}, int64[2] a = {1, 3}, int64[2] p = {2, -2}",
        "u = Slice(t, s, e, a, p)",
    ),
    ("pad", "int64[8] p = {0, 1, 2, 0, 1, 0, 0, 3}", "u = Pad(t, p)"),
    ("pad-mode", "int64[8] p = {0, 0, 2, 1, 0, 0, 1, 3}", "u = Pad <mode = \"reflect\"> (t, p)"),
    ("scales", "float[4] s = {1, 1, 2, 1.5}", "u = Resize <mode = \"linear\"> (t, , s)"),
    ("sizes", "int64[4] n = {2, 3, 7, 4}", "u = Resize(t, , , n)"),
    (
        "computed-sizes",
        "int64[1] two = {2}, int64[1] zero = {0}, int64[2] hw = {7, 9}",
        "h = Shape(t)  nc = Slice(h, zero, two)  n = Concat <axis = 0> (nc, hw)  u = Resize(t, , , n)",
    ),
    (
        "shape",
        "int64 one = {1}",
        "h = Shape <start = 1, end = 3> (t)  c = Gather(h, one)  f = Cast <to = 1> (c)  u = Mul(t, f)",
    ),
    (
        "batch-norm",
        "float[3] s = {1, 2, 3}, float[3] b = {0, 1, 2}, float[3] m = {3, 2, 1}, float[3] v = {1, 2, 3}",
        "u = BatchNormalization(t, s, b, m, v)",
    ),
    ("max-pool", "", "u = MaxPool <kernel_shape = [2, 3], strides = [1, 2], pads = [1, 0, 0, 1]> (t)"),
    ("average-pool", "", "u = AveragePool <kernel_shape = [2, 2], auto_pad = \"SAME_UPPER\"> (t)"),
    ("lrn", "", "u = LRN <size = 3, alpha = 0.5> (t)"),
    (
        "conv-transpose",
        "float[3,2,2,2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6}",
        "u = ConvTranspose <strides = [2, 2]> (t, w)",
    ),
    ("global-average", "", "u = GlobalAveragePool(t)"),
    ("global-max", "", "u = GlobalMaxPool(t)"),
    (
        "merged",
        "int64[3] a = {0, 3, -1}, int64[4] b = {2, 3, 4, 5}",
        "r = Reshape(t, a)  s = Relu(r)  u = Reshape(s, b)",
    ),
    ("squeezed", "int64[1] a = {2}", "r = ReduceMean <axes = [2]> (t)  s = Squeeze(r, a)  u = Unsqueeze(s, a)"),
    ("without-an-axis", "int64[1] a = {3}", "r = ReduceMax <axes = [3], keepdims = 0> (t)  u = Unsqueeze(r, a)"),
    (
        "transposed-back-and-forth",
        "float[1,4,5,3] c = {" + ", ".join(map(str, range(60))) + "}",
        "a = Transpose <perm = [0, 2, 3, 1]> (t)  b = Add(a, c)  u = Transpose <perm = [0, 3, 1, 2]> (b)",
    ),
)  # fmt: skip


ONES: tuple[tuple[str, str, str], ...] = (
    ("squeezed", "int64[1] a = {1}", "r = ReduceMean <axes = [1]> (t)  s = Squeeze(r, a)  u = Unsqueeze(s, a)"),
    ("without-axes", "int64[2] a = {2, 3}", "r = ReduceMean <axes = [2, 3], keepdims = 0> (t)  u = Unsqueeze(r, a)"),
    ("flattened", "int64[4] b = {2, 3, 1, 1}", "g = GlobalMaxPool(t)  f = Flatten(g)  u = Reshape(f, b)"),
)
"""What ends with the axes in their own order, and in a Transpose that moves axes of one element only."""

NEWER: tuple[tuple[str, str, str], ...] = (
    ("reduced", "int64[2] a = {2, -3}", "u = ReduceMin(t, a)"),
    ("pad-axes", "int64[4] p = {1, 2, 3, 0}, int64[2] a = {-1, 1}", "u = Pad(t, p, , a)"),
    ("resize-axes", "int64[2] n = {7, 9}", "u = Resize <axes = [3, 2]> (t, , , n)"),
    ("mish", "", "u = Mish(t)"),
)
"""From opset 18 on."""

OLDER: tuple[tuple[str, str, str], ...] = (
    ("upsample", "float[4] s = {1, 1, 2, 3}", "u = Upsample(t, s)"),
    ("slice", "", "u = Slice <starts = [1, 0], ends = [3, 2], axes = [1, -1]> (t)"),
    ("pad", "", "u = Pad <pads = [0, 1, 2, 0, 1, 0, 0, 3]> (t)"),
    ("clip", "", "u = Clip <min = -0.5, max = 0.5> (t)"),
    ("squeeze", "", "r = ReduceMean <axes = [2]> (t)  s = Squeeze <axes = [2]> (r)  u = Unsqueeze <axes = [-2]> (s)"),
)
"""At opset 9."""


def cases(*tables: tuple[int, tuple[tuple[str, str, str], ...]]) -> list[Any]:
    return [pytest.param(opset, c, b, id=f"{i}-{opset}") for opset, table in tables for i, c, b in table]


def between(constants: str, body: str, rank: int = 4) -> str:
    shape, to, back = {
        4: ("2, 4, 5, 3", [0, 3, 1, 2], [0, 2, 3, 1]),
        3: ("2, 5, 3", [0, 2, 1], [0, 2, 1]),
        5: ("2, 4, 5, 2, 3", [0, 4, 1, 2, 3], [0, 2, 3, 4, 1]),
    }[rank]
    return f"""
        between (float[{shape}] x) => (float[{", ".join("?" * rank)}] y) {f"<{constants}>" if constants else ""} {{
            t = Transpose <perm = {to}> (x)
            {body}
            y = Transpose <perm = {back}> (u)
        }}"""


@pytest.mark.parametrize(("opset", "constants", "body"), cases((17, OPERATORS), (18, NEWER), (9, OLDER)))
def test_transposes_on_both_sides_of_an_operator_vanish(opset: int, constants: str, body: str) -> None:
    check(between(constants, body), left=0, opset=opset)


@pytest.mark.parametrize(("opset", "constants", "body"), cases((17, ONES)))
def test_what_is_left_copies_nothing(opset: int, constants: str, body: str) -> None:
    made = check(between(constants, body), left=1, opset=opset)
    plan = Session(made, open_device("cpu"), fuse=False).plan_for({"x": (2, 4, 5, 3)})
    assert not [step for step in plan.steps if step.kind == "copy"]


@pytest.mark.parametrize("rank", [3, 5])
@pytest.mark.parametrize(
    ("constants", "body"),
    [
        ("float[3] s = {1, 2, 3}", "a = Softmax <axis = 1> (t)  m = ReduceMax <axes = [1]> (a)  u = Sub(a, m)"),
        ("", "a = Abs(t)  b = Concat <axis = 1> (a, t)  u = GlobalAveragePool(b)"),
    ],
    ids=["arithmetic", "pools"],
)
def test_other_ranks(rank: int, constants: str, body: str) -> None:
    check(between(constants, body, rank), left=0)


NEAR_MISSES = {
    "the-result-is-read-as-it-was": """
        g (float[2, 4, 5, 3] x) => (float[?, ?, ?, ?] u) {
            t = Transpose <perm = [0, 3, 1, 2]> (x)
            u = Relu(t)
        }""",
    "an-operator-without-a-rule": """
        g (float[2, 4, 5, 3] x) => (float[?, ?, ?, ?] y) {
            t = Transpose <perm = [0, 3, 1, 2]> (x)
            u = GlobalLpPool(t)
            y = Transpose <perm = [0, 2, 3, 1]> (u)
        }""",
    "a-rank-that-nobody-knows": """
        g (float[2, 4, 5, 3] x, float[2] c) => (float[?, ?, ?, ?] y) {
            t = Transpose <perm = [0, 3, 1, 2]> (x)
            k = Squeeze(c)
            u = Add(t, k)
            y = Transpose <perm = [0, 2, 3, 1]> (u)
        }""",
}


@pytest.mark.parametrize("text", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(text: str) -> None:
    graph = load_graph(parse(text, 17))
    made = convert(graph, registry())
    assert {(n.op, n.inputs, n.outputs) for n in made.nodes} == {(n.op, n.inputs, n.outputs) for n in graph.nodes}


@pytest.mark.parametrize("images", [0, 1, 2])
def test_pixels_are_reduced_to_a_row_of_channels_each_image(images: int) -> None:
    check(
        """g (float[N, 5, 7, 3] x) => (float[N, 3] y) {
            t = Transpose <perm = [0, 3, 1, 2]> (x)
            y = ReduceMax <axes = [2, 3], keepdims = 0> (t)
        }""",
        0,
        sizes={"N": images},
    )
