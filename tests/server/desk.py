"""Models without a server: the test is the event loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from weakref import ref

from infera_server.models.definition import Definition
from infera_server.models.discovery import Source
from infera_server.models.model import Model, open_model
from infera_server.models.servable import Servable
from infera_server.requests import Correlation, Request
from infera_server.runtime import Session
from infera_server.scheduling.jobs import Batch, Done, Job
from infera_server.scheduling.rows import Arrays, HostArray
from infera_server.scheduling.turns import Turns
from infera_server.settings import Settings
from tests.server.support import WAIT


@dataclass
class Answer:
    """What a request was answered with; nothing while it is not."""

    result: Arrays | Exception | None = None
    batch: Batch | None = None
    count: int = 0

    def __call__(self, result: Arrays | Exception, batch: Batch | None) -> None:
        self.result, self.batch = result, batch
        self.count += 1

    @property
    def outputs(self) -> Arrays:
        """The result; fails where it is an error."""
        assert self.result is not None
        assert not isinstance(self.result, Exception), self.result
        return self.result

    def __getitem__(self, name: str) -> HostArray:
        return self.outputs[name]


@dataclass
class Desk:
    """Takes what engine threads post, and does it when the test waits."""

    posted: SimpleQueue[tuple[Callable[[Any], None], Any]] = field(default_factory=SimpleQueue)
    opened: list[Model] = field(default_factory=list)

    def post(self, fn: Callable[[Any], None], argument: Any) -> None:
        self.posted.put((fn, argument))

    def open(self, session: Session, name: str = "m", **settings: Any) -> Model:
        """A session as a model that takes requests."""
        chosen = Settings(**{"inline_run": 0.0, "warmup_seconds": 0.0} | settings)
        source = Source(name, "1", Path(f"{name}.onnx"))
        model = open_model(
            name,
            "1",
            source.path,
            chosen,
            post=self.post,
            turns_of=lambda device: Turns(),
            opener=lambda path, _: session,
            definition=Definition(name, [source]),
        )
        model.batcher.soon = None  # there is no event loop
        self.opened.append(model)
        return model

    def until(self, condition: Callable[[], bool]) -> None:
        """Do what is posted until it holds."""
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            fn, argument = self.posted.get(timeout=WAIT)
            fn(argument)

    def ask(self, model: Servable, correlation: Correlation | None = None, **feeds: HostArray) -> Answer:
        """Send a request and wait for its answer; what `submit` raises is raised."""
        answer = Answer()
        _submit(model, answer, Request("", feeds, [], correlation=correlation))
        self.until(lambda: answer.count > 0)
        return answer

    def close(self) -> None:
        for model in self.opened:
            model.close(WAIT)


class Count:
    """A callback that keeps nothing."""

    def __init__(self) -> None:
        self.answers = 0

    def __call__(self, result: Arrays | Exception, batch: Batch | None) -> None:
        self.answers += 1


def leaves_nothing(send: Callable[[Done], object], until: Callable[[Callable[[], bool]], None]) -> bool:
    """Whether an answered request is freed at once: a circle would wait for the garbage collector, which halts all."""
    gc.collect()
    gc.disable()
    try:
        count = Count()
        known = ref(count)
        job = send(count)
        until(partial(_is_answered, known))
        del count, job
        return known() is None
    finally:
        gc.enable()


def _is_answered(known: ref[Count]) -> bool:
    count = known()
    return count is not None and count.answers > 0


def send(
    model: Servable,
    answer: Done,
    correlation: Correlation | None = None,
    *,
    timeout: float | None = None,
    priority: int = 0,
    **feeds: HostArray,
) -> Job:
    """Submit a request."""
    return _submit(model, answer, Request("", feeds, [], timeout, priority, correlation))


def _submit(model: Servable, answer: Done, request: Request) -> Job:
    return model.submit(request, sum(array.nbytes for array in request.feeds.values()), answer)
