"""Patterns of nodes as data, and where they fit in a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node, lazy
from infera_gpu.passes.draft import Draft
from infera_gpu.spec import DType, TensorSpec


@dataclass(frozen=True)
class P:
    """Matches a node: one of `ops` (standard domain unless qualified) over `args`.

    An argument is another P, alternatives to try in order (`either`), the name of a value ("x"), of a constant ("#w"),
    of a constant of one element ("%eps", see `Match.number`), or a number that such a constant must equal to the
    precision of its type. A missing trailing optional input matches "?name" (so does a present one). `node` names the
    matched node for guards; two patterns of one name match one node.
    """

    ops: str | tuple[str, ...]
    args: tuple[Arg, ...]
    commutes: bool = False
    node: str = ""

    @lazy
    def names(self) -> tuple[str, ...]:
        return (self.ops,) if isinstance(self.ops, str) else self.ops

    @lazy
    def required(self) -> int:
        """Inputs that a node must have."""
        return sum(not (isinstance(a, str) and a.startswith("?")) for a in self.args)

    @lazy
    def below(self) -> tuple[frozenset[str], ...]:
        """For each argument that is a node in every alternative: the operators that may make it."""
        return tuple(made for a in self.args if (made := _makers(a)) is not None)

    def may_stand_on(self, ops: set[str]) -> bool:
        """Whether inputs that these operators make may be what the arguments ask for."""
        return not any(map(ops.isdisjoint, self.below))

    def among(self, present: AbstractSet[str]) -> bool:
        """Whether a graph with nodes of these operators alone may hold a match."""
        return not present.isdisjoint(self.names) and all(_among(a, present) for a in self.args)


@dataclass(frozen=True)
class Either:
    """Alternatives for an argument, tried in order."""

    args: tuple[Arg, ...]


Arg: TypeAlias = P | Either | str | float


def node(ops: str | tuple[str, ...], *args: Arg, commutes: bool = False, name: str = "") -> P:
    """A pattern, short to write."""
    return P(ops, args, commutes, name)


def either(*args: Arg) -> Either:
    """Any of the arguments."""
    return Either(args)


def maybe(op: str, arg: Arg, name: str = "") -> Either:
    """The argument, or a node of one input over it."""
    return Either((node(op, arg, name=name), arg))


def _makers(arg: Arg) -> frozenset[str] | None:
    """The operators that may make an argument, None where it need not be made by a node."""
    if isinstance(arg, P):
        return frozenset(arg.names)
    if not isinstance(arg, Either):
        return None
    found = [_makers(a) for a in arg.args]
    return None if None in found else frozenset[str]().union(*(f for f in found if f is not None))


def _among(arg: Arg, present: AbstractSet[str]) -> bool:
    """Whether nodes of these operators may make an argument, where it need be made by a node."""
    if isinstance(arg, P):
        return arg.among(present)
    return not isinstance(arg, Either) or any(_among(a, present) for a in arg.args)


@dataclass(frozen=True)
class Match:
    """A place where a pattern fits: the graph's values and nodes under the pattern's names.

    `graph` has the constants, inputs and outputs as they are now.
    """

    graph: Graph
    values: Mapping[str, str]
    nodes: Mapping[str, Node]
    inside: tuple[Node, ...]
    draft: Draft

    @property
    def root(self) -> Node:
        """The last node of the match; the replacement makes its outputs."""
        return self.inside[0]

    @property
    def producers(self) -> Mapping[str, Node]:
        """value -> the node that makes it"""
        return self.draft.producers

    def constant(self, name: str) -> HostArray:
        """The value of a constant named in the pattern."""
        return self.graph.constants[self.values[name]]

    def number(self, name: str) -> float:
        """The value of a constant of one element."""
        return float(self.constant(name).reshape(-1)[0])

    def spec(self, name: str) -> TensorSpec | None:
        """What is known of a named value's type; None where not even its element type is."""
        return self.draft.spec(self.values[name])

    def rank(self, name: str) -> int | None:
        """How many axes a named value has, None where that is not known."""
        spec = self.spec(name)
        return spec.ndim if spec is not None and spec.ranked else None

    @property
    def numbers_rank(self) -> int:
        """The highest rank of the constants of one element: 1 where an exporter wrote [0.5] for 0.5."""
        return max((self.constant(name).ndim for name in self.values if name.startswith("=")), default=0)

    def keeps_shape(self, name: str = "x") -> bool:
        """Whether the numbers of the match add no axis to a named value."""
        return self.numbers_rank == 0 or (self.rank(name) or 0) >= self.numbers_rank

    def opset(self, domain: str = "") -> int:
        return self.graph.opsets.get(domain, 1)

    def axes(self, name: str) -> tuple[int, ...] | None:
        """The axes that a named reduction goes over, as they are written; None where none are, which means all or no
        axis, or where they are computed, or no integers. A global pool's are those after the channels."""
        made = self.nodes[name]
        if made.op == "GlobalAveragePool":
            x = self.draft.spec(made.inputs[0])
            return (tuple(range(2, x.ndim)) or None) if x is not None and x.ranked else None
        if "axes" in made.attrs:
            return tuple(int(a) for a in made.attrs["axes"]) or None
        given = self.graph.constants.get(made.inputs[1]) if len(made.inputs) > 1 and made.inputs[1] else None
        integers = given is not None and given.dtype.kind == "i"
        return (tuple(given.reshape(-1).tolist()) or None) if given is not None and integers else None


_ROUNDING: Mapping[DType, float] = MappingProxyType(
    {np.dtype(np.float16): 5e-4, np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-15}
)
"""How far, relative to it, a number in a file may be from the one that it stands for. Integers are exact."""


