"""What onnxruntime's optimiser and quantisers write of small networks runs here, and gives what onnxruntime gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime import quantization

import infera_gpu
from infera_gpu.errors import UnsupportedOperatorError
from infera_gpu.graph import HostArray
from infera_gpu.verify import OnnxRuntime
from tests.cases import assert_close
from tests.text import parse

EXTENDED = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
ALL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL

IMAGES = """
    images (float[2, 3, 16, 16] x) => (float[2, 5] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        b = Relu(a)
        c = Conv <pads = [1, 1, 1, 1]> (b, w2, b2)
        d = Add(c, b)
        e = Relu(d)
        f = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (e)
        g = Conv <pads = [1, 1, 1, 1]> (f, w3, b3)
        h = LeakyRelu <alpha = 0.1> (g)
        i = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (h)
        j = Sigmoid(i)
        k = Mul(i, j)
        l = Concat <axis = 1> (k, i)
        m = GlobalAveragePool(l)
        n = Flatten(m)
        o = Gemm <transB = 1> (n, w4, b4)
        p = Relu(o)
        y = Gemm <transB = 1> (p, w5, b5)
    }"""
IMAGE_WEIGHTS: dict[str, tuple[int, ...]] = {
    "w1": (8, 3, 3, 3),
    "b1": (8,),
    "w2": (8, 8, 3, 3),
    "b2": (8,),
    "w3": (8, 8, 3, 3),
    "b3": (8,),
    "w4": (12, 16),
    "b4": (12,),
    "w5": (5, 12),
    "b5": (5,),
}
TOKENS = """
    tokens (float[B, 6, 32] x) => (float[B, 6, 32] y)
    <float root = {1.4142135}, float one = {1}, float half = {0.5}, float eight = {8}> {
        a = MatMul(x, w1)
        b = Add(a, b1)
        c = Div(b, root)
        d = Erf(c)
        e = Add(d, one)
        f = Mul(b, e)
        g = Mul(f, half)
        h = MatMul(g, w2)
        i = Add(h, b2)
        j = Add(i, x)
        k = LayerNormalization(j, gamma, beta)
        l = Transpose <perm = [0, 2, 1]> (k)
        m = MatMul(k, l)
        n = Div(m, eight)
        o = Softmax(n)
        y = MatMul(o, k)
    }"""
TOKEN_WEIGHTS: dict[str, tuple[int, ...]] = {
    "w1": (32, 64),
    "b1": (64,),
    "w2": (64, 32),
    "b2": (32,),
    "gamma": (32,),
    "beta": (32,),
}
STEPS = """
    steps (float[7, 2, 6] x) => (float[7, 1, 2, 8] y, float[1, 2, 8] h) {
        y, h, c = LSTM <hidden_size = 8> (x, w, r, b)
    }"""
STEP_WEIGHTS: dict[str, tuple[int, ...]] = {"w": (1, 32, 6), "r": (1, 32, 8), "b": (1, 64)}

INTEGER_IMAGES = (
    "QGemm QLinearAdd QLinearAveragePool QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul"
)
INTEGER_TOKENS = "QLinearAdd QLinearMul QLinearSoftmax"
NHWC = f"{INTEGER_IMAGES} NhwcMaxPool QLinearConv"

Written = Callable[[onnx.ModelProto, Path], onnx.ModelProto]


def network(text: str, weights: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = parse(text)
    for name, shape in weights.items():
        values = rng.uniform(-1, 1, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


def fed(model: onnx.ModelProto) -> dict[str, HostArray]:
    shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)}


class Once(quantization.CalibrationDataReader):  # type: ignore[misc]
    """The one example to calibrate on."""

    def __init__(self, feeds: dict[str, HostArray]) -> None:
        self.left = [feeds]

    def get_next(self) -> dict[str, HostArray] | None:
        return self.left.pop() if self.left else None


def optimised(level: Any) -> Written:
    def write(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)

    return write


def static(form: Any, **options: Any) -> Written:
    def write(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
        onnx.save(model, folder / "float.onnx")
        quantization.quantize_static(
            folder / "float.onnx", folder / "static.onnx", Once(fed(model)), quant_format=form, **options
        )
        return onnx.load(folder / "static.onnx")

    return write


def dynamic(**options: Any) -> Written:
    def write(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
        onnx.save(model, folder / "float.onnx")
        quantization.quantize_dynamic(folder / "float.onnx", folder / "dynamic.onnx", **options)
        return onnx.load(folder / "dynamic.onnx")

    return write


OPERATORS, PAIRS = quantization.QuantFormat.QOperator, quantization.QuantFormat.QDQ
CLOSE = 1e-6
STEP = 2 / 65535
"""Of the peak: where a float lies halfway between two of 65536 integers, its last bit decides."""

PAIRED = static(PAIRS, activation_type=quantization.QuantType.QUInt8)
BYTES = static(OPERATORS, activation_type=quantization.QuantType.QUInt8)
SIXTEEN = static(PAIRS, activation_type=quantization.QuantType.QUInt16, extra_options={"UseQDQContribOps": True})


@pytest.mark.parametrize(
    ("text", "weights", "steps", "wanted", "tol"),
    [
        pytest.param(
            IMAGES, IMAGE_WEIGHTS, (optimised(EXTENDED),), "FusedConv FusedGemm QuickGelu", CLOSE, id="images"
        ),
        pytest.param(IMAGES, IMAGE_WEIGHTS, (BYTES,), INTEGER_IMAGES, CLOSE, id="images-integers"),
        pytest.param(IMAGES, IMAGE_WEIGHTS, (BYTES, optimised(ALL)), NHWC, CLOSE, id="images-integers-nhwc"),
        pytest.param(IMAGES, IMAGE_WEIGHTS, (PAIRED, optimised(ALL)), NHWC, CLOSE, id="images-pairs-nhwc"),
        pytest.param(
            IMAGES, IMAGE_WEIGHTS, (static(OPERATORS, per_channel=True),), INTEGER_IMAGES, CLOSE, id="images-channels"
        ),
        pytest.param(IMAGES, IMAGE_WEIGHTS, (SIXTEEN,), "QuantizeLinear DequantizeLinear", STEP, id="images-16-bits"),
        pytest.param(
            TOKENS,
            TOKEN_WEIGHTS,
            (optimised(EXTENDED),),
            "BiasGelu FusedMatMul SkipLayerNormalization",
            CLOSE,
            id="tokens",
        ),
        pytest.param(TOKENS, TOKEN_WEIGHTS, (BYTES,), INTEGER_TOKENS, CLOSE, id="tokens-integers"),
        pytest.param(
            TOKENS,
            TOKEN_WEIGHTS,
            (dynamic(), optimised(EXTENDED)),
            "DynamicQuantizeMatMul Gelu",
            CLOSE,
            id="tokens-dynamic",
        ),
        pytest.param(STEPS, STEP_WEIGHTS, (dynamic(),), "DynamicQuantizeLSTM", CLOSE, id="steps-dynamic"),
        pytest.param(
            STEPS, STEP_WEIGHTS, (dynamic(per_channel=True),), "DynamicQuantizeLSTM", CLOSE, id="steps-channels"
        ),
    ],
)
def test_what_is_written_runs(
    text: str, weights: dict[str, tuple[int, ...]], steps: tuple[Written, ...], wanted: str, tol: float, tmp_path: Path
) -> None:
    model = network(text, weights)
    feeds = fed(model)
    for step in steps:
        model = step(model, tmp_path)
    written = {n.op_type for n in model.graph.node if n.domain == "com.microsoft"}
    assert written >= set(wanted.split()), f"it writes {sorted(written)}"
    # one thread: an LSTM's states are quantised together by as many rows as a thread gets
    want = OnnxRuntime(model.SerializeToString(), threads=1).run(feeds)
    with infera_gpu.load(model, device="cpu") as session:
        got = session.run(feeds)
    for name, expected in want.items():
        assert_close(np.asarray(got[name]), expected, tol, name)


def test_the_layout_of_one_cpu_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    model = optimised(ALL)(network(IMAGES, IMAGE_WEIGHTS), tmp_path)
    written = {n.op_type for n in model.graph.node if n.domain == "com.microsoft.nchwc"}
    if not written:
        pytest.skip("onnxruntime has no such layout for this CPU")
    with pytest.raises(UnsupportedOperatorError, match="ORT_ENABLE_EXTENDED") as caught:
        infera_gpu.load(model, device="cpu")
    assert str(caught.value).count("ORT_ENABLE_EXTENDED") == 1


def test_convolutions_of_channels_last_are_convolutions() -> None:
    """As onnxruntime.transformers.optimizer writes them for diffusion models, which its CPU does not run."""
    rng = np.random.default_rng(0)
    text = """
        g (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y) {
            t = Transpose <perm = [0, 2, 3, 1]> (x)
            c = com.microsoft.NhwcConv <pads = [1, 1, 1, 1]> (t, w, b)
            u = Transpose <perm = [0, 3, 1, 2]> (c)
            y = Relu(u)
        }"""
    w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3, 3, 3), (4,)))
    models = []
    for body, weight in (
        (text, np.moveaxis(w, 1, -1)),
        (
            """
        g (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y) { c = Conv <pads = [1, 1, 1, 1]> (x, w, b)  y = Relu(c) }""",
            w,
        ),
    ):
        model = parse(body)
        model.graph.initializer.extend(map(onnx.numpy_helper.from_array, (np.ascontiguousarray(weight), b), ("w", "b")))
        models.append(model)
    feeds = {"x": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)}
    want = OnnxRuntime(models[1].SerializeToString(), threads=1).run(feeds)["y"]
    for device in ("cpu", "recording"):
        with infera_gpu.load(models[0], device=device) as session:
            assert [n.op.replace("NHWC", "") for n in session.graph.nodes if n.op != "Transpose"] == ["FusedConv"]
            assert_close(np.asarray(session.run(feeds)["y"]), want, CLOSE, "y")
