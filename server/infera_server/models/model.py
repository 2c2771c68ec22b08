"""A model version that is being served: its session, its batcher, its counters."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infera_gpu.cpus import default_threads
from infera_server.errors import BadRequest, Unavailable, run_error
from infera_server.metrics import ModelStats
from infera_server.models.declared import Declared, declared
from infera_server.models.definition import Definition
from infera_server.models.modelconfig import ModelConfig, completed
from infera_server.models.placement import Place
from infera_server.models.queue_policy import QueuePolicies, policies
from infera_server.models.samples import run_samples
from infera_server.pipelines.generation import generates
from infera_server.pipelines.sequence_config import with_states
from infera_server.pipelines.text_batching import derive_for_texts
from infera_server.processes.isolated import IsolatedSession
from infera_server.requests import Request
from infera_server.runtime import Session, open_file
from infera_server.scheduling.arrivals import arrivals
from infera_server.scheduling.batcher import Batcher
from infera_server.scheduling.batching import Batching, derive
from infera_server.scheduling.goal import Goal
from infera_server.scheduling.jobs import ANY_LEVELS, Batch, Done, Job, Levels
from infera_server.scheduling.padding import Lengthened, lengthened, widens, with_padding
from infera_server.scheduling.rows import Arrays, Layout, value_of
from infera_server.scheduling.signature import Signature, tensors
from infera_server.scheduling.turns import Turns
from infera_server.scheduling.warmup import prime
from infera_server.settings import Settings

log = logging.getLogger(__name__)

Post = Callable[..., object]
Opener = Callable[[Path, Settings], Session]


@dataclass(eq=False)
class Model:
    """A `Servable` over a session of the runtime. Made by `open_model`."""

    signature: Signature
    session: Session
    batching: Batching
    batcher: Batcher
    stats: ModelStats
    timeout: float
    source_name: str
    definition: Definition
    levels: Levels = ANY_LEVELS
    policies: QueuePolicies | None = None
    config: ModelConfig = field(init=False)
    device: str = field(init=False)
    retired: bool = field(default=False, init=False)
    measured: Mapping[int, float] = field(default_factory=dict, init=False)
    """Seconds of a run by rows, as measured at load."""

    _goes_by_shape: bool = field(init=False)
    """Whether shapes alone decide with whom a request can share a batch."""

    def __post_init__(self) -> None:
        self.device = self.session.device.name
        layout = self.signature.layout
        self._goes_by_shape = layout is None or (not layout.shared and layout.padding is None)
        self.config = completed(self.definition.config, self.signature, self.device, self.source_name)

    @property
    def lost(self) -> str:
        return self.session.device.lost

    @property
    def queued(self) -> int:
        return self.batcher.queued

    def check_room(self, nbytes: int) -> None:
        self.batcher.check_room(nbytes)

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        """To a model without state a sequence means nothing. Raises BadRequest for inputs that do not agree."""
        common = request.common
        if common is not None and common.grouped and common.grouped[0][0] is self.signature:
            _, rows, group = common.grouped[0]
        else:
            rows, group = self._rows(request.feeds)
            if common is not None and self._goes_by_shape:
                common.grouped[:] = [(self.signature, rows, group)]
        now = time.monotonic()
        deadline = now + min(request.timeout or math.inf, self.timeout)
        job = Job(request.feeds, done, rows, group, nbytes, deadline, self.levels.level(request.priority), now)
        if type(group) is Lengthened:
            job.length, job.longer = group.padding.own_length(request.feeds), group.length
        if self.policies is not None:
            self.policies.apply(job)
        self.batcher.submit(job)
        return job

    def cancel(self, job: Job) -> None:
        self.batcher.cancel(job)

    def expire(self) -> None:
        if self.batcher.expire() and self.session.supervision is not None:
            self.session.supervision.interrupt()

    def drain(self) -> None:
        self.batcher.drain()

    def join(self, timeout: float | None = None) -> bool:
        return self.batcher.join(timeout)

    def give_up(self, error: Exception) -> None:
        self.batcher.close()
        self.batcher.give_up(error)

    def _rows(self, feeds: Arrays) -> tuple[int, Any]:
        """The batch size, and what must be equal for requests to share a batch: all other dimensions.

        Without a layout none do; then it is what requests of about equal run times have in common.
        """
        layout, name = self.signature.layout, self.signature.name
        if layout is None:
            return 1, tuple(array.shape for array in feeds.values())
        rows = -1
        group: list[tuple[Hashable, ...]] = []
        for tensor, array in feeds.items():
            if tensor in layout.shared:
                group.append((tensor, value_of(array)))
                continue
            axis, shape = layout.inputs[tensor], array.shape
            if rows not in (-1, shape[axis]):
                raise BadRequest(f"input '{tensor}' batch size does not match other inputs for '{name}'")
            rows = shape[axis]
            group.append((tensor, shape[:axis], shape[axis + 1 :]))
        if rows > layout.max_rows:
            raise BadRequest(f"inference request batch-size must be <= {layout.max_rows} for '{name}'")
        if rows == 0:
            raise BadRequest(f"inference request batch-size must be at least 1 for '{name}'")
        if layout.padding is not None and (longer := layout.padding.length(feeds)):
            return rows, lengthened(feeds, layout, layout.padding, longer)
        group.sort()
        return rows, tuple(group)

    def close(self, timeout: float | None = None) -> None:
        """What runs on after `timeout` seconds (None: as long as a request may wait) is left to the process's end."""
        self.batcher.close()
        if self.batcher.join(self.timeout if timeout is None else max(timeout, 0.0)):
            self.session.close()


