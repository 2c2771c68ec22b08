"""`sequence_batching` of Triton's ModelConfig, as a `Recurrence`. Errors are in Triton's words where it has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from infera_server.codec import short
from infera_server.errors import BadRequest
from infera_server.models.modelconfig import ConfigError, ModelConfig, dtype_that_is, new, type_of
from infera_server.pipelines.recurrence import Control, Recurrence, State
from infera_server.requests import Correlation
from infera_server.runtime import Session
from infera_server.scheduling.rows import HostArray
from infera_server.scheduling.signature import Signature, agree

_UNUSED = frozenset(
    {"max_queue_delay_microseconds", "minimum_slot_utilization", "preferred_batch_size", "preserve_ordering"}
)
_BUFFERS = ("use_same_buffer_for_input_output", "use_growable_memory")
_UNUSED_WHY = "steps that wait when the device is free run together at once, whatever slot they have"


def declared(config: ModelConfig, model: Signature, read: Callable[[str], bytes]) -> Recurrence:
    """What `sequence_batching` of a ModelConfig says. `read(name)` is a file of the model's `initial_state` folder.

    Raises ConfigError, in Triton's words where it has them.
    """
    batching, batched = config.sequence_batching, config.max_batch_size > 0
    states = [_state(entry, model, batched, read) for entry in batching.state]
    seen: set[str] = set()
    for state in states:
        if state.input in seen:
            raise ConfigError(f"State input name '{state.input}' specified more than once.")
        seen.add(state.input)
    controls = list(_controls(batching, model))
    oldest = batching.WhichOneof("strategy_choice") == "oldest"
    slots = batching.oldest.max_candidate_sequences if oldest else max(1, config.max_batch_size)
    if oldest:
        for size in batching.oldest.preferred_batch_size:
            if not 0 < size <= config.max_batch_size:
                problem = "positive" if size <= 0 else "<= max batch size"
                raise ConfigError(f"sequence batching preferred batch size must be {problem} for {model.name}")
    return Recurrence(
        states,
        controls,
        needed=True,
        slots=slots,
        idle=(batching.max_sequence_idle_microseconds or 1_000_000) / 1e6,
        shown=frozenset(output.name for output in config.output),
    )


def with_states(config: ModelConfig, session: Session) -> ModelConfig:
    """The configuration with the tensors that `sequence_batching` names among its inputs and outputs.

    Clients do not see those, and so it does not list them; where it lists none, all of the model's are meant.
    """
    batching, full = config.sequence_batching, new()
    full.CopyFrom(config)
    fed = [entry.input_name for entry in batching.state] + [entry.name for entry in batching.control_input]
    made = [entry.output_name for entry in batching.state]
    for listed, names, specs in ((full.input, fed, session.inputs), (full.output, made, session.outputs)):
        known = {tensor.name for tensor in listed}
        for name in names if known else ():
            if name in specs and name not in known:
                dims = [d if isinstance(d, int) else -1 for d in specs[name].shape][config.max_batch_size > 0 :]
                listed.add(name=name, data_type=type_of(specs[name].dtype, name), dims=dims)
    return full


def _state(entry: Any, model: Signature, batched: bool, read: Callable[[str], bytes]) -> State:
    name, dtype = entry.input_name, dtype_that_is(entry.data_type, entry.input_name)
    for kind, tensors, wanted in (("input", model.inputs, name), ("output", model.outputs, entry.output_name)):
        tensor = tensors.get(wanted)
        if tensor is None:
            raise ConfigError(f"state {kind} '{wanted}' of model '{model.name}' is none of its {kind}s")
        if tensor.dtype != dtype:
            raise ConfigError(f"state {kind} '{wanted}' of model '{model.name}' is {tensor.datatype} in the model")
        declared_shape = (-1, *entry.dims) if batched else tuple(entry.dims)
        if not agree(declared_shape, tensor.shape):
            raise ConfigError(f"state {kind} '{wanted}' of model '{model.name}' is {list(tensor.shape)} in the model")
    dims = [1 if d == -1 else d for d in entry.dims]
    if not entry.initial_state:
        return State(name, entry.output_name, _filled(dims, dtype, batched, None))
    initial = entry.initial_state[0]
    if initial.data_type != entry.data_type:
        raise ConfigError(
            f"The data type used for 'initial_state' field of state '{name}' does not match the state data type."
        )
    if len(initial.dims) != len(entry.dims):
        raise ConfigError(
            f"Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state input "
            f"'{name}'. {len(initial.dims)} != {len(entry.dims)}"
        )
    for got, want in zip(initial.dims, entry.dims, strict=True):
        if got == -1:
            raise ConfigError(f"'initial_state' field for state input name '{name}' contains variable dimensions.")
        if want not in (-1, got):
            raise ConfigError(
                f"'initial_state' dim for input name '{name}' doesn't match 'state' dim description. {got} != {want}"
            )
    data = read(initial.data_file) if initial.WhichOneof("state_data") == "data_file" else None
    try:
        return State(name, entry.output_name, _filled(list(initial.dims), dtype, batched, data))
    except ValueError:
        raise ConfigError(f"{initial.data_file} is too short for the initial state of '{name}'") from None


def _filled(dims: Sequence[int], dtype: np.dtype[Any], batched: bool, data: bytes | None) -> HostArray:
    shape = (1, *dims) if batched else tuple(dims)
    if data is None:
        return np.full(shape, "", dtype) if dtype.hasobject else np.zeros(shape, dtype)
    return np.frombuffer(data, dtype, int(np.prod(shape))).reshape(shape)


def _controls(batching: Any, model: Signature) -> Iterator[Control]:
    seen: set[str] = set()
    for entry in batching.control_input:
        for control in entry.control:
            kind = control.DESCRIPTOR.enum_types_by_name["Kind"].values_by_number[control.kind].name
            if kind in seen:
                raise ConfigError(f"sequence batching specifies multiple {kind} tensors for {model.name}")
            seen.add(kind)
            tensor = model.inputs.get(entry.name)
            if tensor is None:
                raise ConfigError(f"sequence batching control tensor '{entry.name}' is no input of '{model.name}'")
            value, dtype = _typed(control, kind, model.name)
            if dtype != tensor.dtype:
                raise ConfigError(f"control '{entry.name}' of model '{model.name}' is {tensor.datatype} in the model")
            yield Control(entry.name, value, dtype, tensor.shape)


def _typed(control: Any, kind: str, model: str) -> tuple[Callable[[Correlation], Any], np.dtype[Any]]:
    """The value of a control input for a step, and its type."""
    given = [
        (list(values), np.dtype(dtype), name)
        for name, dtype in (("int32", np.int32), ("fp32", np.float32), ("bool", np.bool_))
        if (values := getattr(control, f"{name}_false_true"))
    ]
    if kind == "CONTROL_SEQUENCE_CORRID":
        if given:
            raise ConfigError(
                "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or "
                f"'bool_false_true' for {kind} for {model}"
            )
        return _identity(control, kind, model)
    if len(given) != 1:
        raise ConfigError(
            f"sequence batching must specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' for "
            f"{kind} for {model}"
            if not given
            else "sequence batching specifies more than one from 'int32_false_true', 'fp32_false_true' and "
            f"'bool_false_true' for {kind} for {model}"
        )
    values, dtype, name = given[0]
    if len(values) != 2:
        raise ConfigError(
            f"sequence batching control '{name}_false_true' must have exactly 2 entries for {kind} for {model}"
        )
    flag: Callable[[Correlation], bool] = {
        "CONTROL_SEQUENCE_START": lambda step: step.start,
        "CONTROL_SEQUENCE_READY": lambda step: True,
        "CONTROL_SEQUENCE_END": lambda step: step.end,
    }[kind]
    return lambda step: values[flag(step)], dtype


def _identity(control: Any, kind: str, model: str) -> tuple[Callable[[Correlation], Any], np.dtype[Any]]:
    dtype = dtype_that_is(control.data_type, kind)
    if dtype.name not in ("uint64", "int64", "uint32", "int32", "object"):
        raise ConfigError(
            f"unexpected data type for control {kind} for {model}. "
            "Allowed data types are TYPE_UINT64, TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING"
        )
    if dtype.hasobject:
        return lambda step: str(step.id), dtype
    bits = 8 * dtype.itemsize
    wrapped = np.dtype(f"uint{bits}").type

    def number(step: Correlation) -> Any:
        if isinstance(step.id, str):
            raise BadRequest(f"model '{model}' takes integers as sequence ids, not '{short(step.id)}'")
        return wrapped(step.id & (1 << bits) - 1).astype(dtype)

    return number, dtype


def ignored_in_sequences(config: ModelConfig) -> list[str]:
    """The settings of a ModelConfig's `sequence_batching` that have no effect, each with the reason."""
    batching = config.sequence_batching
    strategy = batching.WhichOneof("strategy_choice")
    asked = {field.name for field, _ in getattr(batching, strategy).ListFields()} if strategy else set()
    found = [f"{strategy}.{name}" for name in sorted(asked & _UNUSED)]
    found += [f"state.{name}" for name in _BUFFERS if any(getattr(state, name) for state in batching.state)]
    found += ["iterative_sequence"] if batching.iterative_sequence else []
    return [f"sequence_batching.{name}: {_UNUSED_WHY}" for name in found]
