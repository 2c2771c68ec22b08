"""`python -m bench.shapes`: requests of shapes that a session has not seen, against onnxruntime in the same process.

Each model gets as many different lengths as asked for, in a seeded random order, and then all of them a second time:
of that many a session still has the plans, but not their bindings to memory. Both runtimes get every request in turn,
with one thread. Where numba is installed, this is done with the kernels that it compiles too. Planning is Python, which
takes half as long again in some hours on some machines: what ONNX's own inference of a node's outputs takes meanwhile
stands beside it. Writes bench/results/<host class>-shapes-<date>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

import infera_gpu
from bench.environment import environment, write_results
from bench.inputs import Feeds, text_line, tokens
from bench.models import path_of
from bench.worker import COMPILED, OURS, PEER
from infera_gpu.verify import TOLERANCE, OnnxRuntime, compare
from infera_kernels.jit import installed

SMALL_BYTES = 1 << 10
"""Initialisers whose values onnx may need to infer types."""

YARDSTICK_EVERY = 20
"""Requests between two looks at what onnx takes."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests of a model: `feeds` of a length. Lengths are `least`, `least + step`, ..."""

    feeds: Callable[[np.random.Generator, int], Feeds]
    least: int
    step: int

    def requests(self, count: int, seed: int = 0) -> list[Feeds]:
        """One of each of `count` lengths, in random order."""
        rng = np.random.default_rng(seed)
        lengths = self.least + self.step * rng.permutation(count)
        return [self.feeds(rng, int(n)) for n in lengths]


STREAMS: Mapping[str, Stream] = {
    "bert-base": Stream(lambda rng, n: tokens(rng, [n], types=True), 8, 1),
    "deep-bert": Stream(lambda rng, n: tokens(rng, [n], types=True), 8, 1),
    "paraphrase-minilm-l3": Stream(lambda rng, n: tokens(rng, [n], types=False), 8, 1),
    "ppocrv6-rec-small": Stream(lambda rng, n: {"x": text_line(rng, 1, n)}, 64, 4),
}


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of one request, and those of planning among infera's."""

    ours: float
    peer: float
    planning: float


def request(session: infera_gpu.Session, peer: OnnxRuntime, feeds: Feeds, ours_first: bool) -> Taken:
    def ours() -> tuple[float, float]:
        start = time.perf_counter()
        session.plan_for(feeds)
        planned = time.perf_counter()
        session.run(feeds)
        return time.perf_counter() - start, planned - start

    def theirs() -> float:
        start = time.perf_counter()
        peer.run(feeds)
        return time.perf_counter() - start

    if ours_first:
        whole, planning = ours()
        return Taken(whole, theirs(), planning)
    other = theirs()
    whole, planning = ours()
    return Taken(whole, other, planning)


def summarize(taken: Sequence[Taken], nodes: int) -> dict[str, Any]:
    """Milliseconds a request, median and worst, and microseconds of planning a node."""
    requests = {OURS: [1e3 * t.ours for t in taken], PEER: [1e3 * t.peer for t in taken]}
    planning = [1e6 * t.planning / nodes for t in taken]
    return {
        "milliseconds": {k: {"median": statistics.median(v), "worst": max(v)} for k, v in requests.items()},
        "ratio": statistics.median(t.ours / t.peer for t in taken),
        "planning_micros_a_node": {"median": statistics.median(planning), "worst": max(planning)},
    }


