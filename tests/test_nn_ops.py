"""What the cases of the neural-network operators cannot show: fused nodes, what onnxruntime lacks, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import infera_gpu
from infera_gpu.errors import InputError, PlanError
from infera_gpu.graph import HostArray, Node
from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops import registry
from infera_gpu.spec import spec_of
from infera_kernels.cpu.conv_winograd import transforms
from tests.cases import assert_close, inputs_of, site_of
from tests.text import parse

OPSET = 20


def find(name: str, opset: int = OPSET, domain: str = "") -> Op:
    op = registry().find(domain, name, opset)
    assert op is not None
    return op


# what each fused activation means, as standard nodes from "t" to "y"
ACTIVATIONS: dict[str, list[tuple[str, list[str], dict[str, Any]]]] = {
    "": [("Identity", ["t"], {})],
    "relu": [("Relu", ["t"], {})],
    "clip": [("Clip", ["t", "low", "high"], {})],
    "leaky_relu": [("LeakyRelu", ["t"], {"alpha": 0.1})],
    "hard_sigmoid": [("HardSigmoid", ["t"], {"alpha": 0.2, "beta": 0.4})],
    "sigmoid": [("Sigmoid", ["t"], {})],
    "tanh": [("Tanh", ["t"], {})],
    "swish": [("Sigmoid", ["t"], {}), ("Mul", ["t", "y0"], {})],
    "hard_swish": [("HardSwish", ["t"], {})],
    "gelu": [("Gelu", ["t"], {})],
    "gelu_tanh": [("Gelu", ["t"], {"approximate": "tanh"})],
    "mish": [("Mish", ["t"], {})],
    "softplus": [("Softplus", ["t"], {})],
}


def present(op: Op, case: Case) -> tuple[Any, ...]:
    """The case's inputs, for tests that know which are present."""
    return inputs_of(op, case)


@pytest.mark.parametrize("case", find("FusedConv", domain="infera").cases, ids=lambda case: str(case.id))
def test_fused_conv_is_the_nodes_it_stands_for(case: Case) -> None:
    op = find("FusedConv", domain="infera")
    ins = present(op, case)
    x, w, b, residual = (*ins, None, None)[:4]
    params = dict(case.attrs)
    name, bounds = params.pop("activation", ""), params.pop("activation_params", ())
    nodes = [helper.make_node("Conv", ["x", "w", "b" if b is not None else ""], ["c"], **params)]
    nodes.append(
        helper.make_node("Identity", ["c"], ["t"]) if residual is None else helper.make_node("Add", ["c", "r"], ["t"])
    )
    steps = ACTIVATIONS[name]
    for i, (kind, sources, attrs) in enumerate(steps):
        nodes.append(helper.make_node(kind, sources, ["y" if i == len(steps) - 1 else f"y{i}"], **attrs))
    constants = {"w": w, "b": b, "r": residual}
    element = helper.np_dtype_to_tensor_dtype(x.dtype)
    if name == "clip":
        constants |= {k: np.array(v, np.float32) for k, v in zip(("low", "high"), bounds, strict=True)}
    graph = helper.make_graph(
        nodes,
        "fused",
        [helper.make_tensor_value_info("x", element, x.shape)],
        [helper.make_tensor_value_info("y", element, [None] * x.ndim)],
        [numpy_helper.from_array(v, k) for k, v in constants.items() if v is not None],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {"x": x})[0]
    assert_close(op.outputs(np, site_of(op, case, ins), ins)[0], want, 1e-5, "y")


