"""Whole networks on a GPU: precisions against the CPU, replays against eager runs, faults, speed beside PyTorch."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx

from bench.build import bert, resnet50
from bench.gpu_models import bert_feeds, images
from bench.gpu_report import CheckFailed, Context, Section
from bench.gpu_timings import gpu_seconds, torch_seconds
from bench.torch_peers import PEERS
from infera_gpu.devices import open_device
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.passes import PRECISIONS
from infera_gpu.session import Session
from infera_gpu.verify import TOLERANCES, compare

Result = tuple[str, Mapping[str, Any]]
Feeds = Mapping[str, HostArray]


def _small_bert() -> onnx.ModelProto:
    return bert(layers=2, hidden=128, heads=2, inner=256, vocabulary=100)


def token_feeds(batch: int, past: int = 255) -> dict[str, HostArray]:
    """What `gpt2_step` takes."""
    rng = np.random.default_rng(0)
    caches = {
        f"past_{part}_{i}": rng.standard_normal((batch, 12, past, 64)).astype(np.float32)
        for i in range(12)
        for part in ("key", "value")
    }
    return {"input_ids": rng.integers(0, 50257, (batch, 1)), **caches}


# ---- results


def precisions(context: Context) -> Result:
    """Every precision against the CPU in float32, within what `infera verify` allows it."""
    found: dict[str, Any] = {}
    wrong: list[str] = []
    cases = {"bert-small": (_small_bert, bert_feeds(2, 33, 100)), "resnet50": (resnet50, images(1))}
    for name, (build, feeds) in cases.items():
        if context.left() < 20:
            break
        graph = load_graph(build())
        with Session(graph, open_device("cpu")) as cpu:
            want = cpu.run(feeds)
        for precision in PRECISIONS:
            device = context.open()
            device.tf32 = precision == "tf32"
            with Session(graph, device, precision=precision) as session:
                differences = compare(session.run(feeds), want)
            found[f"{name} {precision}"] = {d.name: d.error for d in differences}
            wrong += [f"{name} {precision} {d}" for d in differences if not d.within(TOLERANCES[precision])]
    if wrong or not found:
        raise CheckFailed("; ".join(wrong) or "no time for any model", found)
    worst = {p: max(e for k, v in found.items() if k.endswith(f" {p}") for e in v.values()) for p in PRECISIONS}
    return "errors of the peak: " + ", ".join(f"{p} {e:.2g}" for p, e in worst.items()), found


def replays(context: Context) -> Result:
    """Captured runs give the bits of eager ones, again and again, in turn with other shapes, from several threads."""
    graph = load_graph(_small_bert())
    feeds = {batch: bert_feeds(batch, 33, 100) for batch in (1, 2, 5)}
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

_ILLEGAL = """
import numpy as np
import infera_gpu
from infera_gpu.errors import DeviceLostError
from tests.text import parse

model = parse("g (float[N, 8] x) => (float[N, 8] y) { a = Exp(x) y = Add(a, x) }")
healthy = infera_gpu.load(model, device="cuda:%d")
x = {"x": np.ones((4, 8), np.float32)}
healthy.run(x)
import cupy
broken = cupy.RawKernel("extern \\"C\\" __global__ void poke(int *p) { *p = 1; }", "poke")
with healthy.device.running():
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
        [sys.executable, "-c", _ILLEGAL % device.index], capture_output=True, text=True, timeout=120, check=False
    )
    found["an illegal access"] = (done.stdout + done.stderr)[-2000:]
    if not done.stdout.endswith("lost and told\n") or "did not fail" in done.stdout:
        problems.append(f"an illegal access: {(done.stdout + done.stderr).strip().splitlines()[-1:]}")
    if problems:
        raise CheckFailed("; ".join(problems), found)
    return "a fault loses the GPU to its process alone, which says so; what is too large is refused", found


# ---- speed

SPEED: Mapping[str, tuple[Callable[[int], Feeds], tuple[int, ...]]] = {
    "resnet50": (images, (1, 32)),
    "bert-base": (lambda batch: bert_feeds(batch, 128, 30522), (1, 32)),
    "gpt2-step": (token_feeds, (1, 32)),
}
"""name -> what to feed it, at which batches."""


