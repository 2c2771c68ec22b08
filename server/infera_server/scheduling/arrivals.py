"""When to look at what waits: not while more of it is on its way to the queue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

log = logging.getLogger(__name__)

GAP = 1e-4
"""Seconds without a sign of a request after which no other is at hand, while several callers ask at a time."""

TURNS = 4
"""Turns of the event loop, which does not sleep in them, in which it shows who has waited."""

MOST = 256
"""Signs that are waited for, one after the other."""

Fn: TypeAlias = Callable[[], None]


@dataclass(eq=False)
class Arrivals:
    """`soon(fn)` calls `fn()` when the event loop has done what it is at. Used from the event loop's thread.

    Requests over HTTP are read in one turn of the loop, all that are there. gRPC's library hands over one call after
    the other, each some turns after the one before, and a run after each would find one request. So its handlers tell
    of every sign of a call (`noted`) and of every request (`came`). Where others show right after a run of one, they
    had waited for it: from then on what waits is looked at when no other comes for GAP seconds, until that is one
    again. The loop does not sleep meanwhile: they come as fast as they can be taken.
    """

    clock: Callable[[], float] = time.monotonic
    _loop: asyncio.AbstractEventLoop | None = None
    _waiting: list[Fn] = field(default_factory=list)
    _signs: int = 0
    _sign_at: float = 0.0
    _requests: int = 0
    _crowded: bool = False
    """Whether several callers ask at a time."""

    def noted(self) -> None:
        """A request may be about to come."""
        self._signs += 1
        self._sign_at = self.clock()

    def came(self) -> None:
        """A request is about to be queued."""
        self._requests += 1
        self.noted()

    def soon(self, fn: Fn) -> None:
        loop = asyncio.get_running_loop()
        if not self._requests:
            loop.call_soon(fn)
            return
        if loop is not self._loop:  # what waited in another one is gone with it
            self._loop, self._waiting = loop, []
        self._waiting.append(fn)
        if len(self._waiting) == 1:
            loop.call_soon(*(self._look, self._signs + MOST) if self._crowded else (self._go,))

    def _look(self, most: int) -> None:
        """Go, unless more may come."""
        if self._signs >= most or self.clock() - self._sign_at >= GAP:
            self._go()
        else:
            asyncio.get_running_loop().call_soon(self._look, most)

    def _go(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._crowded, self._requests = self._requests > 1, 0
        for fn in waiting:
            try:
                fn()
            except Exception:
                log.exception("what was to be done soon failed")
        if not self._crowded:
            asyncio.get_running_loop().call_soon(self._watch, TURNS, self._signs)

    def _watch(self, turns: int, signs: int) -> None:
        """See whether others have waited while one request ran."""
        if self._signs != signs:
            self._crowded = True
        elif turns:
            asyncio.get_running_loop().call_soon(self._watch, turns - 1, signs)


arrivals = Arrivals()
"""Of this process, which has one event loop that serves."""
