"""A process with a session in it, seen from the server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import orjson

from infera_gpu.errors import InputError
from infera_server.processes.child import Child
from infera_server.processes.engine_wire import MAX_MESSAGE, error_in
from infera_server.processes.segment import Segment
from infera_server.scheduling.rows import Arrays


class Died(Exception):
    """The process ended before it answered. `began` says whether it may have got what was asked."""

    def __init__(self, began: bool) -> None:
        super().__init__("the engine process ended")
        self.began = began


class EngineProcess(Child):
    """Asked one thing at a time, by one thread at a time. Raises OSError where it cannot be started."""

    def __init__(self, name: str) -> None:
        self._asking = threading.Lock()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._feeds, self._results = Segment.create(f"infera-feeds-{name}"), Segment.create(f"infera-results-{name}")
        with theirs:
            for end in (self._sock, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE)
            fds = (theirs.fileno(), self._feeds.fd, self._results.fd)
            super().__init__("infera_server.processes.isolated_engine", fds)
        self._closed = False
        self._buffer = memoryview(bytearray(MAX_MESSAGE))

    def ask(self, verb: str, argument: Any) -> Any:
        """What the engine answers. Raises what it raised, or Died."""
        with self._asking:
            self._check_open()
            return self._ask(verb, argument)

    def run(self, feeds: Arrays) -> Arrays:
        """The results, copied. Raises what the session raised, or Died."""
        with self._asking:
            self._check_open()
            described: Mapping[str, Any] = self._ask("run", self._feeds.put(feeds))
            return {name: array.copy() for name, array in self._results.views(described).items()}

    def _check_open(self) -> None:
        if self._closed:
            raise Died(began=False)

    def _ask(self, verb: str, argument: Any) -> Any:
        message = orjson.dumps((verb, argument))
        if len(message) > MAX_MESSAGE:
            raise InputError(f"the tensors' names and shapes take {len(message):,} bytes, at most {MAX_MESSAGE:,} can")
        try:
            self._sock.send(message)
        except OSError:
            raise Died(began=False) from None
        try:
            count = self._sock.recv_into(self._buffer)
        except ConnectionResetError:
            count = 0
        if not count:
            raise Died(began=True)
        error, answer = orjson.loads(self._buffer[:count])
        if error is not None:
            raise error_in(error)
        return answer

    def close(self) -> None:
        """Ask it to exit, end it where it does not, and give its memory back. Whoever asks then gets Died."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.end()
        with self._asking:
            self._closed = True
            self._sock.close()
            self._feeds.close()
            self._results.close()
