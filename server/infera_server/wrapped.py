"""A `Servable` around another: what it does not do itself it hands on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from infera_server.jobs import Batch, Done, Job, State
from infera_server.metrics import ModelStats
from infera_server.requests import Request
from infera_server.rows import Arrays
from infera_server.servable import Servable
from infera_server.signature import Signature

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Wrapped:
    """Hands everything on to `inner`. Its counters are those of `inner`."""

    inner: Servable
    signature: Signature = field(init=False)
    stats: ModelStats = field(init=False)
    device: str = field(init=False)
    retired: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.signature, self.stats, self.device = self.inner.signature, self.inner.stats, self.inner.device

    @property
    def lost(self) -> str:
        return self.inner.lost

    @property
    def queued(self) -> int:
        return self.inner.queued

    def check_room(self, nbytes: int) -> None:
        self.inner.check_room(nbytes)

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        return self.inner.submit(request, nbytes, done)

    def cancel(self, job: Job) -> None:
        self.inner.cancel(job)

    def expire(self) -> None:
        self.inner.expire()

    def drain(self) -> None:
        self.inner.drain()

    def join(self, timeout: float | None = None) -> bool:
        return self.inner.join(timeout)

    def give_up(self, error: Exception) -> None:
        self.inner.give_up(error)

    def close(self, timeout: float | None = None) -> None:
        self.inner.close(timeout)


def answer(job: Job, result: Arrays | Exception, batch: Batch | None = None) -> None:
    """Call a job back, unless it was cancelled or answered before. What the callback raises goes to the log."""
    if job.state in (State.CANCELLED, State.ANSWERED):
        return
    job.state = State.ANSWERED
    try:
        job.done(result, batch)
    except Exception:
        log.exception("the callback of a request failed")
