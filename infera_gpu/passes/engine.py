"""Rewrites declared as data: a pattern, a guard, what replaces it, an example and near misses.

One engine applies them, and it alone enforces what keeps a rewrite safe: the same name means the same value (or node)
everywhere in a pattern; a value inside a match is read by nodes of the match alone and is no output of the graph;
commutative operators match in either order; the replacement stands where the last node of the match stood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class P:
    """Matches a node: one of `ops` (standard domain unless qualified) over `args`.

    An argument is another P, the name of a value ("x"), the name of a constant ("#w"), or a number that a constant
    scalar must equal to float32 precision. A missing trailing optional input matches "?name" (so does a present one).
    `node` names the matched node for guards; two patterns of one name match one node.
    """

    ops: str | tuple[str, ...]
    args: tuple[P | str | float, ...]
    commutes: bool = False
    node: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.ops,) if isinstance(self.ops, str) else self.ops


def node(ops: str | tuple[str, ...], *args: P | str | float, commutes: bool = False, name: str = "") -> P:
    """A pattern, short to write."""
    return P(ops, args, commutes, name)


@dataclass(frozen=True)
class Match:
    """A place where a pattern fits: the graph's values and nodes under the pattern's names."""

    graph: Graph
    values: Mapping[str, str]
    nodes: Mapping[str, Node]
    inside: tuple[Node, ...]
    producers: Mapping[str, Node]

    @property
    def root(self) -> Node:
        """The last node of the match; the replacement makes its outputs."""
        return self.inside[0]

    def constant(self, name: str) -> HostArray:
        """The value of a constant named in the pattern."""
        return self.graph.constants[self.values[name]]

    @property
    def numbers_rank(self) -> int:
        """The highest rank of the constants that stood for numbers: 1 where an exporter wrote [0.5] for 0.5."""
        return max((self.constant(name).ndim for name in self.values if name.startswith("=")), default=0)

    def has_axes(self, name: str) -> bool:
        """Whether a named value is known to have an axis at least: a number of rank 1 then leaves its shape alone."""
        return _has_axes(self.graph, self.producers, self.values[name])

    def opset(self, domain: str = "") -> int:
        return self.graph.opsets.get(domain, 1)


@dataclass(frozen=True)
class Replacement:
    """The node that takes a match's place, and the constants it brings."""

    node: Node
    constants: Mapping[str, HostArray] = field(default_factory=dict)


_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Relu", "Tanh", "Sigmoid", "Erf", "Cast", "Identity"})
_WITH_AXES = frozenset({"Conv", "FusedConv", "Gemm", "LayerNormalization", "BatchNormalization", "Softmax"})


def _has_axes(graph: Graph, producers: Mapping[str, Node], value: str) -> bool:
    todo, seen = [value], set[str]()
    while todo:
        value = todo.pop()
        if not value or value in seen:
            continue
        seen.add(value)
        made_by = producers.get(value)
        known = graph.constants[value].shape if value in graph.constants else None
        spec = graph.inputs.get(value)
        if isinstance(spec, TensorSpec):
            known = spec.shape
        if known or (made_by is not None and made_by.op in _WITH_AXES):
            return True
        if made_by is not None and made_by.op in ("MatMul", "FusedMatMul"):
            weight = graph.constants.get(made_by.inputs[1]) if len(made_by.inputs) > 1 else None
            if weight is not None and weight.ndim > 1:
                return True
        elif made_by is not None and made_by.op in _ELEMENTWISE:
            todo += made_by.inputs
    return False


def _always(match: Match) -> bool:
    return True


@dataclass(frozen=True)
class Fusion:
    """A rewrite as data.

    `build` makes the replacement of a match that `guard` accepts. `example` and `near_misses` are graphs in ONNX's
    text syntax (without the header): the rewrite must fire exactly once on the first and never on the others, and the
    rewritten example must compute what the example computes. Tests are generated from them. A rewrite that
    `reassociates` computes something else in exact order (a factor folded into weights); strict sessions leave it out.
    """

    name: str
    patterns: tuple[P, ...]
    build: Callable[[Match], Replacement]
    example: str
    near_misses: tuple[str, ...]
    guard: Callable[[Match], bool] = _always
    opset: int = 17
    reassociates: bool = False


def fused(op: str, inputs: tuple[str, ...], **attrs: Any) -> Callable[[Match], Replacement]:
    """A `build` for the common case: one node of domain "infera" over named values; absent ones become ""."""

    def build(match: Match) -> Replacement:
        names = [match.values.get(i, "") for i in inputs]
        while names and not names[-1]:
            names.pop()
        return Replacement(infera(match, op, tuple(names), attrs))

    return build


def infera(match: Match, op: str, inputs: tuple[str, ...], attrs: Mapping[str, Any]) -> Node:
    """A node of domain "infera" that makes the match's outputs."""
    root = match.root
    return Node(op, inputs, root.outputs, dict(attrs), domain="infera", name=root.name or root.outputs[0])


