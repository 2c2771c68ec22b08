"""`python -m bench.batcher`: what a request costs in the batcher beyond the run of its model.

A model that does nothing is called by 1 and by 64 callers in one event loop; each sends its next request from the
callback of the last. CPU time of the whole process a request, minimum of many rounds, in microseconds; and the time to
count a request for metrics and statistics, in batches of as many.
"""

from __future__ import annotations

import argparse
import asyncio
import time
import timeit
from collections.abc import Callable

import numpy as np

from infera_server.metrics import ModelStats
from infera_server.scheduling.batcher import Batcher
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.rows import Arrays, Layout

WIDTH = 784
LAYOUT = Layout({"x": 0}, {"y": 0}, (1, 2, 4, 8, 16, 32, 64))


def batcher_of(loop: asyncio.AbstractEventLoop) -> Batcher:
    """A batcher over a model that gives back memory that exists already."""
    outputs = {n: {"y": np.zeros((n, 10), np.float32)} for n in LAYOUT.buckets}

    def run(feeds: Arrays) -> Arrays:
        return outputs[len(feeds["x"])]

    return Batcher(run, LAYOUT, post=loop.call_soon_threadsafe, soon=loop.call_soon, inline_limit=3e-4)


async def cost(
    callers: int, requests: int, make: Callable[[asyncio.AbstractEventLoop], Batcher]
) -> tuple[float, float]:
    """(CPU, elapsed) microseconds a request."""
    loop = asyncio.get_running_loop()
    batcher, finished = make(loop), asyncio.Event()
    x = np.zeros((1, WIDTH), np.float32)
    left = requests

    def send() -> None:
        batcher.submit(Job({"x": x}, done, 1, (), x.nbytes, time.monotonic() + 30))

    def done(result: Arrays | Exception, batch: Batch | None) -> None:
        nonlocal left
        left -= 1
        if left >= callers:
            send()
        elif not left:
            finished.set()

    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(callers):
        send()
    await finished.wait()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    batcher.drain()
    batcher.join()
    return cpu / requests * 1e6, wall / requests * 1e6


def counting(jobs: int, rounds: int) -> float:
    """Microseconds a request for counters, where so many share a run."""
    stats, many = ModelStats(), 2000 // jobs
    batch = Batch([Job({}, print, queued_at=0.1) for _ in range(jobs)], jobs, jobs, 0.2, 0.21, 0.22, 0.23)

    def count() -> None:
        for _ in range(jobs):
            stats.replied(200, 0.13)
        stats.ran(batch)

    return min(timeit.repeat(count, number=many, repeat=rounds)) / many / jobs * 1e6


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.batcher", description=__doc__)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for callers in (1, 8, 64):
        rounds = [asyncio.run(cost(callers, options.requests, batcher_of)) for _ in range(options.rounds)]
        cpu, wall = min(r[0] for r in rounds), min(r[1] for r in rounds)
        print(
            f"{callers:3d} callers: {cpu:6.1f} µs CPU, {wall:6.1f} µs elapsed a request; "
            f"{counting(callers, options.rounds):.1f} µs to count one"
        )


if __name__ == "__main__":
    main()
