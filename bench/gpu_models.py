"""Whole models on a GPU: agreement with the CPU, memory, latency."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import onnx

from bench.build import bert, resnet50
from bench.gpu_report import CheckFailed, Context, Section
from bench.gpu_row_sections import LEAST_SECONDS
from bench.gpu_rows import against_roofline, described
from bench.gpu_work import works_of
from infera_gpu.devices import open_device
from infera_gpu.errors import OutOfMemoryError
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_gpu.telemetry import snapshot
from infera_gpu.verify import TOLERANCE, compare

Result = tuple[str, Mapping[str, Any]]

SLACK = 8 << 20
"""Bytes that the driver may keep of what a session used: modules are loaded in chunks of 2 MiB."""


def bert_feeds(batch: int, length: int, vocabulary: int) -> dict[str, HostArray]:
    rng = np.random.default_rng(0)
    mask = np.ones((batch, length), np.int64)
    mask[-1, length // 2 :] = 0
    ids = rng.integers(0, vocabulary, (batch, length))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}


def images(batch: int) -> dict[str, HostArray]:
    return {"image": np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)}


MODELS: Mapping[str, tuple[Callable[[], onnx.ModelProto], dict[str, HostArray], float]] = {
    "bert-small": (
        lambda: bert(layers=2, hidden=64, heads=4, inner=256, vocabulary=100), bert_feeds(2, 33, 100), 5
    ),
    "bert-base": (bert, bert_feeds(2, 64, 30522), 40),
    "resnet50": (resnet50, images(2), 40),
}  # fmt: skip
"""name -> how to build it, what to feed it, seconds without which it is not begun"""


def models(context: Context, names: Sequence[str] = tuple(MODELS)) -> Result:
    """Whole models on the GPU against the CPU, twice each: the second run reuses the plan."""
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for name in names:
        build, feeds, seconds = MODELS[name]
        if context.left() < seconds:
            found[name] = "no time"
            continue
        graph = load_graph(build())
        with Session(graph, open_device("cpu")) as cpu:
            want = cpu.run(feeds)
        with Session(graph, context.open()) as session:
            for _ in range(2):
                differences = compare(session.run(feeds), want)
            (plan,) = session.plans(feeds)
        found[name] = {
            "errors": {d.name: d.error for d in differences},
            "steps": Counter(s.via if s.placed else s.kind for s in plan.steps),
            "arena_bytes": plan.arenas,
            "lower_bound": plan.lower_bound,
        }
        wrong += [f"{name} {d}" for d in differences if not d.within()]
    ran = [name for name in names if found[name] != "no time"]
    if wrong or not ran:
        raise CheckFailed("; ".join(wrong) or "no time for any model", found)
    late = [name for name in names if name not in ran]
    agree = f"{', '.join(ran)} agree with the CPU to {TOLERANCE:g} of the peak"
    return agree + (f", no time for {', '.join(late)}" if late else ""), found


def _wide() -> onnx.ModelProto:
    """150 MB of weights, which SLACK does not hide."""
    return bert(layers=2)


def memory(context: Context, build: Callable[[], onnx.ModelProto] = _wide) -> Result:
    """Runs allocate nothing after the first, closing gives everything back, what does not fit is refused."""
    feeds = bert_feeds(2, 33, 100)
    graph = load_graph(build())
    device = context.open()

    def available() -> tuple[int, int]:
        with device.running():
            free, total = device.xp.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def cycle() -> tuple[int, int, int, int | None]:
        """Bytes free after the first run, after more of them, and after closing; used before that, as NVML says."""
        session = Session(graph, context.open())
        session.run(feeds)
        first = available()[0]
        for _ in range(3):
            session.run(feeds)
        later, used = available()[0], _nvml_used()
        session.close()
        gc.collect()
        return first, later, available()[0], used

    cycle()  # loads modules and libraries, which stay
    (before, total), nvml_before = available(), _nvml_used()
    first, later, closed, nvml_open = cycle()
    nvml_closed = _nvml_used()
    found: dict[str, Any] = {
        "total": total,
        "free_before": before,
        "after_first_run": first,
        "after_more": later,
        "closed": closed,
        "nvml_used_before": nvml_before,
        "nvml_used_open": nvml_open,
        "nvml_used_closed": nvml_closed,
    }
    problems = []
    if later < first:
        problems.append(f"runs after the first took {first - later:,} bytes")
    if closed < before - SLACK:
        problems.append(f"{before - closed:,} bytes are missing after close()")
    if nvml_before is not None and nvml_closed is not None and nvml_closed > nvml_before + SLACK:
        problems.append(f"NVML has {nvml_closed - nvml_before:,} bytes more in use after close()")
    asked: dict[str, Callable[[], object]] = {
        "an arena": partial(device.alloc, 2 * total, "device"),
        "a temporary": partial(_temporary, device, 2 * total),
    }
    for what, ask in asked.items():
        try:
            ask()
            problems.append(f"{what} of twice the GPU's memory was not refused")
        except OutOfMemoryError as error:
            found[f"refusal of {what}"] = str(error)
    if problems:
        raise CheckFailed("; ".join(problems), found)
    return f"a session used {before - first:,} bytes and gave them back; too much is refused", found


def _nvml_used() -> int | None:
    """Bytes in use on all GPUs, as NVML says; None where it does not."""
    used = [reading.memory_used for reading in snapshot()[0]]
    return None if not used or None in used else sum(n for n in used if n is not None)


def _temporary(device: Any, nbytes: int) -> None:
    with device.running():
        device.xp.empty((nbytes,), np.uint8)


LATENCIES: Mapping[str, tuple[Callable[[], onnx.ModelProto], dict[str, HostArray]]] = {
    "bert-base s128 b1": (bert, bert_feeds(1, 128, 30522)),
    "bert-base s128 b8": (bert, bert_feeds(8, 128, 30522)),
    "resnet50 b1": (resnet50, images(1)),
    "resnet50 b8": (resnet50, images(8)),
}


def latency(context: Context) -> Result:
    """Session.run from host arrays to host arrays: the median of a second of runs."""
    rows: list[dict[str, Any]] = []
    load = cache(lambda build: load_graph(build()))
    for name, (build, feeds) in LATENCIES.items():
        if context.left() < LEAST_SECONDS:
            break
        with Session(load(build), context.open()) as session:
            works = works_of(session.plan_for(feeds))
            for _ in range(3):
                session.run(feeds)
            seconds: list[float] = []
            while sum(seconds) < 1 or len(seconds) < 5:
                began = time.perf_counter()
                session.run(feeds)
                seconds.append(time.perf_counter() - began)
        made = described("latency", name, "fp32", feeds, works)
        made |= {"seconds": statistics.median(seconds), "peers": {}}
        rows.append(made | against_roofline(made, works, context.card))
    if not rows:
        raise CheckFailed("no time for any model", {})
    return ", ".join(f"{row['name']} {row['seconds'] * 1e3:.2f} ms" for row in rows), {"rows": rows}


SECTIONS: Mapping[str, Section] = {"models": models, "memory": memory, "latency": latency}
