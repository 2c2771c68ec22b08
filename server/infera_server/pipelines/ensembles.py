"""Ensembles as their configurations have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from infera_server.errors import RequestError
from infera_server.models.modelconfig import ConfigError, ModelConfig, new
from infera_server.models.servable import Servable
from infera_server.models.taps import Tap
from infera_server.pipelines.ensemble import Ensemble, Lookup, absent_text
from infera_server.pipelines.ensemble_graph import Graph, read


def build(
    name: str,
    version: str,
    config: ModelConfig,
    lookup: Lookup,
    timeout: float = 30.0,
    labels: Callable[[str], tuple[str, ...]] = lambda output: (),
) -> Ensemble:
    """The ensemble of a ModelConfig, whose members can be looked up and fit together. Raises ConfigError.

    A request may take `timeout` seconds. `labels(output)` names the classes of an output; where it does not, the model
    that makes the output does.
    """
    graph = read(name, version, config)
    members: list[Servable] = []
    absent: list[str] = []
    depends = set()
    for step in graph.steps:
        if step.model == name:
            raise ConfigError(f"circular dependency between ensembles: {name} -> {name}")
        try:
            members.append(lookup(step.model, step.version))
        except RequestError:
            if step.version is not None:
                raise ConfigError(absent_text(name, step)) from None
            absent.append(step.model)
            continue
        depends |= {step.model, *_depends(members[-1])}
    if absent:
        raise ConfigError(
            f"ensemble {name} contains models that are not available or ambiguous: {', '.join(sorted(set(absent)))}"
        )
    if name in depends:
        raise ConfigError(f"circular dependency between ensembles: {name} -> ... -> {name}")
    graph = _labelled(graph, members, labels)
    ensemble = Ensemble(graph, _completed(name, config), lookup, timeout, frozenset(depends))
    ensemble.fit(members)
    return ensemble


def _labelled(graph: Graph, members: Sequence[Servable], own: Callable[[str], tuple[str, ...]]) -> Graph:
    """The graph with the names of its outputs' classes. Raises what `own` raises."""
    made = {
        tensor: member.signature.outputs[output].labels
        for step, member in zip(graph.steps, members, strict=True)
        for output, tensor in step.outputs.items()
        if output in member.signature.outputs
    }
    outputs = {n: replace(t, labels=own(n) or made.get(n, ())) for n, t in graph.signature.outputs.items()}
    return replace(graph, signature=replace(graph.signature, outputs=outputs))


def _depends(member: Servable) -> frozenset[str]:
    """What an ensemble needs, whatever stands before it; nothing where it is none."""
    if isinstance(member, Tap):
        return frozenset().union(*map(_depends, member.targets))
    return member.depends if isinstance(member, Ensemble) else frozenset()


def _completed(name: str, config: ModelConfig) -> ModelConfig:
    """The configuration as Triton tells it."""
    full = new()
    full.CopyFrom(config)
    full.name, full.platform = name, "ensemble"
    if full.version_policy.WhichOneof("policy_choice") is None:
        full.version_policy.latest.num_versions = 1
    return full
