"""Models whose state is kept from one request of a sequence to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from infera_server.model import Model
from infera_server.modelconfig import ConfigError
from infera_server.recurrence import Recurrence, find
from infera_server.sequence_config import declared
from infera_server.sequence_model import DEFAULT_LIMITS, Limits, SequenceModel

log = logging.getLogger(__name__)

_UNUSED = frozenset(
    {"max_queue_delay_microseconds", "minimum_slot_utilization", "preferred_batch_size", "preserve_ordering"}
)
_BUFFERS = ("use_same_buffer_for_input_output", "use_growable_memory")
_UNUSED_WHY = "steps that wait when the device is free run together at once, whatever slot they have"


def wrap(
    model: Model,
    config: Any = None,
    limits: Limits = DEFAULT_LIMITS,
    read: Callable[[str], bytes] | None = None,
) -> Model | SequenceModel:
    """The model with sequences, as the `sequence_batching` of its ModelConfig says.

    Without a configuration, or one that does not speak of sequences, the states are found; the model itself is returned
    where there are none. `read(name)` is a file of the model's `initial_state` folder. Raises ConfigError.
    """
    if config is not None and config.HasField("sequence_batching"):
        recurrence = declared(config, model.signature, read or _no_files)
    else:
        states, why = find(model.session, model.batching.layout, model.batching.sizes)
        if not states:
            return model
        log.info("model '%s' keeps states for sequences: %s", model.signature.name, why)
        recurrence = Recurrence(states)
    return SequenceModel(model, recurrence, limits)


def ignored(config: Any) -> list[str]:
    """The settings of a ModelConfig's `sequence_batching` that have no effect, each with the reason."""
    batching = config.sequence_batching
    strategy = batching.WhichOneof("strategy_choice")
    asked = {field.name for field, _ in getattr(batching, strategy).ListFields()} if strategy else set()
    found = [f"{strategy}.{name}" for name in sorted(asked & _UNUSED)]
    found += [f"state.{name}" for name in _BUFFERS if any(getattr(state, name) for state in batching.state)]
    found += ["iterative_sequence"] if batching.iterative_sequence else []
    return [f"sequence_batching.{name}: {_UNUSED_WHY}" for name in found]


def _no_files(name: str) -> bytes:
    raise ConfigError(f"initial state '{name}' cannot be read: the model has no folder")
