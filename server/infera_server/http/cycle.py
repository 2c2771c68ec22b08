"""What becomes of a connection once an ASGI cycle of uvicorn's has answered a request whose body it has not read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from weakref import WeakMethod


class Ending:
    """The transport as a cycle has it: to close it is what `end` does, a method of the connection.

    It keeps no connection, which leads to the cycle.
    """

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self.write, self.is_closing = transport.write, transport.is_closing
        self._transport, self._end = transport, WeakMethod(end)

    def close(self) -> None:
        (self._end() or self._transport.close)()
