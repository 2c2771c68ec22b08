"""Large bodies, read from the socket to where they stay.

`asyncio.Protocol` is given what was received as bytes of its own, which the HTTP parser cuts into bytes again: a large
tensor would be copied three times before it is an array. Here the socket is read into one buffer, that lies so that
what follows the request's JSON is aligned: the only copy left is the one to the device, or into a batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np

from infera_server.scheduling.rows import HostArray

LARGE = 1 << 18
"""Bytes of a body from which this pays."""

ALIGNMENT = 64
SCRATCH = 1 << 16


Room: TypeAlias = Callable[[int], HostArray]
"""Memory of so many bytes, as an array of uint8."""


def room(nbytes: int) -> HostArray:
    """Memory of this process."""
    return np.empty(nbytes, np.uint8)


class Receiver(Protocol):
    """What a connection does with its body and with what else happens to it meanwhile."""

    def body_received(self, nbytes: int) -> bool:
        """So many bytes more are there. Returns whether the rest is wanted."""

    def body_complete(self, body: memoryview) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def eof_received(self) -> bool: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class Upload(asyncio.BufferedProtocol):
    """The transport's protocol while `size` bytes of a body are received, of which the first came with its head.

    `aligned` is where in the body an aligned address is wanted, and `room` gives the memory, once `first` bytes are
    there: who announces a body and does not send it has no more memory than that.
    """

    def __init__(self, receiver: Receiver, size: int, aligned: int, room: Room = room, first: int = 0) -> None:
        self._size, self._aligned, self._room = size, aligned, room
        self._receiver = receiver
        self._at = 0
        self._scratch: memoryview | None = None
        self._is_whole = False
        self._body = np.empty(first, np.uint8).data
        if not first:
            self._take_room()

    def _take_room(self) -> None:
        """From now on there is memory for the whole body."""
        memory = self._room(self._size + ALIGNMENT)
        start = -(memory.ctypes.data + self._aligned) % ALIGNMENT
        body = memory[start : start + self._size].data
        body[: self._at] = self._body[: self._at]
        self._body, self._is_whole = body, True

    def put(self, part: bytes) -> None:
        """Keep what came with the head."""
        end = self._at + len(part)
        if not self._is_whole and end >= len(self._body):
            self._take_room()
        self._body[self._at : end] = part
        self._at = end

    @property
    def body(self) -> memoryview:
        """The body, read-only."""
        return self._body.toreadonly()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._body[self._at :] if self._scratch is None else self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._scratch is not None:
            return
        self._at += nbytes
        if not self._receiver.body_received(nbytes):
            self._scratch, self._body = memoryview(bytearray(SCRATCH)), memoryview(b"")
        elif self._at < len(self._body):
            return
        elif self._is_whole:
            self._receiver.body_complete(self.body)
        else:
            self._take_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiver.connection_lost(exc)

    def eof_received(self) -> bool:
        return self._receiver.eof_received()

    def pause_writing(self) -> None:
        self._receiver.pause_writing()

    def resume_writing(self) -> None:
        self._receiver.resume_writing()
