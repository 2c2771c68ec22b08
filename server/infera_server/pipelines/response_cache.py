"""Answers that are kept, for requests that are equal byte for byte.

A key is the BLAKE2b hash, of 32 bytes, of what an answer depends on: the model as it was loaded, the inputs' names,
types, shapes and bytes, and the outputs asked for. Loading a model again makes another model of it, so no answer
outlives the model that gave it. An ensemble is another one as soon as one of its models is. Requests that are equal
while the first of them runs wait for its answer. Steps of sequences have no answer of their own and are passed on, and
so are requests whose inputs lie in memory that a client can change after they were hashed.

A request that is not found costs about 8 µs and 1.1 µs a KiB of its inputs more than without a cache, most of it the
hash; above `AWAY` bytes another thread hashes. One that is found costs 5 µs and the hash.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias
from weakref import ref

from infera_server.errors import Expired, Overloaded, RequestError, Unavailable
from infera_server.models.servable import Servable
from infera_server.models.taps import Tap
from infera_server.pipelines.answers import ResponseCache, key_of
from infera_server.requests import Request
from infera_server.scheduling.jobs import Batch, Done, Job, State, answer
from infera_server.scheduling.rows import Arrays

AWAY = 1 << 16
"""Bytes of inputs above which hashing would hold up the event loop."""

MAX_WAITING = 256
"""Equal requests that wait for one answer; further ones run."""

_identities = itertools.count(1)


@dataclass(slots=True, eq=False)
class Waiter(Job):
    """A request that waits for a flight's answer, or for its key."""

    flight: Flight | None = None


@dataclass(slots=True, eq=False)
class Flight:
    """A run whose answer is to be kept, and who waits for it: `waiters[0]` has asked first."""

    key: bytes
    identity: int
    request: Request
    nbytes: int
    looked: float
    waiters: list[Waiter] = field(default_factory=list)
    job: Job | None = None


Away: TypeAlias = Callable[[Callable[[], bytes], Callable[[bytes], None]], object]
Soon: TypeAlias = Callable[[Callable[[], None]], object]
Parts: TypeAlias = Callable[[], Sequence[Servable] | None]
"""The models that an ensemble's answers come from; None where they may come from others the next time."""


def _away(work: Callable[[], bytes], then: Callable[[bytes], None]) -> None:
    """`then` is called in the event loop's thread, with what `work` returns in another."""
    done = asyncio.get_running_loop().run_in_executor(None, work)
    done.add_done_callback(lambda future: None if future.cancelled() else then(future.result()))


