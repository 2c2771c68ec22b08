"""What is no well-formed model is one clear InvalidModel, and costs nothing."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from infera_gpu.errors import DeviceError, InferaError, InputError, InvalidModel
from infera_gpu.loader import load_graph
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
        (node("Relu", ["nowhere"], ["a"]), "its input 'nowhere' is made by no node"),
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
    with pytest.raises(InvalidModel, match=message):
        infera_gpu.load(changed(edit), device="cpu")


@pytest.mark.parametrize("source", [None, 3, "a\0b", bytearray(b"nothing"), object()])
def test_what_is_no_source_is_refused(source: object) -> None:
    with pytest.raises(InvalidModel):
        infera_gpu.load(source, device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_nodes_may_come_in_any_order(order: tuple[int, ...]) -> None:
    """As onnxruntime takes them; also what only a branch reads."""
    model = parse(
        """g (float[N] x, bool c) => (float[N] y) {
            a = Abs(x)
            b = Neg(x)
            z = If (c) <
                then_branch = t () => (float[N] p) { p = Exp(a) },
                else_branch = e () => (float[N] q) { q = Exp(b) }
            >
            y = Add(z, a)
        }"""
    )
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[i] for i in order)
    x = np.array([1, -2], np.float32)
    for c in (True, False):
        feeds = {"x": x, "c": np.array(c)}
        (want,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
        np.testing.assert_allclose(infera_gpu.load(model, device="cpu").run(feeds)["y"], want, rtol=1e-6)


@pytest.mark.parametrize("nodes", ["y = Add(x, y)", "y = Add(x, a) a = Neg(b) b = Neg(a)"])
def test_nodes_that_wait_for_each_other_are_refused(nodes: str) -> None:
    with pytest.raises(InvalidModel, match="is made by a later node, and some wait for each other"):
        infera_gpu.load(parse(f"g (float[N] x) => (float[N] y) {{ {nodes} }}"), device="cpu")


def test_a_long_chain_backwards_takes_no_time() -> None:
    model = parse(RELU)
    del model.graph.node[:]
    names = ["x", *(f"v{i}" for i in range(20_000)), "y"]
    model.graph.node.extend(helper.make_node("Relu", [a], [b]) for a, b in reversed(list(itertools.pairwise(names))))
    began = time.perf_counter()
    graph = load_graph(model)
    assert time.perf_counter() - began < 5
    assert [n.outputs[0] for n in graph.nodes] == names[1:]


def test_bytes_of_any_kind_are_read() -> None:
    data = parse(RELU).SerializeToString()
    for source in (data, bytearray(data), memoryview(data)):
        assert infera_gpu.load(source, device="cpu").outputs.keys() == {"y"}


def test_large_constants_made_of_few_bytes_are_not_made() -> None:
    size = "int64[1] s = {268435456}"
    model = parse(
        f"""g (float[1] x) => (float[N] y) <{size}> {{
            a = ConstantOfShape(s)  b = ConstantOfShape(s)  c = ConstantOfShape(s)
            d = Add(a, b)  e = Add(d, c)  y = Add(e, x)
        }}"""
    )
    session = infera_gpu.load(model, device="cpu")
    assert sum(a.nbytes for a in session.graph.constants.values()) <= 64 << 20


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


def nested(depth: int) -> onnx.ModelProto:
    """If in If in If ..."""
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["r"])], "b", [], [helper.make_empty_tensor_value_info("r")]
    )
    for i in range(depth):
        node = helper.make_node("If", ["c"], [f"r{i}"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([node], "b", [], [helper.make_empty_tensor_value_info(f"r{i}")])
    model = parse("g (float[N] x, bool c) => (float[N] y) { y = Identity(x) }")
    model.graph.node.extend(inner.node)
    return model


def varint(n: int) -> bytes:
    made = b""
    while n > 127:
        made, n = made + bytes([n & 127 | 128]), n >> 7
    return made + bytes([n])


def field(number: int, data: bytes) -> bytes:
    """A field of a protobuf that holds bytes."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def test_graphs_nested_deep_are_read_or_refused_at_once() -> None:
    began = time.process_time()
    feeds = {"x": np.ones(2, np.float32), "c": np.array(True)}
    assert infera_gpu.load(nested(8), device="cpu").run(feeds)["y"].tolist() == [1, 1]
    chain = b""
    for _ in range(5000):  # each graph holds a node with an attribute that is a graph
        attribute = field(1, b"then_branch") + field(6, chain) + varint(20 << 3) + b"\x05"
        chain = field(1, field(4, b"If") + field(5, attribute))
    with pytest.raises(InvalidModel, match="do not parse"):
        infera_gpu.load(b"\x08\x08" + field(7, chain), device="cpu")
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([1 << 62, 1 << 62], "no memory holds"),
        ([0, 1 << 62, 1 << 62], "no memory holds"),
        ([1 << 40], "needs 4,398,046,511,104 bytes, it has 8"),
        ([3], "needs 12 bytes, it has 8"),
        ([1], "needs 4 bytes, it has 8"),
        ([1] * 40, "has 40 axes"),
    ],
)
def test_shapes_of_initialisers_must_fit_their_bytes(dims: list[int], message: str) -> None:
    model = parse(RELU)
    model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=bytes(8))
    with pytest.raises(InvalidModel, match=message):
        infera_gpu.load(model, device="cpu")


