"""Timing on a machine that others use too: interleaved samples, and only those during which the others kept still.

A sample is a block of runs long enough for /proc/stat, whose unit is 10 ms, to tell how busy other processes were.
Samples of all contenders are taken in turn, so that a slow drift of the machine meets each of them alike. Before each
sample the process sleeps: the thread pools of OpenBLAS and onnxruntime spin for a while after a run, and one library's
spinning would be charged to the next.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SETTLE_S = 0.08
"""Longer than the pools spin."""
BUSY_LIMIT = 0.06
"""Of all processors' time, what other processes may use during a sample that counts as quiet."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds for one run: by the clock, and of processor time over all threads of this process.

    `others` is the fraction of the machine's processor time that other processes used; None where the system does not
    say.
    """

    wall: float
    cpu: float
    others: float | None

    @property
    def quiet(self) -> bool:
        return self.others is not None and self.others <= BUSY_LIMIT


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and quartiles in milliseconds. `quiet` of `n` samples were quiet; `used` says how many count here."""

    wall_ms: float
    wall_q1_ms: float
    wall_q3_ms: float
    cpu_ms: float
    n: int
    quiet: int
    used: int

    @property
    def disturbed(self) -> bool:
        """Whether too few samples were quiet, so that all of them had to be used."""
        return self.used > self.quiet

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "disturbed": self.disturbed}


def processor_seconds() -> float:
    """Processor time of this process and of those that it has started, worker processes among them."""
    total = time.process_time()
    for task in Path("/proc/self/task").glob("*/children"):
        for child in task.read_text().split():
            with suppress(OSError):
                total += int(Path("/proc", child, "schedstat").read_text().split()[0]) / 1e9
    return total


def busy_seconds() -> float | None:
    """Processor seconds that the whole machine has spent working since it started; None without /proc/stat."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def sample(run: Callable[[], object], repeats: int) -> Sample:
    """One block of `repeats` runs."""
    busy, cpu, start = busy_seconds(), processor_seconds(), time.perf_counter()
    for _ in range(repeats):
        run()
    wall, cpu, after = time.perf_counter() - start, processor_seconds() - cpu, busy_seconds()
    others = None
    if busy is not None and after is not None:
        # /proc/stat counts whole ticks: one tick of doubt is not held against the sample.
        tick = 1 / os.sysconf("SC_CLK_TCK")
        others = max(0.0, after - busy - cpu - tick) / (wall * (os.cpu_count() or 1))
    return Sample(wall / repeats, cpu / repeats, others)


def medians(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of single runs, taken in turn: for what is compared within one run and not recorded."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    block_s: float = 0.25,
    patience: int = 3,
    warmups: int = 2,
) -> dict[str, list[Sample]]:
    """Samples of every contender, in turn, until each has `rounds` quiet ones or `patience` times `rounds` in all."""
    repeats: dict[str, int] = {}
    for name, run in contenders.items():
        for _ in range(warmups):
            run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, round(block_s / (time.perf_counter() - start)))
    taken: dict[str, list[Sample]] = {name: [] for name in contenders}
    for attempt in range(rounds * patience):
        if attempt >= rounds and all(sum(s.quiet for s in samples) >= rounds for samples in taken.values()):
            break
        order = list(contenders.items())
        for name, run in order if attempt % 2 == 0 else reversed(order):
            time.sleep(SETTLE_S)
            run()
            taken[name].append(sample(run, repeats[name]))
    return taken


def summarize(samples: list[Sample], enough: int = 3) -> Summary:
    """Over the quiet samples where there are `enough` of them, else over all."""
    quiet = [s for s in samples if s.quiet]
    used = quiet if len(quiet) >= min(enough, len(samples)) else samples
    walls = [1e3 * s.wall for s in used]
    q1, _, q3 = statistics.quantiles(walls, n=4, method="inclusive") if len(walls) > 1 else walls * 3
    return Summary(
        wall_ms=statistics.median(walls),
        wall_q1_ms=q1,
        wall_q3_ms=q3,
        cpu_ms=statistics.median(1e3 * s.cpu for s in used),
        n=len(samples),
        quiet=len(quiet),
        used=len(used),
    )
