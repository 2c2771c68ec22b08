"""A promise about latency: 99 of 100 requests are answered within a time.

It is kept by refusing early what would be answered too late, reckoned with the long runs rather than the typical ones,
and by batches short enough that a request which just missed one is answered in time by the next. How far answers are
from what was reckoned is measured, and kept as a margin.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from infera_server.scheduling.costs import GroupCosts
from infera_server.scheduling.jobs import Job
from infera_server.scheduling.margin import Margin, Rate

log = logging.getLogger(__name__)

FLOOD = 1e9
"""Rows a second, before any are counted: more than any batch holds."""

ALLOWED = 0.01
"""The share of answers that may be late."""

REMEMBERED = 2000
"""Answers that say whether the goal is met."""

NEARLY = 0.98
"""Of the most answers in time: a larger bucket with so many is preferred."""

OPEN = 1 / 3
"""The least part of a run during which the next batch takes in: the shorter, the more depends on the estimates."""

PERIOD = 200
"""Answers between two looks at whether the goal is met."""


def told(seconds: float) -> str:
    """A time to three figures, in ms or, from a second on, in s."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


class Goal:
    """The goal of one model: `seconds` from a request's arrival in the queue to its answer. Not thread-safe."""

    def __init__(self, seconds: float, name: str = "model") -> None:
        self.seconds = seconds
        self.margin = Margin()
        self.arrivals = Rate(FLOOD)
        """Of rows, admitted or not."""

        self._name = name
        self._answered: deque[float] = deque(maxlen=REMEMBERED)
        self._seen = 0
        self._complaint = ""

    def largest(self, costs: GroupCosts) -> int:
        """Index of the largest bucket that may run: the largest with nearly the most answers in time.

        While a batch runs for c seconds, those are admitted for the next one who come in its last (goal - c) seconds.
        Large batches take less time a row, and admit for a smaller part of it.
        """
        most = self.seconds / self.margin.value
        index, best = 0, 0.0
        for i, rows in enumerate(costs.buckets):
            run, long = costs.typical[i], costs.high[i]
            if not run:
                return len(costs.buckets) - 1
            if i and most - long < run * OPEN:
                break
            rate = min(rows, self.arrivals.value * min(run, most - long)) / run
            if rate >= best * NEARLY:
                index, best = i, max(rate, best)
        return index

    def limit(self, own: float) -> float:
        """Most seconds that a request whose own run takes `own` may be estimated to need.

        Where the run alone takes longer than the goal, one run ahead of it is tolerated: the goal is out of reach, and
        to refuse everything would help nobody.
        """
        return self.seconds / self.margin.value if own <= self.seconds else 2 * own

    def check_reach(self, costs: GroupCosts) -> None:
        """Say so, once, where a single row takes longer than the goal."""
        if costs.typical[0] > self.seconds and not self._complaint:
            self._complain(f"out of reach: a run of {costs.buckets[0]} row takes {told(costs.typical[0])} by itself")

    def answered(self, jobs: Sequence[Job], now: float) -> None:
        """The jobs of a batch were answered."""
        self._answered.extend(now - job.queued_at for job in jobs)
        self._seen += len(jobs)
        if self._seen >= PERIOD and len(self._answered) == REMEMBERED:
            self._seen = 0
            self._review()

    def _review(self) -> None:
        late = sum(s > self.seconds for s in self._answered)
        if late > 2 * ALLOWED * REMEMBERED:
            self.margin.give_up()
            if not self._complaint:
                self._complain(f"missed: {late} of the last {REMEMBERED} answers took longer")
        elif self._complaint and late <= ALLOWED * REMEMBERED:
            self._complaint = ""
            log.info("model '%s': the goal of %s is met again", self._name, told(self.seconds))

    def _complain(self, text: str) -> None:
        self._complaint = text
        log.warning("model '%s': the goal of %s is %s", self._name, told(self.seconds), text)

    @property
    def p99(self) -> float | None:
        """Of the last answers, in seconds; None before the first."""
        answers = sorted(self._answered)
        return answers[int(len(answers) * (1 - ALLOWED))] if answers else None

    @property
    def state(self) -> str:
        """For people: `met: p99 12.3 ms of 20 ms`, or why not."""
        p99, goal = self.p99, told(self.seconds)
        if self._complaint:
            return f"{goal} is {self._complaint}"
        if p99 is None:
            return f"{goal}: nothing was answered yet"
        return f"{goal} is {'met' if p99 <= self.seconds else 'missed'}: p99 of the last answers is {told(p99)}"
