"""An inference request as a coroutine: for dialects that are not on the hot path."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from infera_server.errors import request_error
from infera_server.models.servable import Servable
from infera_server.requests import Request
from infera_server.scheduling.jobs import Batch
from infera_server.scheduling.rows import Arrays
from infera_server.tracing import Tracing

Reply = TypeVar("Reply")


async def infer(model: Servable, request: Request, nbytes: int, tracing: Tracing) -> Arrays:
    """The outputs of a request that keeps `nbytes` in memory. Raises RequestError; cancelled, it leaves the queue."""
    began = time.monotonic()
    answer: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()

    def done(result: Arrays | Exception, batch: Batch | None) -> None:
        if answer.done():
            return
        if tracing.on:
            tracing.record(model.signature, request.id, began, job, batch)
        if isinstance(result, Exception):
            answer.set_exception(request_error(result, model.signature.name))
        else:
            answer.set_result(result)

    job = model.submit(request, nbytes, done)
    try:
        return await answer
    except asyncio.CancelledError:
        model.cancel(job)
        raise


async def responses(
    model: Servable, request: Request, nbytes: int, tracing: Tracing
) -> AsyncGenerator[tuple[Arrays, bool], None]:
    """The outputs of each response, with whether it is the last one, which may have none. Raises RequestError.

    Any model gives one at least. Closed before the last, it cancels the request.
    """
    if not model.signature.decoupled:
        yield await infer(model, request, nbytes, tracing), True
        return
    made: deque[Arrays] = deque()
    some = asyncio.Event()

    def each(outputs: Arrays) -> None:
        made.append(outputs)
        some.set()

    request.each = each
    last = asyncio.ensure_future(infer(model, request, nbytes, tracing))
    last.add_done_callback(lambda _: some.set())
    try:
        while not (last.done() and not made):
            await some.wait()
            some.clear()
            while made:
                yield made.popleft(), False
        yield last.result(), True
    finally:
        last.cancel()


async def counted(model: Servable, answer: Awaitable[Reply]) -> Reply:
    """What `answer` gives, counted in the model's statistics as one request. Raises RequestError."""
    began = time.monotonic()
    try:
        reply = await answer
    except Exception as error:
        refusal = request_error(error, model.signature.name)
        model.stats.failed(refusal, time.monotonic() - began)
        raise refusal from None
    model.stats.replied(200, time.monotonic() - began)
    return reply


async def counted_each(model: Servable, replies: AsyncGenerator[Reply, None]) -> AsyncGenerator[Reply, None]:
    """The same, counted in the model's statistics as one request. Raises RequestError.

    A client that leaves after the first reply was answered: its status has been sent.
    """
    began, is_answered = time.monotonic(), False
    async with aclosing(replies):
        try:
            async for reply in replies:
                is_answered = True
                yield reply
        except (GeneratorExit, asyncio.CancelledError):
            if is_answered:
                model.stats.replied(200, time.monotonic() - began)
            raise
        except Exception as error:
            refusal = request_error(error, model.signature.name)
            model.stats.failed(refusal, time.monotonic() - began)
            raise refusal from None
    model.stats.replied(200, time.monotonic() - began)
