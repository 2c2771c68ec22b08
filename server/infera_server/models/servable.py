"""What dialects, the drain and the metrics need of a model, whatever runs it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Protocol

from infera_server.metrics import ModelStats
from infera_server.models.modelconfig import ModelConfig
from infera_server.requests import Request
from infera_server.scheduling.jobs import Done, Job
from infera_server.scheduling.signature import Signature


class Servable(Protocol):
    """Takes requests until `drain`. Used from the event loop's thread, except `join` and `close`."""

    @property
    def signature(self) -> Signature: ...
    @property
    def config(self) -> ModelConfig:
        """What Triton's configuration says of it, completed."""

    @property
    def stats(self) -> ModelStats: ...
    @property
    def device(self) -> str: ...

    @property
    def lost(self) -> str:
        """Why nothing runs there any more; empty while it does."""

    @property
    def queued(self) -> int:
        """Requests that wait for a run."""

    @property
    def retired(self) -> bool:
        """Whether another serves in its place, if any: who has held it since before must look it up again to submit."""

    def check_room(self, nbytes: int) -> None:
        """Raises what `submit` would of a request that keeps so many bytes: Overloaded or Unavailable."""

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        """Queue a request, which keeps `nbytes` in memory. `done` gets its outputs or a RequestError, once, later.

        The outputs are those of the last response where the model is decoupled: none where that only says that there
        are no more. Raises BadRequest, Overloaded or Unavailable, and Unsupported for a decoupled model without `each`.
        """

    def cancel(self, job: Job) -> None:
        """Forget a request: its `done` is not called."""

    def expire(self) -> None:
        """Answer requests whose time is up."""

    def drain(self) -> None:
        """Refuse new requests from now on, and finish those accepted."""

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the last accepted request, after `drain`. Returns whether it has been answered."""

    def give_up(self, error: Exception) -> None:
        """Answer everything that has not run, or not to its end, with this error."""

    def close(self, timeout: float | None = None) -> None:
        """`drain`, answer what waits with Unavailable, and release the device once the run in progress has ended."""


class Front(Servable, Protocol):
    """A `Servable` that the repository serves and retires."""

    retired: bool


class Passing(ABC):
    """The drain of a `Servable` that others answer for: it has ended when nothing is `queued` any more."""

    def __init__(self) -> None:
        self._draining = False
        self._ended = threading.Event()

    @property
    @abstractmethod
    def queued(self) -> int:
        """Requests that are not answered."""

    def drain(self) -> None:
        """Who answers must do so until `join` says that the accepted requests are."""
        self._draining = True
        self._check_ended()

    def join(self, timeout: float | None = None) -> bool:
        return self._ended.wait(timeout)

    def _check_ended(self) -> None:
        """To be called when a request has been answered."""
        if self._draining and not self.queued:
            self._ended.set()
