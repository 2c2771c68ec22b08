"""What stands before a model: it takes requests in the model's place and delegates the rest."""

from __future__ import annotations

from collections.abc import Sequence

from infera_server.models.servable import Servable
from infera_server.requests import Request
from infera_server.scheduling.jobs import Done, Job


class Tap:
    """A `Servable` that passes everything on to another."""

    def __init__(self, model: Servable) -> None:
        self.model = model
        self.signature, self.config, self.stats, self.device = model.signature, model.config, model.stats, model.device

    @property
    def targets(self) -> Sequence[Servable]:
        """The models that requests may be passed on to."""
        return (self.model,)

    @property
    def lost(self) -> str:
        return self.model.lost

    @property
    def queued(self) -> int:
        return self.model.queued

    @property
    def retired(self) -> bool:
        return self.model.retired

    def check_room(self, nbytes: int) -> None:
        self.model.check_room(nbytes)

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        return self.model.submit(request, nbytes, done)

    def cancel(self, job: Job) -> None:
        self.model.cancel(job)

    def expire(self) -> None:
        self.model.expire()

    def drain(self) -> None:
        self.model.drain()

    def join(self, timeout: float | None = None) -> bool:
        return self.model.join(timeout)

    def give_up(self, error: Exception) -> None:
        self.model.give_up(error)

    def close(self, timeout: float | None = None) -> None:
        self.model.close(timeout)
