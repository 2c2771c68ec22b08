"""How fast requests are refused while models run.

The event loop's thread lets go of the interpreter's lock between any two connections and takes it again before a thread
that waits for it has woken up (CPython signals that thread each time, which resets the time after which it may demand
the lock). An event loop with nothing but refusals to write would so keep engine threads from running: at ten times the
load that a model can take, all but a twentieth of its throughput was seen to go. Sleeping hands the lock over for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

RATE = 5000.0
"""Refusals a second; at 40 us each they take a fifth of a processor."""

BURST = 16
"""Refusals between looks at the clock. What is accepted meanwhile waits for as long as these may take: 3 ms."""


@dataclass(slots=True)
class Pace:
    """Called after each refusal, from the event loop's thread, which it blocks where they come too fast."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _count: int = field(default=0, init=False)
    _began: float = field(default=0.0, init=False)

    def refused(self) -> None:
        self._count += 1
        if self._count < BURST:
            return
        now = self.clock()
        early = self._began + BURST / RATE - now
        if early > 0:
            self.sleep(early)
            now = self.clock()
        self._began, self._count = now, 0
