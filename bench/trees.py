"""`python -m bench.trees`: a tree ensemble against onnxruntime, one thread, interleaved, medians.

Writes bench/results/<host class>-trees-<date>.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper
from rich.console import Console

import infera_gpu
from bench.__main__ import show
from bench.environment import environment, write_results
from bench.measure import interleave, summarize
from bench.worker import OURS, PEER, Row
from infera_gpu.ops._forest import forest
from infera_gpu.verify import TOLERANCE, OnnxRuntime, compare


def model(trees: int, depth: int, features: int) -> onnx.ModelProto:
    attrs = {**forest(trees, depth, features, 1, "target"), "n_targets": 1}
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", **attrs)
    graph = helper.make_graph(
        [node],
        "trees",
        [helper.make_tensor_value_info("x", 1, ["N", features])],
        [helper.make_tensor_value_info("y", 1, ["N", 1])],
    )
    opsets = [helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def measure(options: argparse.Namespace, batch: int) -> Row:
    """Outputs are compared before anything is timed."""
    row = Row("tree_ensemble", f"{options.trees} trees of depth {options.depth}, batch {batch}", 1)
    proto = model(options.trees, options.depth, options.features)
    x = np.random.default_rng(0).uniform(-1, 1, (batch, options.features)).astype(np.float32)
    row.shapes = {"x": list(x.shape)}
    peer = OnnxRuntime(proto.SerializeToString(), threads=1, optimized=True)
    with infera_gpu.load(proto, device="cpu", threads=1) as session:
        found = compare(session.run({"x": x}), peer.run({"x": x}))
        row.error = max(d.error for d in found)
        if not all(d.within(TOLERANCE) for d in found):
            row.failure = f"outputs differ: {'; '.join(map(str, found))}"
            return row
        contenders: dict[str, Callable[[], object]] = {
            OURS: lambda: session.run({"x": x}),
            PEER: lambda: peer.run({"x": x}),
        }
        taken = interleave(contenders, rounds=options.rounds, block_s=0.1)
    row.summaries = {name: summarize(samples) for name, samples in taken.items()}
    return row


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.trees", description=__doc__)
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--features", type=int, default=25)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--rounds", type=int, default=9, help="quiet samples wanted of each contender (9)")
    parser.add_argument("--out", type=Path, help="the results file (bench/results/<host class>-trees-<date>.json)")
    options = parser.parse_args()
    console = Console(width=120)
    measured = environment()
    rows = [measure(options, batch).as_dict() for batch in options.batch]
    chosen = {name: getattr(options, name) for name in ("trees", "depth", "features", "batch", "rounds")}
    out = write_results(measured, chosen, rows, options.out, "trees")
    show(rows, console)
    console.print(f"written to {out}")
    return 1 if any(row["failure"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
