"""Texts, token by token: a decoder's outputs are its next inputs until it says that it is done.

Every token is a request of the model, so the model's batcher puts tokens of different texts into one batch, and a text
that begins joins those under way with its next run. Of one text only one run is with the batcher at a time.

With a decoupled configuration each token is a response, the last one says so, and where the model stops by itself the
end is one without outputs. Without, there is one response with all tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from infera_server.errors import BadRequest, Overloaded, RequestError, Unavailable
from infera_server.models.model import Model
from infera_server.models.modelconfig import ModelConfig, completed
from infera_server.models.taps import Tap
from infera_server.pipelines.generation import Decoding, decoding, proven
from infera_server.pipelines.sampling import Sampler, Sampling, sampling
from infera_server.pipelines.sequence_steps import size_of
from infera_server.requests import Request, check_each
from infera_server.scheduling.jobs import Batch, Done, Job, State, answer
from infera_server.scheduling.rows import Arrays, HostArray
from infera_server.scheduling.signature import Signature, Tensor

TOKENS = "tokens"
"""The output: what is generated, [1, how many]."""

RETRY_AFTER = 1.0
"""Seconds after which a text may have ended."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Of one model: texts under way, and bytes of their states."""

    texts: int = 256
    state_bytes: int = 256 << 20


@dataclass(slots=True, eq=False, kw_only=True)
class Text(Job):
    """A request: what is to be run next, what is known of the text so far, and the run that is with the batcher.

    `first` are states that it brought for the first run. What was `read` is kept where every run reads it again.
    """

    request: Request
    sampler: Sampler
    left: int
    ahead: list[int]
    shared: Arrays
    first: Arrays
    past: int = 0
    padding: int = 0
    read: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    responses: int = 0
    responded_at: float
    memory: dict[str, HostArray] | None = None
    run: Job | None = None