@dataclass
class _Matcher:
    graph: Graph
    producers: Mapping[str, Node]
    readers: Mapping[str, list[Node]]

    def match(self, pattern: P, root: Node) -> Match | None:
        for values, nodes, inside in self._node(pattern, root, {}, {}, ()):
            if self._is_closed(inside, values):
                return Match(self.graph, values, nodes, inside, self.producers)
        return None

    def _is_closed(self, inside: tuple[Node, ...], values: Mapping[str, str]) -> bool:
        """Whether nobody needs what the inner nodes make: not outside the match, nor the replacement by a name."""
        members, named = {id(n) for n in inside}, set(values.values())
        return all(
            n.outputs[0] not in self.graph.outputs
            and n.outputs[0] not in named
            and all(id(r) in members for r in self.readers.get(n.outputs[0], ()))
            for n in inside[1:]
        )

    def _node(
        self, p: P, n: Node, values: dict[str, str], nodes: dict[str, Node], inside: tuple[Node, ...]
    ) -> Iterator[tuple[dict[str, str], dict[str, Node], tuple[Node, ...]]]:
        if n.qualified not in p.names or any(n.outputs[1:]) or n.subgraphs or n.opset:
            return
        required = sum(not (isinstance(a, str) and a.startswith("?")) for a in p.args)
        if not required <= len(n.inputs) <= len(p.args):
            return
        inputs = [*n.inputs, *[""] * (len(p.args) - len(n.inputs))]
        orders = [inputs, inputs[::-1]] if p.commutes else [inputs]
        if p.node:
            if nodes.get(p.node, n) is not n:
                return
            nodes = {**nodes, p.node: n}
        inside = inside if any(i is n for i in inside) else (*inside, n)
        for order in orders:
            yield from self._args(list(zip(p.args, order, strict=True)), values, nodes, inside)

    def _args(
        self,
        pairs: list[tuple[P | str | float, str]],
        values: dict[str, str],
        nodes: dict[str, Node],
        inside: tuple[Node, ...],
    ) -> Iterator[tuple[dict[str, str], dict[str, Node], tuple[Node, ...]]]:
        if not pairs:
            yield values, nodes, inside
            return
        (arg, value), rest = pairs[0], pairs[1:]
        if isinstance(arg, P):
            inner = self.producers.get(value)
            if inner is None:
                return
            for v, ns, i in self._node(arg, inner, values, nodes, inside):
                yield from self._args(rest, v, ns, i)
        elif isinstance(arg, str):
            name = arg.lstrip("#?")
            optional = arg.startswith("?")
            if not value:
                if optional:
                    yield from self._args(rest, values, nodes, inside)
                return
            if "#" in arg[:2] and value not in self.graph.constants:
                return
            if values.get(name, value) == value:
                yield from self._args(rest, {**values, name: value}, nodes, inside)
        elif self._is_number(value, arg):
            yield from self._args(rest, {**values, f"={value}": value}, nodes, inside)

    def _is_number(self, value: str, number: float) -> bool:
        constant = self.graph.constants.get(value)
        if constant is None or constant.size != 1 or constant.ndim > 1 or constant.dtype.kind not in "fiu":
            return False
        return bool(np.isclose(float(constant.reshape(-1)[0]), number, rtol=1e-6, atol=0.0))


def _made(fusion: Fusion, match: Match) -> Replacement | None:
    """What takes the match's place, None where the guard says no.

    Nothing has been checked when passes run. A node that makes a guard stumble (a weight without axes, a string where a
    number belongs, an input too few) is left as it is: it is named when it is planned.
    """
    try:
        return fusion.build(match) if fusion.guard(match) else None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def apply(graph: Graph, fusion: Fusion) -> tuple[Graph, int]:
    """The graph with every match replaced, and how many there were. Matches do not overlap."""
    matcher = _Matcher(graph, graph.producers(), graph.readers())
    roots = {name for p in fusion.patterns for name in p.names}
    replaced: dict[int, Node] = {}
    gone: set[int] = set()
    constants: dict[str, HostArray] = {}
    for n in reversed(graph.nodes):
        if n.qualified not in roots or id(n) in gone:
            continue
        for pattern in fusion.patterns:
            match = matcher.match(pattern, n)
            if match is None or any(id(i) in gone for i in match.inside):
                continue
            made = _made(fusion, match)
            if made is not None:
                gone.update(id(i) for i in match.inside)
                replaced[id(n)] = made.node
                constants.update(made.constants)
                break
    if not replaced:
        return graph, 0
    nodes = tuple(replaced.get(id(n), n) for n in graph.nodes if id(n) not in gone or id(n) in replaced)
    return replace(graph, nodes=nodes, constants={**graph.constants, **constants}), len(replaced)
