"""Timing on a GPU, by events: calls that take turns, with the L2 cache as it is or filled by others; what a launch
costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.gpu_report import Context, Section
from infera_gpu.op import Call

Result = tuple[str, Mapping[str, Any]]

ROUNDS, ROUND_SECONDS = 7, 0.01
"""How often contenders take turns, and how long each turn is."""

SPIN_SECONDS = 0.2
"""For which each is called before that: clocks rise, and fall to what power and temperature allow."""

FLUSHED = 3
"""Times the L2 cache: what is read before a call so that it finds nothing of its own there. A call that moves as much
needs no such thing."""


@dataclass(frozen=True)
class Contender:
    """A call, and how often it does the work; `besides` is a call of what it does apart from that."""

    call: Callable[[], object]
    times: int = 1
    besides: Callable[[], object] | None = None


def in_turn(device: Any, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of one call of each on the current stream, in every round: the mean of as many as take ROUND_SECONDS."""
    cuda = device.xp.cuda
    begin, end = cuda.Event(), cuda.Event()

    def timed(call: Callable[[], object], times: int) -> float:
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(cuda.get_elapsed_time(begin, end)) / 1000 / times

    counts: dict[str, int] = {}
    for name, call in calls.items():
        timed(call, 3)
        until = time.monotonic() + SPIN_SECONDS
        while not counts.get(name) or time.monotonic() < until:
            counts[name] = max(1, min(1000, int(ROUND_SECONDS / max(timed(call, counts.get(name, 3)), 1e-7))))
    rounds = [{name: timed(call, counts[name]) for name, call in calls.items()} for _ in range(ROUNDS)]
    return {name: [r[name] for r in rounds] for name in calls}


def contended(device: Any, contenders: Mapping[str, Contender]) -> dict[str, list[float]]:
    """Seconds of the work once in every round, by contender."""
    besides = {f"besides {name}": c.besides for name, c in contenders.items() if c.besides is not None}
    taken = in_turn(device, {**{name: c.call for name, c in contenders.items()}, **besides})
    nothing = [0.0] * ROUNDS
    return {
        name: [
            (whole - part) / c.times
            for whole, part in zip(taken[name], taken.get(f"besides {name}", nothing), strict=True)
        ]
        for name, c in contenders.items()
    }


def gpu_seconds(device: Any, call: Callable[[], object]) -> float:
    """Of one call on the current stream: the median."""
    return statistics.median(in_turn(device, {"": call})[""])


def l2_bytes(device: Any) -> int:
    """Of the L2 cache, as the driver says."""
    return int(device.xp.cuda.runtime.getDeviceProperties(device.index)["l2CacheSize"])


def flushing(device: Any, nbytes: int) -> list[Call]:
    """Calls that read so many bytes and write next to none: what is in the L2 cache then need not be written back."""
    from infera_kernels.triton.reduce import reduce

    def empty(shape: Sequence[int], dtype: Any = np.float32) -> Any:
        return device.xp.empty(tuple(shape), np.dtype(dtype))

    read = empty(flushing_shape(nbytes))
    return reduce("max", read, (1,), empty(read.shape[:1]), device.launcher, empty)


def flushing_shape(nbytes: int) -> tuple[int, int]:
    """Of float32, enough rows for every multiprocessor to have several."""
    return 4096, -(-nbytes // (4096 * 4))


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
