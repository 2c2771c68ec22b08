"""Float32 models in half precision and on integers: what is converted, what is not, and how far results are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import infera_gpu
from bench.build import bert, gpt2_step
from infera_gpu.departures import departures
from infera_gpu.devices import cuda
from infera_gpu.errors import InputError
from infera_gpu.graph import Graph
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import PRECISIONS, Precision
from infera_gpu.passes.half import BFLOAT16, FLOAT16, WAYS, halved
from infera_gpu.passes.int8 import by_columns, quantised
from infera_gpu.verify import TOLERANCES, compare
from tests.commandline import assert_fails, infera
from tests.text import parse

ROOT = Path(__file__).parents[1]

NARROWED = ("Clip", "IsInf", "Where", "Cast")
"""What makes a float32 value one in half precision: held to its range, but for infinities."""

WEIGHTS = ", ".join(f"{v:.3f}" for v in np.random.default_rng(0).uniform(-1, 1, 64 * 64))


def converted(text: str, dtype: Any = FLOAT16) -> Graph:
    return halved(load_graph(parse(text)), np.dtype(dtype)).check()


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def run(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from infera_gpu.devices.cpu import CpuDevice
    from infera_gpu.session import Session

    with Session(graph, CpuDevice(), fuse=False) as session:
        return session.run(feeds)


PRODUCT = "g (float[2, 4] x, float[4, 3] w) => (float[2, 3] y) { a = MatMul(x, w) b = Relu(a) y = Mul(b, b) }"


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_products_run_in_half_and_elementwise_operators_follow(dtype: np.dtype[Any]) -> None:
    graph = converted(PRODUCT, dtype)
    assert ops(graph) == [*NARROWED, *NARROWED, "MatMul", "Relu", "Mul", "Cast"]
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 4)).astype(np.float32), rng.standard_normal((4, 3)).astype(np.float32)
    got = run(graph, {"x": x, "w": w})["y"]
    assert got.dtype == np.float32
    want = np.maximum(x @ w, 0) ** 2
    assert 0 < np.abs(got - want).max() < 8 * float(ml_dtypes.finfo(dtype).eps) * want.max()


def test_what_no_product_touches_stays_as_it_is() -> None:
    text = "g (float[4] x) => (float[4] y) { a = Exp(x) b = Relu(a) y = Add(b, x) }"
    assert ops(converted(text)) == ["Exp", "Relu", "Add"]


def test_sensitive_operators_get_float32_between_those_in_half() -> None:
    graph = converted(
        "g (float[4, 4] x) => (float[4, 4] y) { a = MatMul(x, x) b = ReduceSum(a) c = Div(a, b) y = MatMul(c, a) }"
    )
    made = {n.outputs[0]: n for n in graph.nodes}
    assert ops(graph) == [*NARROWED, "MatMul", "Cast", "ReduceSum", "Div", *NARROWED, "MatMul", "Cast"]
    assert made["b"].inputs == ("a",)  # under its own name a value is float32
    assert made["c"].inputs == ("a", "b")


LOWEST = float(np.finfo(np.float32).min)

MASKS: dict[str, tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = {
    "given": ("float[6, 6] m", "", lambda seen: np.where(seen, np.float32(0), np.float32(LOWEST))),
    "computed": (
        "float[6, 6] seen",
        "n = Sub(one, seen)  m = Mul(n, lowest)",
        lambda seen: seen.astype(np.float32),
    ),
    "selected": ("bool[6, 6] seen", "m = Where(seen, zero, lowest)", lambda seen: seen),
}
"""How a model comes by what it adds to scores: the input, the nodes that make `m` of it, its values."""


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_queries_that_see_nothing_give_numbers(dtype: np.dtype[Any], mask: str, fuse: bool) -> None:
    """A batch padded on the left: NaN in such a row would be NaN everywhere after the next layer."""
    given, made, values = MASKS[mask]
    layer = """
            k{0} = Transpose <perm = [1, 0]> ({1})
            s{0} = MatMul(away, k{0})
            b{0} = Mul(s{0}, scale)
            a{0} = Add(b{0}, m)
            p{0} = Softmax(a{0})
            {0} = MatMul(p{0}, {1})"""
    text = f"""
        g (float[6, 8] x, {given}) => (float[6, 8] z)
        <float zero = {{0}}, float one = {{1}}, float lowest = {{{LOWEST}}}, float scale = {{0.35}}> {{
            {made}
            away = Neg(x) {layer.format("y", "x")} {layer.format("z", "y")}
        }}"""
    seen = np.tri(6, dtype=np.bool_)
    seen[:, :2] = False
    x = np.random.default_rng(0).uniform(3, 4, (6, 8)).astype(np.float32)
    feeds = {"x": x, given.split()[-1]: values(seen)}
    model = parse(text)
    precision: Precision = "fp16" if dtype == FLOAT16 else "bf16"
    want = infera_gpu.load(model, device="cpu").run(feeds)["z"]
    half = halved(load_graph(model), dtype).check()
    got = infera_gpu.load(model, device="cpu", precision=precision).run(feeds) if fuse else run(half, feeds)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got["z"], want, rtol=16 * float(ml_dtypes.finfo(dtype).eps))


@pytest.mark.parametrize(("value", "in_half"), [(-3.39e38, False), (-3.38e38, True), (1e-41, False), (1e-40, True)])
def test_constants_that_bfloat16_cannot_hold_stay_float32(value: float, in_half: bool) -> None:
    text = f"g (float[2, 2] x) => (float[2, 2] y) <float c = {{{value}}}> {{ a = MatMul(x, x) y = Max(a, c) }}"
    assert ("c" not in converted(text, BFLOAT16).constants) == in_half


def test_masks_of_bools_stay_so_and_their_attention_is_half() -> None:
    inputs = "float[1, 2, 3, 4] q, float[1, 2, 5, 4] k, float[1, 2, 5, 4] v, bool[3, 5] seen"
    model = parse(f"g ({inputs}) => (float[1, 2, 3, 4] y) {{ y = Attention(q, k, v, seen) }}", opset=23)
    whole = load_graph(model)
    graph = halved(whole, FLOAT16).check()
    assert ops(graph) == [*NARROWED * 3, "Attention", "Cast"]
    assert graph.nodes[-2].inputs[3] == "seen"
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal((1, 2, m, 4)).astype(np.float32) for n, m in (("q", 3), ("k", 5), ("v", 5))}
    feeds["seen"] = np.tri(3, 5, 1, dtype=np.bool_)
    np.testing.assert_allclose(run(graph, feeds)["y"], run(whole, feeds)["y"], atol=5e-3)


@pytest.mark.parametrize(
    ("divisor", "in_half"), [("{8}", True), ("{-0.5}", True), ("{1e-6}", False), ("{0}", False), ("{1e6}", False)]
)
def test_divisors_that_float16_cannot_hold_stay_float32(divisor: str, in_half: bool) -> None:
    text = f"g (float[2, 2] x) => (float[2, 2] y) <float d = {divisor}> {{ a = MatMul(x, x) y = Div(a, d) }}"
    graph = converted(text)
    (node,) = [n for n in graph.nodes if n.op == "Div"]
    assert (node.inputs[1] != "d") == in_half


@pytest.mark.parametrize(("value", "in_half"), [(-1.0, True), (-3e38, False)])
def test_padding_that_float16_cannot_hold_stays_float32(value: float, in_half: bool) -> None:
    text = f"""
        g (float[2, 2] x) => (float[2, 3] y) {{
            a = MatMul(x, x)
            y = Pad <pads = [0, 0, 0, 1], value = {value}> (a)
        }}"""
    model = parse(text)
    model.opset_import[0].version = 10
    graph = halved(load_graph(model), FLOAT16).check()
    assert (ops(graph)[-1] == "Cast") == in_half
    assert (run(graph, {"x": np.eye(2, dtype=np.float32)})["y"][:, 2] == np.float32(value)).all()


def test_tables_are_half_and_indices_are_not() -> None:
    graph = converted(
        "g (int64[3] i) => (float[3, 2] y) <float[4, 2] t = {1, 2, 3, 4, 5, 6, 7, 8}> { y = Gather(t, i) }"
    )
    assert ops(graph) == ["Gather", "Cast"]
    assert [a.dtype for a in graph.constants.values()] == [FLOAT16]
    np.testing.assert_array_equal(run(graph, {"i": np.array([3, 0, 1])})["y"], [[7, 8], [1, 2], [3, 4]])


def test_statistics_of_training_keep_their_types() -> None:
    """All that a BatchNormalization makes has the type of what it reads; a Cast widens each output of the graph."""
    text = """
        g (float[2, 2, 3] x) => (float[2, 2, 3] y, float[2] mean, float[2] variance)
        <float[2, 2, 1] w = {1, 0.5, 0.25, 2}, float[2] s = {1, 2}, float[2] v = {3, 4}> {
            a = Conv(x, w)
            y, mean, variance = BatchNormalization <training_mode = 1> (a, s, s, s, v)
        }"""
    x = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    for dtype in (FLOAT16, BFLOAT16):
        assert {a.dtype for a in run(converted(text, dtype), {"x": x}).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "recording"])
@pytest.mark.parametrize("given", [True, False], ids=["mask_given", "mask_known"])
def test_a_query_that_sees_nothing_stays_so(precision: Precision, device: str, given: bool) -> None:
    """Minus infinity in a mask is no large number: with nothing else in a row the result is 0."""
    mask = np.zeros((3, 4), np.float32)
    mask[1], mask[2, 1] = -np.inf, -np.inf
    ins = "float[1, 2, 3, 8] q, float[1, 2, 4, 8] k, float[1, 2, 4, 8] v"
    model = parse(f"g ({ins}, float[3, 4] m) => (float[1, 2, 3, 8] y) {{ y = Attention(q, k, v, m) }}", opset=23)
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal((1, 2, s, 8)).astype(np.float32) for n, s in (("q", 3), ("k", 4), ("v", 4))}
    if given:
        feeds["m"] = mask
    else:
        del model.graph.input[3]
        model.graph.initializer.append(onnx.numpy_helper.from_array(mask, "m"))
    want = infera_gpu.load(model, device="cpu").run(feeds)["y"]
    got = infera_gpu.load(model, device=device, precision=precision).run(feeds)["y"]
    assert not want[0, :, 1].any()
    assert not got[0, :, 1].any()
    np.testing.assert_allclose(got, want, atol=0.05)


def test_shapes_are_asked_of_either() -> None:
    graph = converted("g (float[2, 2] x) => (int64[2] y, float[2, 2] z) { a = MatMul(x, x) y = Shape(a) z = Exp(a) }")
    assert Counter(ops(graph)) == {**Counter(NARROWED), "Cast": 2, "MatMul": 1, "Shape": 1, "Exp": 1}


def test_subgraphs_see_float32() -> None:
    text = """
        g (float[2, 2] x, bool c) => (float[2, 2] y) {
            a = MatMul(x, x)
            b = Relu(a)
            y = If (c) <
                then_branch = t () => (float[2, 2] p) { p = Exp(b) },
                else_branch = e () => (float[2, 2] q) { q = Neg(a) }
            >
        }"""
    graph = converted(text)
    x = np.full((2, 2), 0.5, np.float32)
    for c in (True, False):
        want = np.exp(np.maximum(x @ x, 0)) if c else -(x @ x)
        np.testing.assert_allclose(run(graph, {"x": x, "c": np.array(c)})["y"], want, rtol=1e-3)


def test_integer_models_are_left_alone() -> None:
    text = "g (int64[2, 2] x, double[2, 2] z) => (int64[2, 2] y, double[2, 2] w) { y = MatMul(x, x) w = MatMul(z, z) }"
    assert ops(converted(text)) == ["MatMul", "MatMul"]


def test_every_way_is_of_an_operator() -> None:
    names = {f"{op.domain}.{op.name}" if op.domain else op.name for op in registry()}
    assert WAYS.keys() <= names


def test_squares_of_a_variance_are_float32() -> None:
    """A layer norm that no fusion finds: the mean of squares less the square of the mean loses every digit in half."""
    text = """
        g (float[4, 64] x, float[64, 64] w) => (float[4, 64] y) <int64[1] last = {-1}, float eps = {1e-6}> {
            a = MatMul(x, w)
            m = ReduceMean <axes = [-1]> (a)
            q = Mul(a, a)
            s = ReduceMean <axes = [-1]> (q)
            n = Mul(m, m)
            v = Sub(s, n)
            e = Add(v, eps)
            r = Sqrt(e)
            c = Sub(a, m)
            y = Div(c, r)
        }"""
    graph = converted(text)
    made = {n.outputs[0]: n for n in graph.nodes}
    assert {"q", "n", "v", "e"} <= made.keys()  # under their own names: float32
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.uniform(4, 4.5, (4, 64)).astype(np.float32),
        "w": rng.uniform(0.9, 1, (64, 64)).astype(np.float32),
    }
    a = feeds["x"].astype(np.float64) @ feeds["w"].astype(np.float64)
    want = (a - a.mean(-1, keepdims=True)) / a.std(-1, keepdims=True)
    assert np.abs(run(graph, feeds)["y"] - want).max() < 0.1 * np.abs(want).max()


# ---- integers


def test_weights_are_symmetric_with_a_scale_for_each_column() -> None:
    weight = np.random.default_rng(1).standard_normal((50, 7)).astype(np.float32) * np.arange(7)
    q, scale = by_columns(weight)
    assert q.dtype == np.int8
    assert (np.abs(q[:, 1:]).max(0) == 127).all()
    assert scale[0] == 1
    assert np.abs(q * scale - weight).max() <= 0.5001 * scale.max()


def test_weights_too_small_for_a_scale_are_zeros() -> None:
    q, scale = by_columns(np.array([[1e-44, 1e-30], [-1e-42, 2e-30]], np.float32))
    assert q.tolist() == [[0, 64], [0, 127]]
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize(
    "text",
    [
        "y = MatMul(x, w)",
        "y = Gemm(x, w, c)",
        "y = Gemm <transB = 1, beta = 0.5> (x, w, c)",
        "a = MatMul(x, w) b = Gemm(x, w) y = Add(a, b)",
    ],
)
def test_known_products_become_integer_products(text: str) -> None:
    model = parse(f"g (float[N, 64] x, float[64] c) => (float[N, 64] y) <float[64, 64] w = {{{WEIGHTS}}}> {{ {text} }}")
    graph = quantised(load_graph(model)).check()
    assert "MatMulInteger" in ops(graph)
    assert ops(graph).count("DynamicQuantizeLinear") == 1
    assert not {"MatMul", "Gemm"} & set(ops(graph))
    assert "w" not in graph.constants
    rng = np.random.default_rng(2)
    feeds = {"x": rng.standard_normal((5, 64)).astype(np.float32), "c": rng.standard_normal(64).astype(np.float32)}
    (difference,) = compare(run(graph, feeds), infera_gpu.load(model, device="cpu").run(feeds))
    assert 1e-5 < difference.error < 0.03


@pytest.mark.parametrize(
    "text",
    [
        f"g (float[2, 4, 64] x) => (float[2, 4, 64] y) <float[64, 64] w = {{{WEIGHTS}}}> {{ y = Gemm(x, w) }}",
        "g (float[4, 64] x, float[64, 64] w) => (float[4, 64] y) { y = MatMul(x, w) }",
        "g (float[4, 2] x) => (float[4, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }",
        f"g (float[64, 4] x) => (float[4, 64] y) <float[64, 64] w = {{{WEIGHTS}}}> {{ y = Gemm <transA = 1> (x, w) }}",
        f"g (float[4, 64] x) => (float[4, 64] y) <float[64, 64] w = {{{WEIGHTS}}}> {{ y = Gemm <alpha = 2.0> (x, w) }}",
    ],
)
def test_other_products_are_left_alone(text: str) -> None:
    graph = load_graph(parse(text))
    assert ops(quantised(graph)) == ops(graph)


# ---- sessions


def small_bert() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    ids = np.random.default_rng(0).integers(0, 50, (2, 7))
    mask = np.ones((2, 7), np.int64)
    mask[1, 4:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros((2, 7), np.int64)}
    return bert(layers=2, hidden=64, heads=2, inner=128, vocabulary=50), feeds


@pytest.mark.parametrize("device", ["cpu", "recording"])
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16", "int8"])
def test_a_transformer_at_every_precision(device: str, precision: Any) -> None:
    model, feeds = small_bert()
    want = infera_gpu.load(model, device="cpu").run(feeds)
    with infera_gpu.load(model, device=device, precision=precision) as session:
        found = compare(session.run(feeds), want)
        counted = Counter(n.op for n in session.graph.nodes)
    assert all(d.within(TOLERANCES[precision]) for d in found), found
    if precision in ("fp16", "bf16"):
        assert counted["Cast"] <= 4  # at the edges only
        assert max(d.error for d in found) > 1e-5


@pytest.mark.parametrize(
    ("device", "product", "count"),
    [
        ("cpu", "NarrowMatMul", 12),
        pytest.param("recording", "MatMulIntegerToFloat", 8, marks=pytest.mark.kernels),
    ],
)
def test_integer_products_take_their_scales_and_biases_with_them(device: str, product: str, count: int) -> None:
    """Six products a layer; on a GPU queries, keys and values are one."""
    model, feeds = small_bert()
    with infera_gpu.load(model, device=device, precision="int8") as session:
        got = session.run(feeds)
        counted = Counter(n.op for n in session.graph.nodes)
    assert counted[product] == count
    assert counted["MatMulInteger"] == counted["MatMul"] == counted["FusedMatMul"] == counted["Mul"] == 0
    assert counted["Cast"] <= 1, "of the mask"
    assert counted["Add"] == 4, "the residuals"
    assert counted["Gelu"] + counted["Elementwise"] > 0
    (difference,) = compare(got, run(quantised(load_graph(model)), feeds))
    assert difference.within(TOLERANCES["fp32"]), str(difference)


@pytest.mark.parametrize("opset", [9, 12, 17])
@pytest.mark.parametrize(
    ("device", "fused"),
    [
        ("cpu", ["DynamicCentre", "NarrowMatMul"]),
        pytest.param("recording", ["DynamicQuantizeLinear", "MatMulIntegerToFloat"], marks=pytest.mark.kernels),
    ],
)
def test_what_is_quantised_is_fused_in_older_models(device: str, fused: list[str], opset: int) -> None:
    text = f"g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w = {{{WEIGHTS}}}> {{ y = MatMul(x, w) }}"
    model, x = parse(text, opset), np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    want = run(quantised(load_graph(model)).check(), {"x": x})
    with infera_gpu.load(model, device=device, precision="int8") as session:
        assert ops(session.graph) == fused
        (difference,) = compare(session.run({"x": x}), want)
    assert difference.within(TOLERANCES["fp32"]), str(difference)


@pytest.mark.parametrize(
    ("weight", "turned"),
    [
        ("t = Transpose(w)", True),
        ("t = Transpose <perm = [1, 0]> (w)", True),
        ("u = Transpose(w) v = Identity(u) t = Transpose(v)", False),
        ("t = Transpose <perm = [0, 1]> (w)", False),
    ],
)
def test_weights_behind_a_transpose_are_quantised_too(weight: str, turned: bool) -> None:
    text = f"g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w = {{{WEIGHTS}}}> {{ {weight} y = MatMul(x, t) }}"
    graph = load_graph(parse(text))
    made = quantised(graph).check()
    assert "MatMulInteger" in ops(made)
    q, scales = by_columns(graph.constants["w"].T if turned else graph.constants["w"])
    assert any(np.array_equal(c, q) for c in made.constants.values())
    assert any(np.array_equal(c, scales) for c in made.constants.values())


@pytest.mark.parametrize("weight", ["t = Neg(w)", "t = Transpose <perm = [1, 0, 2]> (w)", "t = Neg(x)"])
def test_weights_that_are_computed_stay_as_they_are(weight: str) -> None:
    text = f"g (float[64, 64] x) => (float[64, 64] y) <float[64, 64] w = {{{WEIGHTS}}}> {{ {weight} y = MatMul(x, t) }}"
    graph = load_graph(parse(text))
    assert quantised(graph) is graph


def test_half_precision_without_a_gpu_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a GPU is expected. Whoever asks for the CPU means to check results."""
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "no driver")
    model = parse("half (float[1, 8] x) => (float[1, 8] y) { y = Relu(x) }")
    infera_gpu.load(model, precision="fp32")
    infera_gpu.load(model, device="cpu", precision="fp16")
    assert not caplog.messages
    infera_gpu.load(model, precision="bf16")
    assert caplog.messages == ["there is no GPU: precision='bf16' is computed on the CPU, slower than in fp32"]


