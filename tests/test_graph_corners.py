"""What a graph may hold beside operators in a row: each odd shape of a graph, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

import infera_gpu
from infera_gpu.errors import InputError
from tests.test_host_ops import assert_same
from tests.text import parse

X = np.array([[-1.5, 2, 0.25], [3, -4, 0]], np.float32)
FEEDS: dict[str, Any] = {
    "x": X,
    "e": np.zeros((0, 3), np.float32),
    "v": np.zeros((2, 0), np.float32),
    "s": np.array(2.5, np.float32),
    "c": np.array(True),
    "i": np.array([2, 0], np.int64),
    "p": np.zeros((0, 3, 8, 8), np.float32),
}
TYPES = {
    "x": "float[N,M]",
    "e": "float[A,B]",
    "v": "float[N,K]",
    "s": "float",
    "c": "bool",
    "i": "int64[L]",
    "p": "float[B,3,H,W]",
}

GRAPHS = {
    "an input is an output": "x => float[N,M] x",
    "an initialiser is an output": "x => float[2] w <float[2] w = {1,2}> ",
    "one value, two outputs": "x => float[N,M] y, float[N,M] z { y = Relu(x) z = Identity(y) }",
    "an output is used inside": "x => float[N,M] y, float[N,M] z { y = Exp(x) z = Neg(y) }",
    "outputs in another order": "x => float[N,M] z, float[N,M] y { y = Exp(x) z = Neg(y) }",
    "an unused input": "x, s => float[N,M] y { y = Relu(x) }",
    "an unused node": "x => float[N,M] y { u = Exp(x) y = Relu(x) }",
    "an unused output": "x => float[N,M] y { y, k = TopK(x, n) } <int64[1] n = {1}>",
    "the second output alone": "x => int64[N,M] k { y, k = TopK(x, n) } <int64[1] n = {1}>",
    "one value, twice an operand": "x => float[N,M] y { y = Mul(x, x) }",
    "one value, thrice an operand": "x => float[N,M] y { y = Concat <axis = 0> (x, x, x) }",
    "a value in its own square": "x => float[N,M] y { t = Relu(x) u = Add(t, t) y = Mul(u, t) }",
    "scalars": "s => float y, float[1] z, float w { y = Mul(s, s) z = Unsqueeze(s, a) w = Squeeze(z, a) }"
    " <int64[1] a = {0}>",
    "a scalar spread": "s, x => float[N,M] y { y = Add(x, s) }",
    "no rows": "e => float[A,B] y { t = Exp(e) y = Add(t, e) }",
    "no rows, a product": "e => float[A,2] y { y = MatMul(e, w) } <float[3,2] w = {1,2,3,4,5,6}>",
    "no columns, a product": "v, e => float[N,3] y { y = MatMul(v, e) }",
    "no rows, softmax": "e => float[A,B] y { y = Softmax <axis = 1> (e) }",
    "no rows, sum": "e => float[1,3] y { y = ReduceSum(e, a) } <int64[1] a = {0}>",
    "no columns, sum": "v => float[2,1] y { y = ReduceSum(v, a) } <int64[1] a = {1}>",
    "no rows, joined": "e, x => float[N,M] y { y = Concat <axis = 0> (e, x) }",
    "no rows, turned": "e => float[B,A] y { y = Transpose(e) }",
    "no rows, shape": "e => int64[2] y { y = Shape(e) }",
    "no pictures": "p => float[B,C,H,W] y { y = Conv(p, w) } <float[1,3,1,1] w = {1,2,3}>",
    "no pictures, pooled": "p => float[B,3,1,1] y { y = GlobalAveragePool(p) }",
    "nothing gathered": "x => float[A,B] y { y = Gather(x, n) } <int64[0] n = {}>",
    "nothing found": "e => int64[A,B] y { t = Greater(e, z) y = NonZero(t) } <float z = {9}>",
    "a size from data": "x => float[A] y { t = Greater(x, z) y = Compress(x, f) f = Reshape(t, m) }"
    " <float z = {0}, int64[1] m = {-1}>",
    "sizes that depend on sizes": "x => float[A,B] y { h = Shape(x) t = Add(h, o) y = Expand(w, t) }"
    " <int64[2] o = {1,2}, float[1,1] w = {7}>",
    "a shape in and out": "x => float[M,N] y { h = Shape(x) r = Gather(h, i) y = Reshape(x, r) } <int64[2] i = {1,0}>",
    "a branch that makes nothing new": "x, c => float[N,M] y { y = If (c) <"
    "then_branch = t () => (float[N,M] r) { r = Identity(x) }, else_branch = f () => (float[N,M] q) { q = Neg(x) }> }",
    "branches of two shapes": "x, c => float[A,B] y { y = If (c) <"
    "then_branch = t () => (float[A,B] r) { r = Transpose(x) }, else_branch = f () => (float[A,B] q) { q = Neg(x) }> }",
}


def model_of(text: str) -> Any:
    """`inputs => outputs { nodes } <constants>` as a model."""
    head, _, rest = text.partition("=>")
    names = [name.strip() for name in head.split(",")]
    outputs = rest.split("{")[0].split("<")[0].strip()
    constants = rest[rest.rindex("<") : rest.rindex(">") + 1] if rest.rstrip().endswith(">") else ""
    body = rest[: len(rest.rstrip()) - len(constants)] if constants else rest
    nodes = body[body.index("{") :] if "{" in body else "{ }"
    made = f"g ({', '.join(f'{TYPES[n]} {n}' for n in names)}) => ({outputs}) {constants} {nodes}"
    model = parse(made)
    ordered = sorted(model.graph.node, key=lambda n: n.output[0] == "y" and n.op_type == "Compress")
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    return model, {n: FEEDS[n] for n in names}


@pytest.mark.parametrize("device", ["cpu", "recording"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_what_onnxruntime_makes_of_it(name: str, device: str) -> None:
    model, feeds = model_of(GRAPHS[name])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    reference = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    want = dict(zip([o.name for o in reference.get_outputs()], reference.run(None, feeds), strict=True))
    for fuse in (True, False):
        with infera_gpu.load(model, device=device, fuse=fuse) as session:
            assert list(session.outputs) == list(want)
            for _ in range(2):
                got = session.run(feeds)
                for key, array in want.items():
                    assert_same(got[key], array, 1e-6, key)


def test_one_symbol_is_one_size() -> None:
    model = parse("g (float[N] x, float[N] y) => (float[N] z) { z = Add(x, y) }")
    with infera_gpu.load(model, device="cpu") as session:
        assert session.run({"x": np.ones(3, np.float32), "y": np.ones(3, np.float32)})["z"].tolist() == [2, 2, 2]
        with pytest.raises(InputError, match="N"):
            session.run({"x": np.ones(3, np.float32), "y": np.ones(1, np.float32)})