def test_lrn_of_an_even_size_is_onnx_reference() -> None:
    """onnxruntime takes odd sizes only, and onnx's reference normalises as many channels as there are images."""
    op, case = find("LRN"), Case("even", (f32(7, 7, 3, 3),), {"size": 4, "alpha": 0.5, "bias": 2.0})
    (x,) = ins = present(op, case)
    graph = helper.make_graph(
        [helper.make_node("LRN", ["x"], ["y"], **case.attrs)],
        "lrn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    outs: Any = ReferenceEvaluator(model).run(None, {"x": x})
    want = np.asarray(outs[0])
    assert_close(op.outputs(np, site_of(op, case, ins), ins)[0], want, 1e-5, "y")


def test_lstm_couples_the_input_and_forget_gates() -> None:
    """onnxruntime ignores `input_forget`. It is a forget gate whose weights are the input gate's, negated."""
    op, hidden = find("LSTM"), 4
    shapes = (f32(5, 3, 6), f32(1, 16, 6), f32(1, 16, 4), f32(1, 32))
    coupled = Case("coupled", shapes, {"input_forget": 1}, n_outs=3, low=-1, high=1)
    x, w, r, b = present(op, coupled)
    opposite = [a.copy() for a in (w[0], r[0], b.reshape(2, 16)[0], b.reshape(2, 16)[1])]
    for gates in opposite:
        gates[2 * hidden : 3 * hidden] = -gates[:hidden]
    plain = replace(coupled, attrs={})
    other = (x, opposite[0][None], opposite[1][None], np.concatenate(opposite[2:])[None])
    got = op.outputs(np, site_of(op, coupled, (x, w, r, b)), (x, w, r, b))
    want = op.outputs(np, site_of(op, plain, other), other)
    for i, (g, v) in enumerate(zip(got, want, strict=True)):
        assert_close(g, v, 1e-5, f"output {i}")


@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_transforms_convolve_exactly(tile: int) -> None:
    data, taps, out = transforms(tile)
    rng = np.random.default_rng(0)
    signal, kernel = rng.standard_normal(tile + 2), rng.standard_normal(3)
    got = out @ ((taps @ kernel) * (data @ signal))
    np.testing.assert_allclose(got, np.correlate(signal, kernel, "valid"), rtol=0, atol=1e-13)


def _site(op: Op, ins: tuple[HostArray | None, ...], attrs: Mapping[str, Any], opset: int = OPSET) -> Site:
    node = Node(op.name, tuple("" if a is None else f"in{i}" for i, a in enumerate(ins)), ("y",), attrs)
    return Site(node, op.fill(node), tuple(a if a is None else spec_of(a) for a in ins), ins, opset=opset)


def _zeros(*shape: int) -> HostArray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "ins", "attrs", "message"),
    [
        ("Conv", (_zeros(1, 3, 5, 5), _zeros(4, 2, 3, 3)), {}, "3 channels, expected 2 in each of 1 groups"),
        ("Conv", (_zeros(1, 3, 2, 2), _zeros(4, 3, 3, 3)), {}, "does not fit into"),
        ("MaxPool", (_zeros(1, 1, 4, 2),), {"kernel_shape": (3, 3), "strides": (2, 2)}, "does not fit into"),
        ("AveragePool", (_zeros(1, 1, 2, 1),), {"kernel_shape": (2, 2), "strides": (3, 3)}, "does not fit into"),
        ("Conv", (_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3), _zeros(3)), {}, "bias is float32[3], expected 4"),
        ("Conv", (_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3)), {"pads": (1, 1)}, "pads has 2 values"),
        ("Conv", (_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3)), {"auto_pad": "SAME"}, "auto_pad 'SAME' is not one of"),
        ("ConvTranspose", (_zeros(1, 3, 5, 5), _zeros(4, 2, 3, 3)), {}, "weights are"),
        ("MaxPool", (_zeros(1, 3, 5, 5),), {"kernel_shape": (3,)}, "kernel_shape has 1 values"),
        ("STFT", (_zeros(9), np.array(2)), {}, "expected (batch, length, 1 or 2)"),
        ("STFT", (_zeros(1, 9, 2), np.array(2)), {}, "a one-sided transform takes real input"),
        ("Softmax", (_zeros(2, 3),), {"axis": 2}, "axis 2 out of range"),
        ("LayerNormalization", (_zeros(2, 3), _zeros(2)), {}, "does not broadcast"),
        ("GroupNormalization", (_zeros(1, 4, 2), _zeros(3), _zeros(3)), {"num_groups": 3}, "do not divide"),
        ("LSTM", (_zeros(2, 1, 3), _zeros(1, 8, 3), _zeros(1, 4, 1)), {}, "W is"),
        (
            "LSTM", (_zeros(2, 1, 3), _zeros(1, 8, 3), _zeros(1, 8, 2), None, None, _zeros(1, 1, 2), _zeros(1, 1, 4)),
            {}, "input 6 is float32[1, 1, 4], expected [1, 1, 2]",
        ),
        ("GRU", (_zeros(2, 1, 3), _zeros(1, 3, 3), _zeros(1, 3, 1)), {"direction": "up"}, "direction 'up'"),
        ("RNN", (_zeros(2, 1, 3), _zeros(1, 1, 3), _zeros(1, 1, 1)), {"activations": ("Sine",)}, "expected 1 of"),
        *(
            ("Resize", (_zeros(1, 1, 2, 2), None, np.array([1, 1, bad, 1], np.float32)), {}, "are not sizes")
            for bad in (np.nan, np.inf, 0, -1)
        ),
        ("Resize", (_zeros(1, 1, 2, 2), None, np.array([1, 1, 1e15, 1], np.float32)), {}, "more than can be planned"),
        ("Resize", (_zeros(1, 1, 2, 2), None, None, np.array([1, 1, -1, 1])), {}, "are not sizes"),
        ("Resize", (_zeros(1, 1, 0, 2), None, None, np.array([1, 1, 3, 1])), {}, "which has no elements"),
        ("LRN", (_zeros(1, 1, 2, 2),), {"size": 0}, "size is 0"),
        ("LpPool", (_zeros(1, 1, 2, 2),), {"kernel_shape": (1, 1), "p": 0}, "p is 0"),
        ("Resize", (_zeros(1, 1, 2, 2), None, None, None), {}, "either scales or sizes"),
        ("Resize", (_zeros(1, 1, 2, 2), None, _zeros(4)), {"mode": "area"}, "mode 'area' is not one of"),
        ("Pad", (_zeros(2, 3), np.zeros(2, np.int64)), {}, "do not fit"),
        ("Pad", (_zeros(2, 3), np.zeros(4, np.int64)), {"mode": "mirror"}, "mode 'mirror' is not one of"),
        ("Pad", (_zeros(2, 3), np.array([-3, 0, 0, 0])), {}, "remove more than there is"),
    ],
)  # fmt: skip
def test_a_bad_node_is_refused_with_its_name_and_the_reason(
    name: str, ins: tuple[HostArray | None, ...], attrs: Mapping[str, Any], message: str
) -> None:
    op = find(name)
    with pytest.raises(PlanError) as raised:
        op.infer(_site(op, ins, attrs))
    assert message in str(raised.value)
    assert f"{name} 'y'" in str(raised.value)


