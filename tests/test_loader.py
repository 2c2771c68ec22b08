"""What is no well-formed model is one clear ModelError, and costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from infera_gpu.errors import InferaError, ModelError
from tests.text import parse

RELU = "g (float[N] x) => (float[N] y) { y = Relu(x) }"


def changed(edit: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = parse(RELU)
    edit(model)
    return model


def node(op: str, ins: list[str], outs: list[str], **attrs: Any) -> Callable[[onnx.ModelProto], object]:
    return lambda m: m.graph.node.insert(0, helper.make_node(op, ins, outs, **attrs))


def initialiser(name: str) -> Callable[[onnx.ModelProto], object]:
    return lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), name))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.graph.node[0].input.append("x"), "Relu 'y' has 2 inputs, expected 1"),
        (node("Add", ["x"], ["a"]), "Add 'a' has 1 inputs, expected 2"),
        (node("Softmax", ["x"], ["a"], axis="first"), "Softmax 'a': attribute 'axis' is STRING, expected INT"),
        (node("Relu", ["x"], []), "has 0 outputs"),
        (node("Relu", ["nowhere"], ["a"]), "its input 'nowhere' is made by no node before it"),
        (node("Relu", ["x"], ["y"]), "its output 'y' is made twice"),
        (node("Constant", [], ["x"], value_float=1.0), "its output 'x' is made twice"),
        (lambda m: m.graph.ClearField("output"), "no outputs"),
        (lambda m: setattr(m.graph.output[0], "name", "other"), "output 'other' is made by no node"),
        (lambda m: m.graph.input.append(m.graph.input[0]), "input 'x' is given twice"),
        (lambda m: [initialiser("w")(m), initialiser("w")(m)], "initialiser 'w' is given twice"),
        (lambda m: [initialiser("w")(m), m.graph.initializer[0].dims.__setitem__(0, -1)], "has the shape"),
        (lambda m: setattr(m.opset_import[0], "version", 99), "opset 99 is unknown"),
        (lambda m: m.ClearField("opset_import"), "imports no operator set"),
        (lambda m: m.ClearField("graph"), "no outputs"),
    ],
)
def test_what_is_wrong_is_named(edit: Callable[[onnx.ModelProto], object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        infera_gpu.load(changed(edit), device="cpu")


@pytest.mark.parametrize("source", [None, 3, "a\0b", bytearray(b"nothing"), object()])
def test_what_is_no_source_is_refused(source: object) -> None:
    with pytest.raises(ModelError):
        infera_gpu.load(source, device="cpu")  # type: ignore[arg-type]


def test_bytes_of_any_kind_are_read() -> None:
    data = parse(RELU).SerializeToString()
    for source in (data, bytearray(data), memoryview(data)):
        assert infera_gpu.load(source, device="cpu").outputs.keys() == {"y"}


def functions(depth: int, *, recursive: bool = False) -> onnx.ModelProto:
    """y = f_depth(x), each function calling the one below it twice."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    made = []
    for i in range(depth):
        below = f"f{i - 1}" if i else ("f0" if recursive else "")
        domain = "f" if below else ""
        nodes = [helper.make_node(below or "Relu", [a], [b], domain=domain) for a, b in (("a", "b"), ("b", "c"))]
        made.append(helper.make_function("f", f"f{i}", ["a"], ["c"], nodes, opsets))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    graph = helper.make_graph([helper.make_node(f"f{depth - 1}", ["x"], ["y"], domain="f")], "g", [x], [y])
    return helper.make_model(graph, functions=made, opset_imports=opsets, ir_version=8)


def test_functions_are_inlined() -> None:
    session = infera_gpu.load(functions(3), device="cpu")
    assert session.run({"x": np.array([-1, 2], np.float32)})["y"].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("model", "message"),
    [(functions(40), "expand to"), (functions(1, recursive=True), "calls itself")],
)
def test_functions_without_end_are_refused_at_once(model: onnx.ModelProto, message: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ModelError, match=message):
        infera_gpu.load(model, device="cpu")
    assert time.perf_counter() - began < 10


def test_large_constants_made_of_few_bytes_are_not_made() -> None:
    size = "int64[1] s = {268435456}"
    model = parse(
        f"""g (float[1] x) => (float[N] y) <{size}> {{
            a = ConstantOfShape(s)  b = ConstantOfShape(s)  c = ConstantOfShape(s)
            d = Add(a, b)  e = Add(d, c)  y = Add(e, x)
        }}"""
    )
    session = infera_gpu.load(model, device="cpu")
    assert sum(a.nbytes for a in session.graph.constants.values()) <= (1 << 30) + 64


def test_a_branch_may_give_one_value_twice() -> None:
    model = parse(
        """g (float[N] x, bool c) => (float[N] y) {
            p, q = If (c) <
                then_branch = a () => (float[N] r, float[N] s) { r = Neg(x) s = Exp(x) },
                else_branch = b () => (float[N] r, float[N] s) { r = Relu(x) s = Neg(x) }
            >
            y = Add(p, q)
        }"""
    )
    for branch in model.graph.node[0].attribute:
        branch.g.output[1].name = branch.g.output[0].name
    session = infera_gpu.load(model, device="cpu")
    x = np.array([-1, 2], np.float32)
    np.testing.assert_array_equal(session.run({"x": x, "c": np.bool_(True)})["y"], -2 * x)
    np.testing.assert_array_equal(session.run({"x": x, "c": np.bool_(False)})["y"], [0, 4])


def test_a_branch_that_is_no_graph_is_named() -> None:
    model = changed(node("If", ["c"], ["a"], then_branch=1, else_branch=2))
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    with pytest.raises(InferaError, match="If 'a'"):
        infera_gpu.load(model, device="cpu").run({"x": np.zeros(2, np.float32), "c": np.bool_(True)})


def test_a_shape_that_is_left_out_says_nothing() -> None:
    model = parse(RELU)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    session = infera_gpu.load(model, device="cpu")
    assert str(session.inputs["x"]) == "float32[...]"
    for shape in ((), (3,), (2, 0, 4)):
        assert session.run({"x": np.ones(shape, np.float32)})["y"].shape == shape
