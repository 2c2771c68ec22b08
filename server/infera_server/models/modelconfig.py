"""Triton's model configuration, `config.pbtxt`: read, checked, completed, and told.

What the messages mean: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from google.protobuf import json_format, text_format

from infera_server.codec import DATATYPES, datatype_of
from infera_server.models.discovery import CONFIG_FILE, leads_outside
from infera_server.protocols.protos import message
from infera_server.scheduling.signature import Signature

ModelConfig: TypeAlias = Any
"""An `inference.ModelConfig` message."""

PLATFORM, BACKEND = "onnx_infera", "infera"

ENSEMBLE = "ensemble"
"""The platform of what passes requests on to other models."""

PLATFORMS = frozenset({"", "onnxruntime_onnx", PLATFORM, ENSEMBLE})
BACKENDS = frozenset({"", "onnxruntime", BACKEND})

MODEL_FILE = "model.onnx"

MAX_CONFIG_BYTES = 1 << 20


class ConfigError(ValueError):
    """A configuration cannot be read, or asks for what cannot be done."""


def new() -> ModelConfig:
    """An empty configuration."""
    return message("inference.ModelConfig")()


def read(folder: Path, name: str) -> ModelConfig | None:
    """The checked configuration in a model's folder; None where it has none. Raises ConfigError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    if leads_outside(path, folder):
        raise ConfigError(f"{path} leads outside the model's folder")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has over {MAX_CONFIG_BYTES:,} bytes")
        config = text_format.Parse(path.read_bytes().decode(), new())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: byte {error.start} is not UTF-8") from None
    except (OSError, text_format.ParseError) as error:
        raise ConfigError(f"{path} cannot be read: {error}{_suggestion(str(error))}") from None
    check(config, name)
    return config


