"""What a batcher is given and what it makes of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from infera_server.scheduling.rows import Arrays

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Batch:
    """One run. Times are seconds of `time.monotonic`; `rows` excludes the `padded - rows` rows of padding.

    Until `free_at` the model's run before this one went on, until `asked_at` nobody asked for the device, and until
    `taken_at` the model `behind` had it. `fill` is the share of the batch's elements that came with its rows, below 1
    where rows were made longer.
    """

    jobs: Sequence[Job]
    rows: int
    padded: int
    taken_at: float
    gathered_at: float = 0.0
    ran_at: float = 0.0
    split_at: float = 0.0
    results: Sequence[Arrays | Exception] = ()
    free_at: float = 0.0
    asked_at: float = 0.0
    behind: str = ""
    most: int = 1
    fill: float = 1.0


Done: TypeAlias = Callable[[Arrays | Exception, Batch | None], None]
"""Called once a job, unless it was cancelled; without a batch where the job never ran."""


Each: TypeAlias = Callable[[Arrays, Batch | None, "Job"], None]
"""Called with a response that others follow, the run that made it, and the job as which that run had it."""


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    CANCELLED = "cancelled"
    ANSWERED = "answered"


@dataclass(frozen=True, slots=True)
class Levels:
    """Levels of priority: 1 goes first, `count` last. A request that names none of them has the `default`."""

    count: int
    default: int

    def level(self, priority: int) -> int:
        return priority if 0 < priority <= self.count else self.default


ANY_LEVELS = Levels(9, 5)


@dataclass(slots=True, eq=False)
class Job:
    """One caller's request: `rows` rows in every array of `feeds`.

    Jobs of equal `group` can share a batch. `nbytes` is what the job keeps in memory while it waits. `deadline` is a
    time of `time.monotonic`, after which the job is not run any more. A smaller `level` goes first. Rows that are
    `length` long may be made as long as `longer`; where that is 0 they stay as they are.
    """

    feeds: Arrays
    done: Done
    rows: int = 1
    group: Hashable = None
    nbytes: int = 0
    deadline: float = math.inf
    level: int = 0
    queued_at: float = field(default_factory=time.monotonic)
    came_at: float = 0.0
    """When the request came, where it takes many runs and `queued_at` tells of the last one; 0: at `queued_at`."""

    estimate: float = 0.0
    """Seconds until its answer, at the worst, as reckoned when it came; 0 where that was not."""

    allowed: float = math.inf
    """Seconds that it was to take at most, where that was reckoned."""

    last_deadline: float = 0.0
    """Until when the job may still run, after all others, once its deadline has passed; 0: not at all."""

    length: int = 0
    longer: int = 0
    state: State = State.WAITING


def answer(job: Job, result: Arrays | Exception, batch: Batch | None = None) -> None:
    """Call a job back, unless it was cancelled or answered before. What the callback raises goes to the log."""
    if job.state in (State.CANCELLED, State.ANSWERED):
        return
    job.state = State.ANSWERED
    try:
        job.done(result, batch)
    except Exception:
        log.exception("the callback of a request failed")
