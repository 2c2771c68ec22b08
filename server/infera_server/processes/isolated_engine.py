"""The engine process: a session, and who asks it over a socket. Started as `python -m` by `engine_process`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from typing import Any

import orjson

from infera_server.processes.child import die_with_parent, prepare
from infera_server.processes.engine_wire import MAX_MESSAGE, about, error_out
from infera_server.processes.segment import Segment
from infera_server.runtime import Session

OOM_SCORE = 500
"""Out of memory, the system ends this process before the server."""


class Engine:
    """What can be asked: each method gets what was sent with its name and returns what is sent back."""

    def __init__(self, feeds: Segment, results: Segment) -> None:
        self._feeds, self._results = feeds, results
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        assert self._session is not None, "nothing was opened"
        return self._session

    def open(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Call `target`, a function by "module:name" that returns a session, with `arguments`."""
        module, _, name = asked["target"].partition(":")
        self._session = getattr(import_module(module), name)(**asked["arguments"])
        return about(self.session)

    def run(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        """Feeds and results are where they lie in shared memory."""
        return self._results.put(self.session.run(self._feeds.views(feeds)))

    def plan(self, shapes: Mapping[str, list[int]]) -> int:
        """Bytes of its arena."""
        return self.session.plan_for(_tuples(shapes)).arena_bytes

    def facts(self, shared: Sequence[str]) -> Mapping[str, Any]:
        """As `Session.facts`."""
        return asdict(self.session.facts(shared))

    def reserve(self, shapes: Mapping[str, list[int]]) -> int:
        """As `Session.reserve`."""
        return self.session.reserve(_tuples(shapes))


def _tuples(shapes: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in shapes.items()}


def serve(sock: socket.socket, engine: Engine) -> None:
    """Answer until the server closes its end."""
    verbs: Mapping[str, Callable[[Any], Any]] = {
        "open": engine.open, "run": engine.run, "plan": engine.plan, "reserve": engine.reserve,
        "facts": engine.facts,
    }  # fmt: skip
    buffer = memoryview(bytearray(MAX_MESSAGE))
    while count := sock.recv_into(buffer):
        verb, argument = orjson.loads(buffer[:count])
        try:
            reply = orjson.dumps([None, verbs[verb](argument)])
        except Exception as error:
            reply = orjson.dumps([error_out(error), None])
        if len(reply) > MAX_MESSAGE:
            reply = orjson.dumps([error_out(ValueError(f"its answer of {len(reply):,} bytes is too long")), None])
        sock.send(reply)


def main() -> None:
    """Descriptors are the arguments: the socket, the segment of feeds, that of results."""
    sock, feeds, results = map(int, sys.argv[1:])
    prepare()
    die_with_parent(OOM_SCORE)
    with suppress(ConnectionError):
        serve(socket.socket(fileno=sock), Engine(Segment(feeds), Segment(results)))
    os._exit(0)  # at once: the server waits for the memory


if __name__ == "__main__":
    main()