@pytest.mark.parametrize("data", [b"", b"\0", b"onnx", bytes(100), b"\xff" * 100, b"PK\x03\x04" * 9, b"{}" * 50])
def test_what_is_no_protobuf_is_named(data: bytes) -> None:
    with pytest.raises(InvalidModel, match=r"empty|not an ONNX model"):
        infera_gpu.load(data, device="cpu")


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!doctype html><html></html>", "a page of a web site"),
        (b"PK\x03\x04" + bytes(20), "an archive"),
        (b"\x1f\x8b\x08" + bytes(20), "a compressed file"),
    ],
)
def test_files_often_taken_for_models_are_named(data: bytes, hint: str) -> None:
    with pytest.raises(InvalidModel, match=hint):
        infera_gpu.load(data, device="cpu")


def test_files_of_the_future_are_named() -> None:
    with pytest.raises(InvalidModel, match="IR version is 99"):
        infera_gpu.load(changed(lambda m: setattr(m, "ir_version", 99)), device="cpu")


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in ("/dev/zero", tmp_path / "pipe.onnx"):
        with pytest.raises(InvalidModel, match="no regular file"):
            infera_gpu.load(path, device="cpu")
    with pytest.raises(InvalidModel, match="Is a directory"):
        infera_gpu.load(tmp_path, device="cpu")


def test_files_larger_than_a_protobuf_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "large.onnx", "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(InvalidModel, match="external data"):
        infera_gpu.load(tmp_path / "large.onnx", device="cpu")


# ---- sparse tensors


def sparse(values: list[float], indices: object, dims: list[int], name: str = "w") -> onnx.SparseTensorProto:
    made = onnx.SparseTensorProto(dims=dims)
    made.values.CopyFrom(numpy_helper.from_array(np.array(values, np.float32), name))
    made.indices.CopyFrom(numpy_helper.from_array(np.array(indices, np.int64)))
    return made


def plus(tensor: onnx.SparseTensorProto) -> onnx.ModelProto:
    model = parse("g (float[N,M] x) => (float[N,M] y) { y = Add(x, w) }")
    model.graph.sparse_initializer.append(tensor)
    return model


@pytest.mark.parametrize("indices", [[1, 5, 6], [[0, 1], [1, 2], [2, 0]]])
def test_sparse_initialisers_are_written_out(indices: list[object]) -> None:
    model = plus(sparse([1, 2, 3], indices, [3, 3]))
    x = np.ones((3, 3), np.float32)
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_array_equal(infera_gpu.load(model, device="cpu").run({"x": x})["y"], want)
    assert want.tolist() == [[1, 2, 1], [1, 1, 3], [4, 1, 1]]


