"""Messages between the engine and a worker that are not requests to models: a document and bytes, over a socket.

Either end asks, and the other answers; what is asked first is begun first.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import orjson

from infera_server.errors import Unavailable
from infera_server.processes.engine_wire import error_in, error_out

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<II")
"""Bytes of the document, and of what follows it."""

Content: TypeAlias = tuple[Any, bytes]
"""A document, and bytes that it says something of."""

Handler: TypeAlias = Callable[[Any, bytes], Awaitable[Content]]


class Channel(asyncio.Protocol):
    """One end. `handlers` answer what the other asks, by its verb; `lost()` is called when the other is gone."""

    def __init__(self, handlers: Mapping[str, Handler], lost: Callable[[], None] = lambda: None) -> None:
        self._handlers, self._lost = handlers, lost
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._asked: dict[int, asyncio.Future[Content]] = {}
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    async def over(cls, sock: socket.socket, handlers: Mapping[str, Handler], lost: Callable[[], None]) -> Channel:
        """One end of a connected stream socket."""
        channel = cls(handlers, lost)
        await asyncio.get_running_loop().create_connection(lambda: channel, sock=sock)
        return channel

    async def ask(self, verb: str, document: Any = None, body: bytes = b"") -> Content:
        """What the other end answers. Raises what its handler raised, or Unavailable where it is gone."""
        if self._closed or self._transport is None:
            raise Unavailable("the other process is gone; send the request again")
        self._number += 1
        number = self._number
        answer: asyncio.Future[Content] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self._send([number, verb, document], body)
        try:
            return await answer
        finally:
            self._asked.pop(number, None)

    def tell(self, verb: str, document: Any = None) -> None:
        """Say what needs no answer."""
        self._send([0, verb, document], b"")

    def close(self) -> None:
        """Say no more."""
        if self._transport is not None:
            self._transport.close()

    def _send(self, document: Any, body: bytes) -> None:
        if self._transport is not None and not self._closed:
            head = orjson.dumps(document)
            parts = [_HEAD.pack(len(head), len(body)), head]
            self._transport.writelines([*parts, body] if body else parts)  # asyncio's never gets rid of an empty one

    # --- asyncio's ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of a stream socket
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= _HEAD.size:
            head, body = _HEAD.unpack_from(self._received)
            end = _HEAD.size + head + body
            if len(self._received) < end:
                return
            document = orjson.loads(self._received[_HEAD.size : _HEAD.size + head])
            content = bytes(self._received[_HEAD.size + head : end])
            del self._received[:end]
            self._take(document, content)

    def _take(self, document: Any, body: bytes) -> None:
        number, verb, argument = document
        if verb is not None:
            task = asyncio.get_running_loop().create_task(self._answer(number, verb, argument, body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        answer = self._asked.get(number)
        if answer is None or answer.done():
            return
        error, told = argument
        if error is None:
            answer.set_result((told, body))
        else:
            answer.set_exception(error_in(error))

    async def _answer(self, number: int, verb: str, argument: Any, body: bytes) -> None:
        try:
            told, content = await self._handlers[verb](argument, body)
        except Exception as error:
            if not number:
                log.error("what another process has said is not understood", exc_info=error)
                return
            self._send([number, None, [error_out(error), None]], b"")
        else:
            if number:
                self._send([number, None, [None, told]], content)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(Unavailable("the other process is gone; send the request again"))
        for task in self._tasks:
            task.cancel()
        self._lost()
