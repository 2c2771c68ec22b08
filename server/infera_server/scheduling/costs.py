"""How long a run takes, learned from runs.

For every group of equal shapes and every bucket of rows, the last runs are remembered. Their median is the typical
time, which one stalled run does not move and a lasting change moves after half a window, with that of the group's other
buckets; nearly their longest is the time to reckon with where a promise is at stake. What has not run yet is inferred
from what has.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Sequence

WINDOW = 32
"""Runs remembered of each group and bucket."""

REFRESH = 8
"""Runs after which a full window is looked at again."""

MAX_SCATTER = 2.0
"""Longer runs than so many typical ones are stalls, which no choice of a batch and no refusal avoids."""

FADE = 0.998
"""What is left of an estimate each time its bucket was not chosen: one that was slow by accident is tried again."""

STEADY = WINDOW // 2
"""Runs of a bucket, none long after the one before, after which a change of its typical time is taken for one of the
machine. Before, it corrects what was believed of the bucket, which says nothing about others."""

MAX_GROUPS = 256
"""Groups remembered; the least recently used goes."""


class Window:
    """The last values of something: their `median`, the lower of the middle two, and `high`, their 97th percentile.

    Both are 0 where nothing was added, and a few values behind once the window is full.
    """

    __slots__ = ("_added", "_values", "high", "median")

    def __init__(self) -> None:
        self._values: list[float] = []
        self._added = 0
        self.median = self.high = 0.0

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> bool:
        """Returns whether the quantiles are up to date with it."""
        if len(self._values) < WINDOW:
            self._values.append(value)
        else:
            self._values[self._added % WINDOW] = value
            if self._added % REFRESH:
                self._added += 1
                return False
        self._added += 1
        ranked = sorted(self._values)
        self.median = ranked[(len(ranked) - 1) // 2]
        self.high = ranked[-1 - len(ranked) // 20]
        return True

    def scale(self, ratio: float) -> None:
        """As if everything had taken so many times as long."""
        self._values = [value * ratio for value in self._values]
        self.median *= ratio
        self.high *= ratio


class GroupCosts:
    """The times of one group, by index of the bucket.

    `typical`, `high` and `own` have an entry for every bucket, 0 as long as nothing at all is known. `own` is the
    typical processor time of the thread that runs: what a run would take if nobody else had the interpreter's lock.
    `size` is what a row of the group weighs against one of another, in any unit.
    """

    __slots__ = (
        "_began",
        "_last",
        "_own",
        "_runs",
        "_streaks",
        "_windows",
        "buckets",
        "high",
        "known",
        "own",
        "size",
        "typical",
    )

    def __init__(self, buckets: Sequence[int], size: float, like: GroupCosts | None = None) -> None:
        self.buckets = buckets
        self.size = size
        self._windows = [Window() for _ in buckets]
        self._own = [Window() for _ in buckets]
        self._began: set[int] = set()
        self._runs = 0
        self._last = [0] * len(buckets)
        """Of how many runs each bucket's newest was the last."""

        self._streaks = [0] * len(buckets)
        """Runs of each bucket, none of them more than a window of the group's runs after the one before."""

        self.known: bool = like is not None and like.known
        ratio = size / like.size if like is not None and like.size else 1.0
        nothing: Sequence[float] = [0.0] * len(buckets)
        self.typical: list[float] = [s * ratio for s in (like.typical if like else nothing)]
        self.high: list[float] = [s * ratio for s in (like.high if like else nothing)]
        self.own: list[float] = [s * ratio for s in (like.own if like else nothing)]

    def learn(self, rows: int, seconds: float, own: float | None = None) -> None:
        """A run of `rows` rows, a bucket's, took so long, and `own` of it the thread that ran; all of it by default."""
        index = self.index(rows)
        window, thread = self._windows[index], self._own[index]
        self._runs += 1
        self._streaks[index] = self._streaks[index] + 1 if self._runs - self._last[index] <= WINDOW else 1
        self._last[index] = self._runs
        before = window.median, thread.median
        thread.add(seconds if own is None else own)
        if window.add(seconds):
            self.known = True
            self.typical[index], self.high[index] = window.median, min(window.high, MAX_SCATTER * window.median)
            self.own[index] = thread.median
            if not all(self._windows):
                self._infer()
            if self._streaks[index] > STEADY and all(before):
                ratios = window.median / before[0], thread.median / before[1]
                if all(1 / MAX_SCATTER < ratio < MAX_SCATTER for ratio in ratios):
                    self._follow(index, *ratios)

    def _follow(self, index: int, ratio: float, own: float) -> None:
        """What made the runs of one bucket a little slower, or faster, does so to those of the others, for all we know.

        Else a bucket that did not run since a slowdown would look better than those that did.
        """
        for i, window in enumerate(self._windows):
            if i != index and window:
                window.scale(ratio)
                self._own[i].scale(own)
                self.typical[i] *= ratio
                self.high[i] *= ratio
                self.own[i] *= own

    def ran(self, rows: int, seconds: float, own: float | None = None) -> None:
        """A run of requests took so long. The first of its bucket is not learned from: it made the plan as well."""
        index = self.index(rows)
        if self._windows[index] or index in self._began:
            self.learn(rows, seconds, own)
        else:
            self._began.add(index)

    def runs(self, index: int) -> int:
        """How many runs of the bucket are remembered."""
        return len(self._windows[index])

    def _infer(self) -> None:
        """Buckets that never ran: half of the time of the nearest one that did is fixed, half goes with the rows.

        That is hopeful on either side of it, so that they run and are known.
        """
        ran = [i for i, window in enumerate(self._windows) if window]
        for i, rows in enumerate(self.buckets):
            if not self._windows[i]:
                near = min(ran, key=lambda j: (abs(j - i), j))
                ratio = (1 + rows / self.buckets[near]) / 2
                for times in (self.typical, self.high, self.own):
                    times[i] = times[near] * ratio

    def pass_over(self, index: int) -> None:
        """The bucket could have run and another seemed better."""
        self.typical[index] *= FADE
        self.own[index] *= FADE

    def index(self, rows: float) -> int:
        """The smallest bucket that holds `rows`, which the largest does."""
        return bisect_left(self.buckets, rows)


class Costs:
    """The times of all groups of one model. Not thread-safe."""

    def __init__(self, buckets: Sequence[int]) -> None:
        self.buckets = tuple(buckets)
        self._groups: OrderedDict[Hashable, GroupCosts] = OrderedDict()

    def of(self, group: Hashable, size: float = 1.0) -> GroupCosts:
        """The times of a group; a new one begins with those of the group nearest in size, in proportion."""
        found = self._groups.get(group)
        if found is None:
            near = min((g for g in self._groups.values() if g.known), key=lambda g: abs(g.size - size), default=None)
            found = self._groups[group] = GroupCosts(self.buckets, size, near)
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(group)
        return found