@pytest.mark.parametrize("name", ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"])
@pytest.mark.parametrize("target", [-1, -5, 5, 1 << 40])
def test_a_target_that_is_no_class_is_refused(name: str, target: int) -> None:
    """Losses count no classes from the end: -1 is an error unless it is what `ignore_index` says."""
    model = parse(f"g (float[N, 5] x, int64[N] t) => (float y) {{ y = {name} <ignore_index = -7> (x, t) }}")
    session = infera_gpu.load(model, device="cpu")
    x = np.log(np.full((3, 5), 0.2, np.float32))
    with pytest.raises(InputError, match=rf"{name} 'y': target {target} is out of range for 5 classes"):
        session.run({"x": x, "t": np.array([0, target, -7])})
    np.testing.assert_allclose(session.run({"x": x, "t": np.array([0, 4, -7])})["y"], np.log(5), rtol=1e-6)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("device", ["cpu", "recording"])
def test_attention_with_a_negative_scale_prefers_what_is_least_alike(device: str, fuse: bool) -> None:
    """ONNX's own function takes the root of the scale; what it means is clear."""
    text = "g (float[1, 2, 3, 4] q, float[1, 2, 5, 4] k, float[1, 2, 5, 6] v) => (float[1, 2, 3, 6] y)"
    model = parse(f"{text} {{ y = Attention <scale = -0.3> (q, k, v) }}", 23)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, *dims)).astype(np.float32) for dims in ((3, 4), (5, 4), (5, 6)))
    weights = np.exp(-0.3 * q @ k.swapaxes(-1, -2))
    want = weights @ v / weights.sum(-1, keepdims=True)
    with infera_gpu.load(model, device=device, fuse=fuse) as session:
        np.testing.assert_allclose(session.run({"q": q, "k": k, "v": v})["y"], want, rtol=1e-5, atol=1e-6)
