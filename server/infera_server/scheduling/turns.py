"""Whose turn it is on a device: its time is shared among models by weight.

Start-time fair queueing (Goyal, Vin, Cheng 1996), where a turn's length is known only when it ends. Every share has a
virtual clock that its turns advance by their seconds over its weight; of those that wait the one whose clock is
furthest behind goes next. A share that was away does not catch up: it comes back no earlier than the turn being taken.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush


@dataclass(eq=False, slots=True)
class Share:
    """One model's claim on a device. While several want it, each gets seconds in proportion to its `weight`."""

    turns: Turns
    name: str
    weight: float = 1.0
    finish: float = field(default=0.0, init=False)
    """Virtual time at which its last turn ended."""

    seconds: float = field(default=0.0, init=False)
    """How long it had the device so far."""

    def enter(self, wait: bool = True) -> bool:
        """Take the turn, or without `wait` only if nobody has it. Returns whether it was taken."""
        return self.turns._take(self, wait)

    def leave(self, again: bool = False) -> bool:
        """End the turn. With `again` another begins at once if it is this share's. Returns whether one has begun."""
        return self.turns._pass_on(self, again)


class Turns:
    """The turns on one device; as a context manager, one taken by whoever has no share.

    A plain lock would let the thread that gives it back take it again before the one that waits has woken up.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.held_since: float | None = None
        self.holder = ""
        """The name of the share whose turn it is; empty where nobody has it."""

        self._clock = clock
        self._mutex = threading.Lock()
        self._virtual = self._start = 0.0
        self._asked = 0
        self._waiting: list[tuple[float, int, Share, threading.Lock]] = []
        self._nobody = self.share("a model that is being loaded", math.inf)

    def share(self, name: str, weight: float = 1.0) -> Share:
        """A claim for a model."""
        return Share(self, name, weight)

    def __enter__(self) -> None:
        self._take(self._nobody, wait=True)

    def __exit__(self, *_: object) -> None:
        self._pass_on(self._nobody, again=False)

    def held_for(self) -> float:
        """Seconds since the present holder got its turn; 0 where nobody has it."""
        since = self.held_since
        return 0.0 if since is None else self._clock() - since

    def _take(self, share: Share, wait: bool) -> bool:
        with self._mutex:
            start = max(self._virtual, share.finish)
            if self.held_since is None:
                self._begin(start, share)
                return True
            if not wait:
                return False
            mine = threading.Lock()
            mine.acquire()
            self._asked += 1
            heappush(self._waiting, (start, self._asked, share, mine))
        mine.acquire()  # until the turn before is passed on
        return True

    def _begin(self, start: float, share: Share) -> None:
        self._virtual = self._start = start
        self.held_since, self.holder = self._clock(), share.name

    def _pass_on(self, share: Share, again: bool) -> bool:
        with self._mutex:
            assert self.held_since is not None
            took = self._clock() - self.held_since
            share.seconds += took
            share.finish = self._start + took / share.weight
            if again and (not self._waiting or share.finish < self._waiting[0][0]):
                self._begin(share.finish, share)
                return True
            if self._waiting:
                start, _, other, theirs = heappop(self._waiting)
                self._begin(start, other)
                theirs.release()
            else:
                self.held_since, self.holder = None, ""
            return False
