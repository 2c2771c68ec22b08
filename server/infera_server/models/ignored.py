"""Settings of Triton's model configuration that have no effect here, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from infera_server.models.modelconfig import ModelConfig
from infera_server.pipelines.generation import PARAMETERS, generates
from infera_server.pipelines.sequence_config import ignored_in_sequences

THREADS = "intra_op_thread_count"
"""The one of onnxruntime's parameters that means something here."""

_BATCH_SIZES = "a batch leaves when the device is idle, with what waits then"
_COMPILED = "the runtime chooses its own kernels and memory"


@dataclass(frozen=True, slots=True)
class Ignored:
    """A setting, when it asks for something, and why it does not get it."""

    setting: str
    why: str
    asked: Callable[[Any], bool]


def _path(name: str) -> Callable[[Any], bool]:
    """Whether the setting at a dotted path is set to another value than its default."""
    *parents, last = name.split(".")

    def asked(config: Any) -> bool:
        for parent in parents:
            if not config.HasField(parent):
                return False
            config = getattr(config, parent)
        return last in {field.name for field, _ in config.ListFields()}

    return asked


def _rules() -> Iterator[Ignored]:
    for setting, why in (
        ("runtime", "there is one runtime"),
        ("optimization.graph", _COMPILED),
        ("optimization.priority", "models of one device take turns"),
        ("optimization.cuda", _COMPILED),
        ("optimization.execution_accelerators", _COMPILED),
        ("optimization.input_pinned_memory", _COMPILED),
        ("optimization.output_pinned_memory", _COMPILED),
        ("optimization.gather_kernel_buffer_threshold", _COMPILED),
        ("optimization.eager_batching", _BATCH_SIZES),
        ("dynamic_batching.preferred_batch_size", _BATCH_SIZES),
        ("dynamic_batching.max_queue_delay_microseconds", _BATCH_SIZES),
        ("dynamic_batching.preserve_ordering", "replies leave as they are ready; those of one connection in order"),
        ("cc_model_filenames", "default_model_filename is for every device"),
        ("metric_tags", "metrics have the labels 'model' and 'version'"),
        ("model_operations", "operators are declared in Python"),
        ("model_repository_agents", "there are no agents"),
        ("model_metrics", "histograms have fixed bounds"),
        ("ensemble_scheduling.max_inflight_requests", "a model's queue bounds the requests that wait for it"),
    ):
        yield Ignored(setting, why, _path(setting))
    yield Ignored("model_transaction_policy.decoupled", "the model answers a request once", _decoupled_in_vain)
    for setting, why in (
        ("input.is_shape_tensor", "shapes follow from the graph"),
        ("input.is_non_linear_format_io", "tensors are row-major"),
        ("output.is_shape_tensor", "shapes follow from the graph"),
        ("output.is_non_linear_format_io", "tensors are row-major"),
        ("ensemble_scheduling.step.model_namespace", "a name is of one model in the whole repository"),
    ):
        yield Ignored(setting, why, partial(_one_asks, setting.split(".")))
    for setting in ("instance_group", "model_warmup", "default_model_filename"):
        yield Ignored(f"{setting} of an ensemble", "its models have their own", partial(_ensemble_asks, setting))
    yield Ignored("instance_group.kind", "the first group's is that of all", _kinds_differ)
    for field, why in (
        ("count", "one engine runs a model; requests share its batches"),
        ("rate_limiter", "models of one device take turns"),
        ("secondary_devices", _COMPILED),
        ("profile", "there are no optimisation profiles"),
        ("passive", "every instance is scheduled"),
        ("host_policy", "there are no host policies"),
    ):
        yield Ignored(f"instance_group.{field}", why, partial(_a_group_asks, field))


def _decoupled_in_vain(config: Any) -> bool:
    return bool(config.model_transaction_policy.decoupled) and not generates(config)


def _one_asks(path: Sequence[str], config: Any) -> bool:
    """Whether a setting of repeated messages is set in one of them."""
    *parents, last = path
    found = [config]
    for parent in parents:
        below = [getattr(message, parent) for message in found]
        found = [m for value in below for m in (value if isinstance(value, Sequence) else [value])]
    return any(getattr(message, last) for message in found)


def _ensemble_asks(setting: str, config: Any) -> bool:
    return bool(config.HasField("ensemble_scheduling") and getattr(config, setting))


def _kinds_differ(config: Any) -> bool:
    return len({group.kind for group in config.instance_group}) > 1


def _a_group_asks(field: str, config: Any) -> bool:
    """One group asks for nothing with a count of 1; one for each GPU neither."""
    groups = list(config.instance_group)
    if field == "count":
        return sum(max(1, int(group.count)) for group in groups) > 1
    if field == "gpus":
        return len({gpu for group in groups for gpu in group.gpus}) > 1
    return any(map(_path(field), groups))


RULES = tuple(_rules())


def ignored(config: ModelConfig) -> list[str]:
    """`setting: why` of everything that is asked for in vain."""
    found = [f"{rule.setting}: {rule.why}" for rule in RULES if rule.asked(config)]
    found += ignored_in_sequences(config)
    unknown = sorted(name for name in config.parameters if name.lower() != THREADS and name not in PARAMETERS)
    return found + [f"parameters.{name}: {_COMPILED}" for name in unknown]
