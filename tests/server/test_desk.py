"""The engine's and a worker's end of the shared memory, both in this process: what is sent is what arrives."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from infera_server.errors import BadRequest, Expired, Overloaded, RequestError, Unavailable
from infera_server.metrics import ModelStats
from infera_server.models.modelconfig import new
from infera_server.processes.arena import Blocks, Lent
from infera_server.processes.bulletin import Numbers
from infera_server.processes.desk import Desk
from infera_server.processes.front_wire import signature_in, signature_out
from infera_server.processes.remote import Link, RemoteModel
from infera_server.processes.ring import Reader, Signs, Writer, ring_fds
from infera_server.processes.segment import shared_file
from infera_server.requests import Correlation, Output, Request
from infera_server.scheduling.jobs import Batch, Done, Job, State, answer
from infera_server.scheduling.rows import Arrays, Layout
from infera_server.scheduling.signature import Signature, tensors
from tests.server.support import spec

X = np.arange(4, dtype=np.float32).reshape(1, 4)
SIGNATURE = Signature(
    "m", "3", tensors({"x": spec("N", 4)}), tensors({"y": spec("N", 4)}), Layout({"x": 0}, {"y": 0}, (1, 2, 4))
)


@dataclass(eq=False)
class Engine:
    """A `Servable` that keeps what it is asked, or refuses it."""

    refusal: RequestError | None = None
    asked: list[tuple[Request, Job]] = field(default_factory=list)
    cancelled: list[Job] = field(default_factory=list)
    signature: Signature = SIGNATURE
    device: str = "cpu"
    stats: ModelStats = field(default_factory=ModelStats)
    config: Any = field(default_factory=new)

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((request, Job(request.feeds, done, nbytes=nbytes)))
        return self.asked[-1][1]

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job)


@dataclass(eq=False)
class Both:
    """The two ends. `replies` has what the worker's requests were answered with."""

    link: Link
    desk: Desk
    model: RemoteModel
    engine: Engine
    full: Signs
    replies: list[tuple[Arrays | Exception, Batch | None]] = field(default_factory=list)

    def ask(self, feeds: Arrays | None = None, **more: Any) -> Job:
        request = Request("id", dict(feeds or {"x": X}), [Output("y", True)], **more)
        return self.model.submit(request, 16, lambda result, batch: self.replies.append((result, batch)))

    async def exchange(self) -> None:
        """Let everything through that is on its way."""
        for _ in range(10):
            await asyncio.sleep(0.001)
            self.link.flush()  # as both do now and then
            self.desk.flush()

    async def answered(self) -> tuple[Arrays | Exception, Batch | None]:
        await self.exchange()
        (reply,) = self.replies
        self.replies.clear()
        return reply


def run(work: Callable[[Both], Coroutine[Any, Any, None]], result_bytes: int = 1 << 20) -> None:
    """Do something with both ends in an event loop."""

    async def main() -> None:
        engine, numbers = Engine(), Numbers()
        number, _ = numbers.of(engine)  # type: ignore[arg-type]  # it is asked no more than it has
        files = shared_file("requests"), shared_file("results"), Signs.create("full")
        inbox, outbox = ring_fds("in", 64), ring_fds("out", 64)
        full = Signs(files[2])
        desk = Desk(
            numbers.models, full, Lent(files[0]), Blocks(files[1], result_bytes), Reader(*inbox), Writer(*outbox)
        )
        requests, results = Blocks(os.dup(files[0]), 1 << 20), Lent(os.dup(files[1]))
        ends = Writer(*map(os.dup, inbox)), Reader(*map(os.dup, outbox))
        link = Link(full, requests, results, *ends)
        told = {"signature": signature_out(SIGNATURE), "config": "", "device": "cpu"}
        both = Both(link, desk, RemoteModel(number, told, link), engine, full)
        desk.open()
        link.attach()
        await work(both)
        await both.exchange()
        assert requests.taken == 0, "memory of requests is kept"
        desk.close()
        asyncio.get_running_loop().remove_reader(ends[1].event)
        for end in (requests, results, *ends):
            end.close()
        os.close(files[2])

    asyncio.run(main())


def test_a_signature_is_told() -> None:
    assert signature_in(signature_out(SIGNATURE)) == SIGNATURE


def test_a_request_arrives_with_all_that_a_model_goes_by() -> None:
    async def work(both: Both) -> None:
        both.ask(timeout=5.0, priority=2, correlation=Correlation("s", True, False), parameters={"a": 1})
        await both.exchange()
        (request, job), *_ = both.engine.asked
        assert (request.id, request.priority, request.parameters) == ("id", 2, {"a": 1})
        assert request.correlation == Correlation("s", True, False)
        assert request.timeout is not None
        assert 4.5 < request.timeout < 5.0
        assert np.array_equal(request.feeds["x"], X)
        assert request.feeds["x"].flags.aligned
        both.engine.asked.clear()
        del request
        answer(job, {"y": X * 2, "unasked": X})
        del job
        result, batch = await both.answered()
        assert isinstance(result, dict)
        assert list(result) == ["y"]
        assert np.array_equal(result["y"], X * 2)
        assert batch is None

    run(work)


