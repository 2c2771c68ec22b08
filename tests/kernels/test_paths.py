"""Which kernels whole models get: plans of the recording device are the CUDA device's plans."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

import infera_gpu
from bench.build import bert
from bench.build_llama import Sizes, llama, llama_feeds
from infera_gpu.plan import Plan
from tests.kernels.test_tuning import launches
from tests.text import parse

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

MLP = """
g (float[N, 16] x) => (float[N, 3] y) <
    float[16, 32] w = {%s}, float[32] b = {%s}, float[3, 32] v = {%s}, float[3] c = {%s},
    float low = {0.0}, float high = {6.0}
> {
    a = MatMul(x, w)
    h = Add(a, b)
    r = Clip(h, low, high)
    z = Gemm <transB = 1> (r, v, c)
    y = LogSoftmax(z)
}"""


CONVOLUTIONS = """
g (float[N, 3, 96, 96] x) => (float[N, 4] y, float[N, 8, 96, 96] z) {
    s = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, stem)
    t = Relu(s)
    p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (t)
    d = Conv <group = 8, pads = [1, 1, 1, 1]> (p, depth)
    e = Conv <pads = [1, 1, 1, 1]> (d, square)
    a = Add(e, p)
    r = Relu(a)
    u = ConvTranspose <strides = [2, 2]> (r, up)
    z = Sigmoid(u)
    g = GlobalAveragePool(r)
    f = Flatten(g)
    y = MatMul(f, head)
}"""
WEIGHTS = {
    "stem": (8, 3, 3, 3),
    "depth": (8, 1, 3, 3),
    "square": (8, 8, 3, 3),
    "up": (8, 8, 2, 2),
    "head": (8, 4),
    "cube": (4, 4, 3, 3, 3),
}


VOLUMES = """
g (float[N, 4, 9, 9, 9] x) => (float[N, 4, 9, 9, 9] y) {
    a = Conv <pads = [1, 1, 1, 1, 1, 1]> (x, cube)
    m = MaxPool <kernel_shape = [3, 3, 3], pads = [1, 1, 1, 1, 1, 1]> (a)
    y = Conv <pads = [1, 1, 1, 1, 1, 1]> (m, cube)
}"""


def convolutions(text: str = CONVOLUTIONS) -> onnx.ModelProto:
    model = parse(text)
    used = {name: shape for name, shape in WEIGHTS.items() if f" {name})" in text}
    drawn = {name: np.random.default_rng(i).uniform(-1, 1, shape) for i, (name, shape) in enumerate(used.items())}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in drawn.items())
    return model


def numbers(n: int) -> str:
    return ", ".join(f"{v:.4f}" for v in np.random.default_rng(n).uniform(-1, 1, n))


def small_bert() -> onnx.ModelProto:
    return bert(layers=2, hidden=32, heads=2, inner=64, vocabulary=50)


def bert_feeds() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 50, (2, 7))
    mask = np.ones((2, 7), np.int64)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros((2, 7), np.int64)}


def kinds(plan: Plan) -> dict[str, set[str]]:
    """operator -> how its steps run; "" for copies, but of outputs: what leaves a GPU leaves in one piece"""
    found: dict[str, set[str]] = defaultdict(set)
    for step in plan.steps:
        if step.label not in {f"copy {name}" for name in plan.outputs}:
            found[step.placed.node.op if step.placed else ""].add(step.via)
    return found


def copied(plan: Plan) -> set[str]:
    """The values that are copied."""
    return {step.label.removeprefix("copy ") for step in plan.steps if step.kind == "copy"}


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "as_written"])
@pytest.mark.parametrize(
    ("model", "feeds"),
    [
        (small_bert(), bert_feeds()),
        (parse(MLP % tuple(map(numbers, (512, 32, 96, 3)))), {"x": np.ones((5, 16), np.float32)}),
        (convolutions(), {"x": np.ones((2, 3, 96, 96), np.float32)}),
        (convolutions(VOLUMES), {"x": np.ones((1, 4, 9, 9, 9), np.float32)}),
    ],
    ids=["bert", "mlp", "convolutions", "volumes"],
)
def test_answers_are_the_cpus_and_nothing_leaves_the_gpu(
    model: onnx.ModelProto, feeds: dict[str, np.ndarray], fuse: bool
) -> None:
    recording = infera_gpu.load(model, device="recording", fuse=fuse)
    want = infera_gpu.load(model, device="cpu", fuse=fuse).run(feeds)
    got = recording.run(feeds)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-5 * np.abs(want[name]).max())
    (plan,) = recording.plans(feeds)
    assert not [s for s in plan.steps if s.kind in ("upload", "download")]
    assert {s.space for s in plan.steps} == {"device"}


def test_a_transformer_runs_on_triton() -> None:
    session = infera_gpu.load(small_bert(), device="recording")
    (plan,) = session.plans(bert_feeds())
    found = kinds(plan)
    on_triton = {op for op, via in found.items() if via == {"triton"}}
    products = {"MatMul", "FusedMatMul"} & found.keys()
    assert products
    assert {"Attention", "LayerNormalization", "Elementwise", *products} <= on_triton
    assert "Softmax" not in found
    assert "" not in found, "heads are copied"
    assert on_triton == found.keys()


def test_a_transformer_as_written_runs_on_triton() -> None:
    session = infera_gpu.load(small_bert(), device="recording", fuse=False)
    (plan,) = session.plans(bert_feeds())
    found = kinds(plan)
    expected = {"Softmax", "LayerNormalization", "Add", "Mul", "Sub", "Div", "Cast", "Erf", "MatMul", "Gather"}
    assert {op for op, via in found.items() if via == {"triton"}} == expected


def test_a_perceptron_runs_on_triton() -> None:
    model = parse(MLP % tuple(map(numbers, (512, 32, 96, 3))))
    (plan,) = infera_gpu.load(model, device="recording").plans({"x": np.ones((5, 16), np.float32)})
    assert {s.via for s in plan.steps} == {"triton"}


def test_convolutions_run_on_triton_with_channels_last() -> None:
    """Transposes at the edges are views, which the first convolution and the last Sigmoid read: nothing is copied but
    what leaves, in the order that the model has it."""
    (plan,) = infera_gpu.load(convolutions(), device="recording").plans({"x": np.ones((2, 3, 96, 96), np.float32)})
    found = kinds(plan)
    last = ("FusedConv", "MaxPool", "ConvTranspose", "GlobalAveragePool")
    assert copied(plan) <= set(plan.outputs)
    assert found.keys() == {"MatMul", "Sigmoid", *(f"{name}NHWC" for name in last)}
    assert {via for vias in found.values() for via in vias} == {"triton"}


def test_volumes_have_channels_last_too() -> None:
    (plan,) = infera_gpu.load(convolutions(VOLUMES), device="recording").plans(
        {"x": np.ones((1, 4, 9, 9, 9), np.float32)}
    )
    assert kinds(plan) == {"FusedConvNHWC": {"triton"}, "MaxPoolNHWC": {"triton"}}
    assert copied(plan) <= set(plan.outputs)


DECODER = Sizes(layers=2, hidden=256, heads=8, groups=2, inner=96, vocabulary=50)
APPENDING = ["rotary_kernel"] * 2 + ["append_kernel"] * 2 + ["attention_kernel"]


@pytest.mark.parametrize(
    ("batch", "tokens", "past", "wanted"),
    [
        (1, 1, 511, ["decode_kernel", "combine_kernel"]),
        (2, 4, 2047, ["decode_kernel", "combine_kernel"]),
        (256, 1, 511, ["decode_kernel"]),
        (1, 1, 40, ["decode_kernel"]),
        (1, 3, 0, ["decode_kernel"]),
        (2, 5, 40, APPENDING),
        (2, 30, 0, APPENDING),
    ],
)
def test_a_decoders_step_attends_in_a_launch_or_two(
    batch: int, tokens: int, past: int, wanted: list[str], tmp_path: Path
) -> None:
    """Those that rotate, append and attend one after the other are for more tokens."""
    path = llama(tmp_path, tokens=tokens, past=past, sizes=DECODER)
    with infera_gpu.load(path, device="recording") as session:
        session.reserve(llama_feeds(batch, tokens=tokens, past=past, sizes=DECODER))
        (lease,) = session._leases.values()
        (bound,) = lease._bound.values()
    found = [
        [launch.kernel for launch in launches(bound.calls[bound.starts[i] : bound.starts[i + 1]])]
        for i, step in enumerate(bound.plan.steps)
        if step.placed and step.placed.node.op == "GroupQueryAttention"
    ]
    assert found == [wanted] * DECODER.layers
