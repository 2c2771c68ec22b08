"""A promise about latency: 99 of 100 requests are answered within a time.

It is kept by refusing early what would be answered too late, reckoned with the long runs rather than the typical ones,
and by batches short enough that a request which just missed one is answered in time by the next. What the reckoning
does not know of (other processes, garbage collection) shows in the answers, and widens its margin.
"""

from __future__ import annotations

import logging
from collections import deque

from infera_server.costs import GroupCosts

log = logging.getLogger(__name__)

ALLOWED = 0.01
"""The share of answers that may be late."""

REMEMBERED = 1000
"""Answers that say whether the goal is met."""

PERIOD = 200
"""Answers between two looks at the margin."""

MAX_MARGIN = 4.0


class Goal:
    """The goal of one model: `seconds` from a request's arrival in the queue to its answer. Not thread-safe."""

    def __init__(self, seconds: float, name: str = "model") -> None:
        self.seconds = seconds
        self.margin = 1.0
        """What estimates are multiplied by."""

        self._name = name
        self._answered: deque[float] = deque(maxlen=REMEMBERED)
        self._late = self._seen = 0
        self._complaint = ""

    def largest(self, costs: GroupCosts) -> int:
        """Index of the largest bucket that may run: two in a row take no longer than the goal."""
        most = self.seconds / self.margin / 2
        index = len(costs.buckets) - 1
        while index and costs.high[index] > most:
            index -= 1
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

    def answered(self, seconds: float) -> None:
        """A request was answered so long after its arrival."""
        self._answered.append(seconds)
        self._late += seconds > self.seconds
        self._seen += 1
        if self._seen == PERIOD:
            self._review()

    def _review(self) -> None:
        if self._late > ALLOWED * PERIOD:
            self.margin = min(self.margin * 1.25, MAX_MARGIN)
        elif not self._late:
            self.margin = max(self.margin * 0.95, 1.0)
        self._late = self._seen = 0
        late = sum(s > self.seconds for s in self._answered)
        if late > 2 * ALLOWED * len(self._answered) and self.margin == MAX_MARGIN:
            if not self._complaint:
                self._complain(f"missed: {late} of the last {len(self._answered)} answers took longer")
        elif self._complaint and late <= ALLOWED * len(self._answered):
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
    def met(self) -> bool | None:
        """Whether the last answers keep the promise; None before the first."""
        return None if not self._answered else self.p99 <= self.seconds  # type: ignore[operator]

    @property
    def state(self) -> str:
        """For people: `met: p99 12.3 ms of 20 ms`, or why not."""
        p99, goal = self.p99, f"{self.seconds * 1e3:.3g} ms"
        if self._complaint:
            return f"{goal} is {self._complaint}"
        if p99 is None:
            return f"{goal}: nothing was answered yet"
        return f"{goal} is {'met' if p99 <= self.seconds else 'missed'}: p99 of the last answers is {p99 * 1e3:.3g} ms"
