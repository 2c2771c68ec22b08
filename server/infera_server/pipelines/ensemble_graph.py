"""What `ensemble_scheduling` of a ModelConfig says: which steps there are, and which tensors go from where to where.

Every refusal is in Triton's words where it has them, and names what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infera_server.codec import datatype_of
from infera_server.models.modelconfig import ConfigError, dtype_that_is
from infera_server.requests import Output
from infera_server.scheduling.rows import Layout
from infera_server.scheduling.signature import Signature, Tensor, agree


@dataclass(frozen=True, slots=True)
class Step:
    """A model and how its tensors are called in the ensemble. Without a version it is the newest."""

    index: int
    model: str
    version: str | None
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    reads: frozenset[str]
    """The ensemble's tensors that it needs."""

    asks: Sequence[Output]
    """What it asks of its model."""


@dataclass(frozen=True, slots=True)
class Graph:
    """The steps of an ensemble, and its tensors as clients see them."""

    signature: Signature
    steps: Sequence[Step]

    def needed(self, outputs: Iterable[str]) -> Sequence[Step]:
        """The steps that these outputs hang on."""
        makers = {tensor: step for step in self.steps for tensor in step.outputs.values()}
        wanted, found = list(outputs), set()
        while wanted:
            step = makers.get(wanted.pop())
            if step is not None and step.index not in found:
                found.add(step.index)
                wanted += step.inputs.values()
        return [step for step in self.steps if step.index in found]


def read(name: str, version: str, config: Any) -> Graph:
    """The graph of a configuration, where every output is made of the inputs. Raises ConfigError."""
    steps = list(_steps(name, config))
    made = _made(name, steps)
    _check_flow(name, config, steps, made)
    batched = config.max_batch_size > 0
    inputs = {entry.name: _tensor(name, entry, batched) for entry in config.input}
    outputs = {entry.name: _tensor(name, entry, batched) for entry in config.output}
    layout = Layout(dict.fromkeys(inputs, 0), dict.fromkeys(outputs, 0), (config.max_batch_size,)) if batched else None
    return Graph(Signature(name, version, inputs, outputs, layout), steps)


def _steps(name: str, config: Any) -> Iterator[Step]:
    entries = config.ensemble_scheduling.step
    if not entries:
        raise ConfigError(f"must specify 'step' for ensemble '{name}'")
    for index, entry in enumerate(entries):
        for member in ("model_name", "input_map", "output_map"):
            if not getattr(entry, member):
                raise ConfigError(f"must specify '{member}' in step {index} of ensemble '{name}'")
        version = None if entry.model_version in (0, -1) else str(entry.model_version)
        inputs, outputs = dict(entry.input_map), dict(entry.output_map)
        asks = [Output(own, binary=True) for own in outputs]
        yield Step(index, entry.model_name, version, inputs, outputs, frozenset(inputs.values()), asks)


def _made(name: str, steps: Sequence[Step]) -> Mapping[str, Step]:
    """The step that makes each tensor."""
    made: dict[str, Step] = {}
    for step in steps:
        for tensor in step.outputs.values():
            if tensor in made:
                raise ConfigError(
                    f"ensemble tensor '{tensor}' can appear in an output map only once for ensemble '{name}' "
                    f"step {step.index}"
                )
            made[tensor] = step
    return made


def _check_flow(name: str, config: Any, steps: Sequence[Step], made: Mapping[str, Step]) -> None:
    """Every input is used, every output is made of the inputs, and so is every other tensor, and used."""
    inputs, outputs = ({entry.name for entry in entries} for entries in (config.input, config.output))
    used = {tensor for step in steps for tensor in step.inputs.values()}
    for tensor in inputs - used - made.keys():
        raise ConfigError(f"ensemble input '{tensor}' for ensemble {name} is not used")
    for tensor in inputs & made.keys():
        raise ConfigError(f"ensemble input '{tensor}' for ensemble '{name}' is written by step {made[tensor].index}")
    ready, left = set(inputs), list(steps)
    while runs := [step for step in left if ready.issuperset(step.inputs.values())]:
        ready.update(tensor for step in runs for tensor in step.outputs.values())
        left = [step for step in left if step not in runs]
    for tensor in sorted(outputs):
        if tensor not in used | made.keys():
            raise ConfigError(f"ensemble output '{tensor}' for ensemble {name} is not used")
        if tensor not in ready:
            source = _unconnected(tensor, made, ready)
            why = f": at least one of its depending tensors, '{source}', is not connected" if source != tensor else ""
            raise ConfigError(f"output '{tensor}' for ensemble '{name}' is not written{why}")
    for tensor in sorted((used | made.keys()) - outputs):
        if tensor not in ready or tensor not in used:
            raise ConfigError(f"ensemble tensor '{tensor}' is unused in ensemble '{name}'")


