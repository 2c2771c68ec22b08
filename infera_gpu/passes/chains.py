"""Chains of elementwise operators become one node each, after everything that knows them one by one.

A chain is a node and, as long as nobody else needs their values, the nodes that make its operands. Shapes need not be
known: `infera.Elementwise` comes apart again where steps turn out to be of other shapes, or known ahead of all runs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from infera_gpu.graph import Node
from infera_gpu.ops.chain import STEPS, Term, spelled
from infera_gpu.passes.activation import bounds
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.pattern import LATER

MOST_INPUTS = 12
"""Of one chain: blocks of more do not lie in the cache together."""

_TYPES = (np.float32, np.float64)


def chained(draft: Draft) -> int:
    """Put every chain of at least two steps into one node, and say how many there were."""
    times = 0
    for n in draft.candidates([op for op in draft.by_op if op.removeprefix("infera.") in STEPS]):
        if draft.holds(n) and (found := _grown(draft, n)) is not None:
            draft.replace(found, _joined(draft, found))
            times += 1
    return times


def _grown(draft: Draft, root: Node) -> list[Node] | None:
    """The chain that ends with a node, the last one first; None where it is shorter than two steps."""
    if not _is_step(draft, root):
        return None
    members, chosen = {id(root)}, [root]
    inputs = set(_operands(root))
    todo = [(-draft.place(p), p.outputs[0]) for v in inputs if (p := draft.producers.get(v)) is not None]
    heapq.heapify(todo)
    while todo:
        _, value = heapq.heappop(todo)
        n = draft.producers[value]
        if id(n) in members or not _is_inner(draft, n, members):
            continue
        more = inputs - {value} | set(_operands(n))
        if len(more) > MOST_INPUTS:
            continue
        inputs = more
        members.add(id(n))
        chosen.append(n)
        for v in _operands(n):
            if (p := draft.producers.get(v)) is not None:
                heapq.heappush(todo, (-draft.place(p), p.outputs[0]))
    return chosen if len(chosen) > 1 else None


def _is_inner(draft: Draft, n: Node, members: set[int]) -> bool:
    """Whether a step is read by members alone."""
    (value, *others) = n.outputs
    alone = value not in draft.graph.outputs and members.issuperset(draft.readers.get(value, ()))
    return alone and not any(others) and _is_step(draft, n)


def _is_step(draft: Draft, n: Node) -> bool:
    """Whether it is one of STEPS, on floats of a type that the CPU's kernels compute in."""
    op = STEPS.get(n.op)
    if op is None or op.domain != n.domain or any(n.outputs[1:]) or (n.opset and n.op not in LATER):
        return False
    if (
        not n.attrs.keys() <= op.attrs.keys()
        or not all(_operands(n))
        or (n.op in ("Max", "Min", "Sum") and len(n.inputs) < 2)
    ):
        return False
    if n.op == "Clip" and bounds(draft.graph.constants, n) is None:
        return False
    spec = draft.spec(n.outputs[0])
    if n.op == "Pow":
        exponent = draft.graph.constants.get(n.inputs[1])
        if spec is None or exponent is None or exponent.dtype != spec.dtype:
            return False
    return spec is not None and spec.dtype in _TYPES


def _operands(n: Node) -> tuple[str, ...]:
    """The inputs that vary: the bounds of Clip are attributes of a step."""
    return n.inputs[:1] if n.op == "Clip" else n.inputs


def _attributes(draft: Draft, n: Node) -> tuple[tuple[str, float | str], ...]:
    attrs = n.attrs
    if n.op == "Clip":
        low, high = bounds(draft.graph.constants, n) or (-np.inf, np.inf)
        attrs = {"min": low, "max": high}
    return tuple((k, v if isinstance(v, str) else float(v)) for k, v in attrs.items())


def _joined(draft: Draft, found: Sequence[Node]) -> Node:
    """The node of a chain.

    Its first input, whose memory the output may take over, is one of its shape, as far as that is known, that is read
    no longer than others.
    """
    root, steps = found[0], sorted(found, key=draft.place)
    made = {n.outputs[0] for n in steps}
    inputs = list(dict.fromkeys(v for n in steps for v in _operands(n) if v not in made))
    whole, last = draft.spec(root.outputs[0]), {v: i for i, n in enumerate(steps) for v in _operands(n)}
    inputs.sort(key=lambda v: (v in draft.graph.constants, draft.spec(v) != whole, last[v]))
    place = {v: i for i, v in enumerate([*inputs, *(n.outputs[0] for n in steps)])}
    terms = [Term(n.op, _attributes(draft, n), tuple(place[v] for v in _operands(n))) for n in steps]
    attrs = {"expression": spelled(terms, len(inputs))}
    return Node("Elementwise", tuple(inputs), root.outputs, attrs, "infera", root.name or root.outputs[0])
