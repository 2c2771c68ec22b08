"""The run of one batch: gather, run, split; and each job by itself where that fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from infera_server.errors import RequestError
from infera_server.scheduling.backlog import Selection
from infera_server.scheduling.jobs import Batch, Job, State
from infera_server.scheduling.rows import Arrays, Gatherer, Layout, split

Run: TypeAlias = Callable[[Arrays], Arrays]

log = logging.getLogger(__name__)


class Runner:
    """Runs batches, one at a time; without a `layout` every job by itself. What a run raises is its jobs' result."""

    def __init__(self, run: Run, layout: Layout | None, name: str) -> None:
        self.run = run
        self.layout = layout
        self.name = name
        self._gather = Gatherer(layout) if layout else None

    def execute(self, selection: Selection) -> Sequence[Batch]:
        """The batches that the jobs ran in: one, or where it failed one for each job."""
        jobs = selection.jobs
        try:
            return [self._run_together(selection)]
        except RequestError as error:
            now = time.monotonic()
            rows = sum(job.rows for job in jobs)
            return [Batch(jobs, rows, selection.bucket, now, now, now, now, [error] * len(jobs))]
        except Exception as error:
            log.debug("model '%s': a batch of %d failed, each runs alone now: %s", self.name, len(jobs), error)
        batches = [self._run_alone(job) for job in jobs if job.state is State.RUNNING]
        longest = max(job.longer for job in jobs)
        if longest and not any(isinstance(result, Exception) for batch in batches for result in batch.results):
            assert self.layout is not None
            assert self.layout.padding is not None
            self.layout.padding.refused.add(longest)
            log.info("model '%s': rows are not made %d long any more, which it cannot run", self.name, longest)
        return batches

    def _run_together(self, selection: Selection) -> Batch:
        """Raises what the run raises, unless there is but one job, run as it is."""
        jobs, layout, padded = selection.jobs, self.layout, selection.bucket
        counts = [job.rows for job in jobs]
        rows = sum(counts)
        longest = max(job.longer for job in jobs) if layout and layout.padding else 0
        if layout is None or (len(jobs) == 1 and rows == padded and jobs[0].length == longest):
            return self._run_alone(jobs[0])
        assert self._gather is not None
        batch = Batch(jobs, rows, padded, time.monotonic(), most=layout.max_rows)
        if longest:
            batch.fill = sum(job.rows * job.length for job in jobs) / (rows * longest)
        feeds = self._gather([job.feeds for job in jobs], rows, padded, longest)
        batch.gathered_at = time.monotonic()
        outputs = self.run(feeds)
        batch.ran_at = time.monotonic()
        lengths = [job.length for job in jobs] if longest else ()
        batch.results = list(split(outputs, layout, counts, padded, lengths, longest))
        batch.split_at = time.monotonic()
        return batch

    def _run_alone(self, job: Job) -> Batch:
        """The job by itself and unpadded: nothing is gathered or split. Its feeds may begin anywhere, as they came."""
        batch = Batch([job], job.rows, job.rows, time.monotonic(), most=self.layout.max_rows if self.layout else 1)
        batch.gathered_at = batch.taken_at
        try:
            batch.results = [self.run(job.feeds)]
        except Exception as error:
            batch.results = [error]
        batch.ran_at = batch.split_at = time.monotonic()
        return batch