def _soon(fn: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(fn)


class Cached(Tap):
    """A model whose answers are kept. `soon` and `away` are how the event loop is reached.

    The answers of one with `parts` are those of these models: they are dropped when others are in their place.
    """

    retired: bool = False

    def __init__(
        self,
        model: Servable,
        cache: ResponseCache,
        soon: Soon = _soon,
        away: Away = _away,
        parts: Parts | None = None,
    ) -> None:
        super().__init__(model)
        self.cache = cache
        self.identity = next(_identities)
        self._soon, self._hash_away = soon, away
        self._parts = parts
        self._answering: tuple[ref[Servable], ...] = ()
        self._flights: dict[bytes, Flight] = {}
        self._hashing: set[Waiter] = set()
        self._gone = False

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        if self._gone or request.correlation is not None or request.lies_with_client:
            return self.model.submit(request, nbytes, done)
        if self._parts is not None and not self._renewed(self._parts()):
            return self.model.submit(request, nbytes, done)
        began = time.perf_counter()
        now = time.monotonic()
        deadline = now + request.timeout if request.timeout is not None else math.inf
        waiter = Waiter({}, done, nbytes=nbytes, deadline=deadline, queued_at=now)
        work = partial(key_of, self.identity, request)
        if sum(array.nbytes for array in request.feeds.values()) > AWAY:
            self.model.check_room(nbytes)
            self._hashing.add(waiter)
            self._hash_away(work, partial(self._hashed, waiter, request, began))
        else:
            self._look(waiter, request, work(), began)
        return waiter

    def cancel(self, job: Job) -> None:
        if not isinstance(job, Waiter) or (job.flight is None and job not in self._hashing):
            self.model.cancel(job)
            return
        job.state = State.CANCELLED
        self._hashing.discard(job)
        self._drain_model()
        if job.flight is not None:
            self._leave(job.flight, job)

    def expire(self) -> None:
        self.model.expire()
        now = time.monotonic()
        for flight in list(self._flights.values()):
            for waiter in flight.waiters[1:]:  # the first one's deadline is the model's to keep
                if waiter.deadline <= now:
                    self._leave(flight, waiter)
                    answer(waiter, Expired(f"model '{self.signature.name}': the request's time was up"))

    def drain(self) -> None:
        """Requests whose keys are still being made run first."""
        self._gone = True
        self.cache.drop(self.identity)
        self._drain_model()

    def _drain_model(self) -> None:
        if self._gone and not self._hashing:
            self.model.drain()

    def give_up(self, error: Exception) -> None:
        hashing, self._hashing = self._hashing, set()
        for waiter in hashing:
            answer(waiter, error)
        self.model.give_up(error)

    def _renewed(self, parts: Sequence[Servable] | None) -> bool:
        """Forget what others than these models have answered. Returns whether an answer of now can be kept."""
        answering = tuple(map(ref, parts or ()))
        if answering != self._answering:
            self._answering = answering
            self.cache.drop(self.identity)
            self.identity = next(_identities)
        return parts is not None

    # --- looking -----------------------------------------------------------------------------------------------------

    def _hashed(self, waiter: Waiter, request: Request, began: float, key: bytes) -> None:
        if waiter not in self._hashing:
            return
        self._hashing.discard(waiter)
        try:
            self._look(waiter, request, key, began)
        except RequestError as error:
            answer(waiter, error)
        self._drain_model()

    def _look(self, waiter: Waiter, request: Request, key: bytes, began: float) -> None:
        """Answer from the cache, wait for who runs the same, or run. Raises what `submit` of the model raises."""
        arrays = self.cache.get(key)
        if arrays is not None:
            self._hit(began)
            self._soon(partial(answer, waiter, arrays))
            return
        flight = self._flights.get(key)
        if flight is not None and len(flight.waiters) < MAX_WAITING:
            waiter.flight = flight
            flight.waiters.append(waiter)
            self._hit(began)
            return
        waiter.flight = flight = Flight(
            key, self.identity, request, waiter.nbytes, time.perf_counter() - began, [waiter]
        )
        self._flights[key] = flight
        try:
            self._run(flight)
        except RequestError:
            self._forget(flight)
            raise

    def _hit(self, began: float) -> None:
        self.stats.cache_hit.add(1, time.perf_counter() - began)
        self.stats.waiting.add(1, 0.0)  # as Triton counts it

    def _run(self, flight: Flight) -> None:
        flight.job = self.model.submit(flight.request, flight.nbytes, partial(self._landed, flight))

    def _landed(self, flight: Flight, result: Arrays | Exception, batch: Batch | None) -> None:
        """A run has ended: keep its answer, and give it to all who wait for it."""
        flight.job = None  # which leads back to it
        if isinstance(result, Expired | Overloaded | Unavailable):  # of the one that ran; others may have more time
            first = flight.waiters.pop(0)
            first.flight = None
            answer(first, result, batch)
            self._run_again(flight, result)
            return
        self._forget(flight)
        if not isinstance(result, Exception):
            began = time.perf_counter()
            if not self._gone and flight.identity == self.identity:
                self.cache.put(flight.key, result, flight.identity)
            self.stats.cache_miss.add(1, flight.looked + time.perf_counter() - began)
        for waiter in flight.waiters:
            waiter.flight = None
            answer(waiter, result, batch)

    def _run_again(self, flight: Flight, error: RequestError) -> None:
        """In the place of one that did not come to an end, for those who are left."""
        while flight.waiters:
            left = flight.waiters[0].deadline - time.monotonic()
            flight.request = replace(flight.request, timeout=max(left, 1e-6) if left < math.inf else None)
            try:
                if self._gone:
                    raise error
                self._run(flight)
                return
            except RequestError as refusal:
                waiter = flight.waiters.pop(0)
                waiter.flight = None
                answer(waiter, refusal)
        self._forget(flight)

    def _leave(self, flight: Flight, waiter: Waiter) -> None:
        """One who waits does so no more; the run goes on for the others."""
        flight.waiters.remove(waiter)
        waiter.flight = None
        if not flight.waiters:
            self._forget(flight)
            if flight.job is not None:
                self.model.cancel(flight.job)

    def _forget(self, flight: Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]


def wrap(servable: Servable, cache: ResponseCache) -> Cached:
    """The model, with its answers kept in `cache` until it is drained."""
    return Cached(servable, cache)