def test_integers_that_nothing_is_computed_in_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    text = """
        nothing_to_quantise (float[1, 3, 8, 8] x) => (float[1, 2, 8, 8] y) <float[2, 3, 1, 1] w = {1, 2, 3, 4, 5, 6}> {
            y = Conv(x, w)
        }"""
    infera_gpu.load(parse(text), device="cpu", precision="int8")
    (told,) = caplog.messages
    assert "'nothing_to_quantise': precision='int8' changes nothing" in told
    assert "convolutions, and what loops and branches compute, stay float32" in told
    caplog.clear()
    infera_gpu.load(small_bert()[0], device="cpu", precision="int8")
    infera_gpu.load(parse(text), device="cpu")
    assert not caplog.messages


def test_every_load_tells_that_nothing_is_computed_in_integers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of a model does not keep it from that."""
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("INFERA_GRAPH_CACHE", "1")
    for _ in range(4):
        infera_gpu.load(ROOT / "examples/data/smalltype.onnx", device="cpu", precision="int8")
    assert ["changes nothing" in told for told in caplog.messages] == [True] * 4


@pytest.mark.kernels
@pytest.mark.parametrize("opset", [9, 12, 17])
def test_what_is_cast_to_half_is_bounded_in_one_launch(opset: int) -> None:
    text = """
        g (float[4, 8] x, float[4, 8] r) => (float[4, 8] y) {
            a = Mul(x, r)
            t = Transpose <perm = [1, 0]> (r)
            m = MatMul(a, t)
            y = MatMul(m, r)
        }"""
    model = parse(text, opset)
    rng = np.random.default_rng(4)
    feeds = {name: rng.standard_normal((4, 8)).astype(np.float32) for name in ("x", "r")}
    want = infera_gpu.load(model, device="cpu").run(feeds)
    with infera_gpu.load(model, device="recording", precision="fp16") as session:
        counted = Counter(n.op for n in session.graph.nodes)
        assert counted["Cast"] <= 1, "of the output"
        assert counted["Clip"] == 0
        assert all(d.within(TOLERANCES["fp16"]) for d in compare(session.run(feeds), want))


@pytest.mark.kernels
def test_outputs_are_float32_as_soon_as_nothing_else_reads_them() -> None:
    """Caches of keys and values: in both types until the end, they would lie in each other's way."""
    model = gpt2_step(past=15, layers=3, hidden=64, heads=2, vocabulary=50)
    with infera_gpu.load(model, device="recording", precision="fp16") as session:
        nodes = session.graph.nodes
    attention = [i for i, n in enumerate(nodes) if n.op == "Attention"]
    widened = [i for i, n in enumerate(nodes) if n.op == "Cast" and n.outputs[0].startswith(("key", "value"))]
    before = [sum(a < w for a in attention) for w in widened]
    assert before == [0, 1, 1, 2, 2, 3], "a key after its Transpose, a value after the attention of its layer"
    assert Counter(n.op for n in nodes)["Clip"] == 0


