"""Models of the engine process, as a worker sees them.

A request's tensors are copied into a block of shared memory, where the engine reads them; the outputs are views of a
block that the engine has written, which is its own again once nothing views it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from infera_server.errors import QUEUE_FULL, Expired, Overloaded, RequestError, Unavailable, renamed
from infera_server.metrics import ModelStats
from infera_server.models.modelconfig import ModelConfig, new
from infera_server.models.servable import Passing
from infera_server.processes.arena import Blocks, Lent
from infera_server.processes.engine_wire import error_in
from infera_server.processes.front_wire import Entry, entry, kind_of, put, read, request_out, run_in, signature_in
from infera_server.processes.ring import Reader, Signs, Writer
from infera_server.requests import Request, check_each
from infera_server.scheduling.jobs import Done, Each, Job, State, answer
from infera_server.scheduling.rows import HostArray
from infera_server.scheduling.signature import Signature

log = logging.getLogger(__name__)

MOST_UNDER_WAY = 4096
"""Requests of one worker that the engine has not answered."""

RETRY_AFTER = 0.1
"""Seconds after which a request is worth another try that found too many under way."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sent(Job):
    """A request that is with the engine."""

    number: int
    model: RemoteModel
    each: Each | None


class Link:
    """A worker's end of the shared memory. Used in the event loop's thread only."""

    def __init__(
        self, full: Signs, requests: Blocks, results: Lent, outbox: Writer, inbox: Reader, patience: float = math.inf
    ) -> None:
        """`full` shows the models whose queues are full. The engine has `patience` seconds to answer, at the worst."""
        self.full, self.patience = full, patience
        self._requests, self._results = requests, results
        self._outbox, self._inbox = outbox, inbox
        self._under_way: dict[int, Sent] = {}
        self._number = 0
        self._will_flush = False
        self._down = ""
        self.tells_runs = False
        """Whether the engine is to say of every request how it was run."""

    def attach(self) -> None:
        """From now on take the engine's answers in the running event loop."""
        asyncio.get_running_loop().add_reader(self._inbox.event, self.receive)

    def check_room(self, nbytes: int) -> None:
        """Raises Overloaded or Unavailable where no request can be sent."""
        if self._down:
            raise Unavailable(self._down)
        if self._requests.taken >= MOST_UNDER_WAY:
            raise Overloaded(f"{MOST_UNDER_WAY:,} requests are under way already; send it again later", RETRY_AFTER)

    def submit(self, model: RemoteModel, request: Request, nbytes: int, done: Done) -> Job:
        """Send a request. Raises Overloaded or Unavailable."""
        self.check_room(nbytes)
        now = time.monotonic()
        deadline = None if request.timeout is None else now + request.timeout
        self._number = number = self._number + 1
        explained = request.trace or self.tells_runs
        document = [number, model.uid, nbytes, deadline, explained, *request_out(request)]
        self._put(entry(Entry.MESSAGE, put(self._requests, document, request.feeds)))
        job = Sent(
            {},
            done,
            nbytes=nbytes,
            deadline=deadline or math.inf,
            queued_at=now,
            number=number,
            model=model,
            each=request.each,
        )
        self._under_way[number] = job
        model.sent(job)
        return job

    def withdraw(self, job: Sent) -> None:
        """Wait for no answer to a request any more, and tell the engine."""
        if self._under_way.pop(job.number, None) is not None:
            job.model.answered(job)
            self._put(entry(Entry.CANCEL, job.number))

    def fail(self, error: Unavailable) -> None:
        """The engine is gone: what is under way, and whatever is sent from now on, is answered with this error."""
        self._down = str(error)
        under_way, self._under_way = self._under_way, {}
        for job in under_way.values():
            job.model.answered(job)
            answer(job, error)

    def flush(self) -> None:
        """Let the engine see what was sent, and have its memory again, for which alone it is not woken each time."""
        self._will_flush = False
        returned = self._results.returned
        while returned:
            self._outbox.put(entry(Entry.RETURNED, returned.popleft()))
        self._outbox.flush()
        self._requests.collect()

    def memory(self, nbytes: int) -> HostArray:
        """Memory for a large body, which the engine reads where it lies."""
        try:
            return self._requests.array(nbytes)
        except RequestError:
            return np.empty(nbytes, np.uint8)  # there may be room once the body is there

    def receive(self) -> None:
        """Take what the engine has sent."""
        for number in self._inbox.take():
            kind, value = kind_of(number)
            if kind == Entry.MESSAGE:
                try:
                    self._answered(value)
                except Exception:
                    log.exception("an answer of the engine cannot be read")
            elif kind == Entry.RETURNED:
                self._requests.give_back(value)
            elif (job := self._taken(value)) is not None:
                answer(job, Unavailable("the engine has no shared memory left for the response; send it again later"))

    def _answered(self, offset: int) -> None:
        (number, error, run, continues), arrays = read(self._results, offset)
        if continues:
            if (waiting := self._under_way.get(number)) is not None and waiting.each is not None:
                part = Job({}, waiting.done)  # the request itself was queued when it was sent
                waiting.each(arrays, run_in(run, part) if run is not None else None, part)
            return
        job = self._taken(number)
        if job is None:
            return
        batch = run_in(run, job) if run is not None else None
        if error is None:
            answer(job, arrays, batch)
            return
        failure = error_in(error)
        if isinstance(failure, Overloaded) and failure.reason == QUEUE_FULL:
            job.model.refusal = failure
        answer(job, failure, batch)

    def _taken(self, number: int) -> Sent | None:
        """The request that is answered; None where it was withdrawn meanwhile."""
        job = self._under_way.pop(number, None)
        if job is not None:
            job.model.answered(job)
        return job

    def _put(self, number: int) -> None:
        self._outbox.put(number)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._will_flush:
            self._will_flush = True
            asyncio.get_running_loop().call_soon(self.flush)


