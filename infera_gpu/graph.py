"""The model as data: immutable nodes in topological order. Passes return new graphs, nothing edits one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np

from infera_gpu.errors import InvalidModel
from infera_gpu.spec import ValueSpec

Attrs = Mapping[str, Any]
HostArray = np.ndarray[Any, np.dtype[Any]]

EMPTY: Mapping[str, Any] = MappingProxyType({})

FOLD_LIMIT = 1 << 30
"""Bytes. What planning computes ahead must not be larger: a few bytes of a file can ask for any size."""

JOINT = "\N{FRACTION SLASH}"
"""Joins the parts of names that are made here. Files with such names are refused: none is like one of ours."""


T = TypeVar("T")


class lazy(Generic[T]):
    """functools.cached_property, without the lock that it takes before Python 3.12: nodes come in thousands."""

    def __init__(self, build: Callable[[Any], T]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> T:
        made: T = self._build(instance)
        instance.__dict__[self._name] = made
        return made


def made_name(*parts: object) -> str:
    """The name of a value that is in no file, made of a name that is unique where it stands, and of what it is."""
    return JOINT.join(map(str, parts))


@dataclass(frozen=True, init=False)
class Node:
    """One operation. An input named "" is an optional input left out; so is an output.

    `attrs` values are int, float, str, tuples of these, numpy.ndarray (tensors) or Graph (subgraphs). `overload` tells
    model-local functions of one name apart. `opset` is the node's own version of its domain, where that is not the
    graph's: functions may import another one.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Attrs = field(default_factory=lambda: EMPTY)
    domain: str = ""
    name: str = ""
    overload: str = ""
    opset: int = 0

    def __init__(
        self,
        op: str,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        attrs: Attrs = EMPTY,
        domain: str = "",
        name: str = "",
        overload: str = "",
        opset: int = 0,
    ) -> None:
        """What dataclass would write, in half the time: nodes come in thousands."""
        self.__dict__.update(
            op=op, inputs=inputs, outputs=outputs, attrs=attrs, domain=domain, name=name, overload=overload, opset=opset
        )

    def __str__(self) -> str:
        return self.label

    def over(self, inputs: tuple[str, ...], outputs: tuple[str, ...] | None = None) -> Node:
        """The same operation over other values: itself where they are its own."""
        made = self.outputs if outputs is None else outputs
        if inputs == self.inputs and made == self.outputs:
            return self
        return Node(self.op, inputs, made, self.attrs, self.domain, self.name, self.overload, self.opset)

    @lazy
    def label(self) -> str:
        """The operator, and the name that tells it from others."""
        return f"{self.op} '{self.name or next((o for o in self.outputs if o), '')}'"

    @lazy
    def qualified(self) -> str:
        """The operator with its domain, as users write it: `com.microsoft.Gelu`; standard operators bare."""
        return f"{self.domain}.{self.op}" if self.domain else self.op

    @lazy
    def subgraphs(self) -> tuple[tuple[str, Graph], ...]:
        """(attribute, graph) of every subgraph."""
        if not self.attrs:
            return ()
        return tuple([(k, v) for k, v in self.attrs.items() if isinstance(v, Graph)])

    @lazy
    def reads(self) -> tuple[str, ...]:
        """Every value this node needs, those that its subgraphs capture included."""
        needed = [i for i in self.inputs if i]
        for _, sub in self.subgraphs:
            needed += sub.captures()
        return tuple(needed)


def version_of(node: Node, opsets: Mapping[str, int]) -> int:
    """The version of its domain that a node belongs to, in a graph that imports `opsets`."""
    return node.opset or opsets.get(node.domain, 1)


