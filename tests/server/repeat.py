"""A decoupled model for tests: what `grpc_stream_cases` calls `repeat`."""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np

from infera_server.errors import BadRequest
from infera_server.models.servable import Servable
from infera_server.models.taps import Tap
from infera_server.models.traffic import Traffic
from infera_server.requests import Request, check_each
from infera_server.scheduling.jobs import Done, Job, State, answer
from infera_server.scheduling.rows import Arrays
from infera_server.scheduling.signature import Signature, Tensor
from tests.server.support import FakeSession, Running, spec


def repeat_session() -> FakeSession:
    """What is behind it runs nothing."""
    return FakeSession(
        {"IN": spec(1, dtype=np.int32)}, {"OUT": spec(1, dtype=np.int32)}, lambda feeds: {"OUT": feeds["IN"]}
    )


class Repeat(Tap):
    """Answers a request as often as it has elements, one in each turn of the event loop.

    Requests whose id is `held` wait before the answer of this place.
    """

    retired = False

    def __init__(self, model: Servable) -> None:
        super().__init__(model)
        int32, uint32 = np.dtype(np.int32), np.dtype(np.uint32)
        inputs = [Tensor("IN", "INT32", int32, (-1,)), Tensor("FAIL", "INT32", int32, (1,), optional=True)]
        outputs = [Tensor("OUT", "INT32", int32, (1,)), Tensor("IDX", "UINT32", uint32, (1,))]
        own = model.signature
        self.signature = Signature(
            own.name, own.version, {t.name: t for t in inputs}, {t.name: t for t in outputs}, None, decoupled=True
        )
        self.cancelled: list[Job] = []
        self.asked = ""
        self.held: dict[str, int] = {}

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        check_each(request, self.signature)
        self.asked = request.id
        job = Job(request.feeds, done)
        self._later(job, request, 0)
        return job

    def cancel(self, job: Job) -> None:
        job.state = State.CANCELLED
        self.cancelled.append(job)

    def _later(self, job: Job, request: Request, index: int) -> None:
        asyncio.get_running_loop().call_soon(partial(self._next, job, request, index))

    def _next(self, job: Job, request: Request, index: int) -> None:
        if job.state is not State.WAITING:
            return
        values, failing = request.feeds["IN"], request.feeds.get("FAIL")
        if failing is not None and failing[0] == index:
            answer(job, BadRequest("it failed"))
        elif index == len(values):
            answer(job, {})
        elif self.held.get(request.id) == index:
            self._later(job, request, index)
        else:
            assert request.each is not None
            request.each(_outputs(values[index], index), None, job)
            self._later(job, request, index + 1)


def _outputs(value: int, index: int) -> Arrays:
    return {"OUT": np.array([value], np.int32), "IDX": np.array([index], np.uint32)}


def publish_repeat(running: Running, name: str = "repeat") -> Repeat:
    """Put it before the model of this name, of `repeat_session`."""
    made = Repeat(running.model(name))
    running.loop.call_soon_threadsafe(running.host.repository.serving.publish, name, {"1": made}, Traffic())
    running.call(asyncio.sleep(0))
    return made
