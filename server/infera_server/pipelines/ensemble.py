"""Pipelines of models without leaving the process: `ensemble_scheduling` of Triton's model configuration.

A step starts as soon as its inputs are there, as a request of its model: steps of different requests, and requests of
clients of that model, share its batches. Arrays go from step to step as they are. Priority and what is left of the
request's time go along; a request that is cancelled, or one step of which fails, cancels the others.

Models are looked up when they are needed: another version that was loaded in place of one is used from the next step
on, if its tensors fit. While one is missing the ensemble takes no requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias
from weakref import ref

from infera_server.errors import BadRequest, NotFound, RequestError, Unavailable, renamed, request_error
from infera_server.metrics import ModelStats
from infera_server.models.modelconfig import ConfigError, ModelConfig
from infera_server.models.servable import Passing, Servable
from infera_server.models.taps import Tap
from infera_server.models.versions import Route, chosen
from infera_server.pipelines.ensemble_graph import Graph, Step, check_members, unproven
from infera_server.pipelines.ensemble_run import Run
from infera_server.pipelines.sequence_model import SequenceModel
from infera_server.requests import Request, check_input
from infera_server.scheduling.jobs import Batch, Done, Job, State, answer
from infera_server.scheduling.rows import Arrays
from infera_server.scheduling.signature import Signature

Lookup: TypeAlias = Callable[[str, str | None], Servable]
"""A model that can run, by name and version; None is the newest. Raises NotFound or Unavailable."""

MOST_ASKED = 256
"""Choices of outputs that are known to an ensemble; clients can make many more."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """The model of a step that was seen to fit; weak, since a model that is unloaded must not live on here.

    The `unproven` inputs are checked in each run.
    """

    model: ref[Servable]
    unproven: Sequence[str]
    keeps_state: bool


@dataclass(eq=False)
class Ensemble(Passing):
    """A `Servable` over others. Made by `ensembles.build`."""

    graph: Graph
    config: ModelConfig
    lookup: Lookup
    timeout: float
    depends: frozenset[str]
    """Models whose absence makes it unavailable; members of ensembles within it included."""

    stats: ModelStats = field(default_factory=ModelStats, init=False)
    source_name: str = field(default="ensemble", init=False)
    retired: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.signature: Signature = self.graph.signature
        self._fitting: Sequence[Fitting] = ()
        self._runs: set[Run] = set()
        self._needed: dict[frozenset[str], Sequence[Step]] = {}

    @property
    def device(self) -> str:
        return ", ".join(sorted({member.device for f in self._fitting if (member := f.model()) is not None}))

    @property
    def lost(self) -> str:
        """Members speak for themselves."""
        return ""

    @property
    def queued(self) -> int:
        """Requests that are not answered."""
        return len(self._runs)

    def parts(self) -> Sequence[Servable] | None:
        """The models that answer just now, of ensembles within it theirs; None where requests are split over several.

        Raises Unavailable.
        """
        found: list[Servable] = []
        for member in self._resolve():
            while isinstance(member, Tap):
                if isinstance(member, Route):
                    return None
                member = member.model
            inner = member.parts() if isinstance(member, Ensemble) else [member]
            if inner is None:
                return None
            found += inner
        return found

    def check_room(self, nbytes: int) -> None:
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        for member in self._resolve():
            member.check_room(nbytes)

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        """Raises BadRequest where its inputs do not agree on the batch, too."""
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        rows = self._rows(request.feeds)
        asked = frozenset(output.name for output in request.outputs) or frozenset(self.signature.outputs)
        steps = self._needed.get(asked)
        if steps is None:
            if len(self._needed) >= MOST_ASKED:
                self._needed.clear()
            steps = self._needed[asked] = self.graph.needed(asked)
        self._resolve()
        now = time.monotonic()
        run = Run(
            request.feeds,
            done,
            rows,
            None,
            nbytes,
            now + min(request.timeout or math.inf, self.timeout),
            queued_at=now,
            request=request,
            outputs=tuple(asked),
            tensors=dict(request.feeds),
            waiting=list(steps),
        )
        self._runs.add(run)
        try:
            self._start_ready(run)
        except RequestError:
            self._end(run)
            raise
        return run

    def cancel(self, job: Job) -> None:
        if job in self._runs:
            job.state = State.CANCELLED
            self._end(job)

    def expire(self) -> None:
        """Steps that wait carry what is left of the request's time: their models answer them."""

    def give_up(self, error: Exception) -> None:
        for run in list(self._runs):
            self._end(run)
            answer(run, error)

    def close(self, timeout: float | None = None) -> None:
        """There is nothing to release: what it has accepted its members answer."""
        self._draining = True

    # --- steps -------------------------------------------------------------------------------------------------------

    def _find(self, step: Step) -> Servable:
        """The model of a step. Raises Unavailable, with the ensemble's name."""
        name = self.signature.name
        try:
            return self.lookup(step.model, step.version)
        except NotFound:
            raise Unavailable(absent_text(name, step)) from None
        except RequestError as error:
            raise renamed(error, f"in ensemble '{name}', {error}") from None

    def _resolve(self) -> Sequence[Servable]:
        """The models of all steps, whose tensors fit. Raises Unavailable, with the ensemble's name."""
        members = [self._find(step) for step in self.graph.steps]
        if members != [fitting.model() for fitting in self._fitting]:
            try:
                self.fit(members)
            except ConfigError as error:
                raise Unavailable(f"{error}; the model was loaded again after the ensemble") from None
        return members

    def fit(self, members: Sequence[Servable]) -> None:
        """Use these models for the steps. Raises ConfigError where their tensors do not fit together."""
        signatures = [member.signature for member in members]
        if many := next((s.name for s in signatures if s.decoupled), None):
            raise ConfigError(
                f"ensemble {self.signature.name} cannot pass on the responses of decoupled model '{many}'"
            )
        check_members(self.graph, signatures)
        self._fitting = [
            Fitting(ref(member), names, _keeps_state(member))
            for member, names in zip(members, unproven(self.graph, signatures), strict=True)
        ]

    def _member(self, step: Step) -> tuple[Servable, Fitting]:
        member = self._find(step)
        if member is not self._fitting[step.index].model():
            self._resolve()
        return member, self._fitting[step.index]

    def _start_ready(self, run: Run) -> None:
        """Start every step whose inputs are there. Raises what its model refuses it with."""
        have = run.tensors.keys()
        ready = [step for step in run.waiting if step.reads <= have]
        if ready:
            run.waiting = [step for step in run.waiting if not step.reads <= have]
        for step in ready:
            self._start(run, step)
            if run.state is not State.WAITING:
                return

    def _start(self, run: Run, step: Step) -> None:
        (member, fitting), asked = self._member(step), run.request
        feeds = {own: run.tensors[tensor] for own, tensor in step.inputs.items()}
        began = time.monotonic()
        left = run.deadline - began
        try:
            for own in fitting.unproven:
                tensor = member.signature.inputs[own]
                check_input(tensor, tensor.datatype, feeds[own].shape, member.signature)
            correlation = asked.correlation if fitting.keeps_state else None
            request = Request(asked.id, feeds, step.asks, max(left, 1e-6), asked.priority, correlation)
            member = chosen(member, request)
            run.under_way[step.index] = member, None
            nbytes = sum([array.nbytes for array in feeds.values()])
            job = member.submit(request, nbytes, partial(self._stepped, run, step, member.stats, began))
        except RequestError as error:
            member.stats.stepped(False, time.monotonic() - began)
            run.under_way.pop(step.index, None)
            raise renamed(error, f"in ensemble '{self.signature.name}', {error}") from None
        if step.index in run.under_way:
            run.under_way[step.index] = member, job

    def _stepped(
        self, run: Run, step: Step, stats: ModelStats, began: float, result: Arrays | Exception, batch: Batch | None
    ) -> None:
        stats.stepped(not isinstance(result, Exception), time.monotonic() - began)
        run.under_way.pop(step.index, None)
        if batch is not None:
            run.add(batch)
        if run.state is not State.WAITING:
            return
        name = self.signature.name
        if isinstance(result, Exception):
            failure = request_error(result, step.model)
            self._end(run)
            answer(run, renamed(failure, f"in ensemble '{name}', {failure}"))
            return
        for own, tensor in step.outputs.items():
            run.tensors[tensor] = result[own]
        try:
            self._start_ready(run)
        except RequestError as error:
            self._end(run)
            answer(run, error)
            return
        if run.waiting:
            self._forget_used(run)
        elif not run.under_way and run.state is State.WAITING:
            whole = run.summed()
            self.stats.ran(whole)
            self._end(run)
            answer(run, {tensor: run.tensors[tensor] for tensor in run.outputs}, whole)

    def _forget_used(self, run: Run) -> None:
        """Let go of tensors that no step and no client waits for."""
        wanted = set(run.outputs).union(*[step.reads for step in run.waiting])
        run.tensors = {tensor: array for tensor, array in run.tensors.items() if tensor in wanted}

    def _end(self, run: Run) -> None:
        """Nothing more is done for a request; what is under way is cancelled."""
        run.waiting = []
        under_way, run.under_way = run.under_way, {}
        for member, job in under_way.values():
            if job is not None:
                member.cancel(job)
        self._runs.discard(run)
        self._check_ended()

    def _rows(self, feeds: Arrays) -> int:
        layout, name = self.signature.layout, self.signature.name
        if layout is None:
            return 1
        rows: dict[str, int] = {tensor: array.shape[0] for tensor, array in feeds.items()}
        first = next(iter(rows.values()))
        for tensor, count in rows.items():
            if count != first:
                raise BadRequest(f"input '{tensor}' batch size does not match other inputs for '{name}'")
        if not 0 < first <= layout.max_rows:
            bound = f"<= {layout.max_rows}" if first else "at least 1"
            raise BadRequest(f"inference request batch-size must be {bound} for '{name}'")
        return first


def _keeps_state(member: Servable) -> bool:
    """Whether a model, or one of an ensemble, has sequences."""
    while isinstance(member, Tap) and not isinstance(member, SequenceModel):
        member = member.model
    return isinstance(member, SequenceModel | Ensemble)


def absent_text(name: str, step: Step) -> str:
    if step.version is not None:
        return f"ensemble '{name}' depends on '{step.model}' whose required version {step.version} is not loaded."
    return f"ensemble '{name}' depends on '{step.model}' which has no loaded version."
