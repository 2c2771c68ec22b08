"""A model server in virtual time: the server's own `Schedule` under arrivals and run times drawn at random.

The queueing is honest: one device, run times that scatter (lognormal) and stall now and then, arrivals that do not wait
for answers (Poisson), and a schedule that knows no more than what it saw.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from infera_server.errors import Overloaded
from infera_server.scheduling.backlog import Selection
from infera_server.scheduling.jobs import Job
from infera_server.scheduling.schedule import Schedule


@dataclass(frozen=True)
class Arrival:
    """A request that comes at `at` and gives up after `patience` seconds."""

    at: float
    rows: int = 1
    group: Hashable = None
    patience: float = math.inf
    level: int = 5


@dataclass
class Outcome:
    """What became of the arrivals: seconds of those answered, in the order of their arrival, and refusals by reason."""

    answered: list[tuple[Arrival, float]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    batches: list[tuple[float, int, int]] = field(default_factory=list)
    """(when, rows, bucket)."""

    busy: float = 0.0
    ended: float = 0.0

    def quantile(self, q: float, since: float = 0.0) -> float:
        """Of the answers to what arrived from `since` on, in seconds."""
        found = sorted(seconds for arrival, seconds in self.answered if arrival.at >= since)
        return found[min(int(len(found) * q), len(found) - 1)]

    def rate(self, since: float = 0.0) -> float:
        """Answers a second to what arrived from `since` on."""
        return sum(arrival.at >= since for arrival, _ in self.answered) / (self.ended - since)


@dataclass(frozen=True)
class RunTimes:
    """Seconds of a run: fixed + a_row · rows, lognormal with `scatter`; one in `stalls` is `stall` longer."""

    fixed: float
    a_row: float
    scatter: float = 0.1
    stall: float = 0.0
    stalls: int = 1000

    def mean(self, rows: int) -> float:
        return self.fixed + self.a_row * rows

    def draw(self, rows: int, rng: random.Random) -> float:
        late = self.stall if self.stall and rng.randrange(self.stalls) == 0 else 0.0
        return self.mean(rows) * math.exp(rng.gauss(0.0, self.scatter)) + late


def poisson(rate: float, seconds: float, rng: random.Random, **more: object) -> Iterator[Arrival]:
    """Arrivals of `rate` a second for so many seconds."""
    at = rng.expovariate(rate)
    while at < seconds:
        yield Arrival(at, **more)  # type: ignore[arg-type]
        at += rng.expovariate(rate)


def simulate(
    schedule: Schedule,
    arrivals: Iterable[Arrival],
    run_time: Callable[[Hashable, int], float],
    prime: Iterable[Hashable] = (None,),
) -> Outcome:
    """Run a schedule until every arrival is answered or refused. `run_time(group, bucket)` gives seconds.

    The costs of the groups `prime` are learned from three runs of each bucket beforehand, as a server's warm-up does.
    """
    outcome = Outcome()
    for group in prime:
        costs = schedule.costs.of(group)
        for bucket in schedule.buckets:
            for _ in range(3):
                costs.learn(bucket, run_time(group, bucket))
    events: list[tuple[float, int, Arrival | tuple[Selection, float]]] = []
    for number, arrival in enumerate(arrivals):
        heapq.heappush(events, (arrival.at, number, arrival))
    number, busy, arrived = len(events), False, {}
    while events:
        now, _, event = heapq.heappop(events)
        if isinstance(event, Arrival):
            feeds = {"x": np.broadcast_to(np.float32(0), (event.rows, 1))}
            job = Job(feeds, lambda *_: None, event.rows, event.group, 0, now + event.patience, event.level, now)
            arrived[job] = event
            try:
                schedule.add(job)
            except Overloaded as refusal:
                outcome.refused[refusal.reason] += 1
        else:
            selection, took = event
            busy = False
            schedule.ran(selection, took)
            for job in selection.jobs:
                outcome.answered.append((arrived.pop(job), now - job.queued_at))
            schedule.answered(selection.jobs, now)
        if not busy:
            outcome.refused["deadline"] += len(schedule.late(now))
            if schedule.queued and (selected := schedule.take(now)):
                busy, took = True, run_time(selected.group, selected.bucket)
                number += 1
                heapq.heappush(events, (now + took, number, (selected, took)))
                outcome.batches.append((now, sum(job.rows for job in selected.jobs), selected.bucket))
                outcome.busy += took
        outcome.ended = now
    return outcome
