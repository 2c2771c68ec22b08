"""Whole models on a GPU: agreement with infera's CPU and onnxruntime, memory, latency."""

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

from bench import gpu_parity
from bench.build import bert, resnet50
from bench.gpu_parity import OURS, PEER, TRAINED, errors, expected, told, wrong
from bench.gpu_report import CheckFailed, Context, Section
from bench.gpu_row_sections import LEAST_SECONDS
from bench.gpu_rows import against_roofline, described
from bench.gpu_work import works_of
from infera_gpu.dry import launches
from infera_gpu.errors import OutOfMemoryError
from infera_gpu.fetch import cache_dir
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_gpu.telemetry import snapshot
from infera_gpu.verify import TOLERANCE

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


Models = Mapping[str, tuple[Callable[[], onnx.ModelProto], dict[str, HostArray], float]]
"""name -> how to build it, what to feed it, seconds without which it is not begun"""

MODELS: Models = {
    "bert-small": (
        lambda: bert(layers=2, hidden=64, heads=4, inner=256, vocabulary=100), bert_feeds(2, 33, 100), 5
    ),
    "bert-base": (bert, bert_feeds(2, 64, 30522), 12),
    "resnet50": (resnet50, images(2), 8),
}  # fmt: skip
"""With random weights, of which compilation is done before."""


def models(context: Context, names: Sequence[str] = tuple(MODELS)) -> Result:
    """Whole models on the GPU against infera's CPU and onnxruntime's, twice each: the second run reuses the plan."""
    return _agreeing(context, {name: MODELS[name] for name in names})


TRAINED_SECONDS = 3
"""Without which a trained model is not begun."""


def trained(context: Context) -> Result:
    """The same of trained models, of the catalogue's those that are kept here."""
    found = {name: (*source, TRAINED_SECONDS) for name, source in gpu_parity.trained().items()}
    if not found:
        return f"none of {', '.join(TRAINED)} is in {cache_dir()}: no trained weights were compared", {}
    return _agreeing(context, found)


def _agreeing(context: Context, wanted: Models) -> Result:
    found: dict[str, Any] = {}
    alone: dict[str, str] = {}
    problems: list[str] = []
    for name, (build, feeds, seconds) in wanted.items():
        if context.left() < seconds:
            found[name] = "no time"
            continue
        right = expected(build(), feeds)
        with Session(right.graph, context.open()) as session:
            for _ in range(2):
                differences = right.differences(session.run(feeds))
            (plan,) = session.plans(feeds)
        found[name] = {
            "errors": errors(differences),
            "steps": Counter(s.via if s.placed else s.kind for s in plan.steps),
            "arena_bytes": plan.arenas,
            "lower_bound": plan.lower_bound,
        }
        alone[name] = right.alone
        problems += [f"{name} {problem}" for problem in wrong(differences, TOLERANCE)]
    found["compared"] = {name: reason or f"with {OURS} and {PEER}" for name, reason in alone.items()}
    if problems or not alone:
        raise CheckFailed(("; ".join(problems) or "no time for any model") + told(alone), found)
    late = [name for name in wanted if name not in alone]
    by = OURS if all(alone.values()) else f"{OURS} and {PEER}"
    agree = f"{', '.join(alone)} agree with {by} to {TOLERANCE:g} of the peak"
    return agree + told(alone) + (f", no time for {', '.join(late)}" if late else ""), found


def wide() -> onnx.ModelProto:
    """150 MB of weights, which SLACK does not hide."""
    return bert(layers=2)


WIDE_FEEDS = bert_feeds(2, 33, 100)


def memory(context: Context, build: Callable[[], onnx.ModelProto] = wide) -> Result:
    """Runs allocate nothing after the second, closing gives everything back, what does not fit is refused."""
    feeds, graph, device = WIDE_FEEDS, load_graph(build()), context.open()

    def available() -> tuple[int, int]:
        with device.running():
            free, total = device.xp.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def cycle() -> tuple[int, int, int, int | None]:
        """Bytes free after two runs, after more of them, and after closing; used before that, as NVML says."""
        session = Session(graph, context.open())
        for _ in range(2):  # the second makes a CUDA graph
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
        "after_two_runs": first,
        "after_more": later,
        "closed": closed,
        "nvml_used_before": nvml_before,
        "nvml_used_open": nvml_open,
        "nvml_used_closed": nvml_closed,
    }
    problems = []
    if later < first:
        problems.append(f"runs after the second took {first - later:,} bytes")
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
            plan = session.plan_for(feeds)
            works = works_of(plan, launches(session.device, session._constants, plan))
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


SECTIONS: Mapping[str, Section] = {"models": models, "trained": trained, "memory": memory, "latency": latency}