class RemoteModel(Passing):
    """A `Servable` of the engine, by its number there."""

    retired = False
    lost = ""

    def __init__(self, uid: int, told: Mapping[str, Any], link: Link) -> None:
        super().__init__()
        self.uid = uid
        self.signature: Signature = signature_in(told["signature"])
        self.device: str = told["device"]
        self.stats = ModelStats()
        """What this worker has answered; the engine knows of the runs."""

        self.refusal: Overloaded | None = None
        """What the engine has last refused a request with, as its queue was full."""

        self._config: str = told["config"]
        self._link = link
        self._jobs: dict[Sent, None] = {}

    @cached_property
    def config(self) -> ModelConfig:
        found = new()
        found.ParseFromString(self._config.encode("latin-1"))
        return found

    @property
    def queued(self) -> int:
        """Requests that are not answered."""
        return len(self._jobs)

    def check_room(self, nbytes: int) -> None:
        if self.refusal is not None and self._link.full.shows(self.uid):
            raise renamed(self.refusal, str(self.refusal))
        self._link.check_room(nbytes)

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        check_each(request, self.signature)
        return self._link.submit(self, request, nbytes, done)

    def cancel(self, job: Job) -> None:
        if isinstance(job, Sent) and job.model is self:
            job.state = State.CANCELLED
            self._link.withdraw(job)

    def expire(self) -> None:
        """The engine answers what has waited too long; what it does not answer at all is given up."""
        patience, now = self._link.patience, time.monotonic()
        while self._jobs and now - (oldest := next(iter(self._jobs))).queued_at > patience:
            self._link.withdraw(oldest)
            answer(oldest, Expired(f"the engine has not answered within {patience:g} s"))
        self._link.flush()

    def give_up(self, error: Exception) -> None:
        for job in list(self._jobs):
            self._link.withdraw(job)
            answer(job, error)

    def close(self, timeout: float | None = None) -> None:
        """There is nothing to release."""

    def sent(self, job: Sent) -> None:
        """A request is under way."""
        self._jobs[job] = None

    def answered(self, job: Sent) -> None:
        """It is no more."""
        self._jobs.pop(job, None)
        self._check_ended()
