"""What waits for a model, by groups of jobs that can share a batch. No clock, no threads."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from infera_server.scheduling.costs import MAX_GROUPS, GroupCosts
from infera_server.scheduling.jobs import Job

_level = attrgetter("level")

LAST = 1 << 64
"""The level of jobs whose time was up and that may run all the same: no request has so large a one."""


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


class Backlog:
    """Jobs by group, each group ordered by level and then by arrival, with their totals. Not thread-safe."""

    def __init__(self) -> None:
        self.queued = self.queued_rows = self.queued_bytes = 0
        self._waiting: dict[Hashable, Waiting] = {}
        self._empty: dict[Hashable, Waiting] = {}
        self._soonest = math.inf

    def group(self, name: Hashable) -> Waiting | None:
        """A group with jobs, or one that had some."""
        return self._waiting.get(name) or self._empty.get(name)

    def groups(self) -> Iterator[Waiting]:
        """Those with jobs."""
        yield from self._waiting.values()

    def jobs(self) -> Iterator[Job]:
        """All of them."""
        return (job for waiting in self._waiting.values() for job in waiting.jobs)

    @property
    def head(self) -> Waiting:
        """The group whose first job is the most urgent, then has waited longest: no group can starve another."""
        groups = self._waiting.values()
        if len(groups) == 1:
            return next(iter(groups))
        return min(groups, key=lambda w: (w.jobs[0].level, w.jobs[0].queued_at))

    def put(self, job: Job, waiting: Waiting) -> None:
        """Add a job to its group, which may be a new one."""
        jobs = waiting.jobs
        if not jobs:
            self._empty.pop(job.group, None)
            self._waiting[job.group] = waiting
        if not jobs or jobs[-1].level <= job.level:
            jobs.append(job)
        else:
            jobs.insert(bisect_right(jobs, job.level, key=_level), job)
        waiting.rows += job.rows
        self.queued += 1
        self.queued_rows += job.rows
        self.queued_bytes += job.nbytes
        if job.deadline < self._soonest:
            self._soonest = job.deadline

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

    def drop(self, waiting: Waiting, count: int) -> None:
        """Forget the first jobs of a group."""
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

    def late(self, now: float) -> list[Job]:
        """Remove the jobs whose deadline has passed. Those with another one wait on, behind all others."""
        if now < self._soonest:
            return []
        late = [job for job in self.jobs() if job.deadline <= now]
        gone = []
        for job in late:
            waiting = self._waiting[job.group]
            self.remove(job)
            if job.last_deadline > now:
                job.level, job.deadline = LAST, job.last_deadline
                self.put(job, waiting)
            else:
                gone.append(job)
        self._soonest = min((job.deadline for job in self.jobs()), default=math.inf)
        return gone

    def clear(self) -> list[Job]:
        """Remove all jobs."""
        jobs = list(self.jobs())
        for job in jobs:
            self.remove(job)
        return jobs

    def fill(self, selection: Selection, widens: Callable[[Hashable, Hashable], bool]) -> None:
        """Let jobs of narrower groups have the rows that would be padding: they cost nothing there."""
        free = selection.bucket - sum(job.rows for job in selection.jobs)
        for waiting in list(self._waiting.values()) if free else ():
            if waiting.group == selection.group or not widens(waiting.group, selection.group):
                continue
            count = 0
            while count < len(waiting.jobs) and waiting.jobs[count].rows <= free:
                free -= waiting.jobs[count].rows
                count += 1
            selection.jobs += waiting.jobs[:count]
            self.drop(waiting, count)

    def _set_aside(self, waiting: Waiting) -> None:
        """The group is empty; it is kept for its next job."""
        del self._waiting[waiting.group]
        if len(self._empty) >= MAX_GROUPS:
            self._empty.clear()
        self._empty[waiting.group] = waiting
