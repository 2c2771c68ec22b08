"""Many callers, one running batch.

A `Batcher` owns one engine thread. A job that finds the device idle runs at once; jobs that arrive while it is busy
wait, and the next run takes as many of one group (rows that fit in one array) as the batch holds. No delay is ever
added. The group whose first job has waited longest goes next, so no shape blocks another.

The engine takes its turn on the device before it takes jobs: until then they count as waiting, can expire or be
cancelled, and more can join them.

Nothing here knows HTTP, ONNX or a GPU: `run` takes arrays and returns arrays.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from infera_server.errors import Expired, Overloaded, Unavailable
from infera_server.jobs import Batch, Job, State
from infera_server.rows import Arrays, Gatherer, Layout, in_order, split
from infera_server.turns import Turns

Run: TypeAlias = Callable[[Arrays], Arrays]

log = logging.getLogger(__name__)


def _call(deliver: Callable[[Batch], None], batch: Batch) -> None:
    deliver(batch)


@dataclass(eq=False)
class Batcher:
    """The queue and the engine thread of one model.

    `run` is called from the engine thread only, one call at a time, while it has its turn on the device. `post(deliver,
    batch)` is called from there once a batch and must call `deliver(batch)` in the thread of the callers
    (`loop.call_soon_threadsafe`); `observe` is then called with each batch that ran, before its jobs' callbacks.
    Without a `layout` every job runs alone. A run longer than `run_limit` seconds cannot be stopped, but `expire`
    answers the jobs in it.
    """

    run: Run
    layout: Layout | None
    max_queue: int = 256
    max_queue_bytes: int = 1 << 30
    name: str = "model"
    post: Callable[[Callable[[Batch], None], Batch], object] = _call
    observe: Callable[[Batch], None] = lambda batch: None
    turns: Turns = field(default_factory=Turns)
    run_limit: float = math.inf

    queued: int = field(default=0, init=False)
    queued_rows: int = field(default=0, init=False)
    queued_bytes: int = field(default=0, init=False)
    run_seconds: float = field(default=0.0, init=False)
    """Moving average of one batch, queue excluded; 0 before the first."""

    def __post_init__(self) -> None:
        self._groups: dict[Hashable, deque[Job]] = {}
        self._running: Sequence[Job] = ()
        self._running_since = 0.0
        self._changed = threading.Condition()
        self._draining = False
        self._gather = Gatherer(self.layout.inputs if self.layout else {})
        self._thread = threading.Thread(target=self._serve, name=f"infera-engine-{self.name}", daemon=True)
        self._thread.start()

    # --- callers ---------------------------------------------------------------------------------------------------

    def check_room(self, nbytes: int = 0) -> None:
        """Raises what `submit` would of a job of so many bytes: Overloaded or Unavailable."""
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        if self.queued >= self.max_queue or (self.queued and self.queued_bytes + nbytes > self.max_queue_bytes):
            raise Overloaded(
                f"model '{self.name}' has {self.queued} requests ({self.queued_bytes:,} bytes) waiting, "
                f"its limit is {self.max_queue} ({self.max_queue_bytes:,} bytes); send the request again later",
                self.expected_wait(),
            )

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Overloaded where the queue is full and Unavailable once `drain` was called."""
        with self._changed:
            self.check_room(job.nbytes)
            job.queued_at = time.monotonic()
            self._groups.setdefault(job.group, deque()).append(job)
            self._count(job, 1)
            self._changed.notify()

    def cancel(self, job: Job) -> bool:
        """Forget a job: its callback is not called. Returns whether that kept it from running."""
        with self._changed:
            waiting = job.state is State.WAITING and job in self._groups.get(job.group, ())
            if waiting:
                self._remove(job)
            job.state = State.CANCELLED
            return waiting

    def expire(self) -> None:
        """Answer the waiting jobs whose deadline has passed, and those in a run that takes longer than `run_limit`."""
        now = time.monotonic()
        if self._running and now - self._running_since > self.run_limit:
            self.give_up(Expired(f"model '{self.name}' has been running this request for {self.run_limit:g} s"))
        if not self.queued:
            return
        with self._changed:
            late = [job for group in self._groups.values() for job in group if job.deadline <= now]
            for job in late:
                self._remove(job)
        self._post_late(late, now)

    def expected_wait(self) -> float:
        """Seconds until what waits now has run, by the measured time of a batch."""
        most = self.layout.max_rows if self.layout else 1
        return (math.ceil(self.queued_rows / most) + 1) * self.run_seconds

    def drain(self) -> None:
        """Refuse new jobs from now on; the engine thread ends once every accepted job has run."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def close(self) -> None:
        """`drain`, and answer what still waits with Unavailable instead of running it."""
        with self._changed:
            self._draining = True
            left = [job for group in self._groups.values() for job in group]
            for job in left:
                self._remove(job)
            self._changed.notify()
        self._post_failures(left, Unavailable("the server shut down before the request ran"))

    def give_up(self, error: Exception) -> None:
        """Answer the jobs that are being run; what the run returns is thrown away."""
        running, self._running = self._running, ()
        self._post_failures(running, error)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the engine thread to end, which needs `drain` or `close`. Returns whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- bookkeeping, under the lock -------------------------------------------------------------------------------

    def _count(self, job: Job, sign: int) -> None:
        self.queued += sign
        self.queued_rows += sign * job.rows
        self.queued_bytes += sign * job.nbytes

    def _remove(self, job: Job) -> None:
        group = self._groups[job.group]
        group.remove(job)
        if not group:
            del self._groups[job.group]
        self._count(job, -1)

    # --- the engine thread -----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while self._wait():
            self._take_turn()  # a call of its own: its arrays must not live until the next batch

    def _take_turn(self) -> None:
        with self.turns:
            jobs = self._take()
            batches = self._execute(jobs) if jobs else ()
        for batch in batches:
            self._post(batch)

    def _post(self, batch: Batch) -> None:
        try:
            self.post(self._deliver, batch)
        except RuntimeError:  # the callers' event loop is closed: nobody is left to answer
            log.warning("model '%s': %d results had nowhere to go", self.name, len(batch.jobs))

    def _wait(self) -> bool:
        """Return once a job waits: True, or False where none does and none will."""
        with self._changed:
            while not self._groups:
                if self._draining:
                    return False
                self._changed.wait()
            return True

    def _take(self) -> list[Job]:
        """The jobs of the next batch; none where those that waited have expired or left meanwhile."""
        most = self.layout.max_rows if self.layout else 1
        late: list[Job] = []
        jobs: list[Job] = []
        now = time.monotonic()
        with self._changed:
            while self._groups and not jobs:
                key = min(self._groups, key=lambda k: self._groups[k][0].queued_at)
                group, rows = self._groups[key], 0
                while group and (not jobs or (self.layout and rows + group[0].rows <= most)):
                    job = group.popleft()
                    self._count(job, -1)
                    if job.deadline <= now:
                        late.append(job)
                        continue
                    job.state = State.RUNNING
                    jobs.append(job)
                    rows += job.rows
                if not group:
                    del self._groups[key]
        if late:
            self._post_late(late, now)
        return jobs

    def _execute(self, jobs: Sequence[Job]) -> Sequence[Batch]:
        """The batches that the jobs ran in: one, or where it failed one for each job."""
        began = self._running_since = time.monotonic()
        self._running = jobs
        try:
            batches = [self._run_together(jobs)]
        except Exception as error:
            log.debug("model '%s': a batch of %d failed, each runs alone now: %s", self.name, len(jobs), error)
            batches = [self._run_alone(job) for job in jobs if job.state is State.RUNNING]
        self._running = ()
        took = time.monotonic() - began
        self.run_seconds = took if not self.run_seconds else 0.8 * self.run_seconds + 0.2 * took
        return batches

    def _run_together(self, jobs: Sequence[Job]) -> Batch:
        """Raises what the run raises, unless there is but one job, run as it is."""
        rows, layout = sum(job.rows for job in jobs), self.layout
        padded = layout.bucket(rows) if layout else rows
        if len(jobs) == 1 and rows == padded:
            return self._run_alone(jobs[0])
        assert layout is not None
        batch = Batch(jobs, rows, padded, time.monotonic())
        feeds = self._gather([job.feeds for job in jobs], rows, padded)
        batch.gathered_at = time.monotonic()
        outputs = self.run(feeds)
        batch.ran_at = time.monotonic()
        batch.results = list(split(outputs, layout, [job.rows for job in jobs], padded))
        batch.split_at = time.monotonic()
        return batch

    def _run_alone(self, job: Job) -> Batch:
        """The job by itself and unpadded: nothing is gathered or split."""
        batch = Batch([job], job.rows, job.rows, time.monotonic())
        batch.gathered_at = batch.taken_at
        try:
            feeds = in_order(job.feeds)
            batch.gathered_at = time.monotonic()
            batch.results = [self.run(feeds)]
        except Exception as error:
            batch.results = [error]
        batch.ran_at = batch.split_at = time.monotonic()
        return batch

    # --- results ---------------------------------------------------------------------------------------------------

    def _deliver(self, batch: Batch) -> None:
        """In the callers' thread: account for the batch, then call every job back."""
        ran = bool(batch.padded)
        if ran:
            self.observe(batch)
        for job, result in zip(batch.jobs, batch.results, strict=True):
            if job.state in (State.CANCELLED, State.ANSWERED):
                continue
            job.state = State.ANSWERED
            try:
                job.done(result, batch if ran else None)
            except Exception:
                log.exception("model '%s': the callback of a request failed", self.name)

    def _post_late(self, jobs: Sequence[Job], now: float) -> None:
        for job in jobs:
            waited = f"{(now - job.queued_at) * 1e3:.1f} ms"
            self._post_failures(
                [job], Expired(f"model '{self.name}': the request's time was up after {waited} in the queue")
            )

    def _post_failures(self, jobs: Sequence[Job], error: Exception) -> None:
        if jobs:
            self._post(Batch(jobs, 0, 0, time.monotonic(), results=[error] * len(jobs)))
