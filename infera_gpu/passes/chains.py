"""Chains of elementwise operators become one node each, after everything that knows them one by one.

A chain is a node and, as long as nobody else needs their values, the nodes that make its operands. Shapes need not be
known: `infera.Elementwise` comes apart again where steps turn out to be of other shapes, or known ahead of all runs.

On the CPU a chain saves passes over memory, on the GPU launches too: there it may hold steps of any type, and steps
that are computed again for every element of a larger shape.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from infera_gpu.graph import Graph, Node
from infera_gpu.op import Site
from infera_gpu.ops._triton_elementwise import MOST_INPUTS, formula_of
from infera_gpu.ops.chain import BLOCKWISE, STEPS, Term, spelled
from infera_gpu.passes.activation import bounds
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.pattern import LATER
from infera_gpu.spec import TensorSpec

MOST_STEPS = 64
"""Of one chain: longer ones take long to compile."""

_TYPES = (np.float32, np.float64)

IsStep = Callable[[Draft, Node], bool]


def chained(draft: Draft, kinds: Sequence[str] = ("cpu",)) -> int:
    """Put every chain of at least two steps into one node, and say how many there were.

    `kinds` are the kinds of kernels that the device runs.
    """
    times, recompute = 0, "triton" in kinds
    is_step = _is_launched if recompute else _is_blockwise
    for n in draft.candidates([op for op in draft.by_op if op.removeprefix("infera.") in STEPS]):
        if draft.holds(n) and (found := _grown(draft, n, is_step)) is not None:
            draft.replace(found, _joined(draft, found, recompute=recompute))
            times += 1
    return times


def may_chain(graph: Graph) -> bool:
    """Whether a step reads what another makes."""
    made: set[str] = set()
    for n in graph.nodes:
        if n.op in STEPS:
            if not made.isdisjoint(n.inputs):
                return True
            made.update(n.outputs)
    return False


def _grown(draft: Draft, root: Node, is_step: IsStep) -> list[Node] | None:
    """The chain that ends with a node, the last one first; None where it is shorter than two steps."""
    if not is_step(draft, root):
        return None
    members, chosen = {id(root)}, [root]
    inputs = set(_operands(root))
    todo = [(-draft.place(p), p.outputs[0]) for v in inputs if (p := draft.producers.get(v)) is not None]
    heapq.heapify(todo)
    while todo and len(chosen) < MOST_STEPS:
        _, value = heapq.heappop(todo)
        n = draft.producers[value]
        if id(n) in members or not _is_inner(draft, n, members) or not is_step(draft, n):
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
    return alone and not any(others)


def _is_step(draft: Draft, n: Node) -> bool:
    """Whether it is one of STEPS."""
    op = STEPS.get(n.op)
    if op is None or op.domain != n.domain or any(n.outputs[1:]) or (n.opset and n.op not in LATER):
        return False
    if (
        not n.attrs.keys() <= op.attrs.keys()
        or not all(_operands(n))
        or (n.op in ("Max", "Min", "Sum") and len(n.inputs) < 2)
    ):
        return False
    return n.op != "Clip" or bounds(draft.graph.constants, n) is not None


def _is_blockwise(draft: Draft, n: Node) -> bool:
    """Whether it is a step on floats of a type that the CPU's kernels compute in."""
    if n.op not in BLOCKWISE or not _is_step(draft, n):
        return False
    spec = draft.spec(n.outputs[0])
    if n.op == "Pow":
        exponent = draft.graph.constants.get(n.inputs[1])
        if spec is None or exponent is None or exponent.dtype != spec.dtype:
            return False
    return spec is not None and spec.dtype in _TYPES


def _is_launched(draft: Draft, n: Node) -> bool:
    """Whether it is a step whose types a Triton kernel takes, as it would where all operands were scalars.

    An operand of a type that is not known yet is taken to have that of another: planning takes apart what is wrong.
    """
    if not _is_step(draft, n):
        return False
    op, operands = STEPS[n.op], _operands(n)
    own, specs, out = formula_of(op), [draft.spec(v) for v in operands], draft.spec(n.outputs[0])
    like = next((s for s in reversed(specs) if s is not None), None)
    if own is None or out is None or like is None:
        return False
    ins = tuple(TensorSpec((), (s or like).dtype) for s in specs)
    made = Node(n.op, operands, n.outputs, dict(_attributes(draft, n)), n.domain, n.name)
    outs = (TensorSpec((), out.dtype),)
    return own.supports(Site(made, op.fill(made), ins, (None,) * len(ins), outs, op.since))


def _operands(n: Node) -> tuple[str, ...]:
    """The inputs that vary: the bounds of Clip are attributes of a step."""
    return n.inputs[:1] if n.op == "Clip" else n.inputs


def _attributes(draft: Draft, n: Node) -> tuple[tuple[str, int | float | str], ...]:
    attrs = n.attrs
    if n.op == "Clip":
        low, high = bounds(draft.graph.constants, n) or (-np.inf, np.inf)
        attrs = {"min": low, "max": high}
    return tuple((k, v if isinstance(v, (int, str)) else float(v)) for k, v in attrs.items())


def _joined(draft: Draft, found: Sequence[Node], *, recompute: bool) -> Node:
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
    attrs = {"expression": spelled(terms, len(inputs)), **({"recompute": 1} if recompute else {})}
    return Node("Elementwise", tuple(inputs), root.outputs, attrs, "infera", root.name or root.outputs[0])
