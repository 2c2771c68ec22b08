"""How long requests of a level of priority wait, how many of them, and what happens when their time is up.

`default_queue_policy` and `priority_queue_policy` of Triton's model configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infera_server.models.modelconfig import ModelConfig
from infera_server.scheduling.jobs import Job


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """`most` requests wait at a time, 0: as many as the server lets. After `timeout` seconds they are refused.

    Where it `delays` they are not, but run after all others, as long as the server lets a request wait.
    """

    most: int = 0
    timeout: float = math.inf
    delays: bool = False


@dataclass(frozen=True, slots=True)
class QueuePolicies:
    """By level of priority; `default` is that of levels which have none of their own."""

    default: QueuePolicy
    levels: Mapping[int, QueuePolicy]

    def most(self, level: int) -> int:
        """How many requests of a level may wait, 0: no limit of its own."""
        return self.levels.get(level, self.default).most

    def apply(self, job: Job) -> None:
        """Let a job that has just come wait as its level says; its deadline is the last that it may have."""
        policy = self.levels.get(job.level, self.default)
        allowed = job.queued_at + policy.timeout
        if allowed < job.deadline:
            if policy.delays:
                job.last_deadline = job.deadline
            job.deadline = allowed


def policies(config: ModelConfig | None) -> QueuePolicies | None:
    """What a configuration says beyond one timeout and one length for all; None where it says nothing of the kind."""
    if config is None:
        return None
    batching = config.dynamic_batching
    default = _policy(batching.default_queue_policy)
    if not (batching.priority_queue_policy or default.delays):
        return None
    return QueuePolicies(default, {level: _policy(p) for level, p in batching.priority_queue_policy.items()})


def _policy(asked: Any) -> QueuePolicy:
    timeout = asked.default_timeout_microseconds / 1e6 or math.inf
    return QueuePolicy(asked.max_queue_size, timeout, asked.timeout_action == asked.DELAY)
