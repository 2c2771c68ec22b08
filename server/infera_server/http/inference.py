"""An inference request as a coroutine: for dialects that are not on the hot path."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from infera_server.errors import BadRequest, request_error
from infera_server.http.intake import Left
from infera_server.models.servable import Servable
from infera_server.requests import Request
from infera_server.scheduling.explanation import explain
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.rows import Arrays
from infera_server.tracing import Tracing

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True)
class Response:
    """`explained` is where its time went, empty where the request does not ask. The last one may have no outputs."""

    outputs: Arrays
    is_last: bool
    explained: str


async def infer(model: Servable, request: Request, nbytes: int, tracing: Tracing) -> Response:
    """The last response to a request that keeps `nbytes` in memory; `request.each` is called with those before it.

    Raises RequestError; cancelled, the request leaves the queue.
    """
    began = time.monotonic()
    answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

    def done(result: Arrays | Exception, batch: Batch | None) -> None:
        if answer.done():
            return
        if tracing.on:
            tracing.record(model.signature, request.id, began, job, batch)
        if isinstance(result, Exception):
            answer.set_exception(request_error(result, model.signature.name))
        else:
            answer.set_result(Response(result, True, explain(batch, job) if request.trace else ""))

    job = model.submit(request, nbytes, done)
    try:
        return await answer
    except asyncio.CancelledError:
        model.cancel(job)
        raise


async def responses(model: Servable, request: Request, nbytes: int, tracing: Tracing) -> AsyncGenerator[Response, None]:
    """Each response: one at least, of any model. Raises RequestError. Closed before the last one, it cancels."""
    if not model.signature.decoupled:
        yield await infer(model, request, nbytes, tracing)
        return
    made: deque[Response] = deque()
    some = asyncio.Event()

    def each(outputs: Arrays, batch: Batch | None, job: Job) -> None:
        made.append(Response(outputs, False, explain(batch, job) if request.trace else ""))
        some.set()

    request.each = each
    last = asyncio.ensure_future(infer(model, request, nbytes, tracing))
    last.add_done_callback(lambda _: some.set())
    try:
        while not (last.done() and not made):
            await some.wait()
            some.clear()
            while made:
                yield made.popleft()
        yield last.result()
    finally:
        last.cancel()


async def first(found: AsyncGenerator[Reply, None]) -> Reply | None:
    """The next one; None where there are no more."""
    return await anext(found, None)


async def only(found: AsyncGenerator[Reply, None]) -> Reply:
    """The only one. Raises BadRequest where there are none, or more."""
    async with aclosing(found):
        reply = await anext(found, None)
        if reply is None or await anext(found, None) is not None:
            raise BadRequest(
                "generate expects model to produce exactly 1 response, "
                "use generate stream for model that generates various number of responses"
            )
    return reply


@contextmanager
def counted_if_refused(model: Servable) -> Iterator[None]:
    """What is raised within is counted in the model's statistics as one request. Raises RequestError."""
    began = time.monotonic()
    try:
        yield
    except Left:
        raise
    except Exception as error:
        refusal = request_error(error, model.signature.name)
        model.stats.failed(refusal, time.monotonic() - began)
        raise refusal from None


async def counted(model: Servable, answer: Awaitable[Reply]) -> Reply:
    """What `answer` gives, counted in the model's statistics as one request. Raises RequestError."""
    began = time.monotonic()
    with counted_if_refused(model):
        reply = await answer
    model.stats.replied(200, time.monotonic() - began)
    return reply


async def counted_each(model: Servable, replies: AsyncGenerator[Reply, None]) -> AsyncGenerator[Reply, None]:
    """The same, counted in the model's statistics as one request. Raises RequestError.

    A client that leaves after the first reply was answered: its status has been sent.
    """
    began, is_answered = time.monotonic(), False
    async with aclosing(replies):
        try:
            with counted_if_refused(model):
                async for reply in replies:
                    is_answered = True
                    yield reply
        except (GeneratorExit, asyncio.CancelledError):
            if is_answered:
                model.stats.replied(200, time.monotonic() - began)
            raise
    model.stats.replied(200, time.monotonic() - began)
