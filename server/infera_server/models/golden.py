"""Requests of live traffic and their replies, kept to hold a new session of the model against before it serves."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from infera_server.models.servable import Servable
from infera_server.models.taps import Tap
from infera_server.requests import Request
from infera_server.scheduling.jobs import Batch, Done, Job
from infera_server.scheduling.rows import Arrays, HostArray

PERIOD = 0.05
"""Seconds between two requests that are kept: copying every one would slow a busy model."""

MAX_BYTES = 64 << 20
"""Of a model's kept requests and replies; a single one above it is not kept."""


class Golden:
    """The latest requests of a model, at most `size`, and what was answered."""

    def __init__(self, size: int) -> None:
        self._kept: deque[tuple[Arrays, Arrays, int]] = deque()
        self._size, self._nbytes = size, 0
        self._next = 0.0
        self.era = 0
        """How often all were forgotten."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def is_due(self) -> bool:
        """Whether it is time to keep another."""
        return time.monotonic() >= self._next

    def keep(self, feeds: Arrays, outputs: Arrays) -> None:
        """Copies of a request and its reply, in place of the oldest where there is no room."""
        nbytes = sum(array.nbytes for array in (*feeds.values(), *outputs.values()))
        if nbytes > MAX_BYTES:
            return
        self._next = time.monotonic() + PERIOD
        self._kept.append((_copied(feeds), _copied(outputs), nbytes))
        self._nbytes += nbytes
        self._drop_oldest()

    def resize(self, size: int) -> None:
        """Keep at most so many from now on."""
        self._size = size
        self._drop_oldest()

    def forget(self) -> None:
        """Drop all: their answers were those of models that are no more."""
        self._kept.clear()
        self._nbytes = 0
        self.era += 1

    def _drop_oldest(self) -> None:
        while len(self._kept) > self._size or self._nbytes > MAX_BYTES:
            self._nbytes -= self._kept.popleft()[2]

    def difference(self, run: Callable[[Arrays], Arrays], tolerance: float) -> str:
        """How what `run` answers differs from what was answered; empty where it does not. Raises what `run` raises."""
        kept = list(self._kept)
        for index, (feeds, outputs, _) in enumerate(kept, 1):
            if found := differing(run(feeds), outputs, tolerance):
                return f"golden request {index} of {len(kept)}: {found}"
        return ""


class Recorder(Tap):
    """Keeps some of a model's requests and their replies."""

    def __init__(self, model: Servable, golden: Golden) -> None:
        super().__init__(model)
        self._golden = golden

    def submit(self, request: Request, nbytes: int, done: Done) -> Job:
        if request.correlation is not None or request.each is not None or not self._golden.is_due:
            return self.model.submit(request, nbytes, done)
        era = self._golden.era

        def keep(result: Arrays | Exception, batch: Batch | None) -> None:
            if not isinstance(result, Exception) and self._golden.era == era:
                self._golden.keep(request.feeds, result)
            done(result, batch)

        return self.model.submit(request, nbytes, keep)


def running(front: Servable) -> Callable[[Arrays], Arrays]:
    """How requests are answered by what takes them, for another thread than the event loop's, which calls this."""
    loop = asyncio.get_running_loop()
    return lambda feeds: asyncio.run_coroutine_threadsafe(_answered(front, feeds), loop).result()


async def _answered(front: Servable, feeds: Arrays) -> Arrays:
    """Raises RequestError."""
    answer: asyncio.Future[Arrays | Exception] = asyncio.get_running_loop().create_future()

    def done(result: Arrays | Exception, batch: Batch | None) -> None:
        answer.set_result(result)

    front.submit(Request("", dict(feeds), ()), sum(array.nbytes for array in feeds.values()), done)
    result = await answer
    if isinstance(result, Exception):
        raise result
    return result


def _copied(arrays: Arrays) -> Arrays:
    return {name: array.copy() for name, array in arrays.items()}


def differing(found: Arrays, wanted: Arrays, tolerance: float) -> str:
    """Which output differs by how much more than `tolerance`, relative to the largest magnitude wanted of it."""
    for name, want in wanted.items():
        have = found.get(name)
        if have is None:
            return f"output '{name}' is missing"
        if have.shape != want.shape or have.dtype != want.dtype:
            return f"output '{name}' is {_type(have)}, was {_type(want)}"
        if want.dtype.hasobject:
            if list(have.flat) != list(want.flat):
                return f"output '{name}' has other strings"
            continue
        distance = furthest(have, want)
        if not distance <= tolerance:
            return f"output '{name}' differs by {distance:.3g} of its largest value, at most {tolerance:g} may be"
    return ""


def furthest(have: HostArray, want: HostArray) -> float:
    """The largest difference between numbers, relative to the largest magnitude wanted; infinite for a NaN in one."""
    if not want.size:
        return 0.0
    a, b = have.astype(np.float64), want.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gaps = np.abs(np.subtract(a, b, out=np.zeros(a.shape), where=~same))
    if not np.isfinite(gaps).all():
        return float("inf")
    finite = np.abs(b[np.isfinite(b)])
    scale = float(finite.max()) if finite.size else 0.0
    return float(gaps.max()) / (scale or 1.0)


def _type(array: HostArray) -> str:
    return f"{array.dtype.name}{list(array.shape)}"
