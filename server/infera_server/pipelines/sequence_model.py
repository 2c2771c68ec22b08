"""Sequences of requests to a recurrent model: their state is kept here from one step to the next.

A step is a request of the model with its sequence's state among the inputs, so the model's batcher puts steps of
different sequences into one batch: gathering its rows gathers the states, and splitting the outputs scatters them. Of
one sequence only one step is with the batcher at a time; the others wait here, in the order they came in.

What a step does to its sequence:

- A step that succeeds replaces the state. A step that fails, expires, is refused or is cancelled leaves the state as it
  was, also where its run had begun: it can be sent again. Steps that waited behind it were meant for another state:
  they are answered with its error, up to the next first step.
- A first step (START) begins from the initial state whatever there was; one that fails leaves no sequence.
- A last step (END) that succeeds ends the sequence. So does silence for longer than `idle`.
- Where the configuration limits the sequences under way, those above the limit wait whole until one ends.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from infera_server.codec import short
from infera_server.errors import BadRequest, Expired, Overloaded, RequestError, Unavailable
from infera_server.models.model import Model
from infera_server.models.modelconfig import completed
from infera_server.models.taps import Tap
from infera_server.pipelines.recurrence import Recurrence, seen
from infera_server.pipelines.sequence_steps import (
    DEFAULT_LIMITS,
    RETRY_AFTER,
    Identity,
    Limits,
    Sequence,
    Step,
    identity_of,
    named,
    own,
    repeated,
    size_of,
)
from infera_server.requests import Request, check_complete
from infera_server.scheduling.jobs import Batch, Done, Job, answer
from infera_server.scheduling.jobs import State as JobState
from infera_server.scheduling.rows import Arrays, HostArray

log = logging.getLogger(__name__)


class SequenceModel(Tap):
    """A model with its sequences. Requests of no sequence run as ever, unless the configuration needs one."""

    retired: bool = False

    def __init__(
        self,
        model: Model,
        recurrence: Recurrence,
        limits: Limits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(model)
        self.signature = seen(model.signature, recurrence)
        self.config = completed(model.definition.config, self.signature, model.device, model.source_name)
        self.recurrence, self.limits, self.clock = recurrence, limits, clock
        self.waiting = 0
        """Steps that are not with the batcher."""

        self.state_bytes = 0
        self.stats.sequences = 0, 0
        self._timeout = model.timeout
        self._sequences: dict[Identity, Sequence] = {}
        """The one that was silent for longest comes first."""

        self._running: set[Identity] = set()
        self._backlog: dict[Identity, None] = {}
        self._draining = False
        self._initial_bytes = sum(state.initial.nbytes for state in recurrence.states)
        self._idle = limits.idle if recurrence.idle is None else recurrence.idle

    @property
    def sequences(self) -> int:
        """How many are under way."""
        return len(self._sequences)

    @property
    def queued(self) -> int:
        return self.model.queued + self.waiting

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        """Raises BadRequest where the sequence is not named or has not begun, too."""
        correlation, name = request.correlation, self.signature.name
        if correlation is None or correlation.id in (0, ""):
            if self.recurrence.needed or correlation is not None:
                raise BadRequest(
                    f"inference request to model '{name}' must specify a non-zero or non-empty correlation ID"
                )
            check_complete(request.feeds, self.model.signature)
            return self.model.submit(request, nbytes, done)
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        identity, now = identity_of(correlation), self.clock()
        sequence = self._sequences.get(identity)
        if not (correlation.start or (sequence is not None and sequence.open)):
            raise BadRequest(
                f"inference request for sequence {short(str(correlation.id))} to model '{name}' must specify the START "
                "flag on the first request of the sequence"
            )
        self._check_limits(sequence)
        if sequence is None:
            sequence = self._sequences[identity] = Sequence()
        deadline = now + min(request.timeout or math.inf, self._timeout)
        step = Step(
            request.feeds,
            done,
            nbytes=nbytes,
            deadline=deadline,
            queued_at=now,
            request=request,
            correlation=correlation,
            sequence=sequence,
        )
        sequence.steps.append(step)
        sequence.open = not correlation.end
        self.waiting += 1
        self._touch(identity)
        if len(sequence.steps) == 1:
            try:
                self._begin(step)
            except RequestError:
                self._take(step)
                self._settle(identity)
                raise
        return step

    def cancel(self, job: Job) -> None:
        """What it would have made of the state is lost, also where it is running."""
        if not isinstance(job, Step):
            self.model.cancel(job)
        elif job.state is JobState.WAITING and job in self._steps(identity_of(job.correlation)):
            job.state = JobState.CANCELLED
            if job.run is not None:
                self.model.cancel(job.run)
            self._fail(job, Unavailable(f"a request before it in {named(job)} was cancelled"))
            self._settle(identity_of(job.correlation))

    def expire(self) -> None:
        self.model.expire()
        now = self.clock()
        if self.waiting:
            steps = [step for sequence in self._sequences.values() for step in sequence.steps]
            for step in steps:
                if step.run is None and step.deadline <= now and step.state is JobState.WAITING:
                    self._fail(step, self._expired(step, now))
                    self._settle(identity_of(step.correlation))
        self._end_silent(now)

    def drain(self) -> None:
        """Steps that were accepted are still run, one after the other; then the model is drained."""
        self._draining = True
        self._go_on()

    # --- steps -------------------------------------------------------------------------------------------------------

    def _begin(self, step: Step) -> None:
        """Give a sequence's first step to the batcher, if the sequence may be under way. Raises RequestError."""
        identity = identity_of(step.correlation)
        if identity not in self._running and not self._has_slot:
            self._backlog[identity] = None
            return
        self._backlog.pop(identity, None)
        self._running.add(identity)
        now = self.clock()
        if step.deadline <= now:
            raise self._expired(step, now)
        request = replace(
            step.request, feeds=self._feeds(step), timeout=step.deadline - now, correlation=None, common=None
        )
        step.run = self.model.submit(request, step.nbytes, partial(self._done, step))
        self.waiting -= 1

    @property
    def _has_slot(self) -> bool:
        return self._draining or not self.recurrence.slots or len(self._running) < self.recurrence.slots

    def _feeds(self, step: Step) -> dict[str, HostArray]:
        """What the request feeds, with the states that it does not feed itself and the control inputs."""
        layout, given = self.model.signature.layout, step.request.feeds
        axes = layout.inputs if layout is not None else {}
        rows = next((array.shape[axes[name]] for name, array in given.items() if name in axes), 1)
        if rows > 1 and self.recurrence.needed:
            raise BadRequest(
                f"inference request to model '{self.signature.name}' must specify batch-size 1 due to requirements of "
                "sequence batcher"
            )
        kept = None if step.correlation.start else step.sequence.state
        feeds = {
            state.input: repeated(state.initial, rows, axes.get(state.input)) if kept is None else kept[state.input]
            for state in self.recurrence.states
        }
        for control in self.recurrence.controls:
            axis = axes.get(control.input)
            shape = tuple(rows if at == axis else abs(dim) for at, dim in enumerate(control.shape))
            feeds[control.input] = np.full(shape, control.value(step.correlation), control.dtype)
        return feeds | given

    def _done(self, step: Step, result: Arrays | Exception, batch: Batch | None) -> None:
        """The batcher is through with a step: the next one goes there before this one's answer is written."""
        identity, sequence = identity_of(step.correlation), step.sequence
        if isinstance(result, Exception):
            self._fail(step, result)
            self._settle(identity)
            return
        made = {state.input: own(result[state.output]) for state in self.recurrence.states}
        grown = size_of(made) - size_of(sequence.state)
        if grown > 0 and self.state_bytes + grown > self.limits.state_bytes:
            self._fail(step, self._full())
            self._settle(identity)
            return
        self._keep(sequence, None if step.correlation.end else made)
        self._take(step)
        self._settle(identity)
        answer(step, result, batch)

    def _fail(self, step: Step, error: Exception) -> None:
        """Answer a step, and those that waited behind it for the state that it was to make."""
        sequence = step.sequence
        steps = list(sequence.steps)
        at = steps.index(step)
        last = next((i for i in range(at + 1, len(steps)) if steps[i].correlation.start), len(steps))
        if at == 0 and step.correlation.start:
            self._keep(sequence, None)
        for failed in steps[at:last]:
            self._take(failed)
        for failed in steps[at:last]:
            answer(failed, error)

    def _take(self, step: Step) -> None:
        """It is no step of its sequence any more."""
        step.sequence.steps.remove(step)
        self.waiting -= step.run is None
        step.run = None  # which leads back to it

    def _settle(self, identity: Identity) -> None:
        """Steps of a sequence have left: go on with it, and with those that waited for it to end."""
        sequence = self._sequences.get(identity)
        if sequence is not None:
            self._advance(identity, sequence)
        self._go_on()

    def _advance(self, identity: Identity, sequence: Sequence) -> None:
        while sequence.steps and sequence.steps[0].run is None:
            step = sequence.steps[0]
            try:
                self._begin(step)
                break
            except RequestError as error:
                self._fail(step, error)
        if sequence.steps:
            sequence.open = not sequence.steps[-1].correlation.end
            self._touch(identity)
        elif sequence.state is not None:
            sequence.open = True
            self._touch(identity)
        else:
            self._forget(identity)

    def _go_on(self) -> None:
        while self._backlog and self._has_slot:
            identity = next(iter(self._backlog))
            self._advance(identity, self._sequences[identity])
        if self._draining and not self.waiting:
            self.model.drain()

    # --- sequences ---------------------------------------------------------------------------------------------------

    def _steps(self, identity: Identity) -> Iterable[Step]:
        sequence = self._sequences.get(identity)
        return sequence.steps if sequence is not None else ()

    def _touch(self, identity: Identity) -> None:
        sequence = self._sequences.pop(identity)
        sequence.used_at = self.clock()
        self._sequences[identity] = sequence
        self.stats.sequences = len(self._sequences), self.state_bytes

    def _keep(self, sequence: Sequence, state: dict[str, HostArray] | None) -> None:
        self.state_bytes += size_of(state) - size_of(sequence.state)
        sequence.state = state

    def _forget(self, identity: Identity) -> None:
        self._keep(self._sequences.pop(identity), None)
        self._running.discard(identity)
        self._backlog.pop(identity, None)
        self.stats.sequences = len(self._sequences), self.state_bytes

    def _end_silent(self, now: float) -> None:
        ended = False
        while self._sequences:
            identity, sequence = next(iter(self._sequences.items()))
            if now - sequence.used_at < self._idle:
                break
            if sequence.steps:
                self._touch(identity)
            else:
                log.debug("model '%s': sequence %s was silent and is ended", self.signature.name, identity[1])
                self._forget(identity)
                ended = True
        if ended:
            self._go_on()

    def _check_limits(self, sequence: Sequence | None) -> None:
        if self.waiting >= self.limits.waiting or (sequence is None and len(self._sequences) >= self.limits.sequences):
            raise self._full()
        if sequence is None and self.state_bytes + self._initial_bytes > self.limits.state_bytes:
            raise self._full()

    def _full(self) -> Overloaded:
        return Overloaded(
            f"model '{self.signature.name}' has {len(self._sequences)} sequences under way ({self.state_bytes:,} bytes "
            f"of state) and {self.waiting} requests waiting for others of theirs, its limit is {self.limits.sequences} "
            f"({self.limits.state_bytes:,} bytes) and {self.limits.waiting}; send the request again later",
            RETRY_AFTER,
            "sequences",
        )

    def _expired(self, step: Step, now: float) -> Expired:
        waited = f"{(now - step.queued_at) * 1e3:.1f} ms"
        return Expired(f"model '{self.signature.name}': the request's time was up after {waited} in {named(step)}")
