"""Rewrites declared as data: a pattern, a guard, what replaces it, an example and near misses.

One engine applies them, and it alone enforces what keeps a rewrite safe: the same name means the same value (or node)
everywhere in a pattern; a value inside a match is read by nodes of the match alone and is no output of the graph;
commutative operators match in either order; operands of arithmetic are of one type, as far as types are known; the
replacement stands where the last node of the match stood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.pattern import Either as Either
from infera_gpu.passes.pattern import Match as Match
from infera_gpu.passes.pattern import Matcher, P
from infera_gpu.passes.pattern import either as either
from infera_gpu.passes.pattern import maybe as maybe
from infera_gpu.passes.pattern import node as node
from infera_gpu.passes.pattern import own_opset as own_opset

CPU = frozenset({"cpu"})
"""The `kinds` of fusions whose operators have fast kernels on the CPU alone."""

GPU = frozenset({"triton", "cupy"})
"""The `kinds` of rewrites that pay where every node is a launch."""

CPU_AND_TRITON = frozenset({"cpu", "triton"})
"""The `kinds` of fusions whose operators have fast kernels on the CPU and in Triton."""


@dataclass(frozen=True)
class Replacement:
    """The node that takes a match's place, the constants it brings, and nodes that it reads, in their order.

    Those read values that the match does not make, or each other.
    """

    node: Node
    constants: Mapping[str, HostArray] = field(default_factory=dict)
    before: tuple[Node, ...] = ()


def _always(match: Match) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """What every rewrite declares.

    `example` and `near_misses` are graphs in ONNX's text syntax (without the header): the rewrite must fire exactly
    once on the first and never on the others, and the rewritten example must compute what the example computes. Tests
    are generated from them. A rewrite that `reassociates` may give other bits: it changes the order of operations (a
    factor folded into weights) or the formula (a norm times the inverse of a root); strict sessions leave it out.
    `kinds` are the kinds of kernels that have what it makes; devices that run none of them are left the parts.
    """

    name: str
    patterns: tuple[P, ...]
    example: str
    near_misses: tuple[str, ...]
    opset: int = 17
    reassociates: bool = False
    kinds: frozenset[str] | None = None

    def by_root(self, present: AbstractSet[str]) -> Mapping[str, list[P]]:
        """The patterns that may match in a graph with nodes of these operators alone, by the operator of a match's
        last node."""
        found: dict[str, list[P]] = {}
        for p in self.patterns:
            if p.among(present):
                for name in p.names:
                    found.setdefault(name, []).append(p)
        return found

    def fits(self, strict: bool, kinds: tuple[str, ...]) -> bool:
        """Whether a device with these kinds of kernels may have it."""
        return not (strict and self.reassociates) and (self.kinds is None or not self.kinds.isdisjoint(kinds))


@dataclass(frozen=True, kw_only=True)
class Fusion(Rewrite):
    """A rewrite of one place: `build` makes the replacement of a match that `guard` accepts."""

    build: Callable[[Match], Replacement]
    guard: Callable[[Match], bool] = _always


class Fusions(tuple[Fusion, ...]):
    """Fusions in the order in which they are applied, found by the operators that their matches may end with."""

    def __new__(cls, *fusions: Fusion) -> Self:
        return super().__new__(cls, fusions)

    def __init__(self, *fusions: Fusion) -> None:
        self._by_root: dict[str, list[tuple[int, P]]] = {}
        for i, fusion in enumerate(fusions):
            for p in fusion.patterns:
                for name in p.names:
                    self._by_root.setdefault(name, []).append((i, p))

    def among(self, present: AbstractSet[str]) -> set[int]:
        """The numbers of those that may match in a graph with nodes of these operators alone."""
        found: set[int] = set()
        for op in present:
            for i, p in self._by_root.get(op, ()):
                if i not in found and p.among(present):
                    found.add(i)
        return found


def changed(example: str, *changes: tuple[str, str]) -> str:
    """A near miss: an example with some of its text exchanged. Raises ValueError where it does not stand there once."""
    for old, new in changes:
        if example.count(old) != 1:
            raise ValueError(f"{old!r} stands in the example {example.count(old)} times, expected once")
        example = example.replace(old, new)
    return example


def fused(op: str, inputs: tuple[str, ...], **attrs: Any) -> Callable[[Match], Replacement]:
    """A `build` for the common case: one node of domain "infera" over named values; absent ones become ""."""

    def build(match: Match) -> Replacement:
        return Replacement(infera(match, op, named(match, inputs), attrs))

    return build


def named(match: Match, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """The values of these names, "" for absent ones; absent ones at the end are left out."""
    names = [match.values.get(i, "") for i in inputs]
    while names and not names[-1]:
        names.pop()
    return tuple(names)


def infera(match: Match, op: str, inputs: tuple[str, ...], attrs: Mapping[str, Any]) -> Node:
    """A node of domain "infera" that makes the match's outputs."""
    root = match.root
    return Node(op, inputs, root.outputs, dict(attrs), domain="infera", name=root.name or root.outputs[0])