def _unconnected(tensor: str, made: Mapping[str, Step], ready: set[str]) -> str:
    """Upstream of a tensor that is not made: the first that nothing makes, or that a cycle comes back from."""
    seen: set[str] = set()
    while step := made.get(tensor):
        missing = next((t for t in step.inputs.values() if t not in ready and t not in seen), None)
        if missing is None:
            break
        seen.add(missing)
        tensor = missing
    return tensor


def _tensor(name: str, entry: Any, batched: bool) -> Tensor:
    if entry.HasField("reshape"):
        raise ConfigError(f"tensor '{entry.name}' of ensemble '{name}' is reshaped, which only models can be")
    if not entry.dims:
        raise ConfigError(f"tensor '{entry.name}' of ensemble '{name}' must specify 'dims'")
    shape = (-1, *entry.dims) if batched else tuple(entry.dims)
    dtype = dtype_that_is(entry.data_type, entry.name)
    return Tensor(entry.name, datatype_of(dtype, entry.name), dtype, shape)


# --- members ---------------------------------------------------------------------------------------------------------


def check_members(graph: Graph, members: Sequence[Signature]) -> None:
    """Raises ConfigError where the tensors of a step's model are not those that the ensemble takes them to be."""
    name, layout = graph.signature.name, graph.signature.layout
    known = {t.name: (name, t) for t in (*graph.signature.inputs.values(), *graph.signature.outputs.values())}
    for step, member in zip(graph.steps, members, strict=True):
        if layout is not None and member.layout is not None and member.layout.max_rows < layout.max_rows:
            raise ConfigError(
                f"ensemble {name} allows maximum batch size {layout.max_rows}, but it contains model {step.model} "
                f"which only allows maximum batch size to be {member.layout.max_rows}"
            )
        for own, tensor in step.inputs.items():
            if own not in member.inputs:
                raise ConfigError(
                    f"in ensemble {name}, ensemble tensor {tensor} is mapping to non-existing input {own} in model "
                    f"{step.model}"
                )
        for own, entry in member.inputs.items():
            if own not in step.inputs and not entry.optional:
                raise ConfigError(
                    f"in ensemble {name}, input {own} in model {step.model} is not mapped to any ensemble tensors"
                )
        for own, tensor in step.outputs.items():
            if own not in member.outputs:
                raise ConfigError(
                    f"in ensemble {name}, ensemble tensor {tensor} is mapped from non-existing output {own} in model "
                    f"{step.model}"
                )
        for mapping, tensors in ((step.inputs, member.inputs), (step.outputs, member.outputs)):
            for own, tensor in mapping.items():
                _check_alike(
                    name, tensor, known.setdefault(tensor, (step.model, tensors[own])), (step.model, tensors[own])
                )


def unproven(graph: Graph, members: Sequence[Signature]) -> Sequence[Sequence[str]]:
    """For each step the inputs that what comes may not fit, as only a run shows: where it is declared less closely."""
    shapes = {name: tensor.shape for name, tensor in graph.signature.inputs.items()}
    for step, member in zip(graph.steps, members, strict=True):
        shapes |= {tensor: member.outputs[own].shape for own, tensor in step.outputs.items()}
    return [
        [own for own, tensor in step.inputs.items() if not member.inputs[own].accepts(shapes[tensor])]
        for step, member in zip(graph.steps, members, strict=True)
    ]


def _check_alike(name: str, tensor: str, known: tuple[str, Tensor], other: tuple[str, Tensor]) -> None:
    (model, a), (another, b) = known, other
    if a.datatype != b.datatype:
        what, values = "data type", [f"TYPE_{'STRING' if t.datatype == 'BYTES' else t.datatype}" for t in (a, b)]
    elif not agree(a.shape, b.shape):
        what, values = "shape", [f"[{','.join(map(str, t.shape))}]" for t in (a, b)]
    else:
        return
    raise ConfigError(
        f"in ensemble {name}, ensemble tensor {tensor}: inconsistent {what}: {values[0]} is inferred from model "
        f"{model} while {values[1]} is inferred from model {another}"
    )
