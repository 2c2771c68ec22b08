"""What becomes of a connection once an ASGI cycle of uvicorn's has answered a request whose body it has not read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from infera_server.http.gate import Message, Receive, Send


class Ending:
    """The transport as a cycle has it: to close it is what `end` does, a method of the connection.

    It keeps no connection, which leads to the cycle.
    """

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self.write, self.is_closing = transport.write, transport.is_closing
        self._transport, self._end = transport, WeakMethod(end)

    def close(self) -> None:
        (self._end() or self._transport.close)()


def expecting(app: Any, cycle: Any) -> Any:
    """The application of a cycle whose client waits for `100 Continue`.

    Where the reply comes instead of that, the connection ends with it: the client may send the body or not, the framing
    is lost.
    """

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        async def last(message: Message) -> None:
            if cycle.waiting_for_100_continue and cycle.more_body:
                cycle.keep_alive = False
            await send(message)

        await app(scope, receive, last)

    return answer
