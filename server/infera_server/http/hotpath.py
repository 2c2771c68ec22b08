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
from contextlib import suppress
from typing import Any

from infera_server.errors import RequestError, TooLarge
from infera_server.http import coding
from infera_server.http.connection import CONTINUE
from infera_server.http.cycle import Ending, expecting
from infera_server.http.exchange import INLINE_BYTES, INLINE_CODED_BYTES, Exchange, again, decode, infer_target, keep
from infera_server.http.gate import CREDENTIALS, credentials
from infera_server.http.recall import Head
from infera_server.http.recalling import Recalling
from infera_server.http.replying import TRACE
from infera_server.http.upload import LARGE, Upload
from infera_server.models.servable import Servable
from infera_server.protocols import v2_rest
from infera_server.requests import Request, check_again
from infera_server.scheduling.explanation import is_asked

log = logging.getLogger(__name__)

_FIELDS = CREDENTIALS | {
    b"content-length", b"content-encoding", b"accept-encoding", b"inference-header-content-length", TRACE
}  # fmt: skip


class HotPathProtocol(Recalling):
    """`uvicorn.Config(http=HotPathProtocol)`. The lifespan's state must hold the Service as "service"."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asgi: Any = None
        """The last ASGI cycle that was begun: others may have been received since."""

        self.upload: Upload | None = None
        """What receives the body of `cycle`."""

    # --- receiving -------------------------------------------------------------------------------------------------

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
        if not exchange.turn or exchange.refusal is not None or exchange.response_complete:  # refused at once
            return
        if (size := self._announced()) >= LARGE:
            first = int(size * self.service.room_share)
            self.upload = Upload(self, size, exchange.header or 0, self.service.room, first)

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
        exchange.trace = is_asked(fields.get(TRACE))
        size = int(fields.get(b"content-length", b"0"))
        if size > self.max_body:
            exchange.keep_alive = False
            with suppress(RequestError):  # for whom it is counted
                exchange.model = self.service.repository.get(*target)
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
            cycle.transport = Ending(self.transport, self._end)
            super()._start_asgi_task(cycle, expecting(app, cycle) if cycle.waiting_for_100_continue else app)
        elif self.flow.write_paused:
            self.held = cycle
        else:
            self.loop.call_soon(self._begin, cycle)  # not a call: a long pipeline would nest as deep

    def _end(self) -> None:
        """The ASGI cycle at work closes the connection: it has answered, or cannot."""
        if self.asgi.response_complete:
            self._let_go()
            self._hang_up(not self.asgi.more_body)
        else:
            self.transport.close()

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
                self._fail(exchange, error)

    def _submit(self, exchange: Exchange) -> None:
        model, parts = exchange.model, exchange.body
        assert model is not None
        if model.retired:
            model = exchange.model = self.service.model(*exchange.target)
        self.active, settings = exchange, self.service.settings
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if (request := again(exchange, model, body, self.service.templates, settings.max_json_bytes)) is not None:
            self._send(exchange, model, request, len(body))
            return
        coded = exchange.coding is not None
        if coded and len(body) <= INLINE_CODED_BYTES:
            body = exchange.opened(body, min(INLINE_BYTES, settings.max_body_bytes))
        arguments = body, exchange, model, settings, self.service.regions_for(exchange.key)
        if exchange.coding is None and len(body) <= INLINE_BYTES:
            request, nbytes = decode(*arguments)
            if not coded:
                keep(exchange, model, body, request, self.service.templates)
            self._send(exchange, model, request, nbytes)
        else:
            exchange.body = []
            del parts, body
            decoded = self.loop.run_in_executor(None, decode, *arguments)
            decoded.add_done_callback(lambda found: self._decoded(exchange, model, found))

    def _decoded(self, exchange: Exchange, model: Servable, found: asyncio.Future[tuple[Request, int]]) -> None:
        """A large body was read in another thread, or could not be; the client may have left meanwhile."""
        if found.cancelled() or self.active is not exchange:
            exchange.let_go(self.service.intake)
            return
        try:
            request, nbytes = found.result()
            exchange.trace = exchange.trace or request.trace
            if model.retired:
                model = exchange.model = self.service.model(*exchange.target)
                check_again(request, model.signature)
            self._send(exchange, model, request, nbytes)
        except Exception as error:
            self._fail(exchange, error)

    def _is_amid_events(self) -> bool:
        cycle = self.asgi
        begun = cycle is not None and cycle.response_started and not cycle.response_complete
        return begun and bool(cycle.chunked_encoding)

    def _can_probe(self) -> bool:
        cycle = self.asgi
        if cycle is None or cycle.response_complete:
            return self.active is not None and self.active.is_1_1
        scope = cycle.scope  # what is only looked up is answered before long
        return not cycle.response_started and scope["http_version"] == "1.1" and scope["method"] == "POST"

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.held is not None:
            held, self.held = self.held, None
            self._begin(held)

    # --- leaving ---------------------------------------------------------------------------------------------------

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
