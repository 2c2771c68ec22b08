"""Model-local functions: each call becomes the nodes of the function's body, at the function's own opset."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from infera_gpu.errors import InvalidModel
from infera_gpu.graph import Graph, HostArray, Node, made_name

MAX_SIZE = 2_000_000
"""Nodes, with their inputs and outputs, that functions may expand to; long names count more than once. A few functions
that call each other twice can ask for any number."""

Key: TypeAlias = tuple[str, str, str]
"""domain, name, overload"""


@dataclass(frozen=True, slots=True)
class Reference:
    """In a function's body, in place of an attribute: the attribute of the call that has this name, and its kind."""

    name: str
    kind: str

    def check(self, value: Any, label: str) -> Any:
        """`value`. Raises InvalidModel where it is of another kind."""
        found = kind_of(value)
        if found != self.kind and not (value == () and self.kind.endswith("S")):
            raise InvalidModel(f"{label}: attribute '{self.name}' is {found}, the function needs {self.kind}")
        return value


_KINDS = {float: "FLOAT", int: "INT", str: "STRING", bytes: "STRING", Graph: "GRAPH"}


def kind_of(value: Any) -> str:
    """The name of an attribute's type (AttributeProto.AttributeType), from a value as nodes hold it."""
    if isinstance(value, tuple):
        return f"{kind_of(value[0])}S" if value else "INTS"
    return "TENSOR" if isinstance(value, np.ndarray) else _KINDS.get(type(value), "TYPE_PROTO")


@dataclass(frozen=True, slots=True)
class Function:
    """A function: its body as a graph, and the attributes that a call may give, some with defaults."""

    body: Graph
    attrs: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)


def key_of(node: Node) -> Key:
    return node.domain, node.op, node.overload


def inline(graph: Graph, functions: Mapping[Key, Function]) -> Graph:
    """The graph without calls of functions, in subgraphs neither.

    Raises InvalidModel for functions that call themselves or expand to more than MAX_SIZE.
    """
    if not functions:
        return graph
    size = _Sizes(functions).of(graph)
    if size > MAX_SIZE:
        raise InvalidModel(f"its functions expand to {size:,} nodes and values, at most {MAX_SIZE:,} are accepted")
    return _inlined(graph, functions, itertools.count())


class _Sizes:
    """How many nodes and values calls expand to."""

    def __init__(self, functions: Mapping[Key, Function]) -> None:
        self._functions = functions
        self._known: dict[Key, int | None] = {}

    def of(self, graph: Graph) -> int:
        own = len(graph.constants) + len(graph.outputs)
        return own + sum(self._node(n) + sum(self.of(sub) for _, sub in n.subgraphs) for n in graph.nodes)

    def _node(self, node: Node) -> int:
        key = key_of(node)
        function = self._functions.get(key)
        names = (node.name, node.op, *node.inputs, *node.outputs)
        size = len(names) + sum(len(name) // 64 for name in names)
        if function is None:
            return size
        if key not in self._known:
            self._known[key] = None
            self._known[key] = self.of(function.body)
        found = self._known[key]
        if found is None:
            raise InvalidModel(f"the function {node.qualified} calls itself")
        return size + found


def _inlined(graph: Graph, functions: Mapping[Key, Function], numbers: Iterator[int]) -> Graph:
    nodes: list[Node] = []
    constants = dict(graph.constants)
    for node in graph.nodes:
        if node.subgraphs:
            attrs = {k: _inlined(v, functions, numbers) if isinstance(v, Graph) else v for k, v in node.attrs.items()}
            node = replace(node, attrs=attrs)
        function = functions.get(key_of(node))
        if function is None:
            nodes.append(node)
            continue
        called = _called(function, node, graph.opsets, made_name(node.op[:40], next(numbers)))
        body = _inlined(called, functions, numbers)
        nodes += body.nodes
        constants.update(body.constants)
    return replace(graph, nodes=tuple(nodes), constants=constants)


def _called(function: Function, call: Node, opsets: Mapping[str, int], prefix: str) -> Graph:
    """The body as this call needs it: attributes and names filled in, every node at the function's opset.

    Its own values are named `prefix`⁄..., which no other call's are.
    """
    body = function.body
    unknown = [k for k in call.attrs if k not in function.attrs]
    if unknown:
        raise InvalidModel(f"{call}: the function {call.qualified} has no attribute '{unknown[0]}'")
    for what, actual, formal in (("inputs", call.inputs, body.inputs), ("outputs", call.outputs, body.outputs)):
        if len(actual) > len(formal):
            raise InvalidModel(f"{call} has {len(actual)} {what}, the function {call.qualified} has {len(formal)}")
    attrs = {**function.defaults, **call.attrs}
    given = dict(zip(body.inputs, (*call.inputs, *[""] * len(body.inputs)), strict=False))
    names = {v: made_name(prefix, v) for v in (*body.constants, *(o for n in body.nodes for o in n.outputs if o))}
    copies: list[Node] = []
    for inner, outer in zip(body.outputs, call.outputs, strict=False):
        if not outer:
            continue
        if inner in given or inner in body.constants:
            source = given.get(inner, names.get(inner, ""))
            if not source:
                raise InvalidModel(f"{call}: its output '{outer}' is the input '{inner}', which is left out")
            copies.append(Node("Identity", (source,), (outer,)))
        else:
            names[inner] = outer
    filled = _filled(body, attrs, body.opsets, opsets, call.name or call.op)
    renamed = filled.renamed({**names, **given})
    return replace(renamed, nodes=(*renamed.nodes, *copies), opsets=opsets)


def _filled(
    graph: Graph, attrs: Mapping[str, Any], own: Mapping[str, int], outer: Mapping[str, int], label: str
) -> Graph:
    """References become the attributes that they name, or vanish where the call leaves those out."""

    def value(v: Any) -> Any:
        if isinstance(v, Reference):
            return v.check(attrs[v.name], label) if v.name in attrs else v
        return _filled(v, attrs, own, outer, label) if isinstance(v, Graph) else v

    def node(n: Node) -> Node:
        opset = own.get(n.domain, 0)
        made = {k: value(v) for k, v in n.attrs.items()}
        return replace(
            n,
            attrs={k: v for k, v in made.items() if not isinstance(v, Reference)},
            name=f"{label}/{n.name or next((o for o in n.outputs if o), n.op)}",
            opset=n.opset or (0 if opset == outer.get(n.domain, 0) else opset),
        )

    return replace(graph, nodes=tuple(map(node, graph.nodes)), opsets=outer)


def constants_first(graph: Graph, value: Callable[[Node], HostArray]) -> Graph:
    """The graph with its Constant nodes turned into constants, in subgraphs too; `value(node)` gives the array.

    Those whose attribute is a reference stay.
    """
    nodes: list[Node] = []
    constants: dict[str, HostArray] = dict(graph.constants)
    if not any(n.op == "Constant" or n.subgraphs for n in graph.nodes):
        return graph
    for n in graph.nodes:
        if n.op == "Constant" and not n.domain and not any(isinstance(v, Reference) for v in n.attrs.values()):
            if n.outputs[0] in constants or n.outputs[0] in graph.inputs:
                raise InvalidModel(f"{n}: its output '{n.outputs[0]}' is made twice")
            constants[n.outputs[0]] = value(n)
        elif n.subgraphs:
            attrs = {k: constants_first(v, value) if isinstance(v, Graph) else v for k, v in n.attrs.items()}
            nodes.append(replace(n, attrs=attrs))
        else:
            nodes.append(n)
    return replace(graph, nodes=tuple(nodes), constants=constants)
