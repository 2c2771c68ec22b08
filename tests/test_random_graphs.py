"""Random graphs against onnxruntime: planned as written and fused, on the CPU, and as CUDA would plan them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import printer

import infera_gpu
from infera_gpu.graph import HostArray
from tests.random_graphs import draw

SEEDS = range(800)
TOLERANCE = 1e-4
"""Of the largest value: chains of a dozen nodes, in float32, in another order of summation."""

FLOOR = 1e-2
"""A largest value below which rounding errors of what came before are all that there is."""


def by_onnxruntime(model: onnx.ModelProto, *feeds: dict[str, HostArray]) -> list[dict[str, HostArray]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return [dict(zip(names, map(np.asarray, session.run(names, f)), strict=True)) for f in feeds]


def difference(got: HostArray, want: HostArray) -> str:
    """What is wrong, or nothing."""
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"is {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}"
    if want.dtype.kind != "f":
        return "" if np.array_equal(got, want) else f"is {got.tolist()}, expected {want.tolist()}"
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return f"is {got.tolist()}, expected {want.tolist()}"
    error = np.abs(got[finite] - want[finite]).max(initial=0.0)
    peak = max(float(np.abs(want[finite]).max(initial=0.0)), FLOOR)
    return "" if error <= TOLERANCE * peak else f"is off by {error:.3g} where the largest value is {peak:.3g}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_graph_is_what_onnxruntime_computes(seed: int) -> None:
    example = draw(seed)
    wants = by_onnxruntime(example.model, *map(dict, example.feeds))
    for device, fuse in (("cpu", True), ("cpu", False), ("recording", True)):
        with infera_gpu.load(example.model, device=device, fuse=fuse) as session:
            for run, (feeds, want) in enumerate(zip(example.feeds * 2, wants * 2, strict=True)):
                got = session.run(feeds)
                wrong = {name: text for name in want if (text := difference(got[name], want[name]))}
                assert not wrong, (
                    f"seed {seed}, {device}, {'fused' if fuse else 'as written'}, run {run}: {wrong}\n"
                    + printer.to_text(example.model.graph)
                )


def test_the_graphs_have_what_they_are_meant_to_have() -> None:
    models = [draw(seed).model for seed in SEEDS]
    ops = Counter(node.op_type for model in models for node in model.graph.node)
    for op in ("If", "Compress", "NonZero", "Conv", "MatMul", "Gemm", "Erf", "Split", "Gather", "Transpose", "Reshape"):
        assert ops[op] > len(SEEDS) / 20, op
    doubled = [n for m in models for n in m.graph.node if n.op_type == "Add" and len(set(n.input)) < len(n.input)]
    assert len(doubled) > len(SEEDS) / 20
