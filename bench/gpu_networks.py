"""Whole networks on a GPU: precisions against the CPU, replays against eager runs, faults."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import onnx

from bench.build import bert, resnet50
from bench.gpu_models import bert_feeds, images
from bench.gpu_parity import OURS, PEER, errors, expected, told, wrong
from bench.gpu_peers import Feeds
from bench.gpu_report import CheckFailed, Context, Section
from infera_gpu.loader import load_graph
from infera_gpu.passes import PRECISIONS
from infera_gpu.session import Session
from infera_gpu.verify import TOLERANCES

Result = tuple[str, Mapping[str, Any]]


def small_bert() -> onnx.ModelProto:
    return bert(layers=2, hidden=128, heads=2, inner=256, vocabulary=100)


# ---- results


PRECISE: Mapping[str, tuple[Callable[[], onnx.ModelProto], Feeds]] = {
    "bert-small": (small_bert, bert_feeds(2, 33, 100)),
    "resnet50": (resnet50, images(1)),
}
"""name -> how to build it, what to feed it"""

LEAST_SECONDS = 10
"""Left, without which none of them is begun."""

REPLAYED = {batch: bert_feeds(batch, 33, 100) for batch in (1, 2, 5)}


def precisions(context: Context) -> Result:
    """Every precision against the CPU in float32, infera's and onnxruntime's, within what `infera verify` allows it."""
    found: dict[str, Any] = {}
    alone: dict[str, str] = {}
    problems: list[str] = []
    for name, (build, feeds) in PRECISE.items():
        if context.left() < LEAST_SECONDS:
            break
        right = expected(build(), feeds)
        for precision in PRECISIONS:
            device = context.open()
            device.tf32 = precision == "tf32"
            with Session(right.graph, device, precision=precision) as session:
                differences = right.differences(session.run(feeds))
            found[f"{name} {precision}"] = errors(differences)
            problems += [f"{name} {precision} {problem}" for problem in wrong(differences, TOLERANCES[precision])]
        alone[name] = right.alone
    found["compared"] = {name: reason or f"with {OURS} and {PEER}" for name, reason in alone.items()}
    if problems or not alone:
        raise CheckFailed(("; ".join(problems) or "no time for any model") + told(alone), found)
    worst = {
        p: max(error for name in alone for by in found[f"{name} {p}"].values() for error in by.values())
        for p in PRECISIONS
    }
    late = [name for name in PRECISE if name not in alone]
    summary = "errors of the peak: " + ", ".join(f"{p} {e:.2g}" for p, e in worst.items()) + told(alone)
    return summary + (f", no time for {', '.join(late)}" if late else ""), found


def replays(context: Context) -> Result:
    """Captured runs give the bits of eager ones, again and again, in turn with other shapes, from several threads."""
    graph, feeds = load_graph(small_bert()), REPLAYED
    device = context.open()
    device.captures = False
    with Session(graph, device) as eager:
        want = {batch: eager.run(given) for batch, given in feeds.items()}
    captured = wrong = 0

    def differs(session: Session, batch: int) -> bool:
        got = session.run(feeds[batch])
        return any(not np.array_equal(got[name], array) for name, array in want[batch].items())

    with Session(graph, context.open()) as session:
        for _ in range(5):
            wrong += sum(differs(session, batch) for batch in feeds)
        plan = session.plan_for(feeds[1])
        captured = sum(map(len, plan.graphs or ()))
        with ThreadPoolExecutor(4) as pool:
            wrong += sum(pool.map(partial(differs, session), [1, 2, 5] * 20))
    facts = {"steps": len(plan.steps), "captured": captured, "graphs": len(plan.graphs or ()), "wrong_runs": wrong}
    if wrong or not captured:
        raise CheckFailed(f"{wrong} of 75 replayed runs differ from eager ones, {captured} steps captured", facts)
    return f"75 replayed runs equal eager ones bit by bit, {captured} of {len(plan.steps)} steps captured", facts


# ---- faults

POKE = 'extern "C" __global__ void poke(int *p) { *p = 1; }'
"""CUDA C++ of a kernel that writes where it is told: the only one in this repository, Triton makes all others."""

FAULT_SECONDS = 25
"""That the process may take which faults: it starts, compiles two kernels and ends."""

_ILLEGAL = """
from contextlib import suppress
import numpy as np
import infera_gpu
from infera_gpu.errors import DeviceLostError
from tests.text import parse

model = parse("g (float[N, 8] x) => (float[N, 8] y) { a = Exp(x) y = Add(a, x) }")
healthy = infera_gpu.load(model, device="cuda:%d")
x = {"x": np.ones((4, 8), np.float32)}
healthy.run(x)
import cupy
broken = cupy.RawKernel(%r, "poke")
with suppress(DeviceLostError), healthy.device.running():
    broken((1,), (1,), (np.uint64(0xDEAD0000),))
for attempt in range(2):
    try:
        healthy.run(x)
        print("a run after an illegal access did not fail")
    except DeviceLostError as error:
        assert "restart the process" in str(error)
assert healthy.device.lost
infera_gpu.load(model, device="cpu").run(x)
healthy.close()
print("lost and told")
"""


def faults(context: Context) -> Result:
    """A kernel that faults loses the GPU to its process, which says so; launches beyond the card are refused."""
    from infera_kernels.launch import LaunchError
    from infera_kernels.triton.matmul import matmul
    from infera_kernels.triton.tiles import Tile

    device = context.open()
    found: dict[str, Any] = {}
    problems: list[str] = []
    with device.running():
        x = device.constant(np.ones((512, 512), np.float16), "device")
        try:
            matmul(x, x, device.xp.empty_like(x), device.launcher, tile=Tile(256, 256, 128, 8, 8))
            problems.append("a tile beyond the card's shared memory was not refused")
        except LaunchError as error:
            found["a tile too large"] = str(error)
        x += x  # the device works on
        device.synchronize()
    done = subprocess.run(
        [sys.executable, "-c", _ILLEGAL % (device.index, POKE)],
        capture_output=True,
        text=True,
        timeout=FAULT_SECONDS,
        check=False,
    )
    found["an illegal access"] = (done.stdout + done.stderr)[-2000:]
    if not done.stdout.endswith("lost and told\n") or "did not fail" in done.stdout:
        problems.append(f"an illegal access: {(done.stdout + done.stderr).strip().splitlines()[-1:]}")
    if problems:
        raise CheckFailed("; ".join(problems), found)
    return "a fault loses the GPU to its process alone, which says so; what is too large is refused", found


SECTIONS: Mapping[str, Section] = {
    "precisions": precisions,
    "replays": replays,
    "faults": faults,
}
