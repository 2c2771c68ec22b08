"""What stands before a model for good, as its configuration asks: sequences, texts, a response cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from infera_server.models.definition import Definition
from infera_server.models.model import Model
from infera_server.models.modelconfig import ConfigError, inside
from infera_server.models.servable import Front
from infera_server.pipelines.answers import ResponseCache
from infera_server.pipelines.ensemble import Ensemble
from infera_server.pipelines.generation import generates
from infera_server.pipelines.generator import Texts, generator
from infera_server.pipelines.response_cache import Cached
from infera_server.pipelines.sequence_steps import Limits
from infera_server.pipelines.sequences import wrap
from infera_server.settings import Settings

INITIAL_STATES = "initial_state"
"""The folder of a model's initial states, beside its versions."""


def before(model: Model, definition: Definition, settings: Settings) -> Front:
    """What takes the model's requests: often itself. Raises ConfigError."""
    config = definition.config
    if config is not None and generates(config):
        return generator(model, config, Texts(settings.max_queue, settings.max_sequence_bytes))
    limits = Limits(settings.max_sequences, settings.max_sequence_bytes, settings.max_queue, settings.max_sequence_idle)
    return wrap(model, config, limits, partial(_initial_state, definition.folder))


def cached(front: Front, definition: Definition, cache: ResponseCache | None) -> Front:
    """The same with its answers kept, if the configuration asks for it and there is a cache. Raises ConfigError."""
    config = definition.config
    if config is None or not config.response_cache.enable:
        return front
    if config.HasField("sequence_batching"):
        raise ConfigError(
            f"Response Cache does not currently support model {definition.name} with sequence batching scheduler. "
            "Please disable the response cache."
        )
    if cache is None:
        return front
    return Cached(front, cache, parts=front.parts if isinstance(front, Ensemble) else None)


def _initial_state(folder: Path | None, name: str) -> bytes:
    if folder is None:
        raise ConfigError(f"initial state '{name}' cannot be read: the model has no folder")
    return inside(folder / INITIAL_STATES, name, "initial state").read_bytes()
