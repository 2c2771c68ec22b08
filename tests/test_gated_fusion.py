"""The gated feed-forward of Llama-like models is one launch where Triton's kernels run, and as it was elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import infera_gpu
from bench.build_llama import Sizes, llama, llama_feeds
from infera_gpu import passes
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.dry import launches
from infera_gpu.errors import PlanError
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import optimize
from infera_gpu.passes.engine import Fusions
from infera_gpu.passes.gated import GATED
from infera_gpu.session import Session
from infera_gpu.verify import TOLERANCES, compare
from tests.text import parse

FORWARD = """
g (float[B, S, 16] x) => (float[B, S, 16] y) {
    g = MatMul(x, wg)
    s = Sigmoid(g)
    a = Mul(g, s)
    u = MatMul(x, wu)
    h = Mul(a, u)
    d = MatMul(h, wd)
    y = Add(x, d)
}"""
LINEAR = """
g (float[B, 16] x) => (float[B, 24] y) {
    u = Gemm <transB = 1> (x, wut)
    g = Gemm <transB = 1> (x, wgt)
    a = Relu(g)
    y = Mul(u, a)
}"""
GIVEN = """
g (float[B, 16] x, float[16, 24] v, float[16, 24] w) => (float[B, 24] y) {
    a = infera.FusedMatMul <activation = "tanh"> (x, v)
    u = MatMul(x, w)
    y = Mul(u, a)
}"""


WEIGHTS = {"wg": (16, 24), "wu": (16, 24), "wd": (24, 16), "wgt": (24, 16), "wut": (24, 16)}


def model(text: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    """With those of WEIGHTS that the text reads, or others in their place."""
    rng, proto = np.random.default_rng(0), parse(text, 18)
    for name, shape in (WEIGHTS | weights).items():
        if re.search(rf"\b{name}\b", text):
            weight = rng.normal(0, 0.3, shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return proto


def feeds(session: Session) -> dict[str, HostArray]:
    rng = np.random.default_rng(1)
    shapes = {name: [d if isinstance(d, int) else 3 for d in s.shape] for name, s in session.tensor_inputs.items()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def counted(proto: onnx.ModelProto, *, kinds: tuple[str, ...] = ("triton", "cupy"), **options: Any) -> Counter[str]:
    """The operators that are left for a device with kernels of such kinds."""
    return Counter(n.op for n in optimize(load_graph(proto), registry(), kinds=kinds, **options).nodes)


@pytest.mark.kernels
@pytest.mark.parametrize("text", [FORWARD, LINEAR, GIVEN], ids=["forward", "linear", "given"])
def test_it_is_for_triton_and_not_for_strict_sessions(text: str) -> None:
    assert counted(model(text))["GatedMatMul"] == 1
    assert counted(model(text), strict=True)["GatedMatMul"] == 0
    for kind in ("cpu", "cupy"):
        assert counted(model(text), kinds=(kind,))["GatedMatMul"] == 0


@pytest.mark.kernels
@pytest.mark.parametrize(("size", "times"), [(16, 1), (64, 0)])
def test_quantised_products_stay_as_they_are(size: int, times: int) -> None:
    """Small matrices are not quantised."""
    text, sizes = FORWARD.replace("16", str(size)), dict.fromkeys(("wg", "wu", "wd"), (size, size))
    assert counted(model(text, **sizes), precision="int8")["GatedMatMul"] == times


@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("text", [FORWARD, LINEAR, GIVEN], ids=["forward", "linear", "given"])
def test_it_computes_the_same_at_every_precision(text: str, precision: Any) -> None:
    with infera_gpu.load(model(text), device="cpu", fuse=False) as session:
        given = feeds(session)
        want = session.run(given)
    with infera_gpu.load(model(text), device="recording", precision=precision) as session:
        (plan,) = session.plans(given)
        steps = {s.placed.node.op: s for s in plan.steps if s.placed is not None}
        (spec,) = steps["GatedMatMul"].placed.site.outs  # type: ignore[union-attr]
        assert steps["GatedMatMul"].via == "triton"
        assert spec is not None
        assert spec.dtype.itemsize == (2 if precision in ("fp16", "bf16") else 4)
        found = compare(session.run(given), want)
    assert all(d.within(TOLERANCES[precision]) for d in found), found


@pytest.mark.kernels
@pytest.mark.parametrize(("tokens", "past"), [(1, 5), (3, 0)])
def test_a_decoders_layer_is_two_launches_less(
    tokens: int, past: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(layers=2, hidden=64, heads=4, groups=2, inner=96, vocabulary=50)
    path, given = (
        llama(tmp_path, tokens=tokens, past=past, sizes=sizes),
        llama_feeds(2, tokens=tokens, past=past, sizes=sizes),
    )

    def launched() -> tuple[int, int]:
        """All launches, and those of gated products, which normalise their rows first."""
        with Session(load_graph(path), RecordingDevice()) as session:
            plan = session.plan_for(given)
            each = launches(session.device, session._constants, plan)
            ops = [s.placed.node.op if s.placed else "" for s in plan.steps]
            return sum(each), sum(n for n, op in zip(each, ops, strict=True) if op == "GatedMatMul")

    after = launched()
    monkeypatch.setattr(passes, "FUSIONS", Fusions(*(f for f in passes.FUSIONS if f is not GATED)))
    before = launched()
    assert (after[1], before[1]) == (2 * sizes.layers, 0)
    assert before[0] - after[0] == 2 * sizes.layers


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('y = infera.GatedMatMul <activation = "swish"> (x, wg, wu)', "activation is 'swish', expected one of"),
        ("y = infera.GatedMatMul (x, wg, wd)", "expected two matrices of one shape and type, got"),
        ("y = infera.GatedMatMul <transB = 1> (x, wg, wu)", "cannot multiply"),
    ],
)
def test_what_does_not_fit_is_named(body: str, message: str) -> None:
    text = f"g (float[2, 16] x) => (float[M, N] y) {{ {body} }}"
    with infera_gpu.load(model(text), device="cpu") as session, pytest.raises(PlanError, match=message):
        session.plan_for({"x": (2, 16)})
