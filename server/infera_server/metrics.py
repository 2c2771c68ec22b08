"""Counters of what was served, and their Prometheus exposition.

Everything is counted in the event loop's thread with plain integers (about 1 µs a request); the Prometheus objects are
made when somebody asks. What is not known (a GPU without NVML) has no series, never a zero.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from infera_gpu.telemetry import Telemetry
from infera_server.errors import RequestError
from infera_server.scheduling.goal import Goal
from infera_server.scheduling.jobs import Batch

if TYPE_CHECKING:
    from infera_server.access import Access
    from infera_server.models.repository import Repository

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


class Histogram:
    """Counts of values up to each bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """(bound, values up to it), as Prometheus has it."""
        running = 0
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            running += count
            yield ("+Inf" if math.isinf(bound) else repr(bound)), running


class Times:
    """A count and the nanoseconds it took, the unit of the V2 statistics."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, count: int, seconds: float) -> None:
        self.count += count
        self.ns += int(seconds * 1e9)

    def as_dict(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


class Phases:
    """What runs took, by phase: a count, and seconds."""

    __slots__ = ("count", "infer", "input", "output")

    def __init__(self) -> None:
        self.count = 0
        self.input = self.infer = self.output = 0.0

    def add(self, batch: Batch, count: int) -> None:
        """A run that counts so many times."""
        began, ended = batch.gathered_at, batch.ran_at
        self.count += count
        self.input += (began - batch.taken_at) * count
        self.infer += (ended - began) * count
        self.output += (batch.split_at - ended) * count

    def as_dict(self) -> dict[str, dict[str, int]]:
        """As the V2 statistics name them."""
        return {
            f"compute_{name}": {"count": self.count, "ns": int(getattr(self, name) * 1e9)}
            for name in ("input", "infer", "output")
        }


RESPONSE_STATS = ("compute_infer", "compute_output", "success", "fail", "empty_response", "cancel")
"""What the V2 statistics count of the responses at one place among those to a request."""


class ModelStats:
    """What one model version did. Used from the event loop's thread only."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.refused: Counter[str] = Counter()
        """Requests refused, by the reason of their RequestError."""

        self.duration = Histogram(SECONDS)
        self.queue = Histogram(SECONDS)
        self.execution = Histogram(SECONDS)
        self.rows = Histogram(ROWS)
        self.padding = 0
        self.waste = 0.0
        """Rows computed for nothing, those included that were made longer: a row half padding is half a row."""

        self.goal: Goal | None = None
        self.waiting = Times()
        self.phases = Phases()
        """Of requests: a batch counts for each of its jobs."""

        self.success, self.fail = Times(), Times()
        self.cache_hit, self.cache_miss = Times(), Times()
        """Looks at a response cache: a hit with the time it took, a miss with that and storing the response."""

        self.sequences: tuple[int, int] | None = None
        """Sequences under way, and the bytes of their states; None where none are kept."""

        self.memory: dict[tuple[str, int], int] = {}
        """Bytes that the model keeps on a device, by Triton's type of memory and the device's index."""

        self.batches: dict[int, Phases] = {}
        """Of runs, by their rows."""

        self.responses: dict[int, dict[str, Times]] = {}
        """Of a decoupled model, by the response's place among those to its request."""

        self.last_inference = 0

    def replied(self, status: int, seconds: float) -> None:
        """A reply was written `seconds` after the request's headers."""
        self.statuses[status] += 1
        self.duration.observe(seconds)
        (self.success if status == 200 else self.fail).add(1, seconds)

    def failed(self, error: RequestError, seconds: float) -> None:
        """An error was written, `seconds` after the request's headers."""
        if error.reason:
            self.refused[error.reason] += 1
        self.replied(error.status, seconds)

    def stepped(self, succeeded: bool, seconds: float) -> None:
        """An ensemble's request was answered after so long: no client had a reply."""
        (self.success if succeeded else self.fail).add(1, seconds)

    def handed_over(self) -> list[Any]:
        """What was counted at replies, which is forgotten here: for `add`, in another process."""
        times = [[each.count, each.ns] for each in (self.success, self.fail)]
        found = [list(self.statuses.items()), dict(self.refused), self.duration.counts, self.duration.total, *times]
        self.statuses, self.refused = Counter(), Counter()
        self.duration, self.success, self.fail = Histogram(SECONDS), Times(), Times()
        return found

    def add(self, found: Sequence[Any]) -> None:
        """Count what another process has counted."""
        statuses, refused, durations, total, *times = found
        self.statuses.update(dict(statuses))
        self.refused.update(refused)
        self.duration.counts = [a + b for a, b in zip(self.duration.counts, durations, strict=True)]
        self.duration.total += total
        for own, (count, ns) in zip((self.success, self.fail), times, strict=True):
            own.count, own.ns = own.count + count, own.ns + ns

    def ran(self, batch: Batch) -> None:
        """A batch ran."""
        rows, padded, taken = batch.rows, batch.padded, batch.taken_at
        self.rows.observe(rows)
        self.padding += padded - rows
        self.waste += padded - batch.fill * rows
        self.execution.observe(batch.ran_at - batch.gathered_at)
        waited, jobs = 0.0, batch.jobs
        for job in jobs:
            wait = taken - job.queued_at
            waited += wait
            self.queue.observe(wait)
        self.waiting.add(len(jobs), waited)
        self.phases.add(batch, len(jobs))
        size = self.batches.get(rows)
        if size is None:
            size = self.batches[rows] = Phases()
        size.add(batch, 1)
        self.last_inference = int(time.time() * 1e3)

    def responded(self, index: int, seconds: float, outcome: str) -> None:
        """One of the responses to a request to a decoupled model came so long after the one before it.

        The `outcome` is one of RESPONSE_STATS. Responses are written where they are read, so output takes no time.
        """
        times = self.responses.get(index) or self.responses.setdefault(index, {n: Times() for n in RESPONSE_STATS})
        times[outcome].add(1, seconds)
        if outcome in ("success", "fail"):
            times["compute_infer"].add(1, seconds)
            times["compute_output"].add(1, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """The counters as the V2 statistics extension names them."""
        return {
            "last_inference": self.last_inference,
            "inference_count": int(self.rows.total),
            "execution_count": self.rows.count,
            "inference_stats": {
                "success": self.success.as_dict(),
                "fail": self.fail.as_dict(),
                "queue": self.waiting.as_dict(),
                **self.phases.as_dict(),
                "cache_hit": self.cache_hit.as_dict(),
                "cache_miss": self.cache_miss.as_dict(),
            },
            "response_stats": {
                str(index): {name: times.as_dict() for name, times in found.items()}
                for index, found in sorted(self.responses.items())
            },
            "batch_stats": [{"batch_size": rows, **phases.as_dict()} for rows, phases in sorted(self.batches.items())],
            "memory_usage": [
                {"type": kind, "id": index, "byte_size": nbytes} for (kind, index), nbytes in self.memory.items()
            ],
        }


class Extract:
    """A Prometheus collector of what another has about those models that `tells` says yes to, and about no model."""

    def __init__(self, whole: Exposition, tells: Callable[[str], bool]) -> None:
        self._whole, self._tells = whole, tells

    def collect(self) -> Iterable[Metric]:
        for metric in self._whole.collect():
            metric.samples = [s for s in metric.samples if "model" not in s.labels or self._tells(s.labels["model"])]
            yield metric


class Exposition:
    """A Prometheus collector over a repository's models, who was not let in to them, and the machine's GPUs."""

    def __init__(self, repository: Repository, access: Access) -> None:
        self._repository, self._access = repository, access
        self._telemetry = Telemetry()

    def collect(self) -> Iterable[Metric]:
        yield from self._models()
        yield from self._refused()
        yield from self._gpus()

    def _models(self) -> Iterator[Metric]:
        own = ["model", "version"]
        requests = CounterMetricFamily("infera_requests", "Requests answered, by HTTP status.", labels=[*own, "code"])
        rejected = CounterMetricFamily("infera_rejected", "Requests refused, by reason.", labels=[*own, "reason"])
        padding = CounterMetricFamily("infera_padding_rows", "Rows run only to fill a bucket.", labels=own)
        waste = CounterMetricFamily(
            "infera_padding_waste_rows", "Rows' worth of computing on padding, of rows and within them.", labels=own
        )
        kept = {
            "sequences": GaugeMetricFamily("infera_sequences", "Sequences under way.", labels=own),
            "states": GaugeMetricFamily("infera_sequence_state_bytes", "What their states take.", labels=own),
        }
        cache = CounterMetricFamily(
            "infera_response_cache", "Looks at the response cache, by result.", labels=[*own, "result"]
        )
        goals = {
            "goal": GaugeMetricFamily("infera_slo_seconds", "The goal for the 99th percentile.", labels=own),
            "p99": GaugeMetricFamily("infera_slo_p99_seconds", "That of the last answers.", labels=own),
            "met": GaugeMetricFamily("infera_slo_met", "1 where the last answers keep the goal.", labels=own),
        }
        depth = GaugeMetricFamily("infera_queue_depth", "Requests waiting for a run.", labels=own)
        info = InfoMetricFamily("infera_model", "What is served and how.", labels=own)
        histograms = {
            "duration": HistogramMetricFamily(
                "infera_request_duration_seconds", "From a request's headers to its reply.", labels=own
            ),
            "queue": HistogramMetricFamily("infera_queue_duration_seconds", "Waiting for a run.", labels=own),
            "execution": HistogramMetricFamily("infera_execution_duration_seconds", "One run of a batch.", labels=own),
            "rows": HistogramMetricFamily("infera_batch_rows", "Rows in a batch, padding excluded.", labels=own),
        }
        for loaded in self._repository.loaded():
            model, path = loaded.front, loaded.source.path.name
            key, stats = [model.signature.name, model.signature.version], model.stats
            layout = model.signature.layout
            for code, count in sorted(stats.statuses.items()):
                requests.add_metric([*key, str(code)], count)
            for reason, count in sorted(stats.refused.items()):
                rejected.add_metric([*key, reason], count)
            padding.add_metric(key, stats.padding)
            waste.add_metric(key, stats.waste)
            if stats.sequences is not None:
                for name, value in zip(("sequences", "states"), stats.sequences, strict=True):
                    kept[name].add_metric(key, value)
            for result, looks in (("hit", stats.cache_hit), ("miss", stats.cache_miss)):
                if looks.count:
                    cache.add_metric([*key, result], looks.count)
            if (goal := stats.goal) is not None:
                goals["goal"].add_metric(key, goal.seconds)
                if (p99 := goal.p99) is not None:
                    goals["p99"].add_metric(key, p99)
                    goals["met"].add_metric(key, p99 <= goal.seconds)
            depth.add_metric(key, model.queued)
            info.add_metric(
                key,
                {"device": model.device, "max_batch": str(layout.max_rows if layout else 1), "path": path},
            )
            for name, family in histograms.items():
                histogram: Histogram = getattr(stats, name)
                family.add_metric(key, list(histogram.cumulative()), histogram.total)
        yield from (requests, rejected, padding, waste, depth, info, *histograms.values())
        yield from (family for family in (*goals.values(), *kept.values(), cache) if family.samples)

    def _refused(self) -> Iterator[Metric]:
        family = CounterMetricFamily("infera_access_refused", "Requests not let in, by reason.", labels=["reason"])
        for reason, count in sorted(self._access.refused.items()):
            family.add_metric([reason], count)
        if family.samples:
            yield family

    def _gpus(self) -> Iterator[Metric]:
        readings = self._telemetry.read()
        for name, text, attribute, scale in (
            ("infera_gpu_utilization_ratio", "Share of time a kernel was running.", "utilization", 0.01),
            ("infera_gpu_memory_used_bytes", "Device memory in use.", "memory_used", 1.0),
            ("infera_gpu_memory_size_bytes", "Device memory there is.", "memory_total", 1.0),
        ):
            family = GaugeMetricFamily(name, text, labels=["gpu", "name"])
            for reading in readings:
                value = getattr(reading, attribute)
                if value is not None:
                    family.add_metric([str(reading.index), reading.name or ""], value * scale)
            if family.samples:
                yield family
