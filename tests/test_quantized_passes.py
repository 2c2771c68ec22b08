"""What quantised models become on a GPU: integers from one product to the next, and about the same answers."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import onnx
import pytest

from bench.build import bert
from bench.build_int8 import quantised
from bench.gpu_models import bert_feeds
from infera_gpu.devices import open_device
from infera_gpu.graph import Graph, HostArray
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import optimize
from infera_gpu.passes.quantized_norm import quantized_norms
from infera_gpu.passes.signed import signed
from infera_gpu.session import Session
from tests.text import parse

KINDS = ("triton", "cupy")

BLOCK = """
    block (float[N, 3, 17, 17] image) => (float[N, 5] y)
    <float si = {{0.03}}, {kind} zi = {{{zero}}}, float sa = {{0.05}}, {kind} za = {{{low}}}, float sb = {{0.04}},
     float sm = {{0.02}}> {{
        qi = QuantizeLinear(image, si, zi)
        di = DequantizeLinear(qi, si, zi)
        v1 = DequantizeLinear <axis = 0> (w1, s1)
        c1 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (di, v1, b1)
        r1 = Relu(c1)
        q1 = QuantizeLinear(r1, sa, za)
        d1 = DequantizeLinear(q1, sa, za)
        m = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (d1)
        qm = QuantizeLinear(m, sa, za)
        dm = DequantizeLinear(qm, sa, za)
        v2 = DequantizeLinear <axis = 0> (w2, s2)
        c2 = Conv <pads = [1, 1, 1, 1]> (dm, v2, b1)
        {sum}
        r2 = Relu(t2)
        q2 = QuantizeLinear(r2, sa, za)
        d2 = DequantizeLinear(q2, sa, za)
        g = GlobalAveragePool(d2)
        qg = QuantizeLinear(g, sm, za)
        dg = DequantizeLinear(qg, sm, za)
        f = Flatten(dg)
        qf = QuantizeLinear(f, sm, za)
        df = DequantizeLinear(qf, sm, za)
        v3 = DequantizeLinear(w3, s3)
        y = Gemm <transB = 1> (df, v3, b3)
    }}"""
DIRECT = "t2 = Add(c2, dm)"
"""As TensorRT's guide has it: the sums go on in float."""
QUANTISED = "qc = QuantizeLinear(c2, sb, zi)  dc = DequantizeLinear(qc, sb, zi)  t2 = Add(dc, dm)"
"""As onnxruntime's quantiser writes it: every result is quantised."""


def block(kind: str, how: str) -> Graph:
    """Two convolutions with a residual, pools and a product, in int8 or uint8."""
    zero, low = ("3", "-128") if kind == "int8" else ("131", "0")
    model = parse(BLOCK.format(kind=kind, zero=zero, low=low, sum=how))
    rng = np.random.default_rng(2)

    def integers(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.integers(-127, 128, shape).astype(np.int8), name)

    def floats(name: str, low: float, high: float, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.uniform(low, high, shape).astype(np.float32), name)

    model.graph.initializer.extend(
        [
            *(integers("w1", 16, 3, 3, 3), integers("w2", 16, 16, 3, 3), integers("w3", 5, 16)),
            *(floats("s1", 0.002, 0.004, 16), floats("s2", 0.001, 0.002, 16), floats("b1", -1, 1, 16)),
            *(onnx.numpy_helper.from_array(np.array(0.01, np.float32), "s3"), floats("b3", -1, 1, 5)),
        ]
    )
    return load_graph(model)


def on_gpu(graph: Graph) -> Graph:
    return optimize(graph, registry(), kinds=KINDS, channels_last=True)


def answer(graph: Graph, feeds: dict[str, HostArray]) -> HostArray:
    with Session(graph, open_device("cpu"), fuse=False) as session:
        made: HostArray = session.run(feeds)["y"]
        return made


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize(
    ("how", "steps"), [(DIRECT, {}), (QUANTISED, {"com.microsoft.QLinearAdd": 1})], ids=["direct", "quantised"]
)
def test_nothing_between_products_is_a_float(kind: str, how: str, steps: dict[str, int]) -> None:
    graph = block(kind, how)
    made = on_gpu(graph)
    views = ("Transpose", "Flatten", "infera.FlattenStored", "Identity")
    found = Counter(n.qualified for n in made.nodes if n.qualified not in views)
    assert found == {
        "QuantizeLinear": 1,
        "infera.QuantizedConvNHWC": 2,
        "infera.MaxPoolNHWC": 1,
        "com.microsoft.QLinearGlobalAveragePool": 1,
        "infera.QuantizedMatMul": 1,
        **steps,
    }
    image = {"image": np.random.default_rng(0).uniform(-3, 3, (2, 3, 17, 17)).astype(np.float32)}
    want, got = answer(graph, image), answer(made, image)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


def test_a_residual_is_read_as_integers_beside_the_sums() -> None:
    made = on_gpu(block("int8", DIRECT))
    inputs = [dict(enumerate(n.inputs)) for n in made.nodes if n.qualified == "infera.QuantizedConvNHWC"]
    assert not inputs[0].get(3)
    assert all(inputs[1].get(i) for i in (0, 3, 6, 7, 8, 9))
    assert inputs[1][0] == inputs[1][3]


