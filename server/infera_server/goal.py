"""A promise about latency: 99 of 100 requests are answered within a time.

It is kept by refusing early what would be answered too late, reckoned with the long runs rather than the typical ones,
and by batches short enough that a request which just missed one is answered in time by the next. How far answers are
from what was reckoned is measured, and kept as a margin.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from infera_server.costs import GroupCosts
from infera_server.jobs import Job

log = logging.getLogger(__name__)

ALLOWED = 0.01
"""The share of answers that may be late."""

REMEMBERED = 2000
"""Answers that say whether the goal is met."""

COUNTED = 256
"""Rows after which the rate of arrivals is looked at again."""

FLOOD = 1e9
"""Rows a second, before any are counted: more than any batch holds."""

NEARLY = 0.98
"""Of the most answers in time: a larger bucket with so many is preferred."""

OPEN = 1 / 3
"""The least part of a run during which the next batch takes in: the shorter, the more depends on the estimates."""

PERIOD = 200
"""Answers between two looks at whether the goal is met."""

FIRST_MARGIN, MIN_MARGIN, MAX_MARGIN = 1.3, 0.7, 2.0
"""Answers later than the largest margin allows are late for other reasons, and to refuse more does not help."""

PAUSE = 10000
"""Answers for which the margin is then left out, before it is tried again."""

STEP = 0.05
"""How far the margin moves with a batch whose answers took longer than it allows; with others a little back."""

QUANTILE = 0.99
"""The share of answers with long estimates that the margin is to cover; those with short ones are in time anyway."""


class Goal:
    """The goal of one model: `seconds` from a request's arrival in the queue to its answer. Not thread-safe."""

    def __init__(self, seconds: float, name: str = "model") -> None:
        self.seconds = seconds
        self.margin = FIRST_MARGIN
        """What estimates are multiplied by."""

        self.rate = FLOOD
        """Rows that arrive in a second."""

        self._name = name
        self._rows, self._counted_at = 0, 0.0
        self._answered: deque[float] = deque(maxlen=REMEMBERED)
        self._seen = 0
        self._complaint = ""
        self._paused = 0
        """Answers for which the margin stays as it is."""

    def arrived(self, rows: int, now: float) -> None:
        """So many rows came, admitted or not."""
        self._rows += rows
        if self._rows >= COUNTED and now > self._counted_at:
            rate = self._rows / (now - self._counted_at)
            self.rate = rate if self.rate == FLOOD else (self.rate + rate) / 2
            self._rows, self._counted_at = 0, now

    def joining(self, seconds: float) -> float:
        """Rows that arrive in so many seconds; 0 before their rate is known."""
        return self.rate * seconds if self.rate != FLOOD else 0.0

    def largest(self, costs: GroupCosts) -> int:
        """Index of the largest bucket that may run: the largest with nearly the most answers in time.

        While a batch runs for c seconds, those are admitted for the next one who come in its last (goal - c) seconds.
        Large batches take less time a row, and admit for a smaller part of it.
        """
        most = self.seconds / self.margin
        index, best = 0, 0.0
        for i, rows in enumerate(costs.buckets):
            run, long = costs.typical[i], costs.high[i]
            if not run:
                return len(costs.buckets) - 1
            if i and most - long < run * OPEN:
                break
            rate = min(rows, self.rate * min(run, most - long)) / run
            if rate >= best * NEARLY:
                index, best = i, max(rate, best)
        return index

    def limit(self, own: float) -> float:
        """Most seconds that a request whose own run takes `own` may be estimated to need.

        Where the run alone takes longer than the goal, one run ahead of it is tolerated: the goal is out of reach, and
        to refuse everything would help nobody.
        """
        return self.seconds / self.margin if own <= self.seconds else 2 * own

    def check_reach(self, costs: GroupCosts) -> None:
        """Say so, once, where a single row takes longer than the goal."""
        if costs.typical[0] > self.seconds and not self._complaint:
            self._complain(
                f"out of reach: a run of {costs.buckets[0]} row takes {costs.typical[0] * 1e3:.3g} ms by itself"
            )

    def answered(self, jobs: Sequence[Job], now: float) -> None:
        """The jobs of a batch were answered.

        The margin follows the 99th percentile of the time that an answer took over the one estimated when its request
        came, by stochastic approximation (Robbins, Monro 1951). Short estimates do not count: what an answer takes
        besides runs is much to them. A batch is one step, since its answers are late together.
        """
        counted = over = 0
        for job in jobs:
            took = now - job.queued_at
            self._answered.append(took)
            if job.estimate > self.seconds / 2:
                counted += 1
                over += took > self.margin * job.estimate
        if self._paused > 0:
            self._paused -= len(jobs)
        elif counted:
            step = STEP * (over / counted - (1 - QUANTILE))
            self.margin = min(max(self.margin + step, MIN_MARGIN), MAX_MARGIN)
        self._seen += len(jobs)
        if self._seen >= PERIOD and len(self._answered) == REMEMBERED:
            self._seen = 0
            self._review()

    def _review(self) -> None:
        late = sum(s > self.seconds for s in self._answered)
        if late > 2 * ALLOWED * REMEMBERED:
            if self.margin > MAX_MARGIN - STEP:
                self.margin, self._paused = 1.0, PAUSE
            if not self._complaint:
                self._complain(f"missed: {late} of the last {REMEMBERED} answers took longer")
        elif self._complaint and late <= ALLOWED * REMEMBERED:
            self._complaint = ""
            log.info("model '%s': the goal of %.3g ms is met again", self._name, self.seconds * 1e3)

    def _complain(self, text: str) -> None:
        self._complaint = text
        log.warning("model '%s': the goal of %.3g ms is %s", self._name, self.seconds * 1e3, text)

    @property
    def p99(self) -> float | None:
        """Of the last answers, in seconds; None before the first."""
        answers = sorted(self._answered)
        return answers[int(len(answers) * (1 - ALLOWED))] if answers else None

    @property
    def state(self) -> str:
        """For people: `met: p99 12.3 ms of 20 ms`, or why not."""
        p99, goal = self.p99, f"{self.seconds * 1e3:.3g} ms"
        if self._complaint:
            return f"{goal} is {self._complaint}"
        if p99 is None:
            return f"{goal}: nothing was answered yet"
        return f"{goal} is {'met' if p99 <= self.seconds else 'missed'}: p99 of the last answers is {p99 * 1e3:.3g} ms"
