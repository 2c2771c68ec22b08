"""`python -m bench.dispatch`: what a node costs at run time beyond NumPy's own call.

A chain of tiny elementwise nodes runs through a session, as the same NumPy calls written out by hand into arrays that
exist already, and through onnxruntime where that is installed; interleaved, medians. Writes
bench/results/<host class>-dispatch-<date>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import onnx
from onnx import helper, numpy_helper

import infera_gpu
from bench.environment import environment, write_results
from bench.measure import medians

KINDS = (("Add", np.add), ("Mul", np.multiply), ("Sub", np.subtract), ("Div", np.divide))


def chain(nodes: int, width: int) -> onnx.ModelProto:
    """`width` floats through `nodes` binary nodes with one constant, which no rewrite merges."""
    made = [helper.make_node(KINDS[i % len(KINDS)][0], [f"v{i}", "c"], [f"v{i + 1}"]) for i in range(nodes)]
    graph = helper.make_graph(
        made,
        "chain",
        [helper.make_tensor_value_info("v0", 1, [width])],
        [helper.make_tensor_value_info(f"v{nodes}", 1, [width])],
        [numpy_helper.from_array(np.full(width, 0.5, np.float32), "c")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def by_hand(nodes: int, width: int) -> Callable[[np.ndarray], np.ndarray]:
    """The chain as NumPy calls into one buffer."""
    c, v = np.full(width, 0.5, np.float32), np.empty(width, np.float32)
    calls = [KINDS[i % len(KINDS)][1] for i in range(nodes)]

    def run(x: np.ndarray) -> np.ndarray:
        np.copyto(v, x)
        for fn in calls:
            fn(v, c, v)
        return v.copy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.dispatch", description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    measured = environment()
    model = chain(options.nodes, options.width)
    x = np.linspace(-1, 1, options.width, dtype=np.float32)
    session = infera_gpu.load(model, device="cpu", jit=False)
    last = f"v{options.nodes}"
    plain = by_hand(options.nodes, options.width)
    runs: dict[str, Callable[[], np.ndarray]] = {
        "NumPy by hand": lambda: plain(x),
        "infera_gpu": lambda: session.run({"v0": x})[last],
    }
    if find_spec("onnxruntime"):
        import onnxruntime

        opts = onnxruntime.SessionOptions()
        opts.intra_op_num_threads = 1
        peer = onnxruntime.InferenceSession(model.SerializeToString(), opts)
        runs["onnxruntime"] = lambda: peer.run(None, {"v0": x})[0]
    want = plain(x)
    for name, run in runs.items():
        np.testing.assert_allclose(run(), want, rtol=1e-6, err_msg=name)
    per_node = {name: s / options.nodes * 1e6 for name, s in medians(runs, options.rounds).items()}
    for name, micros in per_node.items():
        print(f"{name}: {micros:.3f} µs a node")
    above = per_node["infera_gpu"] - per_node["NumPy by hand"]
    print(f"infera_gpu above NumPy's own calls: {above:.3f} µs a node")
    row = {"model": f"chain of {options.nodes}", "micros_a_node": per_node, "above_numpy": above}
    chosen = {"nodes": options.nodes, "width": options.width, "rounds": options.rounds}
    print(write_results(measured, chosen, [row], topic="dispatch"))


if __name__ == "__main__":
    main()