def test_a_run_is_explained_where_somebody_asks() -> None:
    async def work(both: Both) -> None:
        job = both.ask(trace=True)
        await both.exchange()
        ((_, theirs),) = both.engine.asked
        theirs.queued_at, theirs.came_at = 7.0, 6.0
        answer(theirs, {"y": X}, Batch([theirs, theirs], 3, 4, 8.0, 8.5, 9.0, 9.5, behind="other", most=64))
        both.engine.asked.clear()
        del theirs
        _, batch = await both.answered()
        assert batch is not None
        assert (len(batch.jobs), batch.rows, batch.padded, batch.ran_at, batch.behind, batch.most) == (
            2, 3, 4, 9.0, "other", 64,
        )  # fmt: skip
        assert (job.queued_at, job.came_at) == (7.0, 6.0)

    run(work)


def test_refusals_come_as_what_they_are() -> None:
    async def work(both: Both) -> None:
        for error in (BadRequest("no"), Overloaded("late", 3.0, "slo"), Unavailable("gone")):
            both.engine.refusal = error
            both.ask()
            got, _ = await both.answered()
            error.__traceback__ = None  # which leads to the tensors
            assert type(got) is type(error)
            assert (str(got), vars(got)) == (str(error), vars(error))

    run(work)


def test_while_a_queue_is_full_workers_refuse_for_themselves() -> None:
    async def work(both: Both) -> None:
        both.ask()
        await both.exchange()
        both.engine.refusal = Overloaded("256 wait", 0.5)
        both.model.check_room(16)
        both.ask()
        await both.answered()
        both.engine.refusal.__traceback__ = None
        with pytest.raises(Overloaded, match="256 wait") as caught:
            both.model.check_room(16)
        assert caught.value.retry_after == 0.5
        del caught  # it leads to this frame
        ((_, job),) = both.engine.asked
        both.engine.asked.clear()
        answer(job, {"y": X})
        del job
        both.model.check_room(16)
        await both.answered()

    run(work)


def test_who_leaves_is_cancelled_and_not_answered() -> None:
    async def work(both: Both) -> None:
        first, second = both.ask(), both.ask()
        await both.exchange()
        both.model.cancel(first)
        await both.exchange()
        assert first.state is State.CANCELLED
        (_, one), (_, two) = both.engine.asked
        assert both.engine.cancelled == [one]
        answer(one, {"y": X})
        answer(two, {"y": X})
        both.model.cancel(second)
        await both.exchange()
        assert both.replies == []
        assert both.model.queued == 0
        both.engine.asked.clear()
        both.engine.cancelled.clear()

    run(work)


def test_a_response_that_finds_no_memory_is_an_answer_too() -> None:
    async def work(both: Both) -> None:
        both.ask()
        await both.exchange()
        ((_, job),) = both.engine.asked
        both.engine.asked.clear()
        answer(job, {"y": np.zeros((4096, 4), np.float32)})
        del job
        result, _ = await both.answered()
        assert isinstance(result, Unavailable)
        assert "no shared memory" in str(result)

    run(work, result_bytes=1 << 12)


def test_when_the_worker_is_gone_its_requests_are_cancelled() -> None:
    async def work(both: Both) -> None:
        both.ask()
        await both.exchange()
        both.desk.close()
        ((_, job),) = both.engine.asked
        assert both.engine.cancelled == [job]
        answer(job, {"y": X})
        await both.exchange()
        assert both.replies == []

    with pytest.raises((AssertionError, OSError)):  # nobody gives the memory back, and the desk is closed once more
        run(work)


def test_when_the_engine_is_gone_everything_is_refused() -> None:
    async def work(both: Both) -> None:
        both.ask()
        both.model.drain()
        assert not both.model.join(0)
        both.link.fail(Unavailable("the engine is gone"))
        assert [str(result) for result, _ in both.replies] == ["the engine is gone"]
        assert both.model.join(0)
        with pytest.raises(Unavailable):
            both.model.check_room(0)
        with pytest.raises(Unavailable):
            both.ask()
        await both.exchange()
        answer(both.engine.asked.pop()[1], {"y": X})

    run(work)


def test_an_engine_that_does_not_answer_is_not_waited_for() -> None:
    async def work(both: Both) -> None:
        both.ask()
        both.model.expire()
        await both.exchange()
        assert both.replies == []
        both.link.patience = 0.0
        both.model.expire()
        result, _ = await both.answered()
        assert isinstance(result, Expired)
        ((_, job),) = both.engine.asked
        assert both.engine.cancelled == [job]
        answer(job, {"y": X})
        both.engine.asked.clear()
        both.engine.cancelled.clear()

    run(work)


def test_a_deadline_that_has_passed_on_the_way_is_one() -> None:
    async def work(both: Both) -> None:
        both.ask(timeout=1e-6)
        time.sleep(0.001)
        await both.exchange()
        ((request, _),) = both.engine.asked
        assert request.timeout is not None
        assert 0 < request.timeout < 1e-3
        answer(both.engine.asked.pop()[1], {"y": X})

    run(work)
