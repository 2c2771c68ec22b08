"""Where Triton's kernels run, a product normalises what only it reads; one row in the same launch."""

from __future__ import annotations

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
from infera_gpu.loader import load_graph
from infera_gpu.passes.engine import Fusions
from infera_gpu.session import Session
from infera_gpu.verify import TOLERANCES, compare
from tests.text import parse

HEADS = """
g (float[B, S, 48] x) => (float[B, S, 24] y, float[B, S, 12] z) {
    n = RMSNormalization <epsilon = 0.001> (x, s)
    q = MatMul(n, wq)
    r = Add(q, b)
    y = Sin(r)
    k = MatMul(n, wk)
    l = Add(k, c)
    z = Sin(l)
}"""
FORWARD = """
g (float[B, S, 48] x) => (float[B, S, 48] y) {
    n = SimplifiedLayerNormalization (x, s)
    g = MatMul(n, wg)
    h = Sigmoid(g)
    a = Mul(g, h)
    u = MatMul(n, wu)
    p = Mul(a, u)
    y = MatMul(p, wd)
}"""
WEIGHTS = {
    "s": (48,),
    "b": (24,),
    "c": (12,),
    "wq": (48, 24),
    "wk": (48, 12),
    "wg": (48, 24),
    "wu": (48, 24),
    "wd": (24, 48),
}


def model(text: str) -> onnx.ModelProto:
    rng, proto = np.random.default_rng(0), parse(text, 23)
    for name, shape in WEIGHTS.items():
        if f", {name})" in text:
            weight = rng.normal(0.1, 0.3, shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return proto


@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize(
    ("text", "op"), [(HEADS, "NormalizedMatMul"), (FORWARD, "GatedMatMul")], ids=["heads", "gated"]
)
def test_it_computes_the_same_at_every_precision(text: str, op: str, rows: tuple[int, int], precision: Any) -> None:
    given = {"x": np.random.default_rng(1).normal(0, 3, (*rows, 48)).astype(np.float32)}
    with infera_gpu.load(model(text), device="cpu", fuse=False) as session:
        want = session.run(given)
    with infera_gpu.load(model(text), device="recording", precision=precision) as session:
        (plan,) = session.plans(given)
        placed = {s.placed.node.op: s for s in plan.steps if s.placed is not None}
        assert not [name for name in placed if name.endswith("Normalization")]
        assert placed[op].via == "triton"
        found = compare(session.run(given), want)
    assert all(d.within(TOLERANCES[precision]) for d in found), found


@pytest.mark.kernels
@pytest.mark.parametrize(("batch", "norms"), [(1, 5), (2, 0)])
def test_a_step_of_one_sequence_launches_no_norms(
    batch: int, norms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One less for each half of a layer, and one for the last; those of more rows are launched as they were."""
    sizes = Sizes(layers=2, hidden=512, heads=4, groups=2, inner=700, vocabulary=600)
    path = llama(tmp_path, tokens=1, past=5, sizes=sizes)
    given = llama_feeds(batch, tokens=1, past=5, sizes=sizes)

    def launched() -> int:
        with Session(load_graph(path), RecordingDevice()) as session:
            return sum(launches(session.device, session._constants, session.plan_for(given)))

    after = launched()
    monkeypatch.setattr(passes, "LAST", Fusions())
    assert launched() - after == norms


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y = infera.NormalizedMatMul (x, wq, b)", r"the scale, is float32\[24\], expected float32\[48\]"),
        ("y = infera.NormalizedMatMul (x, s, s)", "expected a matrix, got"),
        ("y = infera.NormalizedMatMul (x, wq, s, s)", r"the bias is float32\[48\], expected float32\[24\]"),
        ("y = infera.NormalizedMatMul <transB = 1> (x, wq, s)", "cannot multiply"),
        ("y = infera.GatedMatMul (x, wg, wu, b)", r"the scale, is float32\[24\], expected float32\[48\]"),
    ],
)
def test_what_does_not_fit_is_named(body: str, message: str) -> None:
    proto = parse(f"g (float[2, 48] x) => (float[M, N] y) {{ {body} }}", 23)
    for name, shape in WEIGHTS.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    with infera_gpu.load(proto, device="cpu") as session, pytest.raises(PlanError, match=message):
        session.plan_for({"x": (2, 48)})