def from_json(text: str, name: str) -> ModelConfig:
    """The checked configuration that a load request gives. Raises ConfigError."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"Invalid config override: over {MAX_CONFIG_BYTES:,} characters")
    try:
        config = json_format.Parse(text, new(), max_recursion_depth=32)
    except (json_format.ParseError, RecursionError) as error:
        raise ConfigError(f"Invalid config override: {error}{_suggestion(str(error))}") from None
    check(config, name)
    return config


def _suggestion(error: str) -> str:
    """The field that protobuf's error about an unknown one may mean."""
    found = re.search(r'Message type "([\w.]+)" has no field named "(\w+)"', error)
    if found is None:
        return ""
    fields = new().DESCRIPTOR.file.pool.FindMessageTypeByName(found[1]).fields_by_name
    close = get_close_matches(found[2], fields, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def check(config: ModelConfig, name: str) -> None:
    """Raises ConfigError for what no file could make right."""
    if config.name not in ("", name):
        raise ConfigError(
            f"unexpected directory name '{name}' for model '{config.name}', directory name must equal model name"
        )
    config.name = name
    if config.platform not in PLATFORMS:
        raise ConfigError(f"unexpected platform type '{config.platform}' for {name}; ONNX models are served here")
    if (config.platform == ENSEMBLE) != config.HasField("ensemble_scheduling"):
        raise ConfigError(
            f"ensemble scheduling must be set for ensemble {name} whose platform is {ENSEMBLE}"
            if config.platform == ENSEMBLE
            else f"ensemble scheduling cannot be set for model '{name}' whose platform is not {ENSEMBLE}"
        )
    if config.backend not in BACKENDS:
        raise ConfigError(f"unable to find backend library for backend '{config.backend}'; ONNX models are served here")
    if config.max_batch_size < 0:
        raise ConfigError(f"'max_batch_size' must be non-negative value for {name}")
    if config.batch_input or config.batch_output or any(i.allow_ragged_batch for i in config.input):
        raise ConfigError(f"ragged batches (batch_input, batch_output, allow_ragged_batch) cannot be served for {name}")
    _check_batching(config, name)
    for index, group in enumerate(config.instance_group):
        if group.gpus and group.kind in (group.KIND_CPU, group.KIND_MODEL):
            group_name, kind = group.name or f"{name}_{index}", group.Kind.Name(group.kind)
            raise ConfigError(
                f"instance group {group_name} of model {name} has kind {kind} but specifies one or more GPUs"
            )
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for tensor in tensors:
            _check_tensor(tensor, f"model {kind}", name)
    for tensor in config.input:
        if tensor.format and len(tensor.dims) != 3:
            raise ConfigError(f"model input NHWC/NCHW require 3 dims for {name}")


def _check_batching(config: ModelConfig, name: str) -> None:
    if not config.HasField("dynamic_batching"):
        return
    batching = config.dynamic_batching
    for size in batching.preferred_batch_size:
        if size <= 0:
            raise ConfigError(f"dynamic batching preferred size must be positive for {name}")
        if size > config.max_batch_size:
            raise ConfigError(f"dynamic batching preferred size must be <= max batch size for {name}")
    if levels := batching.priority_levels:
        if not 1 <= batching.default_priority_level <= levels:
            raise ConfigError(f"default priority level must be in range [1, {levels}] for {name}")
        if not all(1 <= level <= levels for level in batching.priority_queue_policy):
            raise ConfigError(f"priority queue policy must have priority level in range [1, {levels}] for {name}")


def _check_tensor(tensor: Any, kind: str, name: str) -> None:
    if not tensor.name:
        raise ConfigError(f"{kind} must specify 'name' for {name}")
    if tensor.data_type == 0:
        raise ConfigError(f"{kind} must specify 'data_type' for {name}")
    if not tensor.dims:
        raise ConfigError(f"{kind} must specify 'dims' for {name}")
    if any(d < 1 and d != -1 for d in tensor.dims):
        raise ConfigError(
            f"{kind} dimension must be integer >= 1, or -1 to indicate a variable-size dimension for {name}"
        )
    if tensor.HasField("reshape"):
        _check_reshape(list(tensor.dims), list(tensor.reshape.shape), f"{kind} '{tensor.name}'", name)


def _check_reshape(dims: list[int], shape: list[int], tensor: str, name: str) -> None:
    fixed, reshaped = (int(np.prod([d for d in s if d != -1], dtype=np.int64)) for s in (dims, shape))
    if dims.count(-1) != shape.count(-1) or dims.count(-1) > 1 or fixed != reshaped:
        raise ConfigError(f"{tensor} has different size for dims and reshape for {name}")


def chosen(config: ModelConfig | None, versions: Iterable[str]) -> list[str]:
    """Of the versions that there are, those to be served, oldest first. Without a configuration it is all of them."""
    ordered = sorted(versions, key=int)
    policy = config.version_policy.WhichOneof("policy_choice") if config is not None else "all"
    if policy == "all":
        return ordered
    assert config is not None
    if policy == "specific":
        wanted = set(map(str, config.version_policy.specific.versions))
        return [version for version in ordered if version in wanted]
    count = config.version_policy.latest.num_versions if policy == "latest" else 1
    return ordered[-count:] if count else []


def absent(config: ModelConfig | None, versions: Iterable[str]) -> list[str]:
    """Versions that the policy names and that are not there."""
    if config is None or config.version_policy.WhichOneof("policy_choice") != "specific":
        return []
    have = set(versions)
    return [version for version in map(str, config.version_policy.specific.versions) if version not in have]


def model_file(config: ModelConfig | None, path: Path) -> Path:
    """The file of a version at `path`, which is that file or the version's folder. Raises ConfigError."""
    named = config.default_model_filename if config is not None else ""
    folder = path if path.is_dir() else path.parent
    if not named:
        if path.is_dir():
            raise ConfigError(f"{folder} holds no {MODEL_FILE}, and {CONFIG_FILE} has no default_model_filename")
        return path
    return inside(folder, named, "default_model_filename")


def inside(folder: Path, name: str, what: str, below: str = "") -> Path:
    """The file of this name in a folder, or in one `below` it. Raises ConfigError where there is none, or elsewhere."""
    path = folder / below / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or leads_outside(path, folder):
        raise ConfigError(f"{what} '{name}' leads outside the model's folder")
    if not path.is_file():
        raise ConfigError(f"{what} '{name}' does not exist in {folder / below}")
    return path


def completed(config: ModelConfig | None, signature: Signature, device: str, file: str) -> ModelConfig:
    """The configuration of a model in `file` with what it leaves out filled in, as Triton tells it."""
    full, layout, batched = new(), signature.layout, signature.leading
    if config is not None:
        full.CopyFrom(config)
        batched = config.max_batch_size > 0 or (batched and not (config.input or config.output))
    full.name = signature.name
    if not (full.platform or full.backend):
        full.platform, full.backend = PLATFORM, BACKEND
    elif full.platform == "onnxruntime_onnx":
        full.backend = "onnxruntime"
    if full.version_policy.WhichOneof("policy_choice") is None:
        full.version_policy.CopyFrom(_default_policy(config))
    if batched and not full.max_batch_size and layout is not None:
        full.max_batch_size = layout.max_rows
    for tensors, known in ((full.input, signature.inputs), (full.output, signature.outputs)):
        named = {tensor.name for tensor in tensors}
        for tensor in known.values():
            if tensor.name not in named:
                tensors.add(
                    name=tensor.name,
                    data_type=type_of(tensor.dtype, tensor.name),
                    dims=tensor.shape[1 if batched else 0 :],
                )
    if batched and layout is not None and full.WhichOneof("scheduling_choice") is None:
        full.dynamic_batching.preferred_batch_size.extend(layout.buckets)
    elif full.HasField("dynamic_batching") and not full.dynamic_batching.preferred_batch_size and full.max_batch_size:
        full.dynamic_batching.preferred_batch_size.append(full.max_batch_size)
    for memory in (full.optimization.input_pinned_memory, full.optimization.output_pinned_memory):
        memory.enable = True
    if not full.instance_group:
        full.instance_group.add(name=signature.name)
    for index, group in enumerate(full.instance_group):
        group.name = group.name or f"{signature.name}_{index}"
        group.count = group.count or 1
        if group.kind == 0:
            group.kind = 1 if device.startswith("cuda") else 2
    full.default_model_filename = full.default_model_filename or file
    return full


def _default_policy(config: ModelConfig | None) -> Any:
    policy = message("inference.ModelVersionPolicy")()
    if config is None:
        policy.all.SetInParent()
    else:
        policy.latest.num_versions = 1
    return policy


def type_of(dtype: np.dtype[Any], name: str) -> int:
    """The DataType of tensor `name`. Raises ValueError for a dtype that has none."""
    found = datatype_of(dtype, name)
    name = "STRING" if found == "BYTES" else found
    return int(_data_types().values_by_name[f"TYPE_{name}"].number)


def type_name(data_type: int) -> str:
    """`TYPE_FP32` for 11."""
    return str(_data_types().values_by_number[data_type].name)


def _data_types() -> Any:
    return new().DESCRIPTOR.file.enum_types_by_name["DataType"]


def dtype_of(data_type: int) -> np.dtype[Any] | None:
    """The NumPy dtype of a DataType; None for TYPE_INVALID."""
    name = type_name(data_type).removeprefix("TYPE_")
    return DATATYPES.get("BYTES" if name == "STRING" else name)


def dtype_that_is(data_type: int, tensor: str) -> np.dtype[Any]:
    """The NumPy dtype of tensor `tensor`. Raises ConfigError where it has none."""
    found = dtype_of(data_type)
    if found is None:
        raise ConfigError(f"'{tensor}' must specify 'data_type'")
    return found


def as_dict(config: Any) -> dict[str, Any]:
    """A message as Triton's JSON has it: every scalar, list and map, and the messages that are set; numbers as such."""
    found: dict[str, Any] = {}
    for field in config.DESCRIPTOR.fields:
        value = getattr(config, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of_messages = field.message_type.fields_by_name["value"].message_type is not None
            found[field.name] = {str(k): as_dict(v) if of_messages else v for k, v in value.items()}
        elif field.is_repeated:
            found[field.name] = [_value(field, v) for v in value]
        elif not field.has_presence or config.HasField(field.name):
            found[field.name] = _value(field, value)
    return found


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_dict(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value.decode("latin-1") if isinstance(value, bytes) else value
