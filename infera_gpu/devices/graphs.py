"""CUDA graphs: calls that a stream records once and then replays at one go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from infera_gpu.op import Call

ENDED = range(900, 909)
"""The errors, as the CUDA runtime numbers them, of what a recording does not allow."""

TRIES = 3
"""How often a recording may be ended by what it does not allow: any thread of the process can do that, once."""

PATIENCE = 0.05, 1.0
"""Seconds that one who records waits for the others at first, and at most: twice as long each time that some stayed."""

PAUSE = 20
"""Times as long as was waited in vain nobody waits again: others are held up for a twentieth of the time at most."""


class _Depth(threading.local):
    """How many runs a thread is in, each within the one before."""

    depth = 0


class Turnstile:
    """Lets runs of several threads through side by side, and one that records alone.

    What a stream is asked while it records becomes a part of the graph, whoever asks: nobody else may be there then.
    A run is inside `with turnstile`, and waits before it while another one records; a run within a run of the same
    thread does not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self._recording = False
        self._mine = _Depth()
        self._patience, self._resumes_at = PATIENCE[0], 0.0

    def __enter__(self) -> None:
        depth = self._mine.depth
        if not depth:
            with self._lock:
                while self._recording:
                    self._changed.wait()
                self._inside += 1
        self._mine.depth = depth + 1

    def __exit__(self, *_: object) -> None:
        depth = self._mine.depth = self._mine.depth - 1
        if not depth:
            with self._lock:
                self._inside -= 1
                if self._recording:
                    self._changed.notify_all()  # who waits to be alone

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """For a run inside: True when no other is. False where another one waits for that already, or where others stay
        inside, as one does that plans: newcomers, who wait meanwhile, are not to wait for that."""
        with self._changed:
            first = not self._recording and self._may_wait()
            self._recording |= first
        try:
            yield first and self._waited()
        finally:
            if first:
                with self._changed:
                    self._recording = False
                    self._changed.notify_all()

    def _may_wait(self) -> bool:
        return self._inside == 1 or time.monotonic() >= self._resumes_at

    def _waited(self) -> bool:
        """Whether all others left."""
        with self._changed:
            left = self._changed.wait_for(lambda: self._inside == 1, self._patience)
            if left:
                self._patience = PATIENCE[0]
            else:
                self._resumes_at = time.monotonic() + PAUSE * self._patience
                self._patience = min(2 * self._patience, PATIENCE[1])
            return left


class Calls:
    """Calls as one. `args` are those of the call that is made now, by which its step is found after an error."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = tuple(calls)
        self.args: tuple[Any, ...] = ()

    def __call__(self) -> None:
        for fn, args in self._calls:
            self.args = args
            fn(*args)
        self.args = ()


class CapturedCalls(Calls):
    """Calls that only launch on `stream`. The first run makes them one by one, which loads every kernel; the next that
    can be alone records them, and from then on they are replayed.

    A recording that is ended by what none allows begins anew in the next run, and fails the third time.
    """

    def __init__(self, calls: Sequence[Call], stream: Any, turnstile: Turnstile) -> None:
        super().__init__(calls)
        self._stream, self._turnstile = stream, turnstile
        self._warm = False
        self._ended = 0
        self._graph: Any = None

    def __call__(self) -> None:
        if self._graph is not None or (self._warm and self._record()):
            self._graph.launch(self._stream)
        else:
            super().__call__()
            self._warm = True

    def _record(self) -> bool:
        """Whether there is a graph now."""
        with self._turnstile.alone() as alone:
            if not alone:
                return False
            self._stream.begin_capture()
            try:
                super().__call__()
                self._graph = self._stream.end_capture()
            except BaseException as error:
                error.add_note(f"in recording a CUDA graph of {len(self._calls)} launches, which takes memory, too")
                if self._abandoned() not in ENDED and getattr(error, "status", 0) not in ENDED:
                    raise
                self._ended += 1
                if self._ended >= TRIES:
                    raise
        return self._graph is not None

    def _abandoned(self) -> int:
        """Ends a recording that failed. Returns why CUDA had ended it, 0 where it had not: a library does not say."""
        try:
            self._stream.end_capture()
        except Exception as error:
            return getattr(error, "status", 0)
        return 0
