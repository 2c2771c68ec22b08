"""Model-local functions: every way in which a call and a body can meet, against onnxruntime where it runs them."""

from __future__ import annotations

import itertools
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import infera_gpu
from infera_gpu.errors import InvalidModel

X = np.array([[-1.0, 2.0, 0.5], [3.0, -4.0, 0.0]], np.float32)


def parsed(text: str, opset: int = 17, ir_version: int = 10) -> onnx.ModelProto:
    """A model and its functions in text syntax, without the header."""
    header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "f" : 1]>\n'
    return parser.parse_model(header + text.strip())


def ours(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    with infera_gpu.load(model, device="cpu") as session:
        return list(session.run(feeds).values())


def agree(text: str, **feeds: np.ndarray) -> None:
    model = parsed(text)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    reference = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for got, want in zip(ours(model, **feeds), reference.run(None, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


FUNCTION = '<domain: "f", opset_import: ["" : 17, "f" : 1]>'


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(
            f"""g (float[N,M] x) => (float[N,M] y) {{ t = f.twice(x)  y = f.twice(t) }}
            {FUNCTION} twice (a) => (c) {{ b = Relu(a)  c = Add(b, b) }}""",
            id="called_twice",
        ),
        pytest.param(
            f"""g (float[N,M] x) => (float[N,M] y) {{ y = f.outer(x) }}
            {FUNCTION} outer (a) => (c) {{ b = f.inner(a)  c = f.inner(b) }}
            {FUNCTION} inner (a) => (c) {{ b = Neg(a)  c = Exp(b) }}""",
            id="functions_in_functions",
        ),
        pytest.param(
            f"""g (float[N,M] x) => (float[N,M] y) {{ y = f.leaky <alpha = 0.3> (x) }}
            {FUNCTION} leaky <alpha> (a) => (b) {{ b = LeakyRelu <alpha: float = @alpha> (a) }}""",
            id="attribute",
        ),
        pytest.param(
            f"""g (float[N,M] x) => (float[N,M] y, float[N,M] z) {{
                y = f.leaky (x)
                z = f.leaky <alpha = 0.3> (x)
            }}
            {FUNCTION} leaky <alpha: float = 0.5> (a) => (b) {{ b = LeakyRelu <alpha: float = @alpha> (a) }}""",
            id="attribute_with_a_default",
        ),
        pytest.param(
            f"""g (float[N,M] x) => (float[N,M] y) {{ y = f.leaky (x) }}
            {FUNCTION} leaky <alpha> (a) => (b) {{ b = LeakyRelu <alpha: float = @alpha> (a) }}""",
            id="attribute_left_out",
        ),
        pytest.param(
            f"""g (float[N,M] x) => (float[N,M] y) {{ y = f.plus <v = 1.5> (x) }}
            {FUNCTION} plus <v> (a) => (c) {{ b = Constant <value_float: float = @v> ()  c = Add(a, b) }}""",
            id="attribute_of_a_constant",
        ),
        pytest.param(
            f"""g (float[N,M] x, bool c) => (float[N,M] y) {{ y = f.pick <alpha = 0.25> (x, c) }}
            {FUNCTION} pick <alpha> (a, c) => (b) {{
                n = Neg(a)
                b = If (c) <
                    then_branch = t () => (r) {{ r = LeakyRelu <alpha: float = @alpha> (n) }},
                    else_branch = e () => (r) {{ r = Add(a, n) }}
                >
            }}""",
            id="attribute_in_a_subgraph_that_captures",
        ),
        pytest.param(
            f"""g (float[N,M] x, bool c) => (float[N,M] y) {{
                y = If (c) <
                    then_branch = t () => (float[N,M] r) {{ r = f.twice(x) }},
                    else_branch = e () => (float[N,M] r) {{ q = f.twice(x)  r = f.twice(q) }}
                >
            }}
            {FUNCTION} twice (a) => (c) {{ b = Relu(a)  c = Add(b, b) }}""",
            id="called_in_subgraphs",
        ),
        pytest.param(
            f"""g (float[N,M] x) => (float[N,M] y) {{ y = f.clip(x) }}
            {FUNCTION} clip (a, low, high) => (b) {{ b = Clip(a, low, high) }}""",
            id="inputs_left_out",
        ),
    ],
)
@pytest.mark.parametrize("truth", [True, False])
def test_agrees_with_onnxruntime(text: str, truth: bool) -> None:
    feeds = {"x": X} | ({"c": np.array(truth)} if "bool c" in text else {})
    agree(text, **feeds)


def test_an_input_may_be_an_output_and_outputs_may_be_one_value() -> None:
    model = parsed(
        f"""g (float[N,M] x) => (float[N,M] y, float[N,M] z, float[N,M] w) {{ y, z, w = f.same(x) }}
        {FUNCTION} same (a) => (a, b, b) {{ b = Neg(a) }}"""
    )
    y, z, w = ours(model, x=X)
    assert [a.tolist() for a in (y, z, w)] == [X.tolist(), (-X).tolist(), (-X).tolist()]


def test_an_output_may_be_left_out() -> None:  # onnxruntime refuses such calls
    model = parsed(
        f"""g (float[N,M] x) => (float[N,M] y, float[N,M] z) {{ y = f.two(x)  none, z = f.two(x) }}
        {FUNCTION} two (a) => (b, c) {{ b = Relu(a)  c = Neg(a) }}"""
    )
    model.graph.node[1].output[0] = ""
    y, z = ours(model, x=X)
    np.testing.assert_array_equal(y, np.maximum(X, 0))
    np.testing.assert_array_equal(z, -X)


def test_names_of_the_caller_are_not_captured_by_the_body() -> None:
    model = parsed(
        f"""g (float[N,M] r, bool q) => (float[N,M] b) {{ b = f.pick(r, q) }}
        {FUNCTION} pick (a, c) => (y) {{
            y = If (c) <
                then_branch = t () => (b) {{ r = Exp(a)  q = Add(r, a)  b = Neg(q) }},
                else_branch = e () => (b) {{ r = Relu(a)  b = Add(r, a) }}
            >
        }}"""
    )
    np.testing.assert_allclose(ours(model, r=X, q=np.array(True))[0], -(np.exp(X) + X), rtol=1e-6)
    np.testing.assert_allclose(ours(model, r=X, q=np.array(False))[0], np.maximum(X, 0) + X)


def test_overloads_are_told_apart() -> None:
    model = parsed(
        f"""g (float[N,M] x) => (float[N,M] y) {{ t = f.act(x)  y = f.act(t) }}
        {FUNCTION} act (v) => (w) {{ w = Neg(v) }}"""
    )
    other = onnx.FunctionProto()
    other.CopyFrom(model.functions[0])
    other.node[0].op_type = "Relu"
    for function, node, overload in zip((model.functions[0], other), model.graph.node, ("a", "b"), strict=True):
        function.overload = node.overload = overload
    model.functions.append(other)
    np.testing.assert_array_equal(ours(model, x=X)[0], np.maximum(-X, 0))


def versions(function_opset: int, model_opset: int) -> onnx.ModelProto:
    """softmax(x) of (2, 3, 4) without an axis: over the last two axes before opset 13, over the last one since."""
    body = [helper.make_node("Softmax", ["a"], ["b"])]
    function = helper.make_function("f", "soft", ["a"], ["b"], body, [helper.make_opsetid("", function_opset)])
    x, y, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3, 4]) for n in "xyz")
    nodes = [helper.make_node("soft", ["x"], ["y"], domain="f"), helper.make_node("Softmax", ["x"], ["z"])]
    opsets = [helper.make_opsetid("", model_opset), helper.make_opsetid("f", 1)]
    graph = helper.make_graph(nodes, "g", [x], [y, z])
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(("function_opset", "model_opset"), [(11, 17), (17, 11)])
def test_a_function_keeps_its_own_opset(function_opset: int, model_opset: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    e = np.exp(x)
    new, old = e / e.sum(axis=2, keepdims=True), e / e.sum(axis=(1, 2), keepdims=True)
    inner, outer = ours(versions(function_opset, model_opset), x=x)
    np.testing.assert_allclose(inner, old if function_opset < 13 else new, rtol=1e-5)
    np.testing.assert_allclose(outer, old if model_opset < 13 else new, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"g (float[N] x) => (float[N] y) {{ y = f.a(x, x) }} {FUNCTION} a (v) => (w) {{ w = Neg(v) }}",
            "has 2 inputs",
        ),
        (
            f"g (float[N] x) => (float[N] y) {{ y, z = f.a(x) }} {FUNCTION} a (v) => (w) {{ w = Neg(v) }}",
            "has 2 outputs",
        ),
        (
            f"g (float[N] x) => (float[N] y) {{ y = f.a <k = 1> (x) }} {FUNCTION} a (v) => (w) {{ w = Neg(v) }}",
            "has no attribute 'k'",
        ),
        (
            f"g (float[N] x) => (float[N] y) {{ y = f.a(x) }} {FUNCTION} a (v) => (w) {{ w = Neg(u) }}",
            "made by no node",
        ),
        (
            f"g (float[N] x) => (float[N] y) {{ y = f.a(x) }} {FUNCTION} a (v) => (w) {{ u = Neg(v) }}",
            "made by no node",
        ),
        (
            f"g (float[N] x) => (float[N] y) {{ y = f.a(x) }} {FUNCTION} a (v, v) => (w) {{ w = Neg(v) }}",
            "gives two inputs one name",
        ),
        (
            f"""g (float[N] x) => (float[N] y) {{ y = f.a(x) }}
            {FUNCTION} a (v) => (w) {{ w = f.b(v) }} {FUNCTION} b (v) => (w) {{ w = f.a(v) }}""",
            "calls itself",
        ),
        (
            f"""g (float[N] x) => (float[N] y) {{ y = f.a(x) }}
            {FUNCTION} a (v) => (w) {{ w = Neg(v) }} {FUNCTION} a (v) => (w) {{ w = Exp(v) }}""",
            "is defined twice",
        ),
        (
            "g (float[N] x) => (float[N] y) { y = LeakyRelu <alpha: float = @alpha> (x) }",
            "refers to an attribute of a function",
        ),
    ],
)
def test_what_does_not_fit_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        infera_gpu.load(parsed(text), device="cpu")


