"""Whose turn it is on a device."""

from __future__ import annotations

import threading
import time
from collections import deque


class Turns:
    """A lock that is handed on in the order of asking, and knows since when it is held.

    `threading.Lock` would let the thread that gives it back take it again before the one that waits has woken up:
    a busy model would starve the others on its device.
    """

    def __init__(self) -> None:
        self.held_since: float | None = None
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._mutex:
            if self.held_since is None:
                self.held_since = time.monotonic()
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until __exit__ of the one before releases it

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self.held_since = time.monotonic()
                self._waiting.popleft().release()
            else:
                self.held_since = None

    def held_for(self) -> float:
        """Seconds since the present holder got its turn; 0 where nobody has it."""
        since = self.held_since
        return 0.0 if since is None else time.monotonic() - since
