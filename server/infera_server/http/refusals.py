"""Refusals of a full queue that are repeated: under overload the same answer goes to thousands of requests a second.

What refusing costs is taken from the model that is to catch up.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ref

from infera_server.models.servable import Servable

SECONDS = 0.02
"""How long a refusal is repeated before it is made anew: it names what waits, and when to come back."""

MAX_TARGETS = 256
"""How many targets have refusals that are kept."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """`reply` is what the client was sent, with `headers` of that time, as `queued` requests waited for the model."""

    model: ref[Servable]
    size: int
    queued: int
    until: float
    headers: object
    reply: bytes


class Refusals:
    """The last one of each target."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str | None], Refusal] = {}

    def keep(
        self, target: tuple[str, str | None], model: Servable, size: int, now: float, headers: object, reply: bytes
    ) -> None:
        """A request with a body of `size` bytes was refused since the model's queue is full.

        Where it is another's that is full, of a step of an ensemble, and nothing waits for this one, nothing is kept:
        then nobody would see that there is room again.
        """
        if not model.queued:
            return
        if len(self._known) >= MAX_TARGETS:
            self._known.clear()
        self._known[target] = Refusal(ref(model), size, model.queued, now + SECONDS, headers, reply)

    def find(
        self, target: tuple[str, str | None], model: Servable, size: int, now: float, headers: object
    ) -> bytes | None:
        """The reply to a request that would be refused again: no smaller than the last one, behind no fewer."""
        known = self._known.get(target)
        if known is None:
            return None
        if now < known.until and model.queued >= known.queued and size >= known.size:
            if known.headers is headers and known.model() is model:
                return known.reply
        else:
            del self._known[target]
        return None
