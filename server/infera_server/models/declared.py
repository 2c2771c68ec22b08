"""A session as its configuration declares it: tensors checked against the model, reshaped, narrowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from infera_gpu.spec import Dim, TensorSpec
from infera_server.models.modelconfig import ConfigError, ModelConfig, dtype_of, type_name, type_of
from infera_server.runtime import Device, Plan, Session, Specs, Supervision
from infera_server.scheduling.independence import Facts
from infera_server.scheduling.rows import Arrays

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reshape:
    """The fixed dimensions that replace others after the batch; -1 is at most one, of equal size in both."""

    batched: bool
    shape: tuple[int, ...]

    def __call__(self, shape: Shape) -> Shape:
        """What a tensor of this shape becomes."""
        ahead = shape[:1] if self.batched else ()
        rest = math.prod(shape[len(ahead) :]) // max(1, math.prod(d for d in self.shape if d != -1))
        return (*ahead, *(rest if d == -1 else d for d in self.shape))


@dataclass(frozen=True)
class Declared:
    """A session with other shapes at its edges. `optional` inputs may be left out; `inputs` are the others."""

    session: Session
    inputs: Specs
    outputs: Specs
    optional: Specs
    feeds: Mapping[str, Reshape]
    results: Mapping[str, Reshape]

    @property
    def overridable(self) -> Specs:
        return self.session.overridable

    @property
    def supervision(self) -> Supervision | None:
        return self.session.supervision

    def facts(self, shared: Collection[str] = ()) -> Facts:
        return self.session.facts(shared)

    @property
    def device(self) -> Device:
        return self.session.device

    def run(self, feeds: Arrays) -> Arrays:
        given = {name: array.reshape(self._fed(name, array.shape)) for name, array in feeds.items()}
        found = self.session.run(given)
        return {
            name: found[name].reshape(self.results[name](found[name].shape)) if name in self.results else found[name]
            for name in self.outputs
        }

    def plan_for(self, shapes: Mapping[str, Shape]) -> Plan:
        return self.session.plan_for({name: self._fed(name, shape) for name, shape in shapes.items()})

    def reserve(self, shapes: Mapping[str, Shape]) -> int:
        return self.session.reserve({name: self._fed(name, shape) for name, shape in shapes.items()})

    def close(self) -> None:
        self.session.close()

    def _fed(self, name: str, shape: Shape) -> Shape:
        return self.feeds[name](shape) if name in self.feeds else shape


def declared(session: Session, config: ModelConfig) -> Declared:
    """The session with the tensors that the configuration lists; those of the model where it lists none.

    Raises ConfigError, in Triton's words, where they are not the model's.
    """
    batched = config.max_batch_size > 0
    inputs, feeds = _tensors("input", config.input, {**session.inputs, **session.overridable}, config, session.inputs)
    outputs, results = _tensors("output", config.output, session.outputs, config, {})
    optional = {t.name: inputs[t.name] for t in config.input if t.optional}
    for name in optional:
        if batched:
            raise _unable(config, f"optional input '{name}' is not supported for models that support batching")
        if name not in session.overridable:
            raise _unable(config, f"input '{name}' cannot be optional: the model has no value for it")
    required = {name: spec for name, spec in inputs.items() if name not in optional}
    return Declared(session, required, outputs, optional, feeds, results)


def _tensors(
    kind: str, entries: Iterable[Any], known: Specs, config: ModelConfig, required: Specs
) -> tuple[dict[str, TensorSpec], dict[str, Reshape]]:
    """The declared specs by name, and how a request's tensor becomes the model's (for an output the other way)."""
    entries, batched = list(entries), config.max_batch_size > 0
    if not entries:
        found = dict(required or known)
        for name in found:
            _check_batch(name, found[name], config)
        return found, {}
    specs: dict[str, TensorSpec] = {}
    reshapes: dict[str, Reshape] = {}
    for entry in entries:
        if (spec := known.get(entry.name)) is None:
            raise ConfigError(
                f"unexpected inference {kind} '{entry.name}', allowed {kind}s are: {', '.join(sorted(known))}"
            )
        if dtype_of(entry.data_type) != spec.dtype:
            raise _unable(
                config,
                f"configuration expects datatype {type_name(entry.data_type)} for {kind} '{entry.name}', "
                f"model provides {type_name(type_of(spec.dtype, entry.name))}",
            )
        _check_batch(entry.name, spec, config)
        dims, inner = tuple(entry.dims), tuple(entry.reshape.shape if entry.HasField("reshape") else entry.dims)
        _check_dims(entry.name, spec, inner, config, exact=kind == "output")
        inner = inner if spec.shape or not spec.ranked else ()
        specs[entry.name] = _narrowed(spec, dims, inner, batched)
        if inner != dims:
            reshapes[entry.name] = Reshape(batched, inner if kind == "input" else dims)
    missing = [name for name in required if name not in specs]
    if missing:
        raise _unable(config, f"configuration expects {len(specs)} inputs, model provides {len(required)}")
    return specs, reshapes


def _check_batch(name: str, spec: TensorSpec, config: ModelConfig) -> None:
    if config.max_batch_size > 0 and spec.ranked and (not spec.shape or isinstance(spec.shape[0], int)):
        raise ConfigError(
            f"model '{config.name}', tensor '{name}': for the model to support batching the shape should have at "
            f"least 1 dimension and the first dimension must be -1; but shape expected by the model is {_text(spec)}"
        )


def _check_dims(name: str, spec: TensorSpec, dims: Shape, config: ModelConfig, exact: bool) -> None:
    """Triton's CompareDimsSupported; an output of the model with an open dimension may be declared with a size."""
    full: Shape = (-1, *dims) if config.max_batch_size > 0 else dims
    if not spec.ranked or (not spec.shape and all(d == 1 for d in dims)):
        return
    fits = len(full) == len(spec.shape) and all(
        not isinstance(have, int) or have == want or (want == -1 and not exact)
        for have, want in zip(spec.shape, full, strict=True)
    )
    if not fits:
        batch = (
            " (an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, "
            "making complete shape"
            if config.max_batch_size > 0
            else " (shape"
        )
        raise ConfigError(
            f"model '{config.name}', tensor '{name}': the model expects {len(spec.shape)} dimensions "
            f"(shape {_text(spec)}) but the model configuration specifies {len(full)} dimensions{batch} "
            f"[{','.join(map(str, full))}])"
        )


def _narrowed(spec: TensorSpec, dims: Shape, inner: Shape, batched: bool) -> TensorSpec:
    """The spec that requests are held to: declared sizes, and the model's own where the declaration is open."""
    own: tuple[Dim, ...] = spec.shape[1:] if batched else spec.shape
    if inner != dims or len(own) != len(dims):
        open_ = next((d for d in own if not isinstance(d, int)), None)
        shape: tuple[Dim, ...] = tuple(open_ if d == -1 else d for d in dims)
    else:
        shape = tuple(have if want == -1 else want for have, want in zip(own, dims, strict=True))
    return replace(spec, shape=(spec.shape[0], *shape) if batched and spec.ranked else shape, ranked=True)


def _unable(config: ModelConfig, why: str) -> ConfigError:
    return ConfigError(f"unable to load model '{config.name}', {why}")


def _text(spec: TensorSpec) -> str:
    return f"[{','.join(str(d) if isinstance(d, int) else '-1' for d in spec.shape)}]"
