"""Inference requests, answered before FastAPI sees them.

uvicorn's HTTP/1.1 protocol with one more kind of request: `POST /v2/models/M[/versions/V]/infer` becomes an `Exchange`
instead of an ASGI task. Everything else, and the order of pipelined requests of both kinds, stays uvicorn's.

Invariants: one exchange or ASGI cycle of a connection is at work at a time, the others wait in `pipeline` (or in `held`
while the client does not read its replies); replies leave in the order of the requests; a connection that is lost
cancels its exchange.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from infera_server.codec import Buffer
from infera_server.errors import Overloaded, RequestError, TooLarge, Unauthorized, request_error, retry_after
from infera_server.http import coding
from infera_server.http.connection import CONTINUE, Connection
from infera_server.http.exchange import INLINE_BYTES, INLINE_CODED_BYTES, Exchange, decode, infer_target
from infera_server.http.gate import CREDENTIALS, credentials
from infera_server.http.recall import Head
from infera_server.http.upload import LARGE, Upload
from infera_server.models.servable import Servable
from infera_server.models.versions import chosen
from infera_server.protocols import v2_rest
from infera_server.requests import Request, check_again
from infera_server.scheduling.explanation import HEADER, explain
from infera_server.scheduling.jobs import Batch
from infera_server.scheduling.rows import Arrays

log = logging.getLogger(__name__)

LINGER_SECONDS = 2.0
"""How long a refused upload is read and thrown away, so that the client sees the refusal and not a reset."""

JOIN_BYTES = 1 << 16
"""Replies up to this size are written in one piece."""

_TRACE = HEADER.encode()

_FIELDS = CREDENTIALS | {
    b"content-length", b"content-encoding", b"accept-encoding", b"inference-header-content-length", _TRACE
}  # fmt: skip


class HotPathProtocol(Connection):
    """`uvicorn.Config(http=HotPathProtocol)`. The lifespan's state must hold the Service as "service"."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_body = self.service.settings.max_body_bytes
        self.active: Exchange | None = None
        self.held: Exchange | None = None
        self.asgi: Any = None
        """The last ASGI cycle that was begun: others may have been received since."""

        self.lingering = False
        self.upload: Upload | None = None
        """What receives the body of `cycle`."""

    # --- receiving -------------------------------------------------------------------------------------------------

    def recall(self, data: bytes) -> bool:
        """Take a request whose head came before, with all of its body. Returns whether `data` is one, and no more."""
        if not self.is_idle or self.flow.write_paused or self.lingering or self.transport.is_closing():
            return False
        if self.only_metrics:
            return False
        found = self.service.heads.find(data)
        if found is None:
            return False
        head, start = found
        if head.size > self.max_body:
            return False
        self.cycle = exchange = Exchange(keep_alive=True, expects_continue=False)
        exchange.received = exchange.turn = True
        exchange.known, exchange.target = head, head.target
        exchange.coding, exchange.accept, exchange.header = head.coding, head.accept, head.header
        exchange.trace, exchange.key = head.trace, head.key
        exchange.body, exchange.size = [data[start:]], head.size
        self.waiting_since = exchange.started_at
        try:
            if head.key is not None:
                head.key.spend(exchange.started_at)
            exchange.model = self.service.model(*head.target)
            exchange.model.check_room(head.size)
        except RequestError as error:
            exchange.refusal = error
        self._proceed(exchange)
        return True

    def on_headers_complete(self) -> None:
        self.in_head = False
        if self.is_over or self.parser.should_upgrade():
            return
        self.in_body = True
        fresh, self.fresh = self.fresh, b""
        try:
            self.check_message()
        except RequestError as error:
            self.in_body = False
            self.refuse_rest(error)
            return
        target = infer_target(self.url) if self.parser.get_method() == b"POST" and not self.only_metrics else None
        if target is None:
            super().on_headers_complete()
            return
        http_1_1 = self.parser.get_http_version() != "1.0"
        exchange = Exchange(
            http_1_1 and self.parser.should_keep_alive(), http_1_1 and self.expect_100_continue, http_1_1
        )
        try:
            self._admit(exchange, target, {n: v for n, v in self.headers if n in _FIELDS}, fresh)
        except RequestError as error:
            exchange.refusal = error
        self._enqueue(exchange)
        if exchange.turn and exchange.refusal is None and (size := self._announced()) >= LARGE:
            self.upload = Upload(self, size, exchange.header or 0, self.service.room)

    def _announced(self) -> int:
        """The bytes of the body that is about to come; 0 where its head does not tell."""
        return next((int(value) for name, value in self.headers if name == b"content-length"), 0)

    def _admit(
        self, exchange: Exchange, target: tuple[str, str | None], fields: dict[bytes, bytes], fresh: bytes
    ) -> None:
        """What the headers alone decide; `fresh` begins with them, if they came in one piece. Raises RequestError."""
        access = self.service.access
        if not access.is_open:
            exchange.key = access.admit(credentials(fields), target[0], exchange.started_at)
        exchange.accept = fields.get(b"accept-encoding", b"")
        exchange.trace = fields.get(_TRACE) == b"1"
        size = int(fields.get(b"content-length", b"0"))
        if size > self.max_body:
            exchange.keep_alive = False
            raise TooLarge(f"the request body has {size:,} bytes, at most {self.max_body:,} are accepted")
        exchange.target = target
        exchange.model = self.service.model(*target)
        exchange.model.check_room(size)
        self.service.intake.check(size)
        exchange.coding = coding.coding_of(fields.get(b"content-encoding", b""))
        if b"inference-header-content-length" in fields:
            exchange.header = v2_rest.header_length(fields[b"inference-header-content-length"])
        if fresh and b"content-length" in fields and exchange.keep_alive and not exchange.expects_continue:
            head = Head(target, size, exchange.coding, exchange.accept, exchange.header, exchange.trace, exchange.key)
            exchange.known = self.service.heads.keep(fresh, head)

    def _enqueue(self, exchange: Exchange) -> None:
        before, self.cycle = self.cycle, exchange
        if before is not None and not before.response_complete:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]
        elif self.flow.write_paused:
            self.held = exchange
        else:
            self._begin(exchange)

    def on_body(self, body: bytes) -> None:
        exchange = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_body(body)
            return
        self.head_size = 0
        if self.is_over:
            return
        exchange.size += len(body)
        if exchange.size > self.max_body:
            exchange.refusal = TooLarge(f"the request body is over the limit of {self.max_body:,} bytes")
            exchange.keep_alive = False
            exchange.let_go(self.service.intake)
            self._proceed(exchange)
        elif exchange.refusal is None:
            try:
                exchange.hold(len(body), self.service.intake)
            except RequestError as error:
                exchange.refusal, self.upload = error, None
                exchange.let_go(self.service.intake)
                return
            if self.upload is None:
                exchange.body.append(body)
            else:
                self.upload.put(body)

    def on_message_complete(self) -> None:
        exchange = self.cycle
        if self.parser.should_upgrade():
            return
        if not isinstance(exchange, Exchange):
            super().on_message_complete()
            return
        if self.is_over:
            return
        if self.upload is not None:
            exchange.body, self.upload = [self.upload.body], None
        self._received(exchange)

    def _received(self, exchange: Exchange) -> None:
        self.in_body, self.head_size = False, 0
        exchange.received = True
        self._proceed(exchange)

    # --- large bodies ----------------------------------------------------------------------------------------------

    def all_parsed(self) -> None:
        if self.upload is not None:
            self._hand_over(self.upload)

    def _hand_over(self, protocol: asyncio.BaseProtocol) -> None:
        """Let another protocol read from the socket. (uvloop looks at what kind it is when reading begins.)"""
        self.transport.pause_reading()
        self.transport.set_protocol(protocol)
        self.transport.resume_reading()

    def body_received(self, nbytes: int) -> bool:
        exchange = self.cycle
        exchange.size += nbytes
        if self.deaf or self.lingering:
            return False
        try:
            exchange.hold(nbytes, self.service.intake)
        except RequestError as error:
            exchange.refusal, exchange.keep_alive = error, False  # its framing is lost
            self._proceed(exchange)
            return False
        return True

    def body_complete(self, body: memoryview) -> None:
        self.upload = None
        self.renew_parser()
        self._hand_over(self)
        self.cycle.body = [body]
        self._received(self.cycle)

    # --- working ---------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if not isinstance(cycle, Exchange):
            self.asgi = cycle
            if self.service.draining:
                cycle.keep_alive = False
            super()._start_asgi_task(cycle, app)
        elif self.flow.write_paused:
            self.held = cycle
        else:
            self.loop.call_soon(self._begin, cycle)  # not a call: a long pipeline would nest as deep

    def _begin(self, exchange: Exchange) -> None:
        """It is this exchange's turn."""
        if self.transport.is_closing() or self.lingering:
            exchange.let_go(self.service.intake)
            return
        exchange.turn = True
        self.waiting_since = time.monotonic()
        if exchange.expects_continue and not exchange.received:
            if exchange.refusal is not None:
                exchange.keep_alive = False  # the client may send the body or not: the framing is lost
            else:
                self.transport.write(CONTINUE)
        self._proceed(exchange)

    def _proceed(self, exchange: Exchange) -> None:
        """Go as far as turn and body allow: a refusal that closes needs no body, all else does."""
        if not exchange.turn or exchange.response_complete or exchange.job is not None:
            return
        if exchange.refusal is not None:
            if exchange.received or not exchange.keep_alive:
                self._refuse(exchange, exchange.refusal)
        elif exchange.received:
            try:
                self._submit(exchange)
            except Exception as error:
                self._refuse_unread(exchange, error)

    def _refuse_unread(self, exchange: Exchange, error: Exception) -> None:
        """Answer what was raised between a body's arrival and the queue."""
        self._refuse(exchange, request_error(error, exchange.model.signature.name if exchange.model else ""))

    def _submit(self, exchange: Exchange) -> None:
        model, parts = exchange.model, exchange.body
        assert model is not None
        if model.retired:
            model = exchange.model = self.service.model(*exchange.target)
        self.active = exchange
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if (request := self._again(exchange, model, body)) is not None:
            self._send(exchange, model, request, len(body))
            return
        arguments = body, exchange, model, self.service.settings, self.service.regions
        if len(body) <= (INLINE_BYTES if exchange.coding is None else INLINE_CODED_BYTES):
            request, nbytes = decode(*arguments)
            if exchange.coding is None:
                self._keep(exchange, model, body, request)
            self._send(exchange, model, request, nbytes)
        else:
            exchange.body = []
            del parts, body
            decoded = self.loop.run_in_executor(None, decode, *arguments)
            decoded.add_done_callback(lambda found: self._decoded(exchange, model, found))

    def _keep(self, exchange: Exchange, model: Servable, body: Buffer, request: Request) -> None:
        """Keep what will be known of the same document with other values."""
        if exchange.header is None:
            self.service.templates.keep(exchange.target, model, body, request)
        elif exchange.header and exchange.known is not None:
            exchange.known.keep(bytes(body[: exchange.header]), model, request)

    def _again(self, exchange: Exchange, model: Servable, body: Buffer) -> Request | None:
        """The request, where one with the same document came before and reading the rest takes no time."""
        if exchange.coding is not None:
            return None
        known, header = exchange.known, exchange.header
        if header is None:
            if len(body) > min(INLINE_BYTES, self.service.settings.max_json_bytes):
                return None
            return self.service.templates.find(exchange.target, model, body)
        if known is None:
            return None
        found = known.requests.get(bytes(body[:header]))
        if found is None or found[0]() is not model:
            return None
        _, request = found
        assert request.common is not None
        if len(body) - header != request.common.nbytes:
            return None
        if len(body) > INLINE_BYTES and not request.common.are_views:
            return None
        return request.again(request.common.feeds(memoryview(body)[header:]), request.id)

    def _decoded(self, exchange: Exchange, model: Servable, found: asyncio.Future[tuple[Request, int]]) -> None:
        """A large body was read in another thread, or could not be; the client may have left meanwhile."""
        if found.cancelled() or self.active is not exchange:
            exchange.let_go(self.service.intake)
            return
        try:
            request, nbytes = found.result()
            if model.retired:
                model = exchange.model = self.service.model(*exchange.target)
                check_again(request, model.signature)
            self._send(exchange, model, request, nbytes)
        except Exception as error:
            self._refuse_unread(exchange, error)

    def _send(self, exchange: Exchange, model: Servable, request: Request, nbytes: int) -> None:
        exchange.request = request
        if exchange.trace:
            request.trace = True
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
        try:
            head, tail = v2_rest.respond(request, result, model.signature, self.service.regions)
        except Exception as error:
            self._refuse(exchange, request_error(error, model.signature.name))
            return
        if tail:
            fields = [b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n" % len(head)]
        else:
            fields = [b"content-type: application/json\r\n"]
        if request.trace:
            fields.append(b"%s: %s\r\n" % (_TRACE, explain(batch, exchange.job).encode()))
        self._reply(exchange, 200, fields, [head, *tail])

    # --- replying --------------------------------------------------------------------------------------------------

    def _refuse(self, exchange: Exchange, error: RequestError) -> None:
        fields = [b"content-type: application/json\r\n"]
        if isinstance(error, Unauthorized):
            fields.append(b"www-authenticate: Bearer\r\n")
        if (seconds := retry_after(error)) is not None:
            fields.append(b"retry-after: %d\r\n" % seconds)
        if exchange.trace:
            fields.append(b"%s: %s\r\n" % (_TRACE, explain(None, None, error).encode()))
        if exchange.model is not None and error.reason:
            exchange.model.stats.refused[error.reason] += 1
        exchange.accept = b""
        if self.service.draining:
            exchange.keep_alive = False  # a connection that is closed at the end could have a request under way
        self._reply(exchange, error.status, fields, [v2_rest.error_body(str(error))])
        if isinstance(error, Overloaded) and exchange.model is not None:  # not over the rate of its key
            self.service.pace.refused()

    def _reply(self, exchange: Exchange, status: int, fields: list[bytes], body: list[Buffer]) -> None:
        self.active = exchange.job = exchange.request = None  # an idle connection keeps its last exchange
        exchange.let_go(self.service.intake)
        if exchange.response_complete or self.transport.is_closing():
            return
        exchange.response_complete = True
        if exchange.accept and (chosen := coding.preferred(exchange.accept)):
            body = [coding.compress(body, chosen)]
            fields.append(b"content-encoding: %s\r\nvary: accept-encoding\r\n" % chosen.encode())
        size = sum(map(len, body))
        head = [STATUS_LINE[status], *(b"%s: %s\r\n" % h for h in self.server_state.default_headers), *fields]
        head.append(b"content-length: %d\r\n" % size)
        head.append(b"\r\n" if exchange.keep_alive else b"connection: close\r\n\r\n")
        if size <= JOIN_BYTES:
            self.transport.write(b"".join([*head, *body]))
        else:
            self.transport.writelines([b"".join(head), *body])
        if exchange.model is not None:
            exchange.model.stats.replied(status, time.monotonic() - exchange.started_at)
            exchange.model = None  # an idle connection must not keep a model that is unloaded
        if not exchange.keep_alive:
            self._let_go()
            self._hang_up(exchange)
        self.on_response_complete()

    def _hang_up(self, exchange: Exchange) -> None:
        """Close; after a reply to half a request only once the client has stopped sending, or soon anyway."""
        if exchange.received or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.lingering = self.deaf = True
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.lingering:
            self._unset_keepalive_if_required()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.held is not None:
            held, self.held = self.held, None
            self._begin(held)

    # --- leaving ---------------------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Forget the requests that wait."""
        for cycle in (self.cycle, self.held, *(cycle for cycle, _ in self.pipeline)):
            if isinstance(cycle, Exchange):
                cycle.let_go(self.service.intake)
        self.pipeline.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_go()
        exchange, self.active, self.held, self.upload = self.active, None, None, None
        if exchange is not None and exchange.job is not None and exchange.model is not None:
            exchange.model.cancel(exchange.job)
        if isinstance(self.cycle, Exchange):
            self.cycle = None
        if self.asgi is not None and not self.asgi.response_complete:
            self.asgi.disconnected = True
            self.asgi.message_event.set()
        super().connection_lost(exc)