def bound_run(device: Any, session: Session, feeds: Feeds) -> tuple[Callable[[], object], Mapping[str, Any]]:
    """The calls of a run that reads arrays on the GPU where they lie, without copying answers out; and its answers.

    Of what a run has copied in, its steps may have overwritten everything: only such a binding can run again by itself.
    """
    with device.running():
        there = {name: device.constant(array, "device") for name, array in feeds.items()}
    for _ in range(4):  # copied, bound to, recorded, replayed
        answers = session.run(there)
    (lease,) = session._leases.values()
    *_, (bound, _) = lease._direct.values()
    return bound.run, answers


def networks(context: Context, names: tuple[str, ...] = tuple(SPEED)) -> Result:
    """Networks at fp16 and fp32 beside PyTorch, eager and compiled, in turn; answers are compared first.

    Times are of the GPU alone: everything is there, and what offers CUDA graphs replays them. torch.compile runs at
    "reduce-overhead", which records graphs; "max-autotune" takes minutes a network.
    """
    found: dict[str, Any] = {}
    for name in names:
        build, peer = PEERS[name]
        feeds_of, batches = SPEED[name]
        model = build()
        graph = load_graph(model)
        module = peer(model) if _torch() else None
        for precision in ("fp16", "fp32"):
            for batch in batches:
                if context.left() < 45:
                    return _summary(found, "out of time")
                row = _timed(context, graph, module, name, feeds_of(batch), precision)
                found[f"{name} {precision} b{batch}"] = row
                gc.collect()
        del module
    return _summary(found, "")


def _torch() -> Any:
    if find_spec("torch") is None:
        return None
    import torch

    return torch if torch.cuda.is_available() else None


def _timed(context: Context, graph: Any, module: Any, name: str, feeds: Feeds, precision: Any) -> dict[str, Any]:
    device = context.open()
    row: dict[str, Any] = {}
    with Session(graph, device, precision=precision) as session:
        began = time.perf_counter()
        call, answers = bound_run(device, session, feeds)
        row["first_run_seconds"] = time.perf_counter() - began
        with device.running():
            row["infera"] = gpu_seconds(device, call)
        torch = _torch()
        if torch is None or module is None:
            return row
        module = module.to("cuda", getattr(torch, {"fp16": "float16", "fp32": "float32"}[precision]))
        dtype = next(module.parameters()).dtype
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        given = [torch.tensor(v, device="cuda") for v in feeds.values()]
        given = [t.to(dtype) if t.is_floating_point() else t for t in given]
        if name == "resnet50":
            module = module.to(memory_format=torch.channels_last)
            given = [t.contiguous(memory_format=torch.channels_last) for t in given]
        with torch.inference_mode():
            made = module(*given)
        first = made[0] if isinstance(made, tuple) else made
        (difference,) = compare({"output": next(iter(answers.values()))}, {"output": first.float().cpu().numpy()})
        row["error_against_torch"] = difference.error
        if not difference.within(2 * TOLERANCES[precision]):
            raise CheckFailed(f"{name} at {precision} differs from PyTorch: {difference}", row)
        with device.running():
            row["torch_eager"] = torch_seconds(device, torch, partial(module, *given))
        try:
            compiled = torch.compile(module, mode="reduce-overhead")
            with torch.inference_mode():
                for _ in range(3):
                    compiled(*given)
            torch.cuda.synchronize()
            row["torch_compile"] = _torch_alone(torch, compiled, given)
            with device.running():
                row["infera"] = min(row["infera"], gpu_seconds(device, call))
        except Exception as error:  # whatever the compiler meets on this machine is no failure of ours
            row["torch_compile_failed"] = f"{type(error).__name__}: {error}"[:300]
    return row


def _torch_alone(torch: Any, compiled: Any, given: list[Any]) -> float:
    """Seconds of a call on torch's own stream, by events: its graphs are bound to that."""
    times = []
    with torch.inference_mode():
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                compiled(*given)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / 20)
    return float(min(times))


def _summary(found: Mapping[str, Any], note: str) -> Result:
    if not found:
        raise CheckFailed("no time for any network", {})
    parts = []
    for name, row in found.items():
        peers = [f"{row[p] / row['infera']:.2f}x {p}" for p in ("torch_eager", "torch_compile") if p in row]
        parts.append(f"{name} {row['infera'] * 1e3:.2f} ms" + (f" ({', '.join(peers)})" if peers else ""))
    return "; ".join([*parts, *([note] if note else [])]), found


SECTIONS: Mapping[str, Section] = {
    "precisions": precisions,
    "replays": replays,
    "faults": faults,
    "networks": networks,
}
