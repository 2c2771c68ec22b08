"""How far estimates can be trusted, and how fast requests come: learned from what happens."""

from __future__ import annotations

from collections.abc import Sequence

from infera_server.scheduling.jobs import Job

FIRST_MARGIN, MIN_MARGIN, MAX_MARGIN = 1.3, 0.7, 2.0
"""Answers later than the largest margin allows are late for other reasons, and to refuse more does not help."""

STEP = 0.05
"""How far the margin moves with a batch whose answers took longer than it allows; with others a little back."""

QUANTILE = 0.99
"""The share of answers with long estimates that the margin is to cover; those with short ones are in time anyway."""

PAUSE = 10000
"""Answers for which a margin that did not help is left out, before it is tried again."""

COUNTED = 256
"""Rows after which a rate is looked at again."""


class Margin:
    """What estimates are multiplied by where something is promised.

    It follows the 99th percentile of the time that an answer took over the one estimated when its request came, by
    stochastic approximation (Robbins, Monro 1951). Short estimates, below half of what the request was allowed, do not
    count: what an answer takes besides runs is much to them. A batch is one step, since its answers are late together.
    """

    __slots__ = ("_paused", "value")

    def __init__(self) -> None:
        self.value = FIRST_MARGIN
        self._paused = 0

    def learn(self, jobs: Sequence[Job], now: float) -> None:
        """The jobs of a batch were answered."""
        counted = over = 0
        for job in jobs:
            if job.estimate > job.allowed / 2:
                counted += 1
                over += now - job.queued_at > self.value * job.estimate
        if not counted:
            return
        if self._paused > 0:
            self._paused -= counted
            return
        step = STEP * (over / counted - (1 - QUANTILE))
        self.value = min(max(self.value + step, MIN_MARGIN), MAX_MARGIN)

    def give_up(self) -> None:
        """Leave the margin out for a while, where it is as large as can be: that answers are late is not for it."""
        if self.value > MAX_MARGIN - STEP:
            self.value, self._paused = 1.0, PAUSE


class Rate:
    """Rows a second; `first` before any are counted."""

    __slots__ = ("_rows", "_since", "known", "value")

    def __init__(self, first: float) -> None:
        self.value = first
        self.known = False
        self._rows, self._since = 0, 0.0

    def add(self, rows: int, now: float) -> None:
        self._rows += rows
        if self._rows >= COUNTED and now > self._since:
            rate = self._rows / (now - self._since)
            self.value = (self.value + rate) / 2 if self.known else rate
            self.known, self._rows, self._since = True, 0, now