def standard(match: Match, op: str, since: int, inputs: tuple[str, ...], attrs: Mapping[str, Any]) -> Node:
    """A node of the standard domain that makes the match's outputs, of version `since` in older models."""
    root, opset = match.root, own_opset(match.graph, since)
    return Node(op, inputs, root.outputs, dict(attrs), name=root.name or root.outputs[0], opset=opset)


_OF_ONE_TYPE: Mapping[str, int] = MappingProxyType(
    {**dict.fromkeys(("Add", "Clip", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Sub", "Sum"), 0), "Where": 1}
)
"""Operators whose inputs are of one type, from which on: planning refuses others, which a replacement would hide."""


def _agrees_in_types(match: Match) -> bool:
    for n in match.inside:
        first = _OF_ONE_TYPE.get(n.qualified)
        if first is None or len(n.inputs) - first < 2:
            continue
        specs = [match.draft.spec(i) for i in n.inputs[first:] if i]
        if len({s.dtype for s in specs if s is not None}) > 1:
            return False
    return True


def _made(fusion: Fusion, match: Match) -> Replacement | None:
    """What takes the match's place, None where the guard says no.

    Nothing has been checked when passes run. A node that makes a guard stumble (a weight without axes, a string where a
    number belongs, an input too few) is left as it is: it is named when it is planned.
    """
    try:
        return fusion.build(match) if fusion.guard(match) and _agrees_in_types(match) else None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def rewrite(draft: Draft, fusion: Fusion) -> int:
    """Replace every match in the draft, and say how many there were. Matches do not overlap."""
    patterns = fusion.by_root(draft.by_op.keys())
    if not patterns:
        return 0
    matcher, times = Matcher(draft), 0
    for n in draft.candidates(patterns):
        if draft.holds(n):
            times += _rewritten(matcher, fusion, patterns[n.qualified], n)
    return times


def _rewritten(matcher: Matcher, fusion: Fusion, patterns: list[P], n: Node) -> bool:
    made_by = matcher.draft.made_by
    ops = {made_by[i] for i in n.inputs if i in made_by}
    for pattern in patterns:
        if not pattern.may_stand_on(ops):
            continue
        for match in matcher.match(pattern, n):
            made = _made(fusion, match)
            if made is not None:
                matcher.draft.replace(match.inside, made.node, made.constants.items(), made.before)
                if made.node.qualified == "Identity":
                    matcher.draft.bypass(made.node)
                return True
    return False


ROUNDS = 8
"""Applications of one fusion: BatchNormalization then Mul then Add on one Conv, each of which enables the next."""


def exhaust(draft: Draft, fusion: Fusion) -> int:
    """Rewrite as long as something matches, and say how often it did."""
    total = 0
    for _ in range(ROUNDS):
        times = rewrite(draft, fusion)
        total += times
        if not times:
            break
    return total


def apply(graph: Graph, fusion: Fusion) -> tuple[Graph, int]:
    """The graph with every match replaced, and how many there were; the graph itself where there was none."""
    draft = Draft(graph)
    times = rewrite(draft, fusion)
    return (draft.finished() if times else graph), times
