"""Timing on a GPU, by events; and what one launch costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench.gpu_report import Context, Section

Result = tuple[str, Mapping[str, Any]]

ROUNDS, ROUND_SECONDS = 7, 0.01
"""How often contenders take turns, and how long each turn is."""


def in_turn(device: Any, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of one call of each on the current stream: medians over rounds of as many as take ROUND_SECONDS."""
    cuda = device.xp.cuda
    begin, end = cuda.Event(), cuda.Event()

    def timed(call: Callable[[], object], times: int) -> float:
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(cuda.get_elapsed_time(begin, end)) / 1000 / times

    counts = {}
    for name, call in calls.items():
        timed(call, 3)
        counts[name] = max(1, min(1000, int(ROUND_SECONDS / max(timed(call, 3), 1e-7))))
    rounds = [{name: timed(call, counts[name]) for name, call in calls.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(r[name] for r in rounds) for name in calls}


def gpu_seconds(device: Any, call: Callable[[], object]) -> float:
    """Of one call on the current stream."""
    return in_turn(device, {"": call})[""]


def launches(context: Context) -> Result:
    """What one launch costs the host, and a small kernel the GPU."""
    from infera_kernels.triton import elementwise

    device = context.open()
    with device.running():
        x = device.constant(np.random.default_rng(0).standard_normal(1024, np.float32), "device")
        ((fn, args),) = elementwise.unary("relu", x, device.xp.empty_like(x), device.launcher)
        fn(*args)
        device.synchronize()
        host = []
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(100):
                fn(*args)
            host.append((time.perf_counter() - began) / 100)
            device.synchronize()
        gpu = gpu_seconds(device, lambda: fn(*args))
    found = {"host_seconds": statistics.median(host), "gpu_seconds": gpu}
    return f"{found['host_seconds'] * 1e6:.2f} µs on the host, {gpu * 1e6:.2f} µs back to back", found


SECTIONS: Mapping[str, Section] = {"launches": launches}
