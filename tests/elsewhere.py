"""Calls that a worker process may be told to make."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., object])


def sendable(fn: F) -> F:
    fn.sendable = True  # type: ignore[attr-defined]
    return fn


@sendable
def note_process(where: Any) -> None:
    """Which process this is."""
    where[...] = os.getpid()


@sendable
def wait_for(other: Any, mine: Any) -> None:
    """Until the other one has come as far; for at most a minute."""
    end = time.monotonic() + 60
    while other[0] < mine[0]:
        if time.monotonic() > end:
            raise TimeoutError("nobody came")
        time.sleep(1e-4)


@sendable
def take_time(seconds: float) -> None:
    time.sleep(seconds)


@sendable
def fail(error: BaseException) -> None:
    raise error


@sendable
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Strange(Exception):
    """An error that cannot be sent."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} {two}")


@sendable
def fail_strangely() -> None:
    raise Strange(lambda: 0, 2)
