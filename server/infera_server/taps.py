"""What stands before a model to look at its requests: it takes them in the model's place and delegates the rest."""

from __future__ import annotations

from infera_server.jobs import Done, Job
from infera_server.requests import Request
from infera_server.servable import Servable


class Tap:
    """A `Servable` that passes everything on to another."""

    def __init__(self, model: Servable) -> None:
        self.model = model
        self.signature, self.config, self.stats, self.device = model.signature, model.config, model.stats, model.device
        self.check_room, self.expire = model.check_room, model.expire
        self.drain, self.join, self.give_up, self.close = model.drain, model.join, model.give_up, model.close

    @property
    def lost(self) -> str:
        return self.model.lost

    @property
    def queued(self) -> int:
        return self.model.queued

    @property
    def retired(self) -> bool:
        return self.model.retired

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        return self.model.submit(request, nbytes, done)

    def cancel(self, job: Job) -> None:
        self.model.cancel(job)