class Generator(Tap):
    """A `Servable` before the model of a decoder. Made by `generator`."""

    retired: bool = False

    def __init__(self, model: Model, how: Decoding, limits: Texts, decoupled: bool) -> None:
        super().__init__(model)
        self.how, self.limits = how, limits
        self.signature = _seen(model.signature, how, decoupled)
        self.config = completed(model.definition.config, self.signature, model.device, model.source_name)
        self.state_bytes = 0
        self._timeout = model.timeout
        self._texts: set[Text] = set()
        self._draining = False
        self.stats.sequences = 0, 0

    def check_room(self, nbytes: int) -> None:
        self._check_open()
        self.model.check_room(nbytes)

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        """Raises BadRequest for a prompt that is not one row of tokens, too."""
        self._check_open()
        check_each(request, self.signature)
        asked = sampling(request.parameters, self.how.most)
        prompt = request.feeds[self.how.tokens]
        if prompt.shape[0] != 1 or not prompt.size:
            raise BadRequest(
                f"input '{self.how.tokens}' for model '{self.signature.name}' must have one row of tokens, got "
                f"{list(prompt.shape)}"
            )
        text = self._text(request, nbytes, done, asked)
        self._texts.add(text)
        try:
            self._go_on(text)
        except RequestError:
            self._forget(text)
            raise
        self._count()
        return text

    def _text(self, request: Request, nbytes: int, done: Done, asked: Sampling) -> Text:
        now = time.monotonic()
        return Text(
            request.feeds,
            done,
            nbytes=nbytes,
            deadline=now + min(request.timeout or math.inf, self._timeout),
            queued_at=now,
            came_at=now,
            responded_at=now,
            request=request,
            sampler=Sampler(asked),
            left=asked.most,
            ahead=request.feeds[self.how.tokens].ravel().tolist(),
            shared={name: request.feeds[name] for name in self.how.shared},
            first={name: request.feeds[name] for name in self.how.beginnings if name in request.feeds},
        )

    def cancel(self, job: Job) -> None:
        if isinstance(job, Text) and job in self._texts:
            job.state = State.CANCELLED
            if job.run is not None:
                self.model.cancel(job.run)
            self._responded(job, "cancel")
            self._end(job)

    def drain(self) -> None:
        """Texts that are under way are written to their end; then the model is drained."""
        self._draining = True
        self._check_ended()

    def give_up(self, error: Exception) -> None:
        for text in list(self._texts):
            if text.run is not None:
                self.model.cancel(text.run)
            self._responded(text, "fail")
            self._end(text)
            answer(text, error)
        self.model.give_up(error)

    # --- runs --------------------------------------------------------------------------------------------------------

    def _go_on(self, text: Text) -> None:
        """Give the batcher what comes next of a text. Raises RequestError."""
        count = len(text.ahead) if self.how.wide else 1
        tokens, text.ahead = text.ahead[:count], text.ahead[count:]
        if self.how.rereads:
            text.read += tokens
            feeds = self.how.feeds(text.read, 0, text.memory, text.shared)
        else:
            feeds = self.how.feeds(tokens, text.past, text.memory, text.shared, text.padding)
        if text.memory is None:
            feeds |= text.first
        text.past += count
        left = max(text.deadline - time.monotonic(), 1e-6)
        request = replace(text.request, feeds=feeds, timeout=left, correlation=None, common=None, each=None)
        text.run = self.model.submit(request, text.nbytes, partial(self._ran, text))

    def _ran(self, text: Text, result: Arrays | Exception, batch: Batch | None) -> None:
        run, text.run = text.run or text, None
        if text.state is not State.WAITING:
            return
        try:
            if isinstance(result, Exception):
                raise result
            memory, text.padding = self.how.next_state(result, text.past)
            self._keep(text, memory)
            if not text.ahead:
                token = text.sampler.choose(self.how.next_logits(result))
                text.queued_at = run.queued_at  # a response tells of the run that made its last token
                if self._is_last(text, token, batch):
                    told = self._told(text.made)
                    self._responded(text, "success" if told else "empty_response")
                    self._end(text)
                    answer(text, told, batch)
                    return
                text.ahead = [token]
            self._go_on(text)
        except Exception as error:
            self._responded(text, "fail")
            self._end(text)
            answer(text, error)

    def _is_last(self, text: Text, token: int, batch: Batch | None) -> bool:
        """Take a token. What is `made` then is what the last response tells."""
        if token in self.how.stop:
            return True
        text.made.append(token)
        text.left -= 1
        if text.left and self.signature.decoupled and text.request.each is not None:
            self._responded(text, "success")
            text.request.each(self._told(text.made), batch, text)
            text.made = []
        return not text.left or text.state is not State.WAITING

    def _told(self, tokens: Sequence[int]) -> Arrays:
        """A response; without outputs where it is decoupled and there are no tokens."""
        if not tokens and self.signature.decoupled:
            return {}
        return {TOKENS: np.array([tokens], self.how.dtype)}

    def _responded(self, text: Text, outcome: str) -> None:
        """Count a response to a text that is under way, where responses are told one by one."""
        if self.signature.decoupled and text in self._texts:
            now = time.monotonic()
            self.stats.responded(text.responses, now - text.responded_at, outcome)
            text.responses, text.responded_at = text.responses + 1, now

    # --- accounting --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        """Raises Unavailable or Overloaded."""
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        if len(self._texts) >= self.limits.texts:
            raise self._full()

    def _full(self) -> Overloaded:
        return Overloaded(
            f"model '{self.signature.name}' has {len(self._texts)} texts under way ({self.state_bytes:,} bytes of "
            f"state), its limit is {self.limits.texts} ({self.limits.state_bytes:,} bytes); send the request again "
            "later",
            RETRY_AFTER,
            "sequences",
        )

    def _keep(self, text: Text, memory: dict[str, HostArray] | None) -> None:
        """Raises Overloaded where a state has grown over what there is for all."""
        grown = size_of(memory) - size_of(text.memory)
        if grown > 0 and self.state_bytes + grown > self.limits.state_bytes:
            raise self._full()
        self.state_bytes += grown
        text.memory = memory
        self._count()

    def _forget(self, text: Text) -> None:
        self._keep(text, None)
        self._texts.discard(text)
        self._count()

    def _end(self, text: Text) -> None:
        if text in self._texts:
            self._forget(text)
            self._check_ended()

    def _check_ended(self) -> None:
        if self._draining and not self._texts:
            self.model.drain()

    def _count(self) -> None:
        self.stats.sequences = len(self._texts), self.state_bytes


def generator(model: Model, config: ModelConfig, limits: Texts) -> Generator:
    """The model as its configuration has it generate, proven by runs. Raises ConfigError."""
    with model.batcher.turns:
        how = proven(model.session, decoding(model.session, model.batching.layout, config))
    return Generator(model, how, limits, config.model_transaction_policy.decoupled)


def _seen(model: Signature, how: Decoding, decoupled: bool) -> Signature:
    """What clients see: a prompt, what else they are to feed, states that they may feed, and tokens."""
    prompt = replace(model.inputs[how.tokens], shape=(1, -1), optional=False)
    made = Tensor(TOKENS, prompt.datatype, prompt.dtype, (1, -1))
    inputs = {how.tokens: prompt, **{name: model.inputs[name] for name in how.shared}}
    inputs |= {name: replace(model.inputs[name], optional=True) for name in how.beginnings}
    return replace(model, inputs=inputs, outputs={TOKENS: made}, layout=None, decoupled=decoupled)
