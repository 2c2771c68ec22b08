"""When a request would be answered, by what is known of run times, arrivals and the device's other users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from infera_server.scheduling.costs import GroupCosts, Window
from infera_server.scheduling.goal import Goal
from infera_server.scheduling.margin import Rate


class Expected(NamedTuple):
    """Seconds that a run takes by all experience, and at the worst."""

    typical: float
    high: float


class Forecast:
    """Seconds of one model's runs: of the present one, and of what waits. Not thread-safe."""

    def __init__(self, buckets: Sequence[int], goal: Goal | None, gain: float) -> None:
        self.buckets = buckets
        self.goal = goal
        self.gain = gain
        self.turns = Window()
        """How long the device was waited for before a batch."""

        self.joining = Rate(0.0)
        """Of the rows that are admitted."""

        self.running: Expected | None = None
        self._since = 0.0

    def begin(self, costs: GroupCosts, index: int, now: float) -> Expected:
        """A run of the bucket at `index` begins."""
        self.running, self._since = Expected(costs.typical[index], costs.high[index]), now
        return self.running

    def residual(self, now: float, high: bool) -> float:
        """Seconds that the present run will still take."""
        if self.running is None:
            return 0.0
        return max(0.0, self._since + (self.running.high if high else self.running.typical) - now)

    def clear(self, costs: GroupCosts, rows: int, high: bool, later: float = 0.0, least: int = 0) -> float:
        """Seconds for so many rows of a group which begin `later` seconds from now, the device's other users included.

        What arrives until the last of them run joins them, and makes their batch longer: that counts where `high` is
        asked for. Where a goal asks for small batches, they may be of the bucket at `least` all the same: a single job
        needs it.
        """
        if not rows:
            return 0.0
        largest = max(self.largest(costs), min(least, len(self.buckets) - 1))
        times, typical = (costs.high if high else costs.typical), costs.typical
        turn = self.turns.high if high else self.turns.median
        batches, rest = divmod(rows, self.buckets[largest])
        seconds = batches * (times[largest] + turn)
        while rest > 0:
            together: float = rest
            if high:
                together = min(rest + self.joining.value * (later + seconds), self.buckets[largest])
            index = costs.index(together)
            if index and typical[index] / together > typical[index - 1] / self.buckets[index - 1] / self.gain:
                index -= 1  # `Schedule` would leave some for another batch
            seconds += times[index] + turn
            rest -= self.buckets[index]
        return seconds

    def largest(self, costs: GroupCosts) -> int:
        """Index of the largest bucket that may run."""
        return self.goal.largest(costs) if self.goal is not None else len(self.buckets) - 1
