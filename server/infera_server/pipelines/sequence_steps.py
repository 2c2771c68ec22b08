"""Sequences of requests: their steps, their states, and how many there may be."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from infera_server.codec import short
from infera_server.requests import Correlation, Request
from infera_server.scheduling.jobs import Job
from infera_server.scheduling.rows import HostArray

Identity: TypeAlias = tuple[str, int | str]
"""A sequence's owner and its id."""


RETRY_AFTER = 1.0
"""Seconds after which a sequence may have ended."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one model: sequences under way, bytes of their states, steps that wait behind others, seconds of silence."""

    sequences: int = 1024
    state_bytes: int = 256 << 20
    waiting: int = 1024
    idle: float = 60.0


DEFAULT_LIMITS = Limits()


@dataclass(slots=True, eq=False, kw_only=True)
class Step(Job):
    """A request of a sequence. `run` is what the batcher was given, once it was."""

    request: Request
    correlation: Correlation
    sequence: Sequence
    run: Job | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """The steps that are not answered, oldest first, and the state after the last that was; None before the first.

    It is `open` while a step that is no first one may come.
    """

    state: dict[str, HostArray] | None = None
    steps: deque[Step] = field(default_factory=deque)
    open: bool = False
    used_at: float = 0.0


def identity_of(correlation: Correlation) -> Identity:
    return correlation.owner, correlation.id


def repeated(initial: HostArray, rows: int, axis: int | None) -> HostArray:
    return initial if rows == 1 or axis is None else np.repeat(initial, rows, axis)


def own(array: HostArray) -> HostArray:
    """The array in memory of its own: a view would keep its whole batch."""
    return array if array.base is None else array.copy()


def size_of(state: dict[str, HostArray] | None) -> int:
    return sum(array.nbytes for array in state.values()) if state else 0


def named(step: Step) -> str:
    return f"sequence {short(str(step.correlation.id))}"
