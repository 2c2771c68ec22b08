"""Many callers, one running batch.

A `Batcher` owns one engine thread. A job that finds the device idle runs at once; jobs that arrive while it is busy
wait, and who runs next is the `Schedule`'s to say. No delay is ever added. Runs that are known to be short can take
place in the callers' thread instead: two changes of threads cost more than they.

The engine takes its turn on the device before it takes jobs: until then they count as waiting, can expire or be
cancelled, and more can join them.

Nothing here knows HTTP, ONNX or a GPU: `run` takes arrays and returns arrays.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TypeAlias

from infera_server.errors import Expired, RequestError, Unavailable
from infera_server.scheduling.backlog import Selection
from infera_server.scheduling.goal import Goal
from infera_server.scheduling.jobs import Batch, Job, State
from infera_server.scheduling.rows import Layout
from infera_server.scheduling.runner import Run, Runner
from infera_server.scheduling.schedule import Schedule
from infera_server.scheduling.turns import Turns

log = logging.getLogger(__name__)

INLINE_EACH = 2e-5
"""Seconds by which a run in the callers' thread may be longer for each of its jobs after the first: to read a request
and to answer it takes that thread as long, so that it is not the run that others wait for most."""

Learn: TypeAlias = Callable[[], None]
"""What a run says of the next ones is looked at when this is called."""


def _call(deliver: Callable[[Batch], None], batch: Batch) -> None:
    deliver(batch)


class Engine(Enum):
    """Who runs what waits."""

    NOBODY = "nothing waits"
    THREAD = "the engine thread"
    CALLERS = "the callers' thread"


@dataclass(eq=False)
class Batcher:
    """The queue and the engine thread of one model.

    `run` is called by one thread at a time, while it has its turn on the device. `post(deliver, batch)` is called from
    the engine thread once a batch and must call `deliver(batch)` in the thread of the callers
    (`loop.call_soon_threadsafe`); `observe` is then called with each batch that ran, after its jobs' callbacks, and by
    `soon` where there is one: when replies have left.
    Without a `layout` every job runs alone. A run longer than `run_limit` seconds cannot be stopped, but `expire`
    answers the jobs in it. `soon(fn)` must call `fn()` in the callers' thread when that has done what it is at
    (`loop.call_soon`): what arrives until then runs together, and there if one job takes up to `inline_limit` seconds,
    and more of them INLINE_EACH longer.
    `wait_for_engine()` returns once there is something to run on; jobs wait until then, and nobody's turn is taken.
    A RequestError that `run` raises is the answer to all jobs of the batch.
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
    goal: Goal | None = None
    widens: Callable[[Hashable, Hashable], bool] | None = None
    weight: float = 1.0
    soon: Callable[[Callable[[], None]], object] | None = None
    inline_limit: float = 0.0
    wait_for_engine: Callable[[], None] | None = None
    most_of: Callable[[int], int] | None = None
    schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = Schedule(
            self.layout.buckets if self.layout else (1,),
            self.layout is not None,
            self.max_queue,
            self.max_queue_bytes,
            self.name,
            self.goal,
            self.widens,
            most_of=self.most_of,
        )
        self.share = self.turns.share(self.name, self.weight)
        self._engine = Engine.NOBODY
        self._owed: list[Callable[[], None]] = []
        self._running: Sequence[Job] = ()
        self._running_since = self._free_at = 0.0
        self._lock = threading.Lock()
        self._bell = threading.Lock()
        self._bell.acquire()
        self._draining = self._has_turn = False
        self._runner = Runner(self.run, self.layout, self.name)
        self._thread = threading.Thread(target=self._serve, name=f"infera-engine-{self.name}", daemon=True)
        self._thread.start()

    # --- callers ---------------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return self.schedule.queued

    def check_room(self, nbytes: int = 0) -> None:
        """Raises what `submit` would of any job of so many bytes: Overloaded or Unavailable."""
        if self._draining:
            self._check_open()
        if self.schedule.is_full(nbytes):
            with self._lock:
                self.schedule.check_room(nbytes, time.monotonic())

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Overloaded where it would wait too long and Unavailable once `drain` was called."""
        with self._lock:
            if self._draining:
                self._check_open()
            self.schedule.add(job)
            if self._engine is not Engine.NOBODY:
                return
            self._wake()

    def cancel(self, job: Job) -> bool:
        """Forget a job: its callback is not called. Returns whether that kept it from running."""
        with self._lock:
            waited = job.state is State.WAITING and self.schedule.remove(job)
            job.state = State.CANCELLED
            return waited

    def expire(self) -> bool:
        """Answer the waiting jobs whose deadline has passed, and those in a run that takes longer than `run_limit`.

        Returns whether there was such a run.
        """
        now = time.monotonic()
        stuck = bool(self._running) and now - self._running_since > self.run_limit
        if stuck:
            self.give_up(Expired(f"model '{self.name}' has been running this request for {self.run_limit:g} s"))
        if self.schedule.queued:
            with self._lock:
                late = self.schedule.late(now)
            self._post_late(late, now)
        return stuck

    def drain(self) -> None:
        """Refuse new jobs from now on; the engine thread ends once every accepted job has run."""
        with self._lock:
            self._draining = True
            if self._engine is not Engine.THREAD and not self._running:
                self._ring()

    def close(self) -> None:
        """`drain`, and answer what still waits with Unavailable instead of running it."""
        with self._lock:
            left = self.schedule.clear()
        self.drain()
        self._post_failures(left, Unavailable("the server shut down before the request ran"))

    def give_up(self, error: Exception) -> None:
        """Answer the jobs that are being run; what the run returns is thrown away."""
        running, self._running = self._running, ()
        self._post_failures(running, error)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the engine thread to end, which needs `drain` or `close`. Returns whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- who runs --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")

    def _wake(self) -> None:
        """Something waits and nobody is at it. Called under the lock, like `_ring`."""
        if self.soon is not None:
            self._engine = Engine.CALLERS
            self.soon(self._begin)
        else:
            self._ring()

    def _ring(self) -> None:
        self._engine = Engine.THREAD
        self._bell.release()

    def _serve(self) -> None:
        """The engine thread: as long as the bell is rung for it, it alone takes jobs."""
        while self._bell.acquire():
            while self.schedule.queued or self._has_turn:
                self._take_turn()  # a call of its own: its arrays must not live until the next batch
            with self._lock:
                if self.schedule.queued:
                    self._bell.release()
                elif self._draining:
                    return
                else:
                    self._engine = Engine.NOBODY

    def _take_turn(self) -> None:
        if self.wait_for_engine is not None and not self._has_turn:
            self.wait_for_engine()
        asked, behind = time.monotonic(), self.turns.holder
        if not self._has_turn:
            self.share.enter()
        batches: Sequence[Batch] = ()
        try:
            batches, learn = self._run_next(asked, behind)
            if learn is not None:
                learn()
        finally:
            failed = bool(batches) and isinstance(batches[0].results[0], RequestError)
            self._has_turn = self.share.leave(again=bool(batches and self.schedule.queued and not failed))
        for batch in batches:
            self._post(batch)

    def _begin(self) -> None:
        """In the callers' thread: one batch, then the accounts of what was answered before."""
        owed, self._owed = self._owed, []
        self._run_here()
        for account in owed:
            account()

    def _run_here(self) -> None:
        """One batch, if it is short and the device is free. Else the engine thread goes on."""
        asked = time.monotonic()
        with self._lock:
            if self._engine is not Engine.CALLERS:
                return
            if not self.schedule.queued:
                self._settle()
                return
            if not (self.schedule.may_take(self.inline_limit) and self.share.enter(wait=False)):
                self._ring()
                return
        try:
            batches, learn = self._run_next(asked, "", self.inline_limit)
        finally:
            self.share.leave()
        for batch in batches:  # before all else: somebody waits for these, and for nothing below
            self._deliver(batch)
        if learn is not None:
            self._later(learn)
        with self._lock:
            if self.schedule.queued and not batches:
                self._ring()
            else:
                self._settle()

    def _settle(self) -> None:
        """Decide who goes on. Called under the lock."""
        if self.schedule.queued:
            self._wake()
        elif self._draining:
            self._ring()
        else:
            self._engine = Engine.NOBODY

    # --- a run -----------------------------------------------------------------------------------------------------

    def _run_next(self, asked: float, behind: str, within: float = math.inf) -> tuple[Sequence[Batch], Learn | None]:
        """Take jobs and run them: none where those that waited have left, or would take longer than `within`.

        There is something to learn of what ran, unless everybody has left.
        """
        now = time.monotonic()
        with self._lock:
            late = self.schedule.late(now)
            selection = self.schedule.take(now, within, INLINE_EACH) if self.schedule.queued else None
            if selection is not None:
                self._running_since, self._running = now, selection.jobs
                running = State.RUNNING
                for job in selection.jobs:  # under the lock: one that is cancelled from now on must stay so
                    job.state = running
        if late:
            self._post_late(late, now)
        if selection is None:
            return (), None
        began, worked = self._running_since, time.thread_time()
        batches = self._runner.execute(selection)
        worked = time.thread_time() - worked
        for batch in batches:
            batch.free_at, batch.asked_at, batch.behind = self._free_at, asked, behind
        if not batches:  # the batch failed, and meanwhile everybody in it has left
            self._running = ()
            return (), None
        self._running, self._free_at = (), batches[-1].split_at
        self.schedule.ended()
        return batches, partial(self._learn, selection, batches, began, worked)

    def _learn(self, selection: Selection, batches: Sequence[Batch], began: float, own: float) -> None:
        """What a run says of the next ones."""
        first, seconds = batches[0], batches[-1].split_at - began
        whole = first.padded == selection.bucket and not isinstance(first.results[0], Exception)
        with self._lock:
            waited = began - first.asked_at if first.behind else 0.0
            if own < seconds / 2:  # it waited for more than the interpreter's lock, and would do so in any thread
                own = seconds
            self.schedule.ran(selection, seconds, own, whole=whole, waited=waited)

    # --- results ---------------------------------------------------------------------------------------------------

    def _post(self, batch: Batch) -> None:
        try:
            self.post(self._deliver, batch)
        except RuntimeError:  # the callers' event loop is closed: nobody is left to answer
            log.warning("model '%s': %d results had nowhere to go", self.name, len(batch.jobs))

    def _deliver(self, batch: Batch) -> None:
        """In the callers' thread: call every job back, and account for the batch later."""
        ran = bool(batch.padded)
        if ran:
            self.schedule.answered(batch.jobs, time.monotonic())
        told, cancelled, answered = batch if ran else None, State.CANCELLED, State.ANSWERED
        for job, result in zip(batch.jobs, batch.results, strict=True):
            if job.state is cancelled or job.state is answered:
                continue
            job.state = answered
            try:
                job.done(result, told)
            except Exception:
                log.exception("model '%s': the callback of a request failed", self.name)
        if ran:
            self._later(partial(self.observe, batch))

    def _later(self, account: Callable[[], None]) -> None:
        """Account for a batch when its replies have left, and after the answers of the next one if that waits: nobody
        waits for accounts. Without `soon` now."""
        if self.soon is None:
            account()
            return
        if not self._owed:
            self.soon(self._catch_up)
        self._owed.append(account)

    def _catch_up(self) -> None:
        if self._engine is Engine.CALLERS and self.schedule.queued:
            return  # `_begin` comes next, and does it afterwards
        owed, self._owed = self._owed, []
        for account in owed:
            account()

    def _post_late(self, jobs: Sequence[Job], now: float) -> None:
        for job in jobs:
            waited = f"{(now - job.queued_at) * 1e3:.1f} ms"
            self._post_failures(
                [job], Expired(f"model '{self.name}': the request's time was up after {waited} in the queue")
            )

    def _post_failures(self, jobs: Sequence[Job], error: Exception) -> None:
        if jobs:
            self._post(Batch(jobs, 0, 0, time.monotonic(), results=[error] * len(jobs)))
