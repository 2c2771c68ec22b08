"""A worker process, seen from the engine."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress

from infera_server.models.servable import Servable
from infera_server.processes.arena import Blocks, Lent
from infera_server.processes.child import Child
from infera_server.processes.desk import Desk
from infera_server.processes.ring import Reader, Signs, Writer, ring_fds
from infera_server.processes.segment import shared_file

ENTRIES = 1 << 14
"""Of a ring."""


class WorkerProcess(Child):
    """Takes requests, and has them run at its desk. `sock` is for all else that is said."""

    def __init__(self, models: Mapping[int, Servable], full: int, buckets: int, result_bytes: int) -> None:
        """`full` is a file of `Signs`, and `buckets` the one where the rates of API keys are counted.

        Responses that are not sent yet take at most `result_bytes`. Raises OSError.
        """
        requests, results = shared_file("infera-requests"), shared_file("infera-results")
        inbox, outbox = ring_fds("infera-inbox", ENTRIES), ring_fds("infera-outbox", ENTRIES)
        self.sock, theirs = socket.socketpair()
        with theirs:
            fds = (theirs.fileno(), full, buckets, requests, results, *inbox, *outbox)
            super().__init__("infera_server.processes.worker", fds)
        self.desk = Desk(
            models, Signs(full), Lent(requests), Blocks(results, result_bytes), Reader(*inbox), Writer(*outbox)
        )

    def close(self) -> None:
        """Wait for its end, or end it: it ends when nobody is at the other end of its socket."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.end()
