"""Models that were unloaded to make room for others: they are loaded again when somebody asks for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

from infera_server.errors import RequestError, Unavailable
from infera_server.models.definition import Definition
from infera_server.models.loaded import Loaded

log = logging.getLogger(__name__)

FIRST_GUESS = 1.0
"""Seconds that a load takes, as long as the model was never loaded while the server ran."""

LEAST_WAIT = 0.1
"""Seconds that a client is told to wait at least."""

PAUSE = 5.0
"""Seconds between two attempts, where one was in vain."""

BUSY = 10.0
"""Seconds that a model is left alone for after its last run, or its load: models that do not fit together and are asked
for in turn would be loaded over and over."""


@dataclass(slots=True)
class Evicted:
    """What served a model, the attempt to load it again, and why the last one failed."""

    definition: Definition
    attempt: asyncio.Task[None] | None = None
    began: float = 0.0
    not_before: float = 0.0
    reason: str = ""


class Evictions:
    """The models that are gone. Used from the event loop's thread; `load(definition)` serves one, or raises."""

    def __init__(self, load: Callable[[Definition], Awaitable[None]]) -> None:
        self._load = load
        self._gone: dict[str, Evicted] = {}
        self.took: dict[str, float] = {}
        """Seconds of the last load of each model."""

    def add(self, definition: Definition) -> None:
        """It is unloaded, to make room."""
        self._gone[definition.name] = Evicted(definition)

    def forget(self, name: str) -> None:
        """It is served, or was unloaded by somebody's wish."""
        self._gone.pop(name, None)

    def definition(self, name: str) -> Definition | None:
        """What served a model that is gone; None for others."""
        gone = self._gone.get(name)
        return gone.definition if gone else None

    def is_wanted(self, name: str) -> bool:
        """Whether it is loaded since somebody asked for it, and not by an operator."""
        gone = self._gone.get(name)
        return gone is not None and gone.attempt is not None

    def told(self) -> dict[str, tuple[float, str]]:
        """Of each the seconds that it may take to be back, and why it is not, for who does not load models."""
        return {name: (self.took.get(name, FIRST_GUESS), gone.reason) for name, gone in self._gone.items()}

    def recall(self, name: str) -> Unavailable | None:
        """Load a model that is gone, and what to tell who asks for it meanwhile; None for others."""
        gone = self._gone.get(name)
        if gone is None:
            return None
        now = time.monotonic()
        if gone.attempt is None and now >= gone.not_before:
            gone.began = now
            gone.attempt = asyncio.get_running_loop().create_task(self._bring_back(name, gone))
        if gone.attempt is not None:
            return absent(name, gone.began + self.took.get(name, FIRST_GUESS) - now, "")
        return absent(name, gone.not_before - now, gone.reason)

    async def _bring_back(self, name: str, gone: Evicted) -> None:
        try:
            await self._load(gone.definition)
            log.info("model '%s' was asked for, and is back after %.2f s", name, time.monotonic() - gone.began)
        except RequestError as error:
            gone.reason = str(error).strip()
            gone.not_before = time.monotonic() + PAUSE
            log.warning("model '%s' was asked for, and cannot be loaded: %s", name, gone.reason)
        finally:
            gone.attempt = None


class Elsewhere:
    """The models that are gone, for a process that does not load them: `ask(name)` has it done."""

    def __init__(self, ask: Callable[[str], None]) -> None:
        self._ask = ask
        self.told: Mapping[str, tuple[float, str]] = {}

    def recall(self, name: str) -> Unavailable | None:
        """As `Evictions.recall`."""
        gone = self.told.get(name)
        if gone is None:
            return None
        self._ask(name)
        return absent(name, *gone)


def absent(name: str, wait: float, reason: str) -> Unavailable:
    """What is told who asks for a model that is gone; without a `reason` it is being loaded."""
    error = Unavailable(
        f"model '{name}' was unloaded to make room for others"
        + (f": {reason}" if reason else ", and is being loaded again")
    )
    error.retry_after = max(wait, LEAST_WAIT)
    return error


def least_used(models: Collection[Loaded], idle: bool) -> Loaded | None:
    """Who is to make room: the least recently used; with `idle` none of those that were used just now."""
    now = time.time() * 1e3
    free = [model for model in models if not idle or now - model.used_at >= BUSY * 1e3]
    return min(free, key=lambda model: model.used_at, default=None)
