"""One model on several devices: each request goes to the one that has the least to do."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from infera_server.models.servable import Front
from infera_server.models.taps import Tap
from infera_server.requests import Request
from infera_server.scheduling.jobs import Batch, Done, Job
from infera_server.scheduling.rows import Arrays


@dataclass(slots=True, eq=False)
class Held:
    """A request that one of them has, until it is answered or cancelled."""

    index: int
    job: Job | None = None
    left: bool = False


class Replicas(Tap):
    """A `Servable` over equal ones, which count in one `ModelStats`. Those of a sequence all go to one of them."""

    retired: bool = False

    def __init__(self, models: Sequence[Front]) -> None:
        super().__init__(models[0])
        self.models = tuple(models)
        self.device = ", ".join(model.device for model in models)
        self._under_way = [0] * len(models)
        self._held: dict[Job, Held] = {}
        self._first = 0

    @property
    def lost(self) -> str:
        return next(filter(None, (model.lost for model in self.models)), "")

    @property
    def queued(self) -> int:
        return sum(model.queued for model in self.models)

    def check_room(self, nbytes: int) -> None:
        self.models[self._idlest()].check_room(nbytes)

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        if request.correlation is None:
            held = Held(self._idlest())
            self._first = held.index + 1
        else:
            held = Held(zlib.crc32(str(request.correlation.id).encode()) % len(self.models))

        def answered(result: Arrays | Exception, batch: Batch | None) -> None:
            self._leave(held)
            done(result, batch)

        self._under_way[held.index] += 1
        try:
            job = held.job = self.models[held.index].submit(request, nbytes, answered)
        except BaseException:
            self._leave(held)
            raise
        if not held.left:
            self._held[job] = held
        return job

    def cancel(self, job: Job) -> None:
        if (held := self._held.get(job)) is not None:
            self._leave(held)
            self.models[held.index].cancel(job)

    def expire(self) -> None:
        for model in self.models:
            model.expire()

    def drain(self) -> None:
        for model in self.models:
            model.drain()

    def join(self, timeout: float | None = None) -> bool:
        until = None if timeout is None else time.monotonic() + timeout
        return all(model.join(None if until is None else max(until - time.monotonic(), 0.0)) for model in self.models)

    def give_up(self, error: Exception) -> None:
        for model in self.models:
            model.give_up(error)

    def close(self, timeout: float | None = None) -> None:
        for model in self.models:
            model.close(timeout)

    def _idlest(self) -> int:
        """Those that have as much to do take turns."""
        count = len(self.models)
        return min(range(count), key=lambda i: (self._under_way[i], (i - self._first) % count))

    def _leave(self, held: Held) -> None:
        if held.left:
            return
        held.left = True
        self._under_way[held.index] -= 1
        if held.job is not None:
            self._held.pop(held.job, None)
        held.job = None  # which leads here