def test_constants_of_a_body_are_read_once() -> None:
    w = numpy_helper.from_array(np.ones((256, 256), np.float32), "w")
    body = [helper.make_node("Constant", [], ["w"], value=w), helper.make_node("MatMul", ["a", "w"], ["b"])]
    function = helper.make_function("f", "linear", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    names = [f"v{i}" for i in range(9)]
    nodes = [helper.make_node("linear", [a], [b], domain="f") for a, b in itertools.pairwise(names)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 256]) for n in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    with infera_gpu.load(model, device="cpu", fuse=False) as session:
        assert len(session.graph.constants) == 8
        assert len({id(a) for a in session.graph.constants.values()}) == 1


def test_deep_and_wide_functions_are_counted_before_they_are_expanded() -> None:
    made = [f"{FUNCTION} f0 (a) => (c) {{ c = Neg(a) }}"]
    made += [f"{FUNCTION} f{i} (a) => (c) {{ b = f.f{i - 1}(a)  c = f.f{i - 1}(b) }}" for i in range(1, 40)]
    began = time.process_time()
    with pytest.raises(InvalidModel, match=r"expand to 7,696,581,394,428 nodes and values"):
        infera_gpu.load(parsed("g (float[N] x) => (float[N] y) { y = f.f39(x) }" + "\n".join(made)), device="cpu")
    assert time.process_time() - began < 10
