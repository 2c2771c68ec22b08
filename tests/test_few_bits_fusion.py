"""A decoder with weights of few bits is few launches where Triton's kernels run, and computes what it did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import infera_gpu
from infera_gpu import passes
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.dry import launches
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import nbits, optimize
from infera_gpu.passes.engine import Fusions
from infera_gpu.passes.skipped import apart
from infera_gpu.session import Session
from infera_gpu.verify import TOLERANCES, compare
from tests.genai import SIZES, decoder, feeds
from tests.text import parse

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zeros": {"zeros": True},
    "biased": {"biased": True},
    "8": {"bits": 8},
}


def counted(proto: onnx.ModelProto, *, kinds: tuple[str, ...] = ("triton", "cupy"), **options: Any) -> Counter[str]:
    """The operators that are left for a device with kernels of such kinds."""
    return Counter(n.op for n in optimize(load_graph(proto), registry(), kinds=kinds, **options).nodes)


@pytest.mark.kernels
@pytest.mark.parametrize(("batch", "tokens", "past"), [(1, 1, 5), (3, 1, 5), (9, 1, 5), (2, 3, 0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_computes_the_same(variant: str, batch: int, tokens: int, past: int, tmp_path: Path) -> None:
    model = decoder(tmp_path, tokens=tokens, past=past, **VARIANTS[variant])
    given = feeds(batch, tokens=tokens, past=past)
    with infera_gpu.load(model, device="cpu", fuse=False) as session:
        want = session.run(given)
    with infera_gpu.load(model, device="recording") as session:
        (plan,) = session.plans(given)
        assert {step.via for step in plan.steps if step.placed is not None} == {"triton"}
        found = compare(session.run(given), want)
    assert all(d.within(TOLERANCES["fp16"]) for d in found), found


@pytest.mark.kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_few_launches(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer: heads, attention, a product that adds, both halves of the feed-forward, their gate, one that adds."""
    model, given = decoder(tmp_path, past=5, **VARIANTS[variant]), feeds(1, past=5)

    def launched() -> int:
        with Session(load_graph(model), RecordingDevice()) as session:
            return sum(launches(session.device, session._constants, session.plan_for(given)))

    assert launched() == 6 * SIZES.layers + 2
    monkeypatch.setattr(passes, "LAST", Fusions())
    monkeypatch.setattr(passes, "SIBLINGS", ())
    monkeypatch.setattr(passes, "apart", lambda graph: graph)
    monkeypatch.setattr(passes, "FUSIONS", Fusions(*(f for f in passes.FUSIONS if f not in nbits.FUSIONS)))
    biases = 3 if variant == "biased" else 0
    assert launched() == (12 + biases) * SIZES.layers + 3


@pytest.mark.kernels
def test_it_is_for_triton_and_not_for_strict_sessions(tmp_path: Path) -> None:
    model = decoder(tmp_path, past=5, biased=True)
    assert counted(model)["FusedMatMulNBits"] == 4 * SIZES.layers + 1
    for options in ({"strict": True}, {"kinds": ("cpu",)}, {"kinds": ("cupy",)}):
        found = counted(model, **options)
        assert found["SkipSimplifiedLayerNormalization"] == 2 * SIZES.layers
        assert found["SimplifiedLayerNormalization"] == 1


PLAIN = """
    g (float[2, 3] x, float[2, 4] a) => (float[2, 3] y{outputs})
    <float[4, 3] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}}, float[3] s = {{-1, 7, 0.5}}> {{
        {before}
        t = {product}
        y{more} = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.5> ({inputs})
    }}"""


def skipped(
    before: str = "", product: str = "MatMul(a, w)", inputs: str = "x, t, s", more: str = "", outputs: str = ""
) -> onnx.ModelProto:
    return parse(PLAIN.format(before=before, product=product, inputs=inputs, more=more, outputs=outputs), 21)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"inputs": "t, x, s"},
        {"product": "Add(s, p)", "before": "p = MatMul(a, w)"},
        {"more": ", , , z", "outputs": ", float[2, 3] z"},
    ],
    ids=["plain", "the product first", "biased", "with the sum"],
)
def test_a_norm_of_a_sum_is_taken_apart(given: dict[str, str]) -> None:
    graph = load_graph(skipped(**given))
    found = apart(graph)
    bias = ["Add"] if "before" in given else []
    assert [n.op for n in found.nodes] == ["MatMul", *bias, "Add", "SimplifiedLayerNormalization"]
    assert found.outputs == graph.outputs
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((2, n), np.float32) for name, n in (("x", 3), ("a", 4))}
    with Session(graph, RecordingDevice()) as before, Session(found, RecordingDevice()) as after:
        assert all(d.within(1e-6) for d in compare(after.run(feeds), before.run(feeds)))


@pytest.mark.parametrize(
    "given",
    [
        {"inputs": "x, t, s, s"},
        {"more": ", , v", "outputs": ", float[2, 1] v"},
        {"outputs": ", float[2, 3] t"},
        {"inputs": "t, t, s"},
        {"product": "Relu(x)"},
        {"product": "Add(x, p)", "before": "p = MatMul(a, w)"},
        {"product": "MatMul(a, v)", "before": "v = Exp(w)"},
        {"inputs": "v, t, s", "before": "i = Constant <value_ints = [0]> () v = Unsqueeze(x, i)"},
        {"inputs": "v, t, s", "before": "v = Concat <axis = 0> (x, x)"},
    ],
    ids=[
        *("biased", "statistics", "an output", "the product twice", "no product", "of three terms", "of two values"),
        *("broadcast", "of other rows"),
    ],
)
def test_other_norms_of_sums_stay(given: dict[str, str]) -> None:
    graph = load_graph(skipped(**given))
    assert apart(graph) is graph
