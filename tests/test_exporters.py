"""Models as exporters write them: against onnxruntime, and against the framework that they come from.

`python -m bench.exporters_torch FOLDER` writes them with a Python that has PyTorch; nothing here needs it.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime
import pytest

import infera_gpu
from bench.exporters_report import STEP, UNFAITHFUL, Export, differences, exports
from infera_gpu.memory import SLACK
from infera_gpu.session import Session
from infera_gpu.verify import AGREEMENT, TOLERANCE, OnnxRuntime, compare

pytestmark = pytest.mark.large
FOLDER = os.environ.get("INFERA_EXPORTS") or None
FOUND = exports(Path(FOLDER)) if FOLDER else []


def test_there_are_exports() -> None:
    if FOLDER is None:
        pytest.skip(
            "INFERA_EXPORTS is not set: `make exports`, or `python -m bench.exporters_torch FOLDER` with PyTorch"
        )
    assert FOUND, f"{FOLDER} has no models with examples"


@pytest.mark.parametrize("export", FOUND, ids=lambda export: export.name)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "as written"])
def test_agrees_with_onnxruntime_and_the_framework(export: Export, fuse: bool) -> None:
    from_peer, from_framework = differences(export, fuse=fuse)
    wrong = [str(d) for d in from_peer if not d.within(tolerance_of(export))]
    assert not wrong, f"from onnxruntime: {'; '.join(wrong)}"
    apart = [str(d) for d in from_framework if not d.within(STEP if export.quantised else TOLERANCE)]
    assert bool(apart) == (export.name in UNFAITHFUL), (
        f"from {export.about['framework']}: {'; '.join(apart) or f'within {TOLERANCE}'}"
    )


@pytest.mark.parametrize("export", FOUND, ids=lambda export: export.name)
def test_arenas_are_near_the_lower_bound(export: Export) -> None:
    with infera_gpu.load(export.path, device="cpu", threads=1) as session:
        for feeds, _ in export.examples:
            for plan in session.plans({name: feeds[name] for name in session.inputs}):
                assert plan.arena_bytes <= (1 + SLACK) * plan.lower_bound


ATTENTIONS = {
    "PaddlePaddle": {"bert": 2},
    "PyTorch": {"bert": 2, "llama": 2, "swin": 4, "t5-encoder": 2, "vit": 2, "whisper-encoder": 2},
    "TensorFlow": dict.fromkeys(("bert", "bert-hub", "causal", "llama", "t5-encoder-hub", "vit"), 2),
}
"""Models whose attentions get queries, keys and values from one input -> how many there are."""


FUSED = {
    ("PaddlePaddle", "llama-grouped"): {"infera.Attention repeated": 2},
    ("TensorFlow", "mobilenet-v2"): {"Pad": 0},
    ("TensorFlow", "resnet"): {"Pad": 0},
    ("TensorFlow", "norms"): {"GroupNormalization": 1},
    ("TensorFlow", "segmenter"): {"GroupNormalization": 2, "SpaceToDepth": 0, "DepthToSpace": 0},
    ("TensorFlow", "gpt2-hub"): {"infera.Attention": 2},
    ("PaddlePaddle", "norms"): {"infera.L2Normalization finite": 1},
}
"""Models whose exporters write these operators in parts -> how many there are, with a flag of theirs that is set."""


def operators(session: Session) -> list[str]:
    """Of every node, and again with each flag that is set."""
    nodes = session.graph.nodes
    return [f"{n.qualified} {flag}".rstrip() for n in nodes for flag in ("", *n.attrs) if n.attrs.get(flag, 1) == 1]


def tolerance_of(export: Export) -> float:
    return STEP if export.quantised else AGREEMENT


@pytest.mark.parametrize("export", FOUND, ids=lambda export: export.name)
@pytest.mark.parametrize("device", ["cpu", "recording"])
def test_what_is_written_in_parts_is_one_operator(export: Export, device: str) -> None:
    wanted = FUSED.get((export.about["framework"], export.about["model"]), {})
    with infera_gpu.load(export.path, device=device) as session:
        found = operators(session)
    assert {op: found.count(op) for op in wanted} == wanted


LEVELS = onnxruntime.GraphOptimizationLevel


@pytest.mark.parametrize("level", [LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_ENABLE_EXTENDED], ids=["basic", "extended"])
@pytest.mark.parametrize("export", FOUND, ids=lambda export: export.name)
def test_what_onnxruntime_optimised_is_fused_as_well_and_agrees(
    export: Export, level: onnxruntime.GraphOptimizationLevel, tmp_path: Path
) -> None:
    path, options = tmp_path / "optimised.onnx", onnxruntime.SessionOptions()
    options.graph_optimization_level, options.optimized_model_filepath = level, str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(export.path), options, providers=["CPUExecutionProvider"])
    feeds, _ = export.examples[0]
    with infera_gpu.load(path, device="cpu") as session:
        given = {name: feeds[name] for name in session.inputs}
        got, found = session.run(given), operators(session)
    wrong = [d for d in compare(got, OnnxRuntime(path, threads=1).run(given)) if not d.within(tolerance_of(export))]
    assert not wrong, "; ".join(map(str, wrong))
    wanted = FUSED.get((export.about["framework"], export.about["model"]), {})
    assert {op: found.count(op) for op in wanted} == wanted


@pytest.mark.parametrize("export", FOUND, ids=lambda export: export.name)
def test_agrees_with_the_framework_as_cuda_would_plan_it(export: Export) -> None:
    with infera_gpu.load(export.path, device="recording") as session:
        attentions, model = ATTENTIONS.get(export.about["framework"], {}), export.about["model"]
        if model in attentions:
            products = {"infera.FusedMatMul", "infera.NormalizedMatMul"}
            joined = [n for n in session.graph.nodes if n.qualified in products and "joined" in n.name]
            assert len(joined) == attentions[model]
        for feeds, wanted in export.examples:
            given = {name: feeds[name] for name in session.inputs}
            got = session.run(given)
            if export.name not in UNFAITHFUL:
                tolerance = STEP if export.quantised else TOLERANCE
                assert not [str(d) for d in compare(got, wanted) if not d.within(tolerance)]
            for plan in session.plans(given):
                assert plan.arena_bytes <= (1 + SLACK) * plan.lower_bound


AS_CUPY: dict[str, set[str]] = {}
"""Models that have steps without a kernel on a GPU -> their operators."""


@pytest.mark.parametrize("export", FOUND, ids=lambda export: export.name)
def test_every_step_is_a_kernel_as_cuda_would_plan_it(export: Export) -> None:
    with infera_gpu.load(export.path, device="recording") as session:
        plans = [p for feeds, _ in export.examples for p in session.plans({k: feeds[k] for k in session.inputs})]
    for plan in plans:
        assert not plan.transfers
        assert not [step.label for step in plan.steps if step.space == "host"]
    found = {str(step.placed and step.placed.node.op) for p in plans for step in p.steps if step.kind == "compute"}
    assert found == AS_CUPY.get(export.name, set())
