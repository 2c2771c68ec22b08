"""What an inference request is answered with on its connection: a reply or a refusal.

What is long to write is written in another thread: text of large tensors, and what is compressed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from infera_server import codec
from infera_server.codec import Buffer
from infera_server.errors import RequestError, Unauthorized, request_error, retry_after
from infera_server.http import coding
from infera_server.http.connection import Connection
from infera_server.http.exchange import INLINE_BYTES, Exchange
from infera_server.models.servable import Servable
from infera_server.models.versions import chosen
from infera_server.protocols import v2_rest
from infera_server.requests import Request
from infera_server.scheduling.explanation import HEADER, explain
from infera_server.scheduling.jobs import Batch
from infera_server.scheduling.rows import Arrays
from infera_server.scheduling.signature import Signature
from infera_server.shared_memory import Regions

log = logging.getLogger(__name__)

LINGER_SECONDS = 2.0
"""How long a refused upload is read and thrown away, so that the client sees the refusal and not a reset."""

JOIN_BYTES = 1 << 16
"""Replies up to this size are written in one piece."""

TRACE = HEADER.encode()

Written: TypeAlias = tuple[list[bytes], list[Buffer]]
"""Fields that say what a body is, and the body."""


def written(request: Request, outputs: Arrays, model: Signature, regions: Regions, accept: bytes) -> Written:
    """The reply for a client that accepts these codings. Raises RequestError; may run in any thread."""
    head, tail = v2_rest.respond(request, outputs, model, regions)
    body: list[Buffer] = [head, *tail]
    if tail:
        fields = [b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n" % len(head)]
    else:
        fields = [b"content-type: application/json\r\n"]
    if accept and (name := coding.preferred(accept)):
        body = [coding.compress(body, name)]
        fields.append(b"content-encoding: %s\r\nvary: accept-encoding\r\n" % name.encode())
    return fields, body


def takes_long(request: Request, outputs: Arrays, accept: bytes) -> bool:
    """Whether the event loop would stand still for longer than a millisecond or two while a reply is written."""
    size = 0
    for array in outputs.values():
        size += array.nbytes if not array.dtype.hasobject else codec.text_bytes(array)
    if size <= INLINE_BYTES:
        return False
    if accept and coding.preferred(accept):
        return True
    return not all(want.binary and not outputs[want.name].dtype.hasobject for want in request.outputs)


class Replying(Connection):
    """A connection that gives requests to their models and answers them. One `active` at a time has its turn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.active: Exchange | None = None
        self.held: Exchange | None = None
        """What waits for the client to read."""

        self.lingering = False
        self._headers: list[tuple[bytes, bytes]] = []
        """Those of every reply, as `_common` has them; uvicorn makes new ones every second."""

        self._common = b""

    def _send(self, exchange: Exchange, model: Servable, request: Request, nbytes: int) -> None:
        exchange.request = request
        exchange.trace = request.trace = exchange.trace or request.trace
        if exchange.key is not None:
            request.claim(exchange.key.name)
        exchange.let_go(self.service.intake)
        model = exchange.model = chosen(model, request)
        exchange.job = model.submit(request, nbytes, lambda result, batch: self._done(exchange, result, batch))

    def _done(self, exchange: Exchange, result: Arrays | Exception, batch: Batch | None) -> None:
        model, request = exchange.model, exchange.request
        assert model is not None
        assert request is not None
        if log.isEnabledFor(logging.DEBUG):
            error = result if isinstance(result, RequestError) else None
            log.debug("%s: %s", model.signature.name, explain(batch, exchange.job, error))
        if self.service.tracing.on and exchange.job is not None:
            self.service.tracing.record(model.signature, request.id, exchange.started_at, exchange.job, batch)
        if isinstance(result, Exception):
            self._refuse(exchange, request_error(result, model.signature.name))
            return
        explained = explain(batch, exchange.job) if request.trace else ""
        arguments = request, result, model.signature, self.service.regions, exchange.accept
        if not takes_long(request, result, exchange.accept):
            self._write(exchange, explained, written, *arguments)
            return
        exchange.job = None  # it has ended, and cannot be cancelled
        made = self.loop.run_in_executor(None, written, *arguments)
        made.add_done_callback(partial(self._made, exchange, explained))

    def _made(self, exchange: Exchange, explained: str, made: asyncio.Future[Written]) -> None:
        """A reply was written in another thread, or could not be."""
        if not made.cancelled():
            self._write(exchange, explained, made.result)

    def _write(self, exchange: Exchange, explained: str, write: Callable[..., Written], *arguments: Any) -> None:
        """Send what `write` makes of the arguments."""
        try:
            fields, body = write(*arguments)
        except Exception as error:
            self._fail(exchange, error)
            return
        if explained:
            fields.append(b"%s: %s\r\n" % (TRACE, explained.encode()))
        self._reply(exchange, 200, fields, body)

    def _refuse(self, exchange: Exchange, error: RequestError) -> None:
        fields = [b"content-type: application/json\r\n"]
        if isinstance(error, Unauthorized):
            fields.append(b"www-authenticate: Bearer\r\n")
        if (seconds := retry_after(error)) is not None:
            fields.append(b"retry-after: %d\r\n" % seconds)
        if exchange.trace or error.trace:
            fields.append(b"%s: %s\r\n" % (TRACE, explain(None, None, error).encode()))
        if exchange.model is not None and error.reason:
            exchange.model.stats.refused[error.reason] += 1
        if self.service.draining:
            exchange.keep_alive = False  # a connection that is closed at the end could have a request under way
        model = exchange.model
        sent = self._reply(exchange, error.status, fields, [v2_rest.error_body(str(error))])
        if sent and exchange.is_refused_again and model is not None and exchange.keep_alive and not exchange.trace:
            refusals, now = self.service.refusals, self.waiting_since
            refusals.keep(exchange.target, model, exchange.size, now, self._headers, sent)

    def _reply(self, exchange: Exchange, status: int, fields: list[bytes], body: list[Buffer]) -> bytes:
        """Write a reply. Returns it where it was written in one piece."""
        self.active = exchange.job = exchange.request = None  # an idle connection keeps its last exchange
        exchange.refusal = None  # whose traceback leads to the exchange: nothing of it would be freed
        if exchange.held or exchange.body:
            exchange.let_go(self.service.intake)
        if exchange.response_complete or self.transport.is_closing():
            return b""
        exchange.response_complete = True
        size = sum(map(len, body))
        if self._headers is not self.server_state.default_headers:
            self._headers = self.server_state.default_headers
            self._common = b"".join([b"%s: %s\r\n" % header for header in self._headers])
        end = b"\r\n" if exchange.keep_alive else b"connection: close\r\n\r\n"
        head = [STATUS_LINE[status], self._common, *fields, b"content-length: %d\r\n" % size, end]
        joined = b"".join([*head, *body]) if size <= JOIN_BYTES else b""
        try:
            if joined:
                self.transport.write(joined)
            else:
                parts = (part for part in body if len(part))  # asyncio's transports never get rid of an empty one
                self.transport.writelines([b"".join(head), *parts])
        except RuntimeError:  # of uvloop: its client has reset it, which `connection_lost` has yet to say
            return b""
        if exchange.model is not None:
            exchange.model.stats.replied(status, time.monotonic() - exchange.started_at)
            exchange.model = None  # an idle connection must not keep a model that is unloaded
        if not exchange.keep_alive:
            self._let_go()
            self._hang_up(exchange.received)
        self.on_response_complete()
        return joined

    def _hang_up(self, received: bool) -> None:
        """Close; after a reply to a request that is not all `received` only once the client has stopped sending, or
        soon anyway.
        """
        if received or self.ended or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.lingering = self.deaf = True
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _fail(self, exchange: Exchange, error: Exception) -> None:
        """Answer what was raised while the request was read or its reply written."""
        self._refuse(exchange, request_error(error, exchange.model.signature.name if exchange.model else ""))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.lingering:
            self._unset_keepalive_if_required()

    def _let_go(self) -> None:
        """Forget the requests that wait."""
        for cycle in (self.cycle, self.held, *(cycle for cycle, _ in self.pipeline)):
            if isinstance(cycle, Exchange):
                cycle.let_go(self.service.intake)
        self.pipeline.clear()
