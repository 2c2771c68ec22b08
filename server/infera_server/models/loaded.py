"""A model version that was loaded, whatever runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from infera_server.models.definition import Definition
from infera_server.models.discovery import Source
from infera_server.models.model import Model
from infera_server.models.servable import Front


@dataclass(eq=False)
class Loaded:
    """What takes a version's requests, and what it was made from.

    `front` is the `model` itself, or what stands before it for good and keeps state between requests; it owns what it
    stands before. One that only passes requests on to others has no model.
    """

    front: Front
    source: Source
    definition: Definition
    model: Model | None = None
    limited: Sequence[str] = ()
    """What of its configuration goes beyond the server's settings."""

    loaded_at: float = field(default_factory=lambda: time.time() * 1e3, init=False)
    """Milliseconds since the epoch, as `stats.last_inference`."""

    @property
    def name(self) -> str:
        return self.front.signature.name

    @property
    def version(self) -> str:
        return self.front.signature.version

    @property
    def device(self) -> str:
        return self.front.device

    @property
    def used_at(self) -> float:
        """When it last ran, or else was loaded; milliseconds since the epoch."""
        return max(self.loaded_at, self.front.stats.last_inference)

    @property
    def notes(self) -> list[str]:
        """What of its configuration has no effect, each with the reason."""
        notes, config, model = [*self.definition.notes, *self.limited], self.definition.config, self.model
        if config is not None and config.max_batch_size > 1 and model is not None and model.batching.layout is None:
            notes.append(f"max_batch_size: requests run one by one, batching is {model.batching.reason}")
        return notes

    @property
    def ignored(self) -> str:
        """The notes, for the index; empty where there are none."""
        return f"ignored: {'; '.join(notes)}" if (notes := self.notes) else ""


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What serves a model, or did: its versions by what they were loaded from."""

    definition: Definition
    models: Mapping[Source, Loaded]
    until: float = math.inf
    """When one that is kept for a rollback is let go, by `time.monotonic`."""