@pytest.mark.parametrize("opset", [11, 13, 21])
def test_sparse_constants_are_written_out(opset: int) -> None:
    model = parse("g (float[N,M] x) => (float[N,M] y) { w = Constant <value_float = 0.0> ()  y = Add(x, w) }", opset)
    attribute = helper.make_attribute("sparse_value", sparse([4, 5], [0, 3], [2, 2]))
    model.graph.node[0].attribute[0].CopyFrom(attribute)
    x = np.zeros((2, 2), np.float32)
    assert infera_gpu.load(model, device="cpu").run({"x": x})["y"].tolist() == [[4, 0], [0, 5]]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (sparse([1, 2], [0, 9], [3, 3]), "an index outside"),
        (sparse([1, 2], [-1, 3], [3, 3]), "an index outside"),
        (sparse([1, 2], [[0, 0], [0, 3]], [3, 3]), "an index outside"),
        (sparse([1, 2], [3, 3], [3, 3]), "do not ascend"),
        (sparse([1, 2], [4, 3], [3, 3]), "do not ascend"),
        (sparse([1, 2], [1], [3, 3]), r"expected \[n\] values"),
        (sparse([1], [0], [1 << 20, 1 << 20]), "sparse tensors of"),
        (sparse([1], [0], [1 << 40, 1 << 40]), "no memory holds"),
        (sparse([1], [0], [-1]), "has the shape"),
    ],
)
def test_sparse_tensors_are_checked(tensor: onnx.SparseTensorProto, message: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidModel, match=message):
        infera_gpu.load(plus(tensor), device="cpu")
    assert time.process_time() - began < 5


# ---- initialisers that are inputs too


OVERRIDABLE = """g (float[N] x, float[K] b, float[1] c) => (float[N] y) <float[2] b = {1, 2}, float[1] c = {10}> {
    s = Mul(b, c)  t = ReduceSum <keepdims = 0> (s)  y = Add(x, t)
}"""


@pytest.mark.parametrize(
    "given", [{}, {"b": [3, 4, 5]}, {"c": [2]}, {"b": [1], "c": [7]}], ids=["none", "one", "other", "both"]
)
def test_initialisers_that_are_inputs_may_be_given(given: dict[str, list[float]]) -> None:
    model = parse(OVERRIDABLE)
    feeds = {k: np.array(v, np.float32) for k, v in {"x": [1, 2], **given}.items()}
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    with infera_gpu.load(model, device="cpu") as session:
        assert list(session.inputs) == ["x"]
        assert list(session.overridable) == ["b", "c"]
        for _ in range(2):
            np.testing.assert_array_equal(session.run(feeds)["y"], want)
            np.testing.assert_array_equal(session.run({"x": feeds["x"]})["y"], feeds["x"] + 30)
        assert session.plan_for(feeds).outputs.keys() == {"y"}
        assert len(session.profile(feeds)) >= 1
        with pytest.raises(InputError, match="'z' is not an input"):
            session.run({**feeds, "z": feeds["x"]})
    with pytest.raises(DeviceError, match="closed"):
        session.run(feeds)


def test_plans_for_given_initialisers_are_bounded() -> None:
    names = [f"w{i}" for i in range(12)]
    ins = ", ".join(f"float[1] {n}" for n in names)
    fixed = ", ".join(f"float[1] {n} = {{1}}" for n in names)
    model = parse(f"g (float[1] x, {ins}) => (float[1] y) <{fixed}> {{ y = Sum(x, {', '.join(names)}) }}")
    with infera_gpu.load(model, device="cpu") as session:
        for name in names:
            feeds = {"x": np.zeros(1, np.float32), name: np.full(1, 5, np.float32)}
            assert session.run(feeds)["y"].tolist() == [16]
        assert len(session._overriding) <= 8
