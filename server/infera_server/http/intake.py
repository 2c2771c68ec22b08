"""A budget for request bodies that are on their way to a queue."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from infera_server.errors import BadRequest, Overloaded, TooLarge

RETRY_AFTER = 1.0
"""Seconds after which a refused upload is worth another try: bodies come and go faster than a queue."""

MAX_MANAGEMENT_BODY = 1 << 16


class Left(BadRequest):
    """The client has left: nobody reads this."""


@dataclass(slots=True)
class Intake:
    """Bytes received of bodies that are not in a queue yet, over all connections, and how many they may be."""

    limit: int
    held: int = 0

    def check(self, nbytes: int) -> None:
        """Raises Overloaded where so many more do not fit."""
        if self.held + nbytes > self.limit:
            raise Overloaded(
                f"{self.held:,} bytes of request bodies are being received, at most {self.limit:,} are held; "
                "send the request again later",
                RETRY_AFTER,
            )

    def take(self, nbytes: int) -> None:
        """Count so many more. Raises Overloaded where they do not fit."""
        self.check(nbytes)
        self.held += nbytes

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Count a body while it is read. Raises Overloaded where it does not fit."""
        self.take(nbytes)
        try:
            yield
        finally:
            self.held -= nbytes


async def received(receive: Callable[[], Awaitable[MutableMapping[str, Any]]], intake: Intake, most: int) -> bytes:
    """The body of an ASGI request. Raises TooLarge, Overloaded, or Left where the client leaves meanwhile."""
    parts: list[bytes] = []
    held, more = 0, True
    try:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Left("the request body did not arrive")
            chunk = message.get("body", b"")
            intake.take(len(chunk))
            held += len(chunk)
            if held > most:
                raise TooLarge(f"the request body is over the limit of {most:,} bytes")
            parts.append(chunk)
            more = message.get("more_body", False)
    finally:
        intake.held -= held
    return b"".join(parts)
