"""Files that are well formed and mean harm, or are named to collide with what loading makes of them."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from infera_gpu.errors import InferaError, InvalidModel
from infera_gpu.graph import JOINT

X = np.array([1.0, -2.0], np.float32)
OPSET = [helper.make_opsetid("", 17)]


def info(name: str, shape: Sequence[int] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def fixed(value: Any, name: str) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def model(
    nodes: list[onnx.NodeProto],
    outs: str = "y",
    inits: Sequence[TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    shape: Sequence[int] | None = None,
    ir_version: int = 10,
) -> bytes:
    graph = helper.make_graph(nodes, "g", [info("x", shape)], [info(o) for o in outs.split()], list(inits))
    opsets = [*OPSET, helper.make_opsetid("f", 1)]
    made = helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=ir_version)
    return bytes(made.SerializeToString())


@contextmanager
def at_most(seconds: float, megabytes: int) -> Iterator[None]:
    """Generous: what this guards against takes minutes, and gigabytes."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


node = helper.make_node


# ---- names


def branches() -> list[onnx.NodeProto]:
    then = helper.make_graph([node("Neg", ["x"], ["r"])], "t", [], [info("r")])
    other = helper.make_graph([node("Abs", ["x"], ["r"])], "e", [], [info("r")])
    return [node("If", ["c"], ["y"], then_branch=then, else_branch=other)]


PLUS_TWO = helper.make_function(
    "f",
    "b",
    ["v"],
    ["w"],
    [node("Constant", [], ["c"], value_float=2.0), node("Add", ["v", "c"], ["w"])],
    OPSET,
)


def scaled(name: str) -> bytes:
    """y = 3 conv(x) + 100, where the 100 has this name."""
    ones = np.ones((1, 1, 1, 1), np.float32)
    nodes = [node("Conv", ["x", "w"], ["t"]), node("Mul", ["t", "c"], ["q"]), node("Add", ["q", name], ["y"])]
    return model(
        nodes, inits=[fixed(ones, "w"), fixed(3 * ones, "c"), fixed(np.float32(100), name)], shape=[1, 1, 1, 2]
    )


@pytest.mark.parametrize(
    ("data", "x"),
    [
        (
            model(
                [node("Exp", ["x"], ["y/r"]), *branches(), node("Identity", ["y/r"], ["z"])], "y z", [fixed(True, "c")]
            ),
            X,
        ),
        (
            model(
                [*branches(), node("Add", ["y", "y/r"], ["z"])], "y z", [fixed(True, "c"), fixed(np.float32(9), "y/r")]
            ),
            X,
        ),
        (
            model(
                [node("b", ["x"], ["t"], domain="f"), node("Add", ["t", "b/0/c"], ["y"])],
                inits=[fixed(np.float32(100), "b/0/c")],
                functions=[PLUS_TWO],
            ),
            X,
        ),
        (scaled("w/q"), X.reshape(1, 1, 1, 2)),
        (scaled("q/weight"), X.reshape(1, 1, 1, 2)),
    ],
    ids=["branch", "branch_constant", "function", "fusion", "fusion_too"],
)
def test_names_of_a_file_are_none_of_ours(data: bytes, x: np.ndarray) -> None:
    want = onnxruntime.InferenceSession(data).run(None, {"x": x})
    got = infera_gpu.load(data, device="cpu").run({"x": x})
    for g, w in zip(got.values(), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6)


@pytest.mark.parametrize("place", ["node", "initialiser", "output"])
def test_names_that_are_like_ours_are_refused(place: str) -> None:
    name = f"y{JOINT}r"
    data = {
        "node": lambda: model([node("Exp", ["x"], [name]), node("Neg", [name], ["y"])]),
        "initialiser": lambda: model([node("Add", ["x", name], ["y"])], inits=[fixed(np.float32(1), name)]),
        "output": lambda: model([node("Exp", ["x"], [name])], name),
    }[place]()
    with pytest.raises(InvalidModel, match="has the character"):
        infera_gpu.load(data, device="cpu")


# ---- what passes meet before anything was checked

