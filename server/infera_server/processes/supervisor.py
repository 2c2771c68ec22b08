"""What keeps a process running that a server has started."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

log = logging.getLogger(__name__)

MOST_CRASHES = 5
"""Processes in a row that end without success, before no other is started."""

FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
"""Seconds before a process is started again: none after the first crash, then these, doubling."""


class Supervised(Protocol):
    """A process."""

    def wait(self) -> str:
        """How it ended, once it has."""

    def kill(self) -> None: ...
    def close(self) -> None:
        """Ask it to exit, end it where it does not, and give back what it has."""


Process = TypeVar("Process", bound=Supervised)


class Supervisor(Generic[Process]):
    """Keeps one process running. `start` returns one that is ready, or raises.

    `what` it is, and what it is not a `success` without, are for messages. Safe to use from several threads.
    """

    def __init__(self, what: str, start: Callable[[], Process], success: str) -> None:
        """Raises what `start` raises."""
        self._what, self._start, self._success = what, start, success
        self._changed = threading.Condition()
        self._process: Process | None = start()
        self._crashes = 0
        self._closed = False
        self.failed = ""
        """Why no process is started any more; empty while one is."""

        threading.Thread(target=self._watch, args=(self._process,), name="infera-watch", daemon=True).start()

    @property
    def process(self) -> Process | None:
        """The one that is ready; None where it ended."""
        return self._process

    def wait(self) -> None:
        """Return once a process is ready, or none ever will be: at once, except after a crash."""
        with self._changed:
            self._changed.wait_for(self._is_settled)

    def interrupt(self) -> None:
        """End the process, and with it the run in progress; another is started."""
        with self._changed:
            if self._process is not None:
                self._process.kill()

    def succeeded(self) -> None:
        """What it was started for was done: the next crash is the first."""
        self._crashes = 0

    def retire(self) -> None:
        """Start no other: the process is about to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the process and start no other."""
        with self._changed:
            self._closed = True
            process, self._process = self._process, None
            self._changed.notify_all()
        if process is not None:
            process.close()

    def _is_settled(self) -> bool:
        return self._process is not None or bool(self.failed) or self._closed

    def _gone(self, process: Process) -> None:
        """Ask this process nothing more: it is ending."""
        with self._changed:
            if self._process is process:
                self._process = None

    def _watch(self, process: Process) -> None:
        """The thread that sees a process end and starts the next."""
        following: Process | None = process
        while following is not None:
            how = following.wait()
            if self._closed:
                return
            self._gone(following)
            following.close()
            following = self._again(how)

    def _again(self, how: str) -> Process | None:
        """The next process; None where no other is to be, or it is given up."""
        while True:
            self._crashes += 1
            if self._crashes > MOST_CRASHES:
                with self._changed:
                    self.failed = (
                        f"{self._what} {how}, and is not started again: "
                        f"{self._crashes} in a row ended without {self._success}"
                    )
                    self._changed.notify_all()
                log.error("%s", self.failed)
                return None
            log.error("%s %s; it is started again", self._what, how)
            delay = min(FIRST_DELAY * 2 ** (self._crashes - 2), LONGEST_DELAY) if self._crashes > 1 else 0.0
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, delay):
                    return None
            try:
                process = self._start()
            except Exception as error:
                how = f"could not be started again: {error}"
                continue
            with self._changed:
                if not self._closed:
                    self._process = process
                    self._changed.notify_all()
                    return process
            process.close()
            return None
