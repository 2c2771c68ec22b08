"""`batch_invariant` on a GPU: entries of a batch against the same ones alone, bit for bit, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from bench.build import bert, resnet50
from bench.gpu_bound import bound_run
from bench.gpu_models import bert_feeds, images
from bench.gpu_peers import Feeds
from bench.gpu_report import CheckFailed, Context, Section
from bench.gpu_timings import gpu_seconds
from infera_gpu.graph import Graph
from infera_gpu.loader import load_graph
from infera_gpu.passes import Precision
from infera_gpu.session import Session

Result = tuple[str, Mapping[str, Any]]

NETWORKS: Mapping[str, tuple[Callable[[], onnx.ModelProto], Callable[[int], Feeds]]] = {
    "resnet50": (resnet50, images),
    "bert-base": (bert, lambda batch: bert_feeds(batch, 128, 30522)),
}
BATCH, ALONE = 32, (0, 16, 31)
"""A batch, and the entries of it that run alone."""

HALVES: Sequence[Precision] = ("fp32", "fp16")
NEEDED = 8
"""Seconds without which a network is not begun."""


def batches(context: Context, batch: int = BATCH, alone: Sequence[int] = ALONE) -> Result:
    """With the option entries are the same bits alone and in a batch; GPU times of both with it and without."""
    found: dict[str, Any] = {}
    for name, (build, feeds_of) in NETWORKS.items():
        graph, feeds = load_graph(build()), feeds_of(batch)
        for precision in HALVES:
            if context.left() < NEEDED:
                break
            without, with_it = (
                _measured(context, graph, feeds, alone, precision, batch_invariant=option) for option in (False, True)
            )
            found[f"{name} {precision}"] = {"without": without, "with": with_it}
    wrong = {name: row["with"]["differ"] for name, row in found.items() if row["with"]["differ"]}
    if wrong or not found:
        raise CheckFailed(f"entries differ: {wrong}" if wrong else "no time for any network", found)
    return "; ".join(f"{name} {_cost(row, batch)}" for name, row in found.items()), found


def _measured(
    context: Context, graph: Graph, feeds: Feeds, alone: Sequence[int], precision: Precision, *, batch_invariant: bool
) -> dict[str, Any]:
    """The entries that differ from those of the batch, and seconds of the GPU for one and for the batch."""
    device = context.open(batch_invariant=batch_invariant)
    with Session(graph, device, precision=precision) as session:
        whole = session.run(feeds)
        differ = []
        for i in alone:
            made = session.run({name: x[i : i + 1] for name, x in feeds.items()})
            differ += [i] if any(not np.array_equal(y, whole[name][i : i + 1]) for name, y in made.items()) else []
        seconds = {}
        for size in (1, len(next(iter(feeds.values())))):
            call = bound_run(device, session, {name: x[:size] for name, x in feeds.items()}).call
            with device.running():
                seconds[size] = gpu_seconds(device, call)
    return {"differ": differ, "seconds": seconds}


def _cost(row: Mapping[str, Any], batch: int) -> str:
    with_it, without = (row[which]["seconds"] for which in ("with", "without"))
    return ", ".join(f"b{n} {with_it[n] * 1e3:.2f} ms ({with_it[n] / without[n]:.2f}x)" for n in (1, batch))


SECTIONS: Mapping[str, Section] = {"batches": batches}
