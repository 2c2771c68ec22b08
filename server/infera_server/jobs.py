"""What a batcher is given and what it makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from infera_server.rows import Arrays


@dataclass(slots=True, eq=False)
class Batch:
    """One run. Times are seconds of `time.monotonic`; `rows` excludes the `padded - rows` rows of padding."""

    jobs: Sequence[Job]
    rows: int
    padded: int
    taken_at: float
    gathered_at: float = 0.0
    ran_at: float = 0.0
    split_at: float = 0.0
    results: Sequence[Arrays | Exception] = ()


Done: TypeAlias = Callable[[Arrays | Exception, Batch | None], None]
"""Called once a job, unless it was cancelled; without a batch where the job never ran."""


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    CANCELLED = "cancelled"
    ANSWERED = "answered"


@dataclass(slots=True, eq=False)
class Job:
    """One caller's request: `rows` rows in every array of `feeds`.

    Jobs of equal `group` can share a batch. `nbytes` is what the job keeps in memory while it waits. `deadline` is a
    time of `time.monotonic`, after which the job is not run any more.
    """

    feeds: Arrays
    done: Done
    rows: int = 1
    group: Hashable = None
    nbytes: int = 0
    deadline: float = math.inf
    queued_at: float = 0.0
    state: State = State.WAITING