def ordered(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes, each behind those that make what it reads, else in the order given.

    Those of a cycle have no such order, and all are given back as they are: `Graph.check` says what is wrong.
    """
    makers = {o: i for i, n in enumerate(nodes) for o in n.outputs if o}
    if all(makers.get(v, -1) < i for i, n in enumerate(nodes) for v in (n.reads if n.attrs else n.inputs)):
        return tuple(nodes)
    found: list[Node] = []
    begun, placed = set[int](), set[int]()
    for first in range(len(nodes)):
        waiting = [first]
        while waiting:
            i = waiting[-1]
            before = {makers[v] for v in nodes[i].reads if v in makers} - placed
            if i in placed or not before:
                waiting.pop()
                if i not in placed:
                    placed.add(i)
                    found.append(nodes[i])
                continue
            begun.add(i)
            if not begun.isdisjoint(before):
                return tuple(nodes)
            waiting += sorted(before, reverse=True)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in topological order, one producer a value.

    `inputs` and `outputs` map names to specs, which may hold symbols. `constants` are initialisers, and what folding
    added to them. `specs` says what is known of other values. `opsets` maps a domain ("" is ai.onnx) to its version.
    `overridable` are the constants that a run may be given other values for.
    """

    nodes: tuple[Node, ...]
    inputs: Mapping[str, ValueSpec]
    outputs: Mapping[str, ValueSpec]
    constants: Mapping[str, HostArray] = field(default_factory=lambda: EMPTY)
    opsets: Mapping[str, int] = field(default_factory=lambda: EMPTY)
    specs: Mapping[str, ValueSpec] = field(default_factory=lambda: EMPTY)
    name: str = ""
    overridable: Mapping[str, ValueSpec] = field(default_factory=lambda: EMPTY)

    def opset_of(self, node: Node) -> int:
        """The version of its domain that a node of this graph belongs to."""
        return version_of(node, self.opsets)

    def producers(self) -> dict[str, Node]:
        """value -> the node that makes it"""
        return {o: n for n in self.nodes for o in n.outputs if o}

    def readers(self) -> dict[str, list[Node]]:
        """value -> the nodes that read it, once for each use, captures of subgraphs included"""
        found: dict[str, list[Node]] = {}
        for n in self.nodes:
            for value in n.reads:
                found.setdefault(value, []).append(n)
        return found

    def walk(self) -> Iterator[Graph]:
        """This graph and every graph inside it."""
        yield self
        for n in self.nodes:
            for _, sub in n.subgraphs:
                yield from sub.walk()

    def overriding(self, names: Iterable[str]) -> Graph:
        """The same graph with these of its overridable constants as inputs."""
        names = set(names)
        given = {k: spec for k, spec in self.overridable.items() if k in names}
        return replace(
            self,
            inputs={**self.inputs, **given},
            constants={k: v for k, v in self.constants.items() if k not in given},
            overridable={},
        )

    def prefixed(self, prefix: str) -> Graph:
        """The same graph with the values that it makes and its constants renamed; captured values keep their names.

        Inlining a subgraph needs this: two of them may use one name for different values.
        """
        own = {*self.constants, *(o for n in self.nodes for o in n.outputs if o)}
        return self.renamed({name: made_name(prefix, name) for name in own})

    def renamed(self, names: Mapping[str, str]) -> Graph:
        """The same graph with other names. What a subgraph makes itself hides names, and makes way for new ones."""
        taken = set(names.values())

        def inner(sub: Graph) -> Graph:
            own = {*sub.inputs, *sub.constants, *(o for n in sub.nodes for o in n.outputs if o)}
            moved = {k: made_name(k, "") for k in own & taken}
            while not taken.isdisjoint(moved.values()) or not own.isdisjoint(moved.values()):
                moved = {k: made_name(v, "") for k, v in moved.items()}
            return sub.renamed({**{k: v for k, v in names.items() if k not in own}, **moved})

        def new(name: str) -> str:
            return names.get(name, name)

        return replace(
            self,
            inputs={new(k): s for k, s in self.inputs.items()},
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
            needed |= {v for v in n.reads if v not in own}
            own.update(n.outputs)
        return needed | {o for o in self.outputs if o not in own}

    def check(self, outer: Iterable[str] = ()) -> Graph:
        """Returns itself. Raises InvalidModel where a value has no producer before its use, or has two."""
        known = {*self.inputs, *self.constants, *outer}
        for n in self.nodes:
            for value in n.inputs:
                if value and value not in known:
                    later = any(value in other.outputs for other in self.nodes)
                    how = "is made by a later node, and some wait for each other" if later else "is made by no node"
                    raise InvalidModel(f"{n}: its input '{value}' {how}")
            for _, sub in n.subgraphs:
                sub.check(known)
            for value in n.outputs:
                if value and value in known:
                    raise InvalidModel(f"{n}: its output '{value}' is made twice")
                if value:
                    known.add(value)
        for value in self.outputs:
            if value not in known:
                raise InvalidModel(f"output '{value}' is made by no node")
        return self
