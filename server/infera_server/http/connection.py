"""One HTTP/1.1 connection: what is a message, how long and how large its parts may be, and what does not parse.

uvicorn's protocol with limits that it leaves to a proxy. A client has the request timeout for a head, and again for a
body; no timer is armed for that, `Service` looks at all connections now and then.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from infera_server.errors import (
    BadRequest,
    HeadTooLarge,
    InternalError,
    RequestError,
    TooSlow,
    Unavailable,
    UnknownTransfer,
    UnknownVersion,
)
from infera_server.http.exchange import Exchange
from infera_server.service import Service

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 1 << 16
"""The most that a URL and headers may have, and that may come without a byte of a body: heads of chunks, trailers. Of
those nothing is counted that is received in one piece with the end of something else."""

MAX_HEADERS = 256

HEAD_TOO_LARGE = f"the URL and headers are over the limit of {MAX_HEAD_BYTES:,} bytes"

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

PIECE, TURN = 1 << 12, 64
"""Bytes that are parsed at once, and requests after which other connections have their turn before the next piece;
while more than so many wait for their replies, nothing is parsed or read."""

PROBE_SECONDS = 0.05
"""How long a reset takes to come back from a client that is gone; the looks at all connections see later ones."""

STALL_SECONDS = 60.0
"""How long a client may not read its replies before its connection is cut."""

FAREWELL_SECONDS = 3.0
"""The same while the server shuts down."""


class Flow(FlowControl):
    """uvicorn's, which reads on after each reply, however many requests wait: not while `is_behind()`."""

    def __init__(self, transport: asyncio.Transport, is_behind: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._is_behind = is_behind

    def resume_reading(self) -> None:
        if self.read_paused and not self._is_behind():
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """The lifespan's state must hold the Service as "service". What raises NotImplementedError is the subclass's."""

    cycle: Any  # an Exchange, or uvicorn's cycle for an ASGI task

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.service: Service = self.app_state["service"]
        self.deaf = False
        self.ended = False
        """Whether the client has said that it sends no more."""

        self.finished = False
        """Whether all that it sent until then is parsed."""

        self.only_metrics = False
        self.in_head = False
        self.in_body = False
        self.head_size = 0
        self.fresh = b""
        """What was received in one piece and begins with the message whose head is being read."""
        self.waiting_since = time.monotonic()
        self.begun = 0
        """Requests whose heads have begun."""

        self.rest = b""
        """What was received and is not parsed yet, since it is the turn of others; nothing more is read meanwhile."""

        self.will_go_on = False
        self.stalled: asyncio.TimerHandle | None = None

    def recall(self, data: bytes) -> bool:
        raise NotImplementedError

    def _enqueue(self, exchange: Exchange) -> None:
        raise NotImplementedError

    def _proceed(self, exchange: Exchange) -> None:
        raise NotImplementedError

    def _is_amid_events(self) -> bool:
        """Whether the reply at work has begun, and is as long as its events go on."""
        raise NotImplementedError

    def _can_probe(self) -> bool:
        """Whether an interim response may be sent: a request is at work that came in HTTP/1.1, its reply not begun."""
        raise NotImplementedError

    # --- receiving -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = Flow(transport, self._is_behind)
        port = self.service.metrics_port
        self.only_metrics = port is not None and transport.get_extra_info("sockname")[1] == port
        self.service.connections.add(self)
        if len(self.service.connections) > self.service.max_connections:
            self._make_room()

    def _make_room(self) -> None:
        """One connection too many: the one that has been idle longest goes, else this one."""
        stay = [c for c in self.service.connections if not c.transport.is_closing()]  # others may just have been let go
        most = self.service.max_connections
        if len(stay) <= most:
            return
        idle = [c for c in stay if c is not self and c.is_idle]
        if idle:
            min(idle, key=lambda c: c.waiting_since).transport.abort()
        else:
            self.refuse_rest(Unavailable(f"{most} connections are open, all of them busy"), linger=False)

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        self._unset_keepalive_if_required()
        if self.rest:
            self.rest += data
            return
        if self.in_head or self.in_body:
            self.fresh = b""
        elif self.recall(data):
            return
        else:
            self.fresh = data
        first = self.begun
        for start in range(0, len(data), PIECE):
            if self.is_over:
                return
            if self.begun - first >= TURN:
                self.rest = data[start:]
                self.flow.pause_reading()
                self._go_on_soon()
                return
            self._parse(data[start : start + PIECE] if len(data) > PIECE else data)
        self.all_parsed()

    def all_parsed(self) -> None:
        """What was received is parsed."""

    def _is_behind(self) -> bool:
        """Whether there is enough to do without reading, or nothing to read."""
        return self.ended or bool(self.rest) or len(self.pipeline) > TURN

    def _go_on_soon(self) -> None:
        """Parse the rest once others had their turn, and the requests before it have been answered."""
        if not self.will_go_on and len(self.pipeline) <= TURN:
            self.will_go_on = True
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self.will_go_on = False
        rest, self.rest = self.rest, b""
        if rest and not self.is_over:
            self.data_received(rest)
        if self.ended and not self.rest:
            self._finish()
        self.flow.resume_reading()

    def _parse(self, data: bytes) -> None:
        self.head_size += len(data)
        pieces: list[bytes | memoryview] = [data]
        while pieces and not self.deaf:
            piece = pieces.pop()
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                if self.is_stream():
                    self.service.connections.discard(self)
                    self.scope["method"] = self.parser.get_method().decode("ascii")
                    self.handle_websocket_upgrade()
                    return
                pieces += [memoryview(piece)[upgrade.args[0] :], *self._without_upgrade()]
            except httptools.HttpParserCallbackError as error:
                log.error("a request could not be taken", exc_info=error.__context__)
                self.refuse_rest(InternalError("the request could not be taken"))
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
        if self.head_size > MAX_HEAD_BYTES and not self.deaf:
            self.refuse_rest(HeadTooLarge(HEAD_TOO_LARGE))

    def is_stream(self) -> bool:
        """Whether a WebSocket is asked for where there is one, and nothing else is under way."""
        path = self.url.partition(b"?")[0]
        return self._should_upgrade() and path.endswith(b"/stream") and self.is_idle and not self.only_metrics

    def _without_upgrade(self) -> Iterable[bytes]:
        """The head again without its offer, for a new parser: requests go on in HTTP/1.1.

        (Java's client offers HTTP/2.) The parser ends a message that offers an upgrade with its headers.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("this server is no proxy")
            return ()
        head = [b"%s %s HTTP/%s\r\n" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(token for token in value.split(b",") if token.strip().lower() != b"upgrade")
            if name != b"upgrade":
                head.append(b"%s: %s\r\n" % (name, value))
        self.renew_parser()
        return [b"".join([*head, b"\r\n"])]

    def renew_parser(self) -> None:
        """Forget what the parser is in the middle of."""
        self.parser = httptools.HttpRequestParser(self)
        with suppress(AttributeError):  # as uvicorn does: httptools before 0.6.3 has no such choice
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.begun += 1
        self.in_head, self.head_size = True, 0
        self.waiting_since = time.monotonic()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:  # else it is a trailer, which nobody reads
            super().on_header(name, value)

    def check_message(self) -> None:
        """Raises RequestError for a request that is too large, or that others on the way could have read otherwise."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise UnknownVersion(f"HTTP/{version} is not spoken here, send HTTP/1.1")
        size, hosts = len(self.url), 0
        for name, value in self.headers:
            size += len(name) + len(value)
            if name == b"transfer-encoding":
                if value.strip().lower() != b"chunked":
                    raise UnknownTransfer("a Transfer-Encoding other than chunked is not supported")
            elif name == b"host":
                hosts += 1
        if size > MAX_HEAD_BYTES:
            raise HeadTooLarge(HEAD_TOO_LARGE)
        if len(self.headers) > MAX_HEADERS:
            raise HeadTooLarge(f"the request has {len(self.headers):,} headers, at most {MAX_HEADERS} are accepted")
        if hosts > 1:
            raise BadRequest(f"the request has {hosts} Host headers")

    def on_body(self, body: bytes) -> None:
        self.head_size = 0
        if not self.is_over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self.in_body, self.head_size = False, 0
        if not self.is_over:
            super().on_message_complete()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio reads it: True keeps the transport open
        """A client that sends no more may wait for its replies, or be gone, which look the same.

        It is sent an interim response, which every HTTP/1.1 client skips, and one that is gone answers with a reset.
        Within a stream of events there is no place for one: who sends no more then is taken to be gone.
        """
        if self._is_amid_events():
            return False
        if not self.ended:
            self.ended = True
            if not self.rest:
                self._finish()
            if self._owes and not self.transport.is_closing() and self._can_probe():
                self.transport.write(CONTINUE)
                self.loop.call_later(PROBE_SECONDS, self._leave_if_gone)
        return self._owes and self.scheme != "https"  # TLS has no half of a connection

    def _finish(self) -> None:
        """All is parsed that will ever come: of the message being received that is not enough."""
        self.finished = True
        if self.in_body and not self.deaf:
            cycle = self.cycle
            size = f"after {cycle.size:,} bytes, " if isinstance(cycle, Exchange) else ""
            refused = cycle.refusal if isinstance(cycle, Exchange) else None
            self.refuse_rest(refused or BadRequest(f"the request body ends {size}before its end"))
        if not self._owes:
            self.transport.close()

    @property
    def _owes(self) -> bool:
        """Whether a request is not answered yet, or not parsed."""
        return bool(self.rest or self.pipeline) or not (self.cycle is None or self.cycle.response_complete)

    def _leave_if_gone(self) -> None:
        """End the connection where the interim response was met by a reset, which no event tells of after the end."""
        if self.ended and not self.transport.is_closing():
            found: socket.socket = self.transport.get_extra_info("socket")
            if found.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.transport.abort()

    # --- waiting ---------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing more is read: what came in one piece with the last request means nothing."""
        return self.deaf or bool(self.transport.is_closing())

    @property
    def is_idle(self) -> bool:
        """Whether no request has arrived completely that is not answered, nor any of its body."""
        return not self.deaf and (self.cycle is None or self.cycle.response_complete)

    def check_time(self, now: float) -> None:
        """End a connection whose client has not sent what it began, or begun anything, in the request timeout."""
        self._leave_if_gone()
        timeout = self.service.settings.request_timeout
        if self.deaf or now - self.waiting_since <= timeout or self.transport.is_closing():
            return
        if self.is_idle and not self.in_head:
            self.transport.close()
        elif self.is_idle or (self.in_body and self._has_turn()):
            what = "body" if self.in_body else "head"
            self.refuse_rest(TooSlow(f"the request's {what} did not arrive in {timeout:g} s"))

    def _has_turn(self) -> bool:
        """Whether it is the message being received that is at work: its client is waited for, and not the server."""
        return self.cycle.turn if isinstance(self.cycle, Exchange) else not self.pipeline

    def on_response_complete(self) -> None:
        self.waiting_since = time.monotonic()
        if self.finished and not self.pipeline:
            self.transport.close()
        if self.pipeline or not isinstance(self.cycle, Exchange):
            super().on_response_complete()
        elif not self.transport.is_closing():  # no timer for its idle time, which `check_time` looks at
            self.server_state.total_requests += 1
            self.flow.resume_reading()
        if self.rest:
            self._go_on_soon()

    # --- refusing --------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """What does not parse."""
        self.refuse_rest(BadRequest(msg))

    def refuse_rest(self, error: RequestError, linger: bool = True) -> None:
        """Refuse the message being received, after the replies still owed, and close; nothing more is read.

        Without `linger` at once, even where the client may then see a reset instead of the reply.
        """
        self.deaf = True
        cycle = self.cycle
        if isinstance(cycle, Exchange) and self.in_body:
            cycle.refusal, cycle.keep_alive = error, False
            self._proceed(cycle)
            return
        exchange = Exchange(keep_alive=False, expects_continue=False)
        exchange.refusal, exchange.received = error, not linger
        if cycle is not None and self.in_body and not cycle.response_complete and not self._abandon(exchange):
            return
        self._enqueue(exchange)

    def _abandon(self, exchange: Exchange) -> bool:
        """Put an exchange in the place of an ASGI task that waits for its body. Returns whether it is to be queued."""
        cycle = self.cycle
        if self.pipeline:  # it has not begun
            self.pipeline.popleft()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]
            self.cycle = exchange
            return False
        if cycle.response_started:
            self.transport.close()
            return False
        cycle.disconnected = cycle.response_complete = True
        cycle.message_event.set()
        return True

    # --- replies that are not read ---------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.stalled is None:
            self.stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unset_stalled()

    def _unset_stalled(self) -> None:
        if self.stalled is not None:
            self.stalled.cancel()
            self.stalled = None

    # --- leaving ---------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        if self.in_body and not self.deaf:
            self.refuse_rest(Unavailable("the server is shutting down; send the request to another one"))
        else:
            super().shutdown()
        self._cut_off_unread(None)

    def _cut_off_unread(self, before: int | None) -> None:
        """Do not wait for a client that has read nothing since so many bytes were left to send, or ends no TLS."""
        left = self.transport.get_write_buffer_size()
        if left == before and (left or self.transport.is_closing()):
            self.transport.abort()
        elif self in self.service.connections:
            self.loop.call_later(FAREWELL_SECONDS, self._cut_off_unread, left)

    def connection_lost(self, exc: Exception | None) -> None:
        self.service.connections.discard(self)
        self._unset_stalled()
        super().connection_lost(exc)
