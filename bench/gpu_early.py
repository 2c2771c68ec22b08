"""Kernels that come early (programmatic dependent launch) against the same ones launched as ever: bits, and times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.gpu_batches import NETWORKS
from bench.gpu_bound import bound_run
from bench.gpu_report import CheckFailed, Context, Section
from bench.gpu_timings import gpu_seconds
from infera_gpu.loader import load_graph
from infera_gpu.session import Session

RUNS = 40
"""Of each: in most of them CUDA graphs are replayed."""

NEEDED = 4
"""Seconds without which a network is not begun."""


def early(context: Context) -> tuple[str, Mapping[str, Any]]:
    """One entry of each network in float16, whose kernels are the shortest: a kernel that did not wait for the one in
    front of it would now and then give other bits."""
    found: dict[str, Any] = {}
    for name, (build, feeds_of) in NETWORKS.items():
        if context.left() < NEEDED:
            break
        graph, feeds, seconds = load_graph(build()), feeds_of(1), {}
        want: Mapping[str, Any] = {}
        wrong = 0
        for way in ("as ever", "early"):
            device = context.open()
            if not device.launcher.target.pdl:
                return "not on this GPU, or not by its driver", {}
            if way == "as ever":
                device.launcher.launch_early = None
            with Session(graph, device, precision="fp16") as session:
                made = [session.run(feeds) for _ in range(RUNS)]
                want = want or made[0]
                wrong += sum(any(not np.array_equal(got[n], array) for n, array in want.items()) for got in made)
                call = bound_run(device, session, feeds).call
                with device.running():
                    seconds[way] = gpu_seconds(device, call)
        found[name] = {"seconds": seconds, "wrong_runs": wrong}
    wrong_runs = {name: row["wrong_runs"] for name, row in found.items() if row["wrong_runs"]}
    if wrong_runs or not found:
        raise CheckFailed(f"runs with other bits: {wrong_runs}" if wrong_runs else "no time for any network", found)
    return "; ".join(f"{name} {_gain(row['seconds'])}" for name, row in found.items()), found


def _gain(seconds: Mapping[str, float]) -> str:
    return f"{seconds['early'] * 1e3:.3f} ms ({seconds['early'] / seconds['as ever']:.2f}x)"


SECTIONS: Mapping[str, Section] = {"early": early}
