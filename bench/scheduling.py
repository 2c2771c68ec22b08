"""`python -m bench.scheduling`: what the scheduler makes of a load, in virtual time. Writes docs/scheduling.svg.

One device, run times of 2 ms and 0.2 ms a row that scatter by a tenth, arrivals that do not wait for answers, at
multiples of what the device can do at best. Three schedulers: what waits runs together, padded to the next bucket; the
batch that takes the least time a row; the same with a goal of 20 ms for the 99th percentile.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.simulation import Outcome, RunTimes, poisson, simulate
from infera_server.scheduling.goal import Goal
from infera_server.scheduling.schedule import Schedule

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
TIMES = RunTimes(fixed=2e-3, a_row=0.2e-3, scatter=0.1)
GOAL = 0.020
LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
PEAK = max(b / TIMES.mean(b) for b in BUCKETS)
OUT = Path(__file__).parents[1] / "docs" / "scheduling.svg"


@dataclass(frozen=True)
class Policy:
    """A way to schedule, and the colour of its line."""

    name: str
    colour: str
    make: Callable[[], Schedule]


POLICIES = (
    Policy("all that waits", "#999999", lambda: Schedule(BUCKETS, gain=1e-9)),
    Policy("least time a row", "#1f77b4", lambda: Schedule(BUCKETS)),
    Policy("with the goal of 20 ms", "#d62728", lambda: Schedule(BUCKETS, goal=Goal(GOAL))),
)


@dataclass(frozen=True)
class Chart:
    """One quantity over the load, on a linear axis from 0 to `top`."""

    title: str
    top: float
    ticks: Sequence[float]
    of: Callable[[Outcome], float]
    line: float | None = None


SETTLED = 0.2
"""The part of a simulation that is not counted."""

CHARTS = (
    Chart("median, ms", 100, (0, 20, 40, 60, 80, 100), lambda o: o.quantile(0.5, o.ended * SETTLED) * 1e3, GOAL * 1e3),
    Chart("p99, ms", 100, (0, 20, 40, 60, 80, 100), lambda o: o.quantile(0.99, o.ended * SETTLED) * 1e3, GOAL * 1e3),
    Chart("answered, % of the peak", 100, (0, 25, 50, 75, 100), lambda o: o.rate(o.ended * SETTLED) / PEAK * 100),
)


def outcome(policy: Policy, load: float, requests: int) -> Outcome:
    rng = random.Random(0)
    arrivals = poisson(load * PEAK, requests / (load * PEAK), rng)
    return simulate(policy.make(), arrivals, lambda group, bucket: TIMES.draw(bucket, rng))


def svg(results: dict[str, list[Outcome]]) -> str:
    """The charts beside each other."""
    wide, high, left, above, between = 250, 200, 50, 40, 70
    parts = []
    for i, chart in enumerate(CHARTS):
        x0, y0 = left + i * (wide + between), above

        def x(load: float, x0: int = x0) -> float:
            return x0 + wide * load / LOADS[-1]

        def y(value: float, top: float = chart.top, y0: int = y0) -> float:
            return y0 + high * (1 - min(value, top) / top)

        parts.append(f'<text x="{x0}" y="{y0 - 14}" class="title">{chart.title}</text>')
        for tick in chart.ticks:
            parts.append(f'<path d="M{x0},{y(tick):.1f}h{wide}" class="grid"/>')
            parts.append(f'<text x="{x0 - 6}" y="{y(tick) + 4:.1f}" class="y">{tick:g}</text>')
        for tick in (0.5, 1.0, 1.5, 2.0):
            parts.append(f'<text x="{x(tick):.1f}" y="{y0 + high + 16}" class="x">{tick:g}</text>')
        if chart.line:
            parts.append(f'<path d="M{x0},{y(chart.line):.1f}h{wide}" class="goal"/>')
        for policy in POLICIES:
            values = [chart.of(o) for o in results[policy.name]]
            points = " ".join(f"{x(load):.1f},{y(v):.1f}" for load, v in zip(LOADS, values, strict=True))
            parts.append(f'<polyline points="{points}" stroke="{policy.colour}"/>')
    below = above + high + 48
    for i, policy in enumerate(POLICIES):
        at = left + i * 190
        parts.append(f'<path d="M{at},{below - 4}h24" stroke="{policy.colour}" stroke-width="2"/>')
        parts.append(f'<text x="{at + 32}" y="{below}">{policy.name}</text>')
    parts.append(f'<text x="{left + 3 * 190}" y="{below}">over the load, in multiples of the peak</text>')
    width, height = left + 3 * wide + 2 * between + 20, below + 16
    style = (
        "text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.y{text-anchor:end}.x{text-anchor:middle}"
        "polyline{fill:none;stroke-width:2}.grid{stroke:#e5e5e5}.goal{stroke:#d62728;stroke-dasharray:4 3}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join(
        [head, f"<style>{style}</style>", '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"]
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.scheduling", description=__doc__)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    results = {p.name: [outcome(p, load, options.requests) for load in LOADS] for p in POLICIES}
    print("load  " + "".join(f"{p.name:>32}" for p in POLICIES))
    for i, load in enumerate(LOADS):
        cells = ["/".join(f"{chart.of(results[p.name][i]):.1f}" for chart in CHARTS) for p in POLICIES]
        print(f"{load:4.1f}  " + "".join(f"{cell:>32}" for cell in cells))
    options.out.write_text(svg(results))


if __name__ == "__main__":
    main()