def threads_of(settings: Settings) -> tuple[int, str]:
    """CPU threads of a run, and why: as set, else all but what event loops need while a run goes on."""
    if settings.threads:
        return settings.threads, "as set"
    if settings.workers:
        return max(1, default_threads()[0] - settings.workers), "a CPU each is left to the workers"
    return max(1, default_threads()[0] - 1), "one CPU is left to the event loop"


def open_session(path: Path, settings: Settings, *, place: Place) -> Session:
    """Load an ONNX file with the runtime at its place. Raises InferaError."""
    return open_file(
        path,
        device=place.device,
        threads=threads_of(settings)[0],
        precision=settings.precision,
        batch_invariant=settings.batch_invariant,
        vram_limit=place.budget,
    )


def open_isolated(path: Path, settings: Settings, *, place: Place, name: str) -> Session:
    """`open_session` in a process of its own, to which the limit of GPU memory is then its own. Raises InferaError."""
    arguments = {
        "path": str(path),
        "device": place.device,
        "threads": threads_of(settings)[0],
        "precision": settings.precision,
        "batch_invariant": settings.batch_invariant,
        "vram_limit": settings.vram_limit,
    }
    return IsolatedSession(name, "infera_server.runtime:open_file", arguments)


def open_model(
    name: str,
    version: str,
    path: Path,
    settings: Settings,
    *,
    post: Post,
    turns_of: Callable[[str], Turns],
    opener: Opener,
    definition: Definition,
    stats: ModelStats | None = None,
) -> Model:
    """Load, find the batch axis by running the model, warm up, start the engine thread. Raises what loading raises.

    It counts in `stats`, which another may count in as well.
    """
    config = definition.config
    session = opener(path, settings)
    try:
        if config is not None:
            session = declared(session, with_states(config, session))
        inputs, outputs = tensors(session.inputs), tensors(session.outputs)
        if isinstance(session, Declared):
            inputs |= tensors(session.optional, optional=True)
        outputs = {n: replace(t, labels=labels) if (labels := definition.labels(n)) else t for n, t in outputs.items()}
        with (turns := turns_of(session.device.name)):
            if config is not None and generates(config):
                batching = derive_for_texts(session, config, settings.max_batch)
            else:
                batching = with_padding(session, _batching(session, config, settings.max_batch), settings.pad.get(name))
            run_samples(session, config, definition.folder)
        if session.device.lost:
            raise Unavailable(session.device.lost)
    except BaseException:
        session.close()
        raise
    supervision = session.supervision
    stats = stats or ModelStats()
    kind, _, index = session.device.name.partition(":")
    if kind == "cuda":
        stats.memory["GPU", int(index or 0)] = session.facts().weight_bytes
    goal = None
    if slo := settings.slo_p99_of.get(name, settings.slo_p99):
        goal = Goal(slo, name)
        stats.goal = stats.goal or goal

    def answer(deliver: Callable[[Batch], None], batch: Batch) -> None:
        batch.results = [run_error(r, name) if isinstance(r, Exception) else r for r in batch.results]
        post(deliver, batch)

    rules = policies(config)
    batcher = Batcher(
        session.run,
        batching.layout,
        max_queue=settings.max_queue,
        max_queue_bytes=settings.max_queue_bytes,
        name=name,
        post=answer,
        observe=stats.ran,
        turns=turns,
        run_limit=settings.request_timeout,
        goal=goal,
        widens=widens if batching.layout and batching.layout.padding else None,
        weight=settings.shares.get(name, 1.0),
        soon=arrivals.soon,
        inline_limit=settings.inline_run if session.device.name == "cpu" and supervision is None else 0.0,
        wait_for_engine=supervision.wait if supervision is not None else None,
        most_of=rules.most if rules is not None else None,
    )
    signature = Signature(name, version, inputs, outputs, batching.layout)
    levels = Levels(settings.priority_levels, settings.default_priority)
    timeout = min(definition.queue_timeout or math.inf, settings.request_timeout)
    model = Model(signature, session, batching, batcher, stats, timeout, path.name, definition, levels, rules)
    size = next(iter(batching.sizes.values()), 1)
    model.measured = prime(
        session,
        batching.layout,
        size,
        lambda feeds: model._rows(feeds)[1],
        batcher.schedule,
        batcher.share,
        settings.warmup_seconds,
    )
    return model


def _batching(session: Session, config: ModelConfig | None, max_batch: int) -> Batching:
    """As derived; where a configuration declares the tensors, with the batch it declares or none."""
    if config is None or not (config.max_batch_size or config.input or config.output):
        return derive(session, max_batch)
    if not config.max_batch_size:
        return replace(derive(session, 1), reason="off: the configuration has no max_batch_size")
    found = derive(session, max_batch)
    first = Layout(dict.fromkeys(session.inputs, 0), dict.fromkeys(session.outputs, 0), (1,))
    if max_batch == 1:
        return replace(found, layout=first, reason="off: max_batch_size is 1")
    if found.layout is not None and any((*found.layout.inputs.values(), *found.layout.outputs.values())):
        return replace(derive(session, 1), reason="off: the first axis, which the configuration batches, is not proven")
    return found
