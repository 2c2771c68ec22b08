"""The model as data: immutable nodes in topological order. Passes return new graphs, nothing edits one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from infera_gpu.errors import ModelError
from infera_gpu.spec import ValueSpec

Attrs = Mapping[str, Any]
HostArray = np.ndarray[Any, np.dtype[Any]]

EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. An input named "" is an optional input left out; so is an output.

    `attrs` values are int, float, str, tuples of these, numpy.ndarray (tensors) or Graph (subgraphs).
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Attrs = field(default_factory=lambda: EMPTY)
    domain: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.op} '{self.name or next((o for o in self.outputs if o), '')}'"

    @property
    def qualified(self) -> str:
        """The operator with its domain, as users write it: `com.microsoft.Gelu`; standard operators bare."""
        return f"{self.domain}.{self.op}" if self.domain else self.op

    @property
    def subgraphs(self) -> tuple[tuple[str, Graph], ...]:
        """(attribute, graph) of every subgraph."""
        return tuple((k, v) for k, v in self.attrs.items() if isinstance(v, Graph))

    def reads(self) -> Iterator[str]:
        """Every value this node needs, those that its subgraphs capture included."""
        yield from (i for i in self.inputs if i)
        for _, sub in self.subgraphs:
            yield from sub.captures()


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in topological order, one producer a value.

    `inputs` and `outputs` map names to specs, which may hold symbols. `constants` are initialisers, and what folding
    added to them. `specs` says what is known of other values. `opsets` maps a domain ("" is ai.onnx) to its version.
    """

    nodes: tuple[Node, ...]
    inputs: Mapping[str, ValueSpec]
    outputs: Mapping[str, ValueSpec]
    constants: Mapping[str, HostArray] = field(default_factory=lambda: EMPTY)
    opsets: Mapping[str, int] = field(default_factory=lambda: EMPTY)
    specs: Mapping[str, ValueSpec] = field(default_factory=lambda: EMPTY)
    name: str = ""

    def producers(self) -> dict[str, Node]:
        """value -> the node that makes it"""
        return {o: n for n in self.nodes for o in n.outputs if o}

    def readers(self) -> dict[str, list[Node]]:
        """value -> the nodes that read it, once for each use, captures of subgraphs included"""
        found: dict[str, list[Node]] = {}
        for n in self.nodes:
            for value in n.reads():
                found.setdefault(value, []).append(n)
        return found

    def walk(self) -> Iterator[Graph]:
        """This graph and every graph inside it."""
        yield self
        for n in self.nodes:
            for _, sub in n.subgraphs:
                yield from sub.walk()

    def prefixed(self, prefix: str) -> Graph:
        """The same graph with the values that it makes and its constants renamed; captured values keep their names.

        Inlining a subgraph needs this: two of them may use one name for different values.
        """
        own = {*self.constants, *(o for n in self.nodes for o in n.outputs if o)}
        return self._renamed({name: f"{prefix}/{name}" for name in own})

    def _renamed(self, names: Mapping[str, str]) -> Graph:
        def inner(sub: Graph) -> Graph:
            hidden = {*sub.inputs, *sub.constants, *(o for n in sub.nodes for o in n.outputs)}
            return sub._renamed({k: v for k, v in names.items() if k not in hidden})

        def new(name: str) -> str:
            return names.get(name, name)

        return replace(
            self,
            nodes=tuple(
                replace(
                    n,
                    inputs=tuple(map(new, n.inputs)),
                    outputs=tuple(map(new, n.outputs)),
                    attrs={k: inner(v) if isinstance(v, Graph) else v for k, v in n.attrs.items()},
                )
                for n in self.nodes
            ),
            outputs={new(k): s for k, s in self.outputs.items()},
            constants={new(k): a for k, a in self.constants.items()},
        )

    def captures(self) -> set[str]:
        """Outer values that this (sub)graph reads."""
        own = {*self.inputs, *self.constants}
        needed: set[str] = set()
        for n in self.nodes:
            needed |= {v for v in n.reads() if v not in own}
            own.update(n.outputs)
        return needed | {o for o in self.outputs if o not in own}

    def check(self, outer: Iterable[str] = ()) -> Graph:
        """Returns itself. Raises ModelError where a value has no producer before its use, or has two."""
        known = {*self.inputs, *self.constants, *outer}
        for n in self.nodes:
            for value in n.inputs:
                if value and value not in known:
                    raise ModelError(f"{n}: its input '{value}' is made by no node before it")
            for _, sub in n.subgraphs:
                sub.check(known)
            for value in n.outputs:
                if value and value in known:
                    raise ModelError(f"{n}: its output '{value}' is made twice")
                if value:
                    known.add(value)
        for value in self.outputs:
            if value not in known:
                raise ModelError(f"output '{value}' is made by no node")
        return self
