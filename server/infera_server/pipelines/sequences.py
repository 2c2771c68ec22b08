"""Models whose state is kept from one request of a sequence to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from infera_server.models.model import Model
from infera_server.models.modelconfig import ConfigError
from infera_server.pipelines.recurrence import Recurrence, find
from infera_server.pipelines.sequence_config import declared
from infera_server.pipelines.sequence_model import SequenceModel
from infera_server.pipelines.sequence_steps import DEFAULT_LIMITS, Limits

log = logging.getLogger(__name__)


def _no_files(name: str) -> bytes:
    raise ConfigError(f"initial state '{name}' cannot be read: the model has no folder")


def wrap(
    model: Model,
    config: Any = None,
    limits: Limits = DEFAULT_LIMITS,
    read: Callable[[str], bytes] = _no_files,
) -> Model | SequenceModel:
    """The model with sequences, as the `sequence_batching` of its ModelConfig says.

    Without a configuration, or one that does not speak of sequences, the states are found; the model itself is returned
    where there are none. `read(name)` is a file of the model's `initial_state` folder. Raises ConfigError.
    """
    if config is not None and config.HasField("sequence_batching"):
        recurrence = declared(config, model.signature, read)
    else:
        with model.batcher.turns:
            states, why = find(model.session, model.batching.layout, model.batching.sizes)
        if not states:
            return model
        log.info("model '%s' keeps states for sequences: %s", model.signature.name, why)
        recurrence = Recurrence(states, reason=why)
    return SequenceModel(model, recurrence, limits)
