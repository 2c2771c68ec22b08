"""A request that goes through an ensemble."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from infera_server.models.servable import Servable
from infera_server.pipelines.ensemble_graph import Step
from infera_server.requests import Request
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.rows import HostArray


@dataclass(slots=True, eq=False, kw_only=True)
class Run(Job):
    """One request: the tensors there are so far, the steps that wait for others, and those that are under way.

    The times of its steps are added up. It does not keep their batches, whose jobs lead back to it: only the garbage
    collector, which halts everything, would free such a circle.
    """

    request: Request
    outputs: Sequence[str]
    tensors: dict[str, HostArray]
    waiting: list[Step]
    under_way: dict[int, tuple[Servable, Job | None]] = field(default_factory=dict)
    began_at: float = math.inf
    copied: float = 0.0
    ran: float = 0.0
    split: float = 0.0
    most: int = 1

    def add(self, batch: Batch) -> None:
        """A step ran in this batch."""
        self.began_at = min(self.began_at, batch.taken_at)
        self.copied += batch.gathered_at - batch.taken_at
        self.ran += batch.ran_at - batch.gathered_at
        self.split += batch.split_at - batch.ran_at
        self.most = max(self.most, batch.most)

    def summed(self) -> Batch:
        """All steps as if they had been one run."""
        began = min(self.began_at, time.monotonic())
        gathered = began + self.copied
        ran = gathered + self.ran
        return Batch([self], self.rows, self.rows, began, gathered, ran, ran + self.split, most=self.most)
