"""The versions of a model behind one name: requests are spread over them, and copied to a shadow."""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from infera_server.errors import RequestError
from infera_server.models.golden import differing
from infera_server.models.servable import Servable
from infera_server.models.taps import Tap
from infera_server.requests import Request
from infera_server.scheduling.jobs import Batch, Done, Job
from infera_server.scheduling.rows import Arrays

log = logging.getLogger(__name__)

MAX_COMPARED = 4
"""Replies of a shadow that wait to be compared at a time; further copies are not made meanwhile."""


class Route(Tap):
    """Several versions with equal tensors, each with a weight. The first stands for all until one is chosen.

    Requests of one id, or of one sequence, always go to the same version; those without are spread at random.
    """

    def __init__(self, models: Sequence[Servable], weights: Sequence[float], seed: int = 0) -> None:
        super().__init__(models[0])
        self.models, self.weights = models, weights
        self._bounds = [bound / sum(weights) for bound in accumulate(weights)]
        self._random = random.Random(seed)

    @property
    def targets(self) -> Sequence[Servable]:
        return self.models

    @property
    def retired(self) -> bool:
        return any(model.retired for model in self.models)

    def choose(self, request: Request) -> Servable:
        """The version that answers a request."""
        key = request.id if request.correlation is None else str(request.correlation.id)
        place = zlib.crc32(key.encode()) / 2**32 if key else self._random.random()
        return self.models[min(bisect_right(self._bounds, place), len(self.models) - 1)]

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        """For who does not ask `chosen`: the reply then names the first version, whichever answers."""
        return self.choose(request).submit(request, nbytes, done)

    def cancel(self, job: Job) -> None:
        for model in self.models:
            model.cancel(job)


def chosen(model: Servable, request: Request) -> Servable:
    """Which version answers a request to `model`: to be asked before `submit`, and to be named in the reply."""
    return model.choose(request) if isinstance(model, Route) else model


class Shadowed(Tap):
    """A model, copies of some of whose requests go to another, whose replies are compared and thrown away.

    A copy is made only while neither has requests waiting, and of inputs that no client can change meanwhile; it never
    fails or delays a reply, but by taking its turn on the device.
    """

    def __init__(self, model: Servable, shadow: Servable, share: float, tolerance: float, seed: int = 0) -> None:
        super().__init__(model)
        self.shadow = shadow
        self.counts = {"sent": 0, "dropped": 0, "equal": 0, "different": 0, "failed": 0}
        self.last_difference = ""
        self._share, self._tolerance = share, tolerance
        self._random = random.Random(seed)
        self._comparing = 0

    @property
    def targets(self) -> Sequence[Servable]:
        return (self.model, self.shadow)

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        if self._random.random() >= self._share or request.correlation is not None or request.each is not None:
            return self.model.submit(request, nbytes, done)
        busy = self.model.queued or self.shadow.queued or self.shadow.retired or self._comparing >= MAX_COMPARED
        if busy or request.lies_with_client:
            self.counts["dropped"] += 1
            return self.model.submit(request, nbytes, done)
        replies: list[Arrays | None] = [None, None]

        def answered(result: Arrays | Exception, batch: Batch | None) -> None:
            done(result, batch)
            self._reply(replies, 0, result)

        job = self.model.submit(request, nbytes, answered)
        try:
            self.shadow.submit(request, nbytes, lambda result, batch: self._reply(replies, 1, result))
            self.counts["sent"] += 1
        except RequestError:
            self.counts["dropped"] += 1
        return job

    def _reply(self, replies: list[Arrays | None], place: int, result: Arrays | Exception) -> None:
        if isinstance(result, Exception):
            self.counts["failed"] += place
            return
        replies[place] = result
        first, second = replies
        if first is not None and second is not None:
            self._comparing += 1
            loop = asyncio.get_running_loop()
            compared = loop.run_in_executor(None, differing, second, first, self._tolerance)
            compared.add_done_callback(self._compared)

    def _compared(self, found: asyncio.Future[str]) -> None:
        self._comparing -= 1
        if found.cancelled() or found.exception() is not None:
            self.counts["failed"] += 1
        elif difference := found.result():
            self.counts["different"] += 1
            self.last_difference = difference
        else:
            self.counts["equal"] += 1

    def as_dict(self) -> dict[str, Any]:
        """What came of the copies."""
        return {**self.counts, "last_difference": self.last_difference}