def is_close(number: float, wanted: float, dtype: DType) -> bool:
    """Whether a number of a type stands for the one that is wanted."""
    return abs(number - wanted) <= _ROUNDING.get(dtype, 0.0) * abs(wanted)


def axis_in(axis: int, rank: int) -> int | None:
    """An axis counted from the first; None where there is none such."""
    return axis % rank if -rank <= axis < rank else None


_Found = tuple[dict[str, str], dict[str, Node], tuple[Node, ...]]

LEGACY = "broadcast"
"""An attribute of arithmetic before opset 7, whose operands then are not aligned at the last axis."""

LATER = frozenset({"DynamicQuantizeLinear", "HardSwish", "MatMulInteger", "Mish", "RMSNormalization", "Swish"})
"""Operators that came after opset 7 and have meant one thing since: a node of an opset of its own is like any other."""


def own_opset(graph: Graph, since: int) -> int:
    """The `opset` of a node that a pass makes, of the standard domain, as version `since` has it: 0 but in older
    models. Nodes with one of their own are in no pattern and no chain."""
    return since if graph.opsets.get("", 1) < since else 0


def _is_part(n: Node) -> bool:
    """Whether it is a Shape of some axes: no pattern means that."""
    return n.op == "Shape" and ("end" in n.attrs or n.attrs.get("start", 0) != 0)


@dataclass(frozen=True)
class Matcher:
    """Finds patterns in a draft of a graph."""

    draft: Draft

    def match(self, pattern: P, root: Node) -> Iterator[Match]:
        """Every way in which the pattern fits with this last node, each safe to replace."""
        for values, nodes, inside in self._node(pattern, root, {}, {}, ()):
            taken = self._taken(inside, values)
            if taken:
                yield Match(self.draft.graph, values, nodes, taken, self.draft)

    def _taken(self, inside: tuple[Node, ...], values: Mapping[str, str]) -> tuple[Node, ...]:
        """The matched nodes that the replacement takes the place of; none where others need what one of them makes: a
        node outside the match, an output, or the replacement by a name. A Shape that others need stays for them."""
        members, named = {id(n) for n in inside}, set(values.values())
        needed = {
            id(n)
            for n in inside[1:]
            if n.outputs[0] in self.draft.graph.outputs
            or n.outputs[0] in named
            or not members.issuperset(self.draft.readers.get(n.outputs[0], ()))
        }
        taken = tuple([n for n in inside if id(n) not in needed or n.op != "Shape"])
        if len(taken) < len(inside):
            return self._taken(taken, values)  # what the ones that stay read is needed outside of the match now
        return () if needed else inside

    def _node(
        self, p: P, n: Node, values: dict[str, str], nodes: dict[str, Node], inside: tuple[Node, ...]
    ) -> Iterator[_Found]:
        if any(n.outputs[1:]) or n.subgraphs or (n.opset and n.op not in LATER) or LEGACY in n.attrs or _is_part(n):
            return
        if not p.required <= len(n.inputs) <= len(p.args):
            return
        inputs = [*n.inputs, *[""] * (len(p.args) - len(n.inputs))]
        orders = [inputs, inputs[::-1]] if p.commutes else [inputs]
        if p.node:
            if nodes.get(p.node, n) is not n:
                return
            nodes = {**nodes, p.node: n}
        inside = inside if any(i is n for i in inside) else (*inside, n)
        for order in orders:
            yield from self._args(p.args, order, values, nodes, inside)

    def _args(
        self,
        args: Sequence[Arg],
        given: Sequence[str],
        values: dict[str, str],
        nodes: dict[str, Node],
        inside: tuple[Node, ...],
    ) -> Iterator[_Found]:
        if not args:
            yield values, nodes, inside
            return
        for found in self._arg(args[0], given[0], values, nodes, inside):
            yield from self._args(args[1:], given[1:], *found)

    def _arg(
        self, arg: Arg, value: str, values: dict[str, str], nodes: dict[str, Node], inside: tuple[Node, ...]
    ) -> Iterator[_Found]:
        if isinstance(arg, P):
            if self.draft.made_by.get(value) in arg.names:
                yield from self._node(arg, self.draft.producers[value], values, nodes, inside)
        elif isinstance(arg, Either):
            for alternative in arg.args:
                yield from self._arg(alternative, value, values, nodes, inside)
        elif isinstance(arg, str):
            if self._may_be(arg, value):
                name = arg.lstrip("#?%")
                if not value:
                    yield values, nodes, inside
                elif "%" in arg:
                    if values.get(name, value) == value:
                        yield {**values, name: value, f"={value}": value}, nodes, inside
                elif values.get(name, value) == value:
                    yield {**values, name: value}, nodes, inside
        elif self._is_number(value, arg):
            yield {**values, f"={value}": value}, nodes, inside

    def _may_be(self, arg: str, value: str) -> bool:
        """Whether a value is of the kind that a name asks for."""
        if not value:
            return arg.startswith("?")
        if "%" in arg[:2]:
            return self._scalar(value) is not None
        return "#" not in arg[:2] or value in self.draft.graph.constants

    def _scalar(self, value: str) -> HostArray | None:
        constant = self.draft.graph.constants.get(value)
        if constant is None or constant.size != 1 or constant.dtype.kind not in "fiu":
            return None
        return constant

    def _is_number(self, value: str, number: float) -> bool:
        constant = self._scalar(value)
        return constant is not None and is_close(float(constant.reshape(-1)[0]), number, constant.dtype)