class Yardstick:
    """Microseconds that onnx takes to infer the outputs of a node, on average over the nodes of a model."""

    def __init__(self, model: str = "ppocrv6-rec-small") -> None:
        typed = onnx.shape_inference.infer_shapes(onnx.load(path_of(model)))
        graph, opset = typed.graph, typed.opset_import[0].version
        types = {v.name: v.type for v in (*graph.value_info, *graph.input, *graph.output)}
        types |= {i.name: onnx.helper.make_tensor_type_proto(i.data_type, i.dims) for i in graph.initializer}
        small = {i.name: i for i in graph.initializer if len(i.raw_data) <= SMALL_BYTES}
        self._imports = list(typed.opset_import)
        self._nodes = [
            (
                onnx.defs.get_schema(node.op_type, opset, node.domain),
                node,
                {v: types[v] for v in node.input if v},
                {v: small[v] for v in node.input if v in small},
            )
            for node in graph.node
        ]

    def micros(self) -> float:
        start = time.perf_counter()
        for schema, node, types, data in self._nodes:
            onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=self._imports)
        return 1e6 * (time.perf_counter() - start) / len(self._nodes)


def measure(name: str, runtime: str, count: int, yardstick: Yardstick) -> dict[str, Any]:
    """Outputs are compared at some lengths, in sessions of their own, before anything is timed."""
    path, requests, jit = path_of(name), STREAMS[name].requests(count), runtime == COMPILED
    row: dict[str, Any] = {"model": name, "runtime": runtime, "shapes": count, "failure": ""}
    peer = OnnxRuntime(path, threads=1, optimized=True)
    with infera_gpu.load(path, device="cpu", threads=1, jit=jit) as session:
        wrong = [str(d) for f in requests[:3] for d in compare(session.run(f), peer.run(f)) if not d.within(TOLERANCE)]
        if wrong:
            return {**row, "failure": f"outputs differ: {'; '.join(wrong)}"}
    peer = OnnxRuntime(path, threads=1, optimized=True)
    with infera_gpu.load(path, device="cpu", threads=1, jit=jit) as session:
        row["nodes"] = len(session.graph.nodes)
        for what in ("new", "again"):
            taken, inferring = [], []
            for i, feeds in enumerate(track(requests, f"{name}, {runtime}, {what}", transient=True)):
                if i % YARDSTICK_EVERY == 0:
                    inferring.append(yardstick.micros())
                taken.append(request(session, peer, feeds, i % 2 == 0))
            row[what] = {**summarize(taken, row["nodes"]), "onnx_micros_a_node": statistics.median(inferring)}
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table(title="requests of new shapes, and of the same shapes again")
    for column in ("model", "", "shapes"):
        shown.add_column(column, no_wrap=True)
    for column in ("ms", "worst", "onnxruntime ms", "worst", "ratio", "planning µs a node", "worst", "onnx"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in (r for r in rows if not r["failure"]):
        for what in ("new", "again"):
            found = row[what]
            ours, peer = found["milliseconds"][OURS], found["milliseconds"][PEER]
            planning = found["planning_micros_a_node"]
            shown.add_row(
                row["model"],
                escape(row["runtime"]),
                f"{row['shapes']} {what}",
                *(f"{t:.1f}" for t in (ours["median"], ours["worst"], peer["median"], peer["worst"])),
                f"{found['ratio']:.2f}",
                *(f"{t:.0f}" for t in (planning["median"], planning["worst"], found["onnx_micros_a_node"])),
            )
    return shown


def main() -> int:
    """0 when every model was measured and agreed with the peer."""
    parser = argparse.ArgumentParser("python -m bench.shapes", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(STREAMS), default=list(STREAMS), metavar="MODEL")
    parser.add_argument("--shapes", type=int, default=200, help="different lengths (200)")
    parser.add_argument("--out", type=Path, help="the results file (bench/results/<host class>-shapes-<date>.json)")
    options = parser.parse_args()
    console = Console(width=140)
    measured = environment()
    runtimes = (OURS, COMPILED) if installed() else (OURS,)
    yardstick = Yardstick()
    rows = [measure(name, runtime, options.shapes, yardstick) for name in options.models for runtime in runtimes]
    out = write_results(measured, {"shapes": options.shapes}, rows, options.out, "shapes")
    console.print(table(rows))
    failures = [f"{row['model']}, {row['runtime']}: {row['failure']}" for row in rows if row["failure"]]
    for failure in failures:
        console.print(f"failed: {failure}", markup=False, highlight=False)
    console.print(f"written to {out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
