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
import math
import time
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from infera_server import coding
from infera_server.codec import Buffer
from infera_server.errors import BadRequest, HeadTooLarge, RequestError, TooLarge, TooSlow, request_error
from infera_server.exchange import Exchange, infer_target
from infera_server.jobs import Batch
from infera_server.protocols import v2_rest
from infera_server.rows import Arrays
from infera_server.service import Service, explain

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 1 << 16
"""The most that a URL and its headers may take after the first piece that is received of them."""

LINGER_SECONDS = 2.0
"""How long a refused upload is read and thrown away, so that the client sees the refusal and not a reset."""

STALL_SECONDS = 60.0
"""How long a client may not read its replies before its connection is cut."""

JOIN_BYTES = 1 << 16
"""Replies up to this size are written in one piece."""

_FIELDS = frozenset({b"content-length", b"content-encoding", b"accept-encoding", b"inference-header-content-length"})


class HotPathProtocol(HttpToolsProtocol):
    """`uvicorn.Config(http=HotPathProtocol)`. The lifespan's state must hold the Service as "service"."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.service: Service = self.app_state["service"]
        self.max_body = self.service.settings.max_body_bytes
        self.active: Exchange | None = None
        self.held: Exchange | None = None
        self.lingering = False
        self.in_head = False
        self.head_size = 0
        self.stalled: asyncio.TimerHandle | None = None
        self.receiving: asyncio.TimerHandle | None = None

    # --- receiving -------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.lingering:
            return
        self._unset_keepalive_if_required()
        self.head_size += len(data)  # on_message_begin sets it to 0: of a message's first piece nothing is counted
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        if self.in_head and self.head_size > MAX_HEAD_BYTES and not self.lingering:
            self._refuse_rest(HeadTooLarge(f"the URL and headers are over the limit of {MAX_HEAD_BYTES:,} bytes"))
        if self.receiving is None and isinstance(self.cycle, Exchange) and not self.cycle.received:
            self._allow_time(self.cycle)

    def _allow_time(self, exchange: Exchange) -> None:
        self.receiving = self.loop.call_later(self.service.settings.request_timeout, self._time_out, exchange)

    def _time_out(self, exchange: Exchange) -> None:
        """The rest of a body has not come in time; a client that was kept waiting itself gets as long again."""
        self.receiving = None
        if not exchange.turn:
            self._allow_time(exchange)
        elif not exchange.received:
            exchange.refusal = TooSlow(f"{exchange.size:,} bytes of the request body arrived in time, not all of it")
            exchange.keep_alive = False
            self._proceed(exchange)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on in HTTP/1.1, as if the offer (Java's client makes one for HTTP/2) had not been made.

        The parser ends a message that offers an upgrade with its headers: they are parsed again without the offer.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("this server is no proxy")
            return
        head = [b"%s %s HTTP/%s\r\n" % (method, self.url, self.parser.get_http_version().encode())]
        head += [
            b"%s: %s\r\n" % (name, value) for name, value in self.headers if name not in (b"upgrade", b"connection")
        ]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join([*head, b"\r\n", rest]))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.in_head, self.head_size = True, 0

    def on_headers_complete(self) -> None:
        self.in_head = False
        if self.parser.should_upgrade():
            return
        target = infer_target(self.url) if self.parser.get_method() == b"POST" else None
        if target is None:
            super().on_headers_complete()
            return
        http_1_1 = self.parser.get_http_version() != "1.0"
        exchange = Exchange(http_1_1 and self.parser.should_keep_alive(), http_1_1 and self.expect_100_continue)
        try:
            self._admit(exchange, target, {n: v for n, v in self.headers if n in _FIELDS})
        except RequestError as error:
            exchange.refusal = error
        self._enqueue(exchange)

    def _admit(self, exchange: Exchange, target: tuple[str, str | None], fields: dict[bytes, bytes]) -> None:
        """What the headers alone decide. Raises RequestError."""
        exchange.accept = fields.get(b"accept-encoding", b"")
        exchange.size = int(fields.get(b"content-length", b"0"))
        if exchange.size > self.max_body:
            exchange.keep_alive = False
            raise TooLarge(f"the request body has {exchange.size:,} bytes, at most {self.max_body:,} are accepted")
        exchange.size = 0
        exchange.model = self.service.model(*target)
        exchange.coding = coding.coding_of(fields.get(b"content-encoding", b""))
        if b"inference-header-content-length" in fields:
            exchange.header = v2_rest.header_length(fields[b"inference-header-content-length"])

    def _enqueue(self, exchange: Exchange) -> None:
        before, self.cycle = self.cycle, exchange  # type: ignore[assignment]
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
        exchange.size += len(body)
        if exchange.size > self.max_body:
            exchange.refusal = TooLarge(f"the request body is over the limit of {self.max_body:,} bytes")
            exchange.keep_alive = False
            exchange.body.clear()
            self._proceed(exchange)
        elif exchange.refusal is None:
            exchange.body.append(body)

    def on_message_complete(self) -> None:
        exchange = self.cycle
        if self.parser.should_upgrade():
            return
        if not isinstance(exchange, Exchange):
            super().on_message_complete()
            return
        exchange.received = True
        if self.receiving is not None:
            self.receiving.cancel()
            self.receiving = None
        self._proceed(exchange)

    def send_400_response(self, msg: str) -> None:
        """What does not parse."""
        self._refuse_rest(BadRequest(msg))

    def _refuse_rest(self, error: RequestError) -> None:
        """The message being received is refused, after the replies still owed, and the connection closed."""
        if self.cycle is not None and not isinstance(self.cycle, Exchange) and not self.cycle.response_complete:
            super().send_400_response(str(error))
            return
        broken = self.cycle if isinstance(self.cycle, Exchange) and not self.cycle.received else None
        exchange = broken or Exchange(keep_alive=False, expects_continue=False)
        exchange.refusal, exchange.keep_alive = error, False
        if broken is None:
            self._enqueue(exchange)
        else:
            self._proceed(exchange)

    def eof_received(self) -> None:
        exchange = self.cycle
        if isinstance(exchange, Exchange) and not exchange.received and exchange.turn and not self.lingering:
            self.send_400_response(f"the request body ends after {exchange.size:,} bytes, before its end")

    # --- working ---------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if not isinstance(cycle, Exchange):
            super()._start_asgi_task(cycle, app)
        elif self.flow.write_paused:
            self.held = cycle
        else:
            self.loop.call_soon(self._begin, cycle)  # not a call: a long pipeline would nest as deep

    def _begin(self, exchange: Exchange) -> None:
        """It is this exchange's turn."""
        if self.transport.is_closing() or self.lingering:
            return
        exchange.turn = True
        if exchange.expects_continue and not exchange.received:
            if exchange.refusal is not None:
                exchange.keep_alive = False  # the client may send the body or not: the framing is lost
            else:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
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
            except RequestError as error:
                self._refuse(exchange, error)
            except Exception as error:
                log.exception("a request could not be read")
                self._refuse(exchange, request_error(error, exchange.model.signature.name if exchange.model else ""))

    def _submit(self, exchange: Exchange) -> None:
        model, parts = exchange.model, exchange.body
        assert model is not None
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        exchange.body = []
        if exchange.coding is not None:
            body = coding.decompress(body, exchange.coding, self.max_body)
        exchange.request = request = v2_rest.parse(body, exchange.header, model.signature)
        self.active = exchange
        exchange.job = model.submit(
            request.feeds, request.timeout, len(body), lambda result, batch: self._done(exchange, result, batch)
        )

    def _done(self, exchange: Exchange, result: Arrays | Exception, batch: Batch | None) -> None:
        model, request = exchange.model, exchange.request
        assert model is not None
        assert request is not None
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s: %s", model.signature.name, explain(batch, exchange.job.queued_at if exchange.job else 0.0))
        if isinstance(result, Exception):
            self._refuse(exchange, request_error(result, model.signature.name))
            return
        try:
            head, tail = v2_rest.respond(request, result, model.signature)
        except Exception as error:
            if not isinstance(error, RequestError):
                log.exception("model '%s': a reply could not be written", model.signature.name)
            self._refuse(exchange, request_error(error, model.signature.name))
            return
        if tail:
            fields = [b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n" % len(head)]
        else:
            fields = [b"content-type: application/json\r\n"]
        self._reply(exchange, 200, fields, [head, *tail])

    # --- replying --------------------------------------------------------------------------------------------------

    def _refuse(self, exchange: Exchange, error: RequestError) -> None:
        fields = [b"content-type: application/json\r\n"]
        if error.retry_after is not None:
            fields.append(b"retry-after: %d\r\n" % max(1, math.ceil(error.retry_after)))
        exchange.accept = b""
        self._reply(exchange, error.status, fields, [v2_rest.error_body(str(error))])

    def _reply(self, exchange: Exchange, status: int, fields: list[bytes], body: list[Buffer]) -> None:
        self.active = exchange.job = exchange.request = None  # an idle connection keeps its last exchange
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
        if not exchange.keep_alive:
            self.pipeline.clear()
            self._hang_up(exchange)
        self.on_response_complete()

    def _hang_up(self, exchange: Exchange) -> None:
        """Close; after a reply to half a request only once the client has stopped sending, or soon anyway."""
        if exchange.received or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.lingering = True
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.lingering:
            self._unset_keepalive_if_required()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.stalled is None:
            self.stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled is not None:
            self.stalled.cancel()
            self.stalled = None
        if self.held is not None:
            held, self.held = self.held, None
            self._begin(held)

    # --- leaving ---------------------------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.stalled, self.receiving):
            if timer is not None:
                timer.cancel()
        self.stalled = self.receiving = None
        exchange, self.active, self.held = self.active, None, None
        if exchange is not None and exchange.job is not None and exchange.model is not None:
            exchange.model.batcher.cancel(exchange.job)
        if isinstance(self.cycle, Exchange):
            self.cycle = None
        self.pipeline.clear()
        super().connection_lost(exc)
