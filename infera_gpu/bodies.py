"""Subgraphs as host nodes call them: planned for every combination of types that they are called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from infera_gpu.errors import PlanError
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.op import Subgraph
from infera_gpu.plan import Plan
from infera_gpu.spec import TensorSpec, ValueSpec, value_spec


class Inside(NamedTuple):
    """A node with a subgraph, which attribute that is, and the plans that it has been run by so far."""

    node: Node
    name: str
    plans: tuple[Plan, ...]


class Nested(Protocol):
    """A graph without captured values that can be called."""

    def called(self, *values: Any) -> list[Any]:
        """Its inputs in order in, its outputs in order out."""
        ...

    @property
    def planned(self) -> tuple[Plan, ...]:
        """The plans of its runs so far."""
        ...

    def inside(self) -> list[Inside]:
        """Those of its own subgraphs."""
        ...


Nest: TypeAlias = Callable[[Graph], Nested]
"""Makes a graph without captured values callable."""


class Body:
    """A subgraph as a stage's host nodes call it; planned for every combination of types that it is called with."""

    def __init__(self, graph: Graph, known: Mapping[str, HostArray], opsets: Mapping[str, int], nest: Nest) -> None:
        captured = sorted(graph.captures())
        self.fed = tuple(v for v in captured if v not in known)
        constants = {**{v: known[v] for v in captured if v in known}, **graph.constants}
        self._graph = replace(graph, constants=constants, opsets=opsets)
        self._nest = nest
        self._made: dict[tuple[ValueSpec, ...], Nested] = {}

    def bound(self, captured: tuple[Any, ...]) -> Subgraph:
        return _Bound(self, captured)

    @property
    def graph(self) -> Graph:
        return self._graph

    def __call__(self, values: tuple[Any, ...]) -> list[Any]:
        types = tuple(map(_type, values))
        found = self._made.get(types)
        if found is None:
            names = (*self._graph.inputs, *self.fed)
            graph = replace(self._graph, inputs=dict(zip(names, types, strict=True)))
            found = self._made[types] = self._nest(graph)
        return found.called(*values)

    def inside(self, node: Node, name: str) -> list[Inside]:
        """The plans that it has been run by, and those of its own subgraphs, as the subgraph `name` of a node."""
        made = list(self._made.values())
        own = Inside(node, name, tuple([plan for nested in made for plan in nested.planned]))
        return [own, *(deeper for nested in made for deeper in nested.inside())]


def _type(value: Any) -> ValueSpec:
    """The type of a value, for which a subgraph is planned: of a tensor, the element type."""
    return TensorSpec((), value.dtype, ranked=False) if isinstance(value, np.ndarray) else value_spec(value)


class _Bound:
    """A body with the values that it captures: implements op.Subgraph."""

    def __init__(self, body: Body, captured: tuple[Any, ...]) -> None:
        self._body, self._captured = body, captured
        self.inputs = tuple(body.graph.inputs.values())
        self.outputs = tuple(body.graph.outputs.values())

    def __call__(self, *values: Any) -> list[Any]:
        if len(values) != len(self.inputs):
            raise PlanError(f"its subgraph has {len(self.inputs)} inputs, {len(values)} values are given")
        return self._body((*map(value_of, values), *self._captured))


def value_of(made: Any) -> Any:
    """What a node made, as a value: arrays, lists, dicts and None."""
    return made if made is None or isinstance(made, (list, dict)) else np.asarray(made)
