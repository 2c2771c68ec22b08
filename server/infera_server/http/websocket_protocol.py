"""WebSocket connections: uvicorn's, with limits on what a client can make of them that never sends a message.

A frame takes five microseconds to read, whatever it carries, and the least has six bytes: a megabyte a second of such
frames would keep the event loop busy. What has arrived of messages counts as bodies being received do, until the
application takes them.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from infera_server.errors import Overloaded
from infera_server.http.gate import STREAM
from infera_server.http.intake import Intake
from infera_server.http.replying import LINGER_SECONDS

PIECE = 1 << 15
"""Bytes that are read before anybody looks at what they were."""

SMALL = 125
"""A fragment of no more bytes carries as good as nothing; nor do pings and pongs."""

TRY_LATER = 1013
"""The code that a connection is closed with where too much is being received (IANA's registry of RFC 6455)."""

MOST_SMALL = 1000
"""How many frames in a second may carry nothing before the connection is cut."""


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """`uvicorn.Config(ws=WebSocketProtocol)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._small, self._since = 0, 0.0
        self._intake: Intake = self.app_state["service"].intake
        self._held = self._fragments = 0
        self._waiting: deque[int] = deque()
        """The sizes of messages that the application has not taken."""

        self._failed = False
        """Whether nothing more is read, after a close frame that says why."""

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            if not self._failed and not self.transport.is_closing():
                super().data_received(data[start : start + PIECE] if len(data) > PIECE else data)
                self._count_kept()

    def _count_kept(self) -> None:
        """Tell the intake what is kept now; where that is too much, end the connection."""
        kept = 0 if self.disconnected else len(self.conn.reader.buffer) + self._fragments + sum(self._waiting)
        more, self._held = kept - self._held, kept
        self._intake.held += more
        if more <= 0 or self.transport.is_closing():
            return
        try:
            self._intake.check(0)
        except Overloaded as error:
            self.conn.fail(TRY_LATER, str(error)[:100])
            self.handle_parser_exception()

    def handle_parser_exception(self) -> None:
        """Say what is wrong, and hang up once the client has stopped sending, or soon anyway (RFC 6455, section 7.1.1).

        What it sends to a socket that is closed resets the connection: it may then not see why.
        """
        self._failed = True
        self.frames, self._fragments = [], 0
        if self.transport.is_closing() or not self.transport.can_write_eof():
            super().handle_parser_exception()
            return
        assert self.conn.close_sent is not None
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.write_eof()
        self.close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self._count_kept()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == f"{STREAM}.body" and not message.get("more_body"):
            self.handshake_complete = True  # as after a refusal without a body, where uvicorn says so itself

    async def receive(self) -> Any:
        message = await super().receive()
        if message["type"] == "websocket.receive":
            self._waiting.popleft()
            self._count_kept()
        return message

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._count_kept()

    def handle_text(self, event: Any) -> None:
        self._look(event)
        super().handle_text(event)

    def handle_bytes(self, event: Any) -> None:
        self._look(event)
        super().handle_bytes(event)

    def handle_cont(self, event: Any) -> None:
        self._look(event)
        super().handle_cont(event)

    def handle_pong(self, event: Any) -> None:
        self._count()
        super().handle_pong(event)

    def handle_ping(self) -> None:
        self._count()
        if self.writable.is_set():
            super().handle_ping()
        else:  # who does not read misses no pong (RFC 6455, section 5.5.3)
            self.conn.data_to_send()

    def _look(self, event: Any) -> None:
        self._fragments += len(event.data)
        if event.fin:
            self._waiting.append(self._fragments)
            self._fragments = 0
        elif len(event.data) <= SMALL:
            self._count()

    def _count(self) -> None:
        now = time.monotonic()
        if now - self._since > 1.0:
            self._small, self._since = 0, now
        self._small += 1
        if self._small > MOST_SMALL:
            self.transport.abort()
