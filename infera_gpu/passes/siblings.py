"""Nodes that read one value and do alike with it become one: fusion across a graph, where `engine` fuses along it.

The engine here alone enforces what keeps that safe. Siblings read the same value, and beside it nothing but constants
and what else its maker makes: what takes their place can stand where the first of them stood. A node is in one match
alone, what is inside a match is read there alone (see `pattern.Matcher`), and every output keeps its name, for outputs
of the graph and subgraphs too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from infera_gpu.graph import FOLD_LIMIT, Graph, HostArray, Node
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.engine import Rewrite
from infera_gpu.passes.fold import drop_dead
from infera_gpu.passes.pattern import Match, Matcher, P

NEAR = 12
"""How many nodes a sibling may stand behind the one before it. What is joined is all in memory until the last of it has
been read, which costs little where siblings serve one attention (they are up to 8 apart), but not where one value feeds
every layer of a decoder (30 and more apart)."""


@dataclass(frozen=True)
class Joined:
    """The nodes that take the place of siblings, in order, and the constants they bring."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, HostArray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Siblings(Rewrite):
    """A rewrite of several places that read the same value, which the patterns call "x".

    `alike` is equal for matches that can be joined, and None for one that cannot. `join` gets two of them or more, in
    the order of the graph; it makes the outputs of all.
    """

    alike: Callable[[Match], Hashable | None]
    join: Callable[[Sequence[Match]], Joined]


def joined(graph: Graph, siblings: Siblings) -> tuple[Graph, int]:
    """The graph with every group of siblings joined, and how many groups there were; itself where there was none.

    What is joined is copied, and the parts live as long as whoever holds the loaded graph: the constants of groups that
    would go beyond FOLD_LIMIT stay as they are.
    """
    patterns = siblings.by_root({n.qualified for n in graph.nodes})
    if not patterns:
        return graph, 0
    draft, times, room = Draft(graph), 0, FOLD_LIMIT
    instead: dict[int, tuple[Node, ...]] = {}
    constants = dict(graph.constants)
    for group in _groups(draft, siblings, patterns):
        room -= (nbytes := sum(map(_constant_bytes, group)))
        if room < 0:
            room += nbytes
            continue
        made = siblings.join(group)
        instead |= {id(n): () for match in group for n in match.inside}
        instead[id(group[0].root)] = made.nodes
        constants.update(made.constants)
        times += 1
    if not times:
        return graph, 0
    nodes = tuple(new for n in graph.nodes for new in instead.get(id(n), (n,)))
    return drop_dead(replace(graph, nodes=nodes, constants=constants)), times


def _groups(draft: Draft, siblings: Siblings, patterns: Mapping[str, Sequence[P]]) -> list[list[Match]]:
    """Matches that are alike over one value and near each other, at least two each; none overlap."""
    groups: list[list[Match]] = []
    latest: dict[tuple[str, Hashable], list[Match]] = {}
    matcher, taken = Matcher(draft), set[int]()
    for n in reversed(draft.candidates(patterns)):
        for match in (m for pattern in patterns[n.qualified] for m in matcher.match(pattern, n)):
            if not taken.isdisjoint(map(id, match.inside)) or (alike := _alike(siblings, match)) is None:
                continue
            taken.update(map(id, match.inside))
            key = match.values["x"], alike
            if key in latest and draft.place(n) - draft.place(latest[key][-1].root) <= NEAR:
                latest[key].append(match)
            else:
                latest[key] = [match]
                groups.append(latest[key])
            break
    return [group for group in groups if len(group) > 1]


def _alike(siblings: Siblings, match: Match) -> Hashable | None:
    """What makes a match alike, None for one that is none; see `engine` for nodes that make a guard stumble."""
    if any(v not in match.graph.constants for v in _beside(match)):
        return None
    try:
        return siblings.alike(match)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _beside(match: Match) -> set[str]:
    """What the nodes of a match read beside what they make, the shared value and the other outputs of its maker."""
    x = match.values["x"]
    maker = match.producers.get(x)
    made = {o for n in match.inside for o in n.outputs}
    return {v for n in match.inside for v in n.reads} - made - {x, *(maker.outputs if maker is not None else ())}


def _constant_bytes(match: Match) -> int:
    return sum(match.graph.constants[v].nbytes for v in _beside(match))