@pytest.mark.kernels
def test_half_precision_takes_half_the_memory() -> None:
    model, feeds = small_bert()
    full, half = (infera_gpu.load(model, device="recording", precision=p) for p in ("fp32", "fp16"))
    assert half.constant_bytes < 0.55 * full.constant_bytes
    assert half.plan_for(feeds).arena_bytes < 0.75 * full.plan_for(feeds).arena_bytes


@pytest.mark.kernels
def test_tensor_cores_round_float32_only_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from infera_kernels.triton import matmul

    asked: list[str] = []
    original = matmul.matmul

    def noting(*args: Any, **options: Any) -> Any:
        asked.append(options["precision"])
        return original(*args, **options)

    monkeypatch.setattr(matmul, "matmul", noting)
    model, feeds = small_bert()
    for precision, want in (("fp32", "ieee"), ("tf32", "tf32")):
        asked.clear()
        infera_gpu.load(model, device="recording", precision=precision).run(feeds)  # type: ignore[arg-type]
        assert set(asked) == {want}


def test_precisions_that_make_no_sense_are_refused() -> None:
    model, _ = small_bert()
    with pytest.raises(InputError, match="precision is 'fp8', expected one of fp32, tf32, fp16, bf16, int8"):
        infera_gpu.load(model, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fuse=False runs it as it is written"):
        infera_gpu.load(model, precision="fp16", fuse=False)


# ---- where it departs


def test_the_first_value_that_departs_is_found(tmp_path: Path) -> None:
    text = """
        g (float[4, 4] x) => (float[4, 4] y) <float big = {300}> {
            a = MatMul(x, x)
            b = Mul(a, big)
            c = MatMul(b, b)
            d = Tanh(c)
            y = Add(d, x)
        }"""
    model, feeds = parse(text), {"x": np.full((4, 4), 2.0, np.float32)}
    found = list(departures(model, feeds, device="cpu", precision="fp16"))
    first = next(d.difference for d in found if not d.difference.within(1e-2))
    assert first.name == "c"  # 4 * (16 * 300)^2 overflows
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    np.save(tmp_path / "x.npy", feeds["x"])
    arguments = ("verify", path, "--device", "cpu", "--precision", "fp16", "-i", f"x={tmp_path / 'x.npy'}", "--first")
    status, out, _ = infera(*arguments)
    assert status == 0  # tanh of infinity is 1: the output does not show it
    assert "cpu in fp16 against cpu, tolerance 0.01 of the peak" in out
    assert "first to differ, after 2 that agree: " in out
    assert ": c: [0, 0] is inf" in out
    status, out, _ = infera(*arguments[:5], "bf16", *arguments[6:])
    assert status == 0
    assert "no value before the outputs differs, of " in out
    assert_fails(infera("run", path, "--random", "--device", "cpu", "--precision", "half"), "expected one of fp32")


def test_values_are_compared_for_constants_that_a_run_gives_and_beside_sequences() -> None:
    model = parse("""
        g (float[2, 2] x, float[2, 2] w) => (float[4, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
            a = MatMul(x, w)
            s = SequenceConstruct(a, x)
            y = ConcatFromSequence <axis = 0> (s)
        }""")
    feeds = {"x": np.eye(2, dtype=np.float32), "w": np.full((2, 2), 5, np.float32)}
    found = [d.difference for d in departures(model, feeds, device="cpu")]
    assert [(d.name, d.error, d.peak) for d in found] == [("a", 0, 5), ("y", 0, 5)]


# ---- subgraphs

IN_A_LOOP = f"""
    g (float[4, 64] x) => (float[4, 64] y) <int64 n = {{2}}, float[64, 64] w = {{{WEIGHTS}}}> {{
        a = MatMul (x, w)
        b = Loop (n, , a) <body = each (int64 i, bool c, float[4, 64] s) => (bool go, float[4, 64] t) {{
            go = Identity (c) t = MatMul (s, w)
        }}>
        y = MatMul (b, w)
    }}"""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bodies_stay_in_float32_but_for_tf32(precision: Precision) -> None:
    feeds = {"x": np.ones((4, 64), np.float32)}
    with infera_gpu.load(parse(IN_A_LOOP), device="recording", precision=precision) as session:
        session.run(feeds)
        plans = [plan for body in session.inside() for plan in body.plans]
    sites = [placed.site for plan in plans for placed in plan.segment.nodes if placed.node.op == "MatMul"]
    assert {spec.dtype for site in sites for spec in site.outs} == {np.dtype(np.float32)}
    assert {site.tf32 for site in sites} == {precision == "tf32"}