@pytest.mark.kernels
def test_a_transformer_keeps_floats_for_attention_and_residuals() -> None:
    """A norm writes its integers beside the floats that go on to the next sum, but for that of embeddings, which is one
    with them; one product makes queries, keys and values; an activation is a part of the product before it."""
    build = partial(bert, layers=2, hidden=64, heads=4, inner=128, vocabulary=50)
    feeds = bert_feeds(2, 9, 50)
    graph = load_graph(quantised(build(), feeds))
    made = on_gpu(graph)
    found = Counter(n.qualified for n in made.nodes)
    assert found["infera.QuantizedMatMul"] == 2 * 4
    assert found["infera.QuantizedLayerNormalization"] == 2 * 2 - 1
    assert found["infera.Attention"] == 2
    assert found["QuantizeLinear"] == 2 + 1
    assert found["LayerNormalization"] == found["infera.EmbeddedNormalization"] == 1
    assert not found["DequantizeLinear"]
    with Session(graph, open_device("cpu"), fuse=False) as written, Session(made, open_device("cpu"), fuse=False) as on:
        want, got = (next(iter(s.run(feeds).values())) for s in (written, on))
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())


NORM = """
    norm (float[2, 8] x, float[8] w) => ({outs})
    <float s = {{0.1}}, int8 z = {{3}}, float[8] t = {{1, 1, 1, 1, 1, 1, 1, 1}},
     int8[8] p = {{0, 0, 0, 0, 0, 0, 0, 0}}> {{
        n = LayerNormalization(x, w)
        y = QuantizeLinear <axis = {axis}> (n, {parameters})
        {more}
    }}"""


@pytest.mark.parametrize(
    ("outs", "axis", "parameters", "more", "fires"),
    [
        ("int8[2, 8] y, float[2, 8] r", 1, "s, z", "r = Relu(n)", True),
        ("int8[2, 8] y", 1, "s, z", "", True),
        ("int8[2, 8] y, float[2, 8] n", 1, "s, z", "", True),
        ("int8[2, 8] y", 1, "t, p", "", False),
    ],
    ids=["read_elsewhere", "alone", "output", "scales_of_columns"],
)
def test_norms_write_integers_beside_floats(outs: str, axis: int, parameters: str, more: str, *, fires: bool) -> None:
    graph = load_graph(parse(NORM.format(outs=outs, axis=axis, parameters=parameters, more=more), 17))
    made = quantized_norms(graph)
    assert (made is not graph) == fires
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((2, 8)).astype(np.float32), "w": rng.uniform(0.5, 2, 8).astype(np.float32)}
    np.testing.assert_array_equal(answer(made, feeds), answer(graph, feeds))


UNSIGNED = """
    g (float[4] x) => ({outs}) <float s = {{0.5}}, uint8 z = {{{zero}}}, uint8 other = {{7}}> {{
        q = QuantizeLinear(x, s, z)
        y = DequantizeLinear(q, s, {point})
        {more}
    }}"""


@pytest.mark.parametrize("zero", [0, 100, 255])
def test_signed_integers_are_the_same_numbers(zero: int) -> None:
    graph = load_graph(parse(UNSIGNED.format(outs="float[4] y", zero=zero, point="z", more="")))
    made = signed(graph)
    assert [made.constants[n.inputs[2]].dtype.name for n in made.nodes] == ["int8", "int8"]
    x = {"x": np.array([-1e9, -0.25, 13.3, 1e9], np.float32)}
    np.testing.assert_array_equal(answer(made, x), answer(graph, x))


@pytest.mark.parametrize(
    ("outs", "point", "more"),
    [
        ("float[4] y, uint8[4] q", "z", ""),
        ("float[4] y, int32[4] w", "z", "w = Cast <to = 6> (q)"),
    ],
    ids=["output", "read_elsewhere"],
)
def test_integers_that_are_seen_stay_unsigned(outs: str, point: str, more: str) -> None:
    graph = load_graph(parse(UNSIGNED.format(outs=outs, zero=3, point=point, more=more)))
    assert signed(graph) is graph


def test_other_zero_points_are_moved_alike() -> None:
    """What is dequantised by another zero point than it was quantised by stays as far from it."""
    graph = load_graph(parse(UNSIGNED.format(outs="float[4] y", zero=3, point="other", more="")))
    x = {"x": np.array([-7, 0, 3, 200], np.float32)}
    np.testing.assert_array_equal(answer(signed(graph), x), answer(graph, x))


@pytest.mark.parametrize("op", ["MatMul", "Conv"])
@pytest.mark.parametrize(("depth", "largest"), [(33_000, 127), (70_000, 127), (70_000, 1)])
def test_sums_that_int32_does_not_hold_stay_floats(op: str, depth: int, largest: int) -> None:
    """70 000 x 255 x 127 is more than 2**31."""
    image = op == "Conv"
    axes, weights = ("1, 1", f"1, {depth}, 1, 1") if image else ("", f"{depth}, 1")
    model = parse(f"""
        deep (float[1, {depth}{", " if image else ""}{axes}] x) => (float[1, 1{", " if image else ""}{axes}] y)
        <float s = {{1}}, uint8 z = {{0}}> {{
            q = QuantizeLinear(x, s, z)
            a = DequantizeLinear(q, s, z)
            b = DequantizeLinear(w, s)
            y = {op}(a, b)
        }}""")
    shape = [int(d) for d in weights.split(",")]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(shape, largest, np.int8), "w"))
    graph = load_graph(model)
    made = on_gpu(graph)
    fits = depth * 255 * largest < 2**31
    assert any(n.op.startswith("Quantized") for n in made.nodes) == fits
    feeds = {"x": np.full((1, depth, 1, 1) if image else (1, depth), 255, np.float32)}
    with Session(graph, open_device("cpu")) as session:
        (on_cpu,) = session.run(feeds).values()
    for y in (answer(made, feeds), on_cpu):
        np.testing.assert_allclose(y, depth * 255.0 * largest, rtol=1e-3)