W = np.ones((2, 1, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("nodes", "inits"),
    [
        (["Conv x w -> t", "BatchNormalization t s s s s -> y"], {"w": W, "s": np.ones(3, np.float32)}),
        (["Conv x w -> t", "BatchNormalization t s s s s -> y"], {"w": np.float32(1), "s": np.ones(1, np.float32)}),
        (["Conv x w -> t", "BatchNormalization t s s s s -> y"], {"w": W, "s": np.array(["a", "b"], object)}),
        (["Conv x w -> t", "Mul t s -> y"], {"w": np.float32(1), "s": np.float32(1)}),
        (["Conv x w -> t", "Mul t s -> y"], {"w": np.ones(3, np.float32), "s": np.ones(1, np.float32)}),
        (
            ["Conv x w b -> t", "Mul t s -> y"],
            {"w": W, "b": np.ones(3, np.float32), "s": np.ones((1, 2, 1, 1), np.float32)},
        ),
        (["Conv x w -> t", "Add t s -> y"], {"w": np.full((2, 1, 2, 2), "a", object), "s": np.float32(1)}),
        (["Conv x w -> t", "Clip t s -> y"], {"w": W, "s": np.array("a", object)}),
        (["Dropout x s m -> y"], {"s": np.float32(0.5), "m": np.zeros(0, bool)}),
    ],
)
def test_malformed_nodes_are_named_when_they_are_planned(nodes: list[str], inits: dict[str, Any]) -> None:
    made = []
    for text in nodes:
        op, *rest = text.split()
        made.append(node(op, rest[: rest.index("->")], rest[rest.index("->") + 1 :]))
    data = model(made, inits=[fixed(v, k) for k, v in inits.items()], shape=[1, 1, 3, 3])
    with pytest.raises(InferaError, match=r"'[ty]'"):
        infera_gpu.load(data, device="cpu").run({"x": np.ones((1, 1, 3, 3), np.float32)})


@pytest.mark.parametrize(("kind", "value"), [(4, 0.5), (1, "abc"), (2, 1.5), (7, 3)])
def test_attributes_given_by_reference_are_of_the_kind_that_is_needed(kind: int, value: Any) -> None:
    inner = node("Softmax", ["v"], ["w"])
    name = {4: "value", 1: "alpha", 2: "axis", 7: "value_ints"}[kind]
    inner = node(
        {4: "Constant", 1: "LeakyRelu", 2: "Softmax", 7: "Constant"}[kind], [] if kind in (4, 7) else ["v"], ["c"]
    )
    inner.attribute.add(name=name, ref_attr_name="k", type=kind)
    function = helper.make_function("f", "a", ["v"], ["w"], [inner, node("Identity", ["c"], ["w"])], OPSET, ["k"])
    data = model([node("a", ["x"], ["y"], domain="f", k=value)], functions=[function])
    with pytest.raises(InvalidModel, match="the function needs"):
        infera_gpu.load(data, device="cpu")


def test_an_output_that_is_an_input_left_out_is_named() -> None:
    function = helper.make_function("f", "o", ["v", "low"], ["w", "low"], [node("Relu", ["v"], ["w"])], OPSET)
    with pytest.raises(InvalidModel, match="which is left out"):
        infera_gpu.load(model([node("o", ["x"], ["y", "z"], domain="f")], functions=[function]), device="cpu")


# ---- small files that ask for much


def doubling(depth: int) -> list[onnx.FunctionProto]:
    opsets = [*OPSET, helper.make_opsetid("f", 1)]
    made = [helper.make_function("f", "f0", ["v"], ["v"], [], OPSET)]
    for i in range(1, depth):
        calls = [node(f"f{i - 1}", [a], [b], domain="f") for a, b in (("v", "t"), ("t", "w"))]
        made.append(helper.make_function("f", f"f{i}", ["v"], ["w"], calls, opsets))
    return made


def wide() -> onnx.FunctionProto:
    return helper.make_function("f", "c", ["v"], ["w"], [node("Concat", ["v"] * 20000, ["w"], axis=0)], OPSET)


def long_names() -> onnx.FunctionProto:
    name = "n" * 20000
    body = [
        node("Relu", ["v"], [name]),
        *(node("Relu", [name], [f"{name}{i}"]) for i in range(50)),
        node("Neg", ["v"], ["w"]),
    ]
    return helper.make_function("f", "c", ["v"], ["w"], body, OPSET)


CALLS = [node("c", ["x"], [f"y{i}"], domain="f") for i in range(500)] + [
    node("Sum", [f"y{i}" for i in range(500)], ["y"])
]


@pytest.mark.parametrize(
    "data",
    [
        model([node("f39", ["x"], ["y"], domain="f")], functions=doubling(40)),
        model(CALLS, functions=[wide()]),
        model(CALLS, functions=[long_names()]),
    ],
    ids=["empty_functions", "wide_nodes", "long_names"],
)
def test_functions_are_measured_before_they_are_expanded(data: bytes) -> None:
    with at_most(20, 300), pytest.raises(InvalidModel, match="expand to"):
        infera_gpu.load(data, device="cpu")


def ones(shape: list[int], name: str = "c", dtype: Any = np.float32) -> list[onnx.NodeProto]:
    """A constant made of nothing."""
    size = node("Constant", [], [f"{name}_size"], value_ints=shape)
    return [size, node("ConstantOfShape", [f"{name}_size"], [name], value=fixed(np.ones(1, dtype), ""))]


LAST = [node("ReduceSum", ["z"], ["q"], keepdims=0), node("Cast", ["q"], ["p"], to=1), node("Add", ["x", "p"], ["y"])]


@pytest.mark.parametrize(
    "nodes",
    [
        [*ones([2] * 24, dtype=bool), node("NonZero", ["c"], ["z"]), *LAST],
        [*ones([1, 1, 1500, 1500]), *ones([1, 1, 20, 20], "k"), node("Conv", ["c", "k"], ["z"]), *LAST],
        [*ones([1, 1, 1500, 1500]), node("MaxPool", ["c"], ["z"], kernel_shape=[20, 20]), *LAST],
        [
            *ones([700, 8000], dtype=np.int32),
            *ones([8000, 700], "k", np.int32),
            node("MatMul", ["c", "k"], ["z"]),
            *LAST,
        ],
        [*ones([1 << 28]), node("Exp", ["c"], ["z"]), *LAST],
    ],
    ids=["sizes_from_data", "convolution", "pooling", "product", "large"],
)
def test_little_is_computed_while_loading(nodes: list[onnx.NodeProto]) -> None:
    with at_most(10, 300):
        infera_gpu.load(model(nodes), device="cpu").close()


def test_chains_of_scales_do_not_multiply_the_weight() -> None:
    w = np.ones((1000, 1000, 1, 1), np.float32)
    scale = np.full((1, 1000, 1, 1), 1.001, np.float32)
    names = ["t", *(f"t{i}" for i in range(200))]
    nodes = [node("Conv", ["x", "w"], ["t"])]
    nodes += [node("Mul", [a, "s"], [b]) for a, b in itertools.pairwise(names)]
    nodes.append(node("Identity", [names[-1]], ["y"]))
    with at_most(20, 300):
        infera_gpu.load(model(nodes, inits=[fixed(w, "w"), fixed(scale, "s")]), device="cpu").close()


def test_products_of_what_does_not_fit_are_not_made() -> None:
    w, b, s = (
        np.ones((12000, 1, 1, 1), np.float32),
        np.ones((12000, 1), np.float32),
        np.ones((1, 12000, 1, 1), np.float32),
    )
    nodes = [node("Conv", ["x", "w", "b"], ["t"]), node("Mul", ["t", "s"], ["y"])]
    with at_most(10, 300):
        infera_gpu.load(model(nodes, inits=[fixed(w, "w"), fixed(b, "b"), fixed(s, "s")]), device="cpu").close()


def test_one_output_given_many_times() -> None:
    with at_most(20, 300):
        data = model([node("Neg", ["x"], ["y"])], " ".join(["y"] * 5000))
        assert len(infera_gpu.load(data, device="cpu").outputs) == 5000


def test_many_functions_and_operator_sets() -> None:
    functions = [
        helper.make_function("f", f"f{i}", ["v"], ["w"], [node("Neg", ["v"], ["w"])], OPSET) for i in range(3000)
    ]
    made = onnx.ModelProto.FromString(model([node("f7", ["x"], ["y"], domain="f")], functions=functions))
    made.opset_import.extend(helper.make_opsetid(f"d{i}", 1) for i in range(3000))
    with at_most(20, 300):
        assert infera_gpu.load(made, device="cpu").run({"x": X})["y"].tolist() == [-1, 2]


def test_einsum_of_many_operands_is_refused() -> None:
    nodes = [node("Einsum", ["x"] * 200, ["y"], equation=",".join(["a"] * 200) + "->")]
    with at_most(10, 300), pytest.raises(InferaError, match="200 operands"):
        infera_gpu.load(model(nodes), device="cpu").run({"x": X})


@pytest.mark.parametrize("kind", ["chain", "fan"])
def test_plans_of_many_nodes_are_made_in_time(kind: str) -> None:
    """Ten thousand nodes; in a chain everything is one memory, in a fan everything is alive at once."""
    n = 10_000
    if kind == "chain":
        names = ["x", *(f"t{i}" for i in range(n)), "y"]
        nodes = [node("Relu", [a], [b]) for a, b in itertools.pairwise(names)]
    else:
        nodes = [node("Exp", ["x"], [f"t{i}"]) for i in range(n)]
        nodes.append(node("Concat", [f"t{i}" for i in range(n)], ["y"], axis=0))
    with infera_gpu.load(model(nodes), device="cpu") as session:
        began = time.process_time()
        assert len(session.run({"x": X})["y"]) == (2 if kind == "chain" else 2 * n)
        assert time.process_time() - began < 60


# ---- overriding


def test_older_files_list_every_initialiser_as_an_input() -> None:
    made = onnx.ModelProto.FromString(
        model([node("Add", ["x", "w"], ["y"])], inits=[fixed(np.float32(5), "w")], ir_version=3)
    )
    made.graph.input.append(info("w", []))
    with infera_gpu.load(made, device="cpu") as session:
        assert not session.overridable
        assert session.run({"x": X})["y"].tolist() == [6, 3]


def test_many_external_files_are_read(tmp_path: Any) -> None:
    """More than a process may hold open."""
    n = 1200
    nodes = [node("Sum", [f"w{i}" for i in range(n)], ["y"])]
    made = onnx.ModelProto.FromString(model(nodes))
    for i in range(n):
        (tmp_path / f"{i}.bin").write_bytes(np.float32(1).tobytes())
        tensor = made.graph.initializer.add(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{i}.bin")
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    assert infera_gpu.load(tmp_path / "m.onnx", device="cpu").run({"x": X})["y"].tolist() == [n]
