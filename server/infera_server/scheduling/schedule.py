"""Who is admitted to what waits for a model, and who runs next.

Everything here is arithmetic on the times it is given: no threads, no clock. `Batcher` drives it by the real clock, the
simulation in `bench/` by a virtual one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from infera_server.errors import Overloaded
from infera_server.scheduling.backlog import Backlog, Selection, Waiting
from infera_server.scheduling.costs import MAX_SCATTER, Costs, GroupCosts
from infera_server.scheduling.forecast import Forecast
from infera_server.scheduling.goal import Goal, told
from infera_server.scheduling.jobs import Job
from infera_server.scheduling.margin import MAX_MARGIN, Margin

GAIN = 0.95
"""A batch that leaves jobs behind has to be cheaper a row by this factor."""


@dataclass(eq=False)
class Schedule(Backlog):
    """The queue of one model. Not thread-safe. Times are seconds of one clock, whichever.

    With `merges` unset a batch is one job. `widens(group, into)` says whether jobs of one group may run in the shapes
    of another. With a `gain` of nearly 0 no batch ever leaves jobs behind that would fit. `most_of(level)` is how many
    jobs of a level may wait, 0: no limit but those for all.
    """

    buckets: Sequence[int] = (1,)
    merges: bool = True
    max_queue: int = 256
    max_queue_bytes: int = 1 << 30
    name: str = "model"
    goal: Goal | None = None
    widens: Callable[[Hashable, Hashable], bool] | None = None
    gain: float = GAIN
    most_of: Callable[[int], int] | None = None

    def __post_init__(self) -> None:
        Backlog.__init__(self)
        self.costs = Costs(self.buckets)
        self.margin = self.goal.margin if self.goal is not None else Margin()
        self._forecast = Forecast(self.buckets, self.goal, self.gain)
        self._slowest = self._worst = self._ahead = 0.0
        """Seconds of one row by itself, of the slowest group that waits; the most that are reckoned with for it, and
        for what runs. With them most jobs need no forecast: they would be in time if every row ran by itself."""

        self._most = self.buckets[-1]
        self._joined = 0
        self._estimated = self.goal is not None

    # --- arriving ----------------------------------------------------------------------------------------------------

    def is_full(self, nbytes: int) -> bool:
        """Whether there is no room for a job of so many bytes: a look that any thread may take."""
        return self.queued >= self.max_queue or (self.queued > 0 and self.queued_bytes + nbytes > self.max_queue_bytes)

    def check_room(self, nbytes: int, now: float) -> None:
        """Raises Overloaded where the queue has no room for a job of so many bytes."""
        if self.is_full(nbytes):
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
        waiting = self.group(job.group) or Waiting(job.group, self._costs_of(job))
        if self.queued or self._forecast.running is not None:
            if self.queued >= self.max_queue or self.queued_bytes + job.nbytes > self.max_queue_bytes:
                self.check_room(job.nbytes, now)
            if self.most_of is not None:
                self._check_level(job, self.most_of(job.level))
            if (alone := waiting.costs.typical[0]) > self._slowest:
                self._reckon(alone)
            at_most = self._ahead + (self.queued_rows + job.rows + self._most) * self._worst
            if now + at_most > (job.last_deadline or job.deadline) or self.goal is not None:
                self._check_hope(job, now)
        else:
            self._reckon(waiting.costs.typical[0])
        self._joined += job.rows
        self.put(job, waiting)

    def _check_level(self, job: Job, most: int) -> None:
        """Raises Overloaded where so many jobs of its level wait."""
        if most and sum(other.level == job.level for other in self.jobs()) >= most:
            raise Overloaded(
                f"model '{self.name}' has {most} requests of priority {job.level} waiting, its limit for them; "
                "send the request again later",
                self.wait(job.queued_at),
            )

    def _reckon(self, alone: float) -> None:
        """A row of the slowest group that waits takes so long by itself."""
        self._slowest = alone
        self._worst = (MAX_SCATTER * alone + self._forecast.turns.high) * MAX_MARGIN

    def _check_hope(self, job: Job, now: float) -> None:
        """Raises Overloaded where the job would be answered after its deadline, or after the goal."""
        self._estimated = True
        job.estimate, job.allowed = self.forecast(job, now, high=True), (job.last_deadline or job.deadline) - now
        needed = job.estimate * self.margin.value
        if needed > job.allowed:
            raise Overloaded(
                f"model '{self.name}': the request would take about {told(needed)}, "
                f"it has {told(job.allowed)}; send it again later or with a longer timeout",
                needed - job.allowed,
                "would_expire",
            )
        if self.goal is not None:
            costs = self._costs_of(job)
            limit = self.goal.limit(costs.high[costs.index(job.rows)])
            job.allowed = min(job.allowed, self.goal.seconds)
            if job.estimate > limit:
                raise Overloaded(
                    f"model '{self.name}': the request would take about {told(needed)}, "
                    f"more than the server's goal of {told(self.goal.seconds)} allows; send it again later",
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
                seconds += self._clear(waiting, waiting.rows_before(job.level), high)
        costs = own.costs if own else self._costs_of(job)
        before, alone = own.rows_before(job.level) if own else 0, costs.index(min(job.rows, self._most))
        first = costs.index(own.jobs[0].rows) if own else alone
        if alone <= max(self._forecast.largest(costs), first):
            return seconds + self._forecast.clear(costs, before + job.rows, high, seconds, first)
        seconds += self._forecast.clear(costs, before, high, seconds, first)
        return seconds + self._forecast.clear(costs, job.rows, high, seconds, alone)

    def wait(self, now: float) -> float:
        """Seconds until what waits and runs now is through."""
        return self._forecast.residual(now, False) + sum(
            self._clear(waiting, waiting.rows, False) for waiting in self._waiting.values()
        )

    def _clear(self, waiting: Waiting, rows: int, high: bool) -> float:
        """Seconds for so many rows of those that wait: a batch is as large as its first job, whatever the goal."""
        return self._forecast.clear(waiting.costs, rows, high, least=waiting.costs.index(waiting.jobs[0].rows))

    def _costs_of(self, job: Job) -> GroupCosts:
        waiting = self.group(job.group)
        if waiting is not None:
            return waiting.costs
        return self.costs.of(job.group, sum(a.size for a in job.feeds.values()) / job.rows)

    # --- running -----------------------------------------------------------------------------------------------------

    def may_take(self, seconds: float) -> bool:
        """Whether the next batch could be as short as that: a look that costs next to nothing."""
        costs = self.head.costs
        return costs.known and costs.own[0] <= seconds

    def take(self, now: float, within: float = math.inf, each: float = 0.0) -> Selection | None:
        """Remove the jobs of the next batch, and say how it runs. Something must wait.

        None where the batch would take its thread longer than `within`, and `each` for every job but the first, or it
        is unknown how long and there is such a limit.
        """
        head = self.head
        index, count = self._choose(head) if self.merges else (0, 1)
        if head.costs.own[index] > within + each * (count - 1) or (within < math.inf and not head.costs.known):
            return None
        selection = Selection(head.jobs[:count], head.group, head.costs, self.buckets[index])
        self.drop(head, count)
        if self.widens is not None and self.merges:
            self.fill(selection, self.widens)
        self._ahead = self._forecast.begin(head.costs, index, now).high * MAX_MARGIN
        self._forecast.joining.add(self._joined, now)
        self._joined = 0
        return selection

    def ended(self) -> None:
        """The batch ended: nothing runs until the next one is taken."""
        self._forecast.running, self._ahead = None, 0.0

    def ran(
        self, selection: Selection, seconds: float, own: float | None = None, *, whole: bool = True, waited: float = 0.0
    ) -> None:
        """The batch took so long, `own` of it its thread, before which the device was `waited` for.

        Unless it ran `whole`, nothing is learned from its time.
        """
        turns = self._forecast.turns
        if waited or turns:
            turns.add(waited)
        self.ended()
        if whole:
            selection.costs.ran(selection.bucket, seconds, own)
            if self.goal is not None:
                self.goal.check_reach(selection.costs)

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
