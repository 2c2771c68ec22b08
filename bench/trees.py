"""`python -m bench.trees`: a tree ensemble against onnxruntime, one thread, interleaved, medians."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
from onnx import helper

import infera_gpu
from bench.measure import medians
from infera_gpu.ops._forest import forest


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


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.trees", description=__doc__)
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--features", type=int, default=25)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    proto = model(options.trees, options.depth, options.features)
    x = np.random.default_rng(0).uniform(-1, 1, (options.batch, options.features)).astype(np.float32)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    peer = onnxruntime.InferenceSession(proto.SerializeToString(), settings)
    session = infera_gpu.load(proto, device="cpu")
    runs: dict[str, Callable[[], np.ndarray]] = {
        "onnxruntime": lambda: peer.run(None, {"x": x})[0],
        "infera_gpu": lambda: session.run({"x": x})["y"],
    }
    np.testing.assert_allclose(runs["infera_gpu"](), runs["onnxruntime"](), atol=1e-5)
    found = {name: s * 1e3 for name, s in medians(runs, options.rounds).items()}
    for name, ms in found.items():
        print(f"{name}: {ms:.2f} ms")
    print(f"ratio: {found['infera_gpu'] / found['onnxruntime']:.2f}")


if __name__ == "__main__":
    main()
