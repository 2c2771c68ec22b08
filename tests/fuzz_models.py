"""Small models that hold between them everything that a file can: what tests.fuzz damages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.text import parse

TEXTS = (
    """g (float[N,3,8,8] x) => (float[N,M] y) <float[4,3,3,3] w = {WEIGHTS}, float[4] b = {1,2,3,4}> {
        c = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, b)  r = Relu(c)  p = MaxPool <kernel_shape = [2,2]> (r)
        y = Flatten(p)
    }""".replace("WEIGHTS", ",".join(["0.1"] * 108)),
    """g (float[N,4] x, bool c) => (float[N,4] y) {
        y = If (c) <
            then_branch = t () => (float[N,4] r) { e = Exp(x)  r = Neg(e) },
            else_branch = e () => (float[N,4] r) { r = Softmax <axis = -1> (x) }
        >
    }""",
    """g (int64 n, float[2] x) => (float[2] y, float[K,2] z) <bool go = {1}> {
        y, z = Loop (n, go, x) <
            body = b (int64 i, bool k, float[2] s) => (bool k2, float[2] s2, float[2] o) {
                k2 = Identity(k)  s2 = Add(s, s)  o = Identity(s2)
            }
        >
    }""",
    """g (float[N,M] x) => (float[K] y) <int64[1] shape = {-1}, int64[2] at = {0,1}, float s = {0.1}, uint8 z = {3}> {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  t = Transpose <perm = [1,0]> (d)
        f = Gather <axis = 1> (t, at)  y = Reshape(f, shape)
    }""",
    """g (float[N,5] x) => (float[A,B] y, int64[A,B] i) <int64[1] k = {2}, int64[1] a = {1}, float[5,5] w = {WEIGHTS}> {
        m = MatMul(x, w)  s = Unsqueeze(m, a)  u = Squeeze(s, a)  c = Concat <axis = 1> (u, x)
        y, i = TopK <axis = 1> (c, k)
    }""".replace("WEIGHTS", ",".join(["0.5"] * 25)),
    """g (seq(float[N]) xs) => (float[M] y) { y = ConcatFromSequence <axis = 0> (xs) }""",
    """g (string[N] x) => (float[M,K] y) { y = TfIdfVectorizer <max_gram_length = 1, max_skip_count = 0,
        min_gram_length = 1, mode = "TF", ngram_counts = [0], ngram_indexes = [0,1], pool_strings = ["a","b"]> (x) }""",
    """g (float[2,N] x) => (float[2,K] y) <int64[2] s = {2,4}, int64[1] e = {3}> {
        c = ConstantOfShape <value = float[1] {2.0}> (s)  p = MatMul(x, c)  t = Tile(p, s)  r = Expand(e, s)
        f = Cast <to = 1> (r)  z = ReduceSum(f)  y = Add(t, z)
    }""",
    """g (float[1,2,4,4] x) => (float[A,B,C,D] y) <float[2,2,1,1] w = {1,2,3,4}, float[2] s = {1,2},
        float[1,2,1,1] k = {2,3}, float low = {0}, float high = {6}> {
        c = Conv(x, w, s)  b = BatchNormalization(c, s, s, s, s)  m = Mul(b, k)  a = Add(m, k)  r = Clip(a, low, high)
        e = Conv(r, w)  q = Relu(e)  f = Conv(q, w)  y = Add(f, x)
    }""",
    """g (float[2,2] x) => (float[A,B] y) <float[2,2] w = {1,2,3,4}, float[2] b = {1,2}, float[1] root = {1.4142135},
        float[1] one = {1}, float[1] half = {0.5}, bool no = {0}> {
        g = Gemm <alpha = 0.5> (x, w, b)  a = Div(g, root)  e = Erf(a)  f = Add(e, one)  d = Mul(g, f)  z = Mul(d, half)
        m = MatMul(z, w)  n = Add(m, b)  u = Tanh(n)  v = Add(u, x)  y = Dropout(v, half, no)
    }""",
    """g (float[2,2] x, float[2] w) => (float[A,B] y) <float[2] w = {1,2}> { u = Mul(x, w)  y = Add(u, w) }""",
    """g (float[N] x) => (float[M] y, int64[K,L] z, float e) <int64[2] s = {2,3}, float[2] v = {1,0}> {
        k = ConstantOfShape <value = bool[1] {1}> (s)  z = NonZero(k)  e = Einsum <equation = "i,j->"> (v, v)
        q = NonZero(v)  u = Unique(v)  y = Unique(x)
    }""",
)

FUNCTION = """<ir_version: 10, opset_import: ["" : 17, "f" : 1]>
g (float[N] x) => (float[N] y) { t = f.a <k = 0.5> (x)  y = f.b(t) }
<domain: "f", opset_import: ["" : 17, "f" : 1]> a <k> (v) => (w) { u = LeakyRelu <alpha: float = @k> (v)  w = f.b(u) }
<domain: "f", opset_import: ["" : 11]> b (v) => (w) { c = Constant <value_float = 2.0> ()  w = Add(v, c) }"""


def models() -> Iterator[onnx.ModelProto]:
    """Small models that hold between them everything that a file can."""
    yield from (parse(text) for text in TEXTS)
    yield onnx.parser.parse_model(FUNCTION)
    external = parse("g (float[N,3] x) => (float[N,3] y) { y = Add(x, w) }")
    tensor = external.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[2, 3])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "8"), ("length", "24")):
        tensor.external_data.add(key=key, value=value)
    yield external
    sparse = parse("g (float[N,3] x) => (float[N,3] y) { y = Mul(x, w) }")
    made = sparse.graph.sparse_initializer.add(dims=[2, 3])
    made.values.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32), "w"))
    made.indices.CopyFrom(numpy_helper.from_array(np.array([1, 5])))
    yield sparse
    yield _forest()
    gradient = parse("g (float[N] x) => (float[N] y) { a = Mul(x, x)  b = Exp(a)  c = Div(b, x)  y = Identity(c) }")
    gradient.opset_import.add(domain="ai.onnx.preview.training", version=1)
    node = helper.make_node("Gradient", ["x"], ["d"], domain="ai.onnx.preview.training", xs=["x"], y="c")
    gradient.graph.node.insert(3, node)
    gradient.graph.node[4].input[0] = "d"
    yield gradient


def _forest() -> onnx.ModelProto:
    attrs: dict[str, Any] = {
        "nodes_treeids": [0, 0, 0],
        "nodes_nodeids": [0, 1, 2],
        "nodes_featureids": [1, 0, 0],
        "nodes_values": [0.5, 0.0, 0.0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
        "nodes_truenodeids": [1, 0, 0],
        "nodes_falsenodeids": [2, 0, 0],
        "target_treeids": [0, 0],
        "target_nodeids": [1, 2],
        "target_ids": [0, 0],
        "target_weights": [1.0, 2.0],
        "n_targets": 1,
    }
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", **attrs)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])
    graph = helper.make_graph([node], "g", [x], [y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
