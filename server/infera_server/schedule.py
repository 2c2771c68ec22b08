"""What waits for a model, who is admitted, and who runs next.

Everything here is arithmetic on the times it is given: no threads, no clock. `Batcher` drives it by the real clock, the
simulation in `bench/` by a virtual one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from infera_server.costs import MAX_GROUPS, MAX_SCATTER, Costs, GroupCosts
from infera_server.errors import Overloaded
from infera_server.forecast import Forecast
from infera_server.goal import Goal
from infera_server.jobs import Job
from infera_server.margin import MAX_MARGIN, Margin

GAIN = 0.95
"""A batch that leaves jobs behind has to be cheaper a row by this factor."""


_level = attrgetter("level")


@dataclass(slots=True, eq=False)
class Waiting:
    """The jobs of one group, best first: by level, then by arrival."""

    group: Hashable
    costs: GroupCosts
    jobs: list[Job] = field(default_factory=list)
    rows: int = 0

    def rows_before(self, level: int) -> int:
        """Rows that go before a new job of this level."""
        if self.jobs[-1].level <= level:
            return self.rows
        return sum(job.rows for job in self.jobs if job.level <= level)


@dataclass(slots=True)
class Selection:
    """The jobs of the next batch, the group whose shapes they run in with what is known of it, and the bucket."""

    jobs: list[Job]
    group: Hashable
    costs: GroupCosts
    bucket: int


@dataclass(eq=False)
class Schedule:
    """The queue of one model. Not thread-safe. Times are seconds of one clock, whichever.

    With `merges` unset a batch is one job. `widens(group, into)` says whether jobs of one group may run in the shapes
    of another. With a `gain` of nearly 0 no batch ever leaves jobs behind that would fit.
    """

    buckets: Sequence[int] = (1,)
    merges: bool = True
    max_queue: int = 256
    max_queue_bytes: int = 1 << 30
    name: str = "model"
    goal: Goal | None = None
    widens: Callable[[Hashable, Hashable], bool] | None = None
    gain: float = GAIN

    queued: int = field(default=0, init=False)
    queued_rows: int = field(default=0, init=False)
    queued_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.costs = Costs(self.buckets)
        self.margin = self.goal.margin if self.goal is not None else Margin()
        self._forecast = Forecast(self.buckets, self.goal, self.gain)
        self._waiting: dict[Hashable, Waiting] = {}
        self._empty: dict[Hashable, Waiting] = {}
        self._soonest = math.inf
        self._slowest = self._worst = self._ahead = 0.0
        """Seconds of one row by itself, of the slowest group that waits; the most that are reckoned with for it, and
        for what runs. With them most jobs need no forecast: they would be in time if every row ran by itself."""

        self._most = self.buckets[-1]
        self._joined = 0
        self._estimated = self.goal is not None

    # --- arriving ----------------------------------------------------------------------------------------------------

    def check_room(self, nbytes: int, now: float) -> None:
        """Raises Overloaded where the queue has no room for a job of so many bytes."""
        if self.queued >= self.max_queue or (self.queued and self.queued_bytes + nbytes > self.max_queue_bytes):
            raise Overloaded(
                f"model '{self.name}' has {self.queued} requests ({self.queued_bytes:,} bytes) waiting, "
                f"its limit is {self.max_queue} ({self.max_queue_bytes:,} bytes); send the request again later",
                self.wait(now),
            )

    def add(self, job: Job) -> None:
        """Queue a job at its `queued_at`. Raises Overloaded where there is no room or no hope, never while idle."""
        now = job.queued_at
        if self.goal is not None:
            self.goal.arrivals.add(job.rows, now)
        waiting = self._waiting.get(job.group) or self._empty.get(job.group) or Waiting(job.group, self._costs_of(job))
        if self.queued or self._forecast.running is not None:
            if self.queued >= self.max_queue or self.queued_bytes + job.nbytes > self.max_queue_bytes:
                self.check_room(job.nbytes, now)
            if (alone := waiting.costs.typical[0]) > self._slowest:
                self._reckon(alone)
            at_most = self._ahead + (self.queued_rows + job.rows + self._most) * self._worst
            if now + at_most > job.deadline or self.goal is not None:
                self._check_hope(job, now)
        else:
            self._reckon(waiting.costs.typical[0])
        jobs = waiting.jobs
        if not jobs:
            self._empty.pop(job.group, None)
            self._waiting[job.group] = waiting
        if not jobs or jobs[-1].level <= job.level:
            jobs.append(job)
        else:
            jobs.insert(bisect_right(jobs, job.level, key=_level), job)
        waiting.rows += job.rows
        self._joined += job.rows
        self.queued += 1
        self.queued_rows += job.rows
        self.queued_bytes += job.nbytes
        if job.deadline < self._soonest:
            self._soonest = job.deadline

    def _reckon(self, alone: float) -> None:
        """A row of the slowest group that waits takes so long by itself."""
        self._slowest = alone
        self._worst = (MAX_SCATTER * alone + self._forecast.turns.high) * MAX_MARGIN

    def _check_hope(self, job: Job, now: float) -> None:
        """Raises Overloaded where the job would be answered after its deadline, or after the goal."""
        self._estimated = True
        job.estimate, job.allowed = self.forecast(job, now, high=True), job.deadline - now
        needed = job.estimate * self.margin.value
        if needed > job.allowed:
            raise Overloaded(
                f"model '{self.name}': the request would take about {needed * 1e3:.3g} ms, "
                f"it has {job.allowed * 1e3:.3g} ms; send it again later or with a longer timeout",
                needed - job.allowed,
                "would_expire",
            )
        if self.goal is not None:
            costs = self._costs_of(job)
            limit = self.goal.limit(costs.high[costs.index(job.rows)])
            job.allowed = min(job.allowed, self.goal.seconds)
            if job.estimate > limit:
                raise Overloaded(
                    f"model '{self.name}': the request would take about {needed * 1e3:.3g} ms, "
                    f"more than the server's goal of {self.goal.seconds * 1e3:.3g} ms allows; send it again later",
                    needed - limit * self.margin.value,
                    "goal",
                )

    def answered(self, jobs: Sequence[Job], now: float) -> None:
        """The jobs of a batch were answered."""
        if self._estimated:
            self.margin.learn(jobs, now)
        if self.goal is not None:
            self.goal.answered(jobs, now)

    def forecast(self, job: Job, now: float, high: bool = False) -> float:
        """Seconds until a job that arrives now would be answered, by typical or by long runs; 0 where none is known."""
        own = self._waiting.get(job.group)
        seconds = self._forecast.residual(now, high)
        for waiting in self._waiting.values():
            if waiting is not own:
                seconds += self._forecast.clear(waiting.costs, waiting.rows_before(job.level), high)
        rows = job.rows + (own.rows_before(job.level) if own else 0)
        return seconds + self._forecast.clear(own.costs if own else self._costs_of(job), rows, high, seconds)

    def wait(self, now: float) -> float:
        """Seconds until what waits and runs now is through."""
        return self._forecast.residual(now, False) + sum(
            self._forecast.clear(w.costs, w.rows, False) for w in self._waiting.values()
        )

    def _costs_of(self, job: Job) -> GroupCosts:
        waiting = self._waiting.get(job.group) or self._empty.get(job.group)
        if waiting is not None:
            return waiting.costs
        return self.costs.of(job.group, sum(a.size for a in job.feeds.values()) / job.rows)

    # --- leaving -----------------------------------------------------------------------------------------------------

    def remove(self, job: Job) -> bool:
        """Forget a job. Returns whether it waited."""
        waiting = self._waiting.get(job.group)
        if waiting is None or job not in waiting.jobs:
            return False
        waiting.jobs.remove(job)
        waiting.rows -= job.rows
        self.queued -= 1
        self.queued_rows -= job.rows
        self.queued_bytes -= job.nbytes
        if not waiting.jobs:
            self._set_aside(waiting)
        return True

    def late(self, now: float) -> list[Job]:
        """Remove the jobs whose deadline has passed."""
        if now < self._soonest:
            return []
        jobs = [job for waiting in self._waiting.values() for job in waiting.jobs]
        late = [job for job in jobs if job.deadline <= now]
        for job in late:
            self.remove(job)
        self._soonest = min((job.deadline for job in jobs if job.deadline > now), default=math.inf)
        return late

    def clear(self) -> list[Job]:
        """Remove all jobs."""
        jobs = [job for waiting in self._waiting.values() for job in waiting.jobs]
        for job in jobs:
            self.remove(job)
        return jobs

    # --- running -----------------------------------------------------------------------------------------------------

    def may_take(self, seconds: float) -> bool:
        """Whether the next batch could be as short as that: a look that costs next to nothing."""
        costs = self._head().costs
        return costs.known and costs.typical[0] <= seconds

    def take(self, now: float, within: float = math.inf) -> Selection | None:
        """Remove the jobs of the next batch, and say how it runs. Something must wait.

        None where the batch would take longer than `within`, or it is unknown how long and there is such a limit.
        """
        head = self._head()
        index, count = self._choose(head) if self.merges else (0, 1)
        seconds = head.costs.typical[index]
        if seconds > within or (within < math.inf and not head.costs.known):
            return None
        selection = Selection(head.jobs[:count], head.group, head.costs, self.buckets[index])
        self._drop(head, count)
        if self.widens is not None and self.merges:
            self._fill(selection)
        self._ahead = self._forecast.begin(head.costs, index, now).high * MAX_MARGIN
        self._forecast.joining.add(self._joined, now)
        self._joined = 0
        return selection

    def ran(self, selection: Selection, seconds: float, *, whole: bool = True, waited: float = 0.0) -> None:
        """The batch ended after so long, before which the device was `waited` for.

        Unless it ran `whole`, nothing is learned from its time.
        """
        turns = self._forecast.turns
        if waited or turns:
            turns.add(waited)
        self._forecast.running, self._ahead = None, 0.0
        if whole:
            selection.costs.learn(selection.bucket, seconds)
            if self.goal is not None:
                self.goal.check_reach(selection.costs)

    def _head(self) -> Waiting:
        """The group whose first job is the most urgent, then has waited longest: no group can starve another."""
        groups = self._waiting.values()
        if len(groups) == 1:
            return next(iter(groups))
        return min(groups, key=lambda w: (w.jobs[0].level, w.jobs[0].queued_at))

    def _choose(self, head: Waiting) -> tuple[int, int]:
        """(index of the bucket, how many jobs) of the batch that takes the least time a row."""
        costs, jobs = head.costs, head.jobs
        first = costs.index(jobs[0].rows)
        if len(jobs) == 1:
            return first, 1
        last = max(self._forecast.largest(costs), first)
        index = count = rows = taken = 0
        least = math.inf
        considered = []
        for i in range(first, last + 1):
            before, bucket = count, self.buckets[i]
            while count < len(jobs) and rows + jobs[count].rows <= bucket:
                rows += jobs[count].rows
                count += 1
            if count == before:
                continue
            considered.append(i)
            rate = costs.typical[i] / rows
            if rate <= least / self.gain:
                index, taken, least = i, count, min(rate, least)
            if count == len(jobs):
                break
        for i in considered:
            if i != index:
                costs.pass_over(i)
        return index, taken

    def _drop(self, waiting: Waiting, count: int) -> None:
        rows = nbytes = 0
        for job in waiting.jobs[:count]:
            rows += job.rows
            nbytes += job.nbytes
        self.queued -= count
        self.queued_rows -= rows
        self.queued_bytes -= nbytes
        waiting.rows -= rows
        del waiting.jobs[:count]
        if not waiting.jobs:
            self._set_aside(waiting)

    def _set_aside(self, waiting: Waiting) -> None:
        """The group is empty; it is kept for its next job."""
        del self._waiting[waiting.group]
        if len(self._empty) >= MAX_GROUPS:
            self._empty.clear()
        self._empty[waiting.group] = waiting

    def _fill(self, selection: Selection) -> None:
        """Let jobs of narrower groups have the rows that would be padding: they cost nothing there."""
        assert self.widens is not None
        free = selection.bucket - sum(job.rows for job in selection.jobs)
        for waiting in list(self._waiting.values()) if free else ():
            if waiting.group == selection.group or not self.widens(waiting.group, selection.group):
                continue
            count = 0
            while count < len(waiting.jobs) and waiting.jobs[count].rows <= free:
                free -= waiting.jobs[count].rows
                count += 1
            selection.jobs += waiting.jobs[:count]
            self._drop(waiting, count)
