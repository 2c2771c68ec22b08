"""Rows that nobody reads are not computed: a Slice or Gather of one axis goes before what computes each row alone.

A classifier reads one token of the last layer, a decoder the last one. What follows the keys and values of the last
attention is then computed for that token alone: norms, products, elementwise operators, and the attention of its query.
The axis is followed by the names of sizes (`facts`); where they do not tell what an operand has along it, or other rows
count, or somebody reads the others, the rows are taken there.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node
from infera_gpu.passes.pattern import axis_in, own_opset
from infera_gpu.passes.unread_rules import PAYING, axes_of, shape_after
from infera_gpu.spec import TensorSpec

_MOST = np.iinfo(np.int64).max
_FAR = np.iinfo(np.int32).max
"""Where a Slice that goes to the end may end, as exporters write it."""


@dataclass(frozen=True)
class _Part:
    """What is read of a value: `[start:end]` along an axis, which is counted from the last; `drops` it then."""

    axis: int
    start: int
    end: int
    drops: bool = False


# ---- what is read


def _part(match: Match) -> _Part | None:
    """None where it is not much less than there is, or where that is not known."""
    x = match.spec("x")
    if x is None or not x.ranked:
        return None
    return _gathered(match, x) if match.root.op == "Gather" else _sliced(match, x)


def _gathered(match: Match, x: TensorSpec) -> _Part | None:
    """One index, which the axis is known to have; of an axis that goes, the first or the last: an empty one is refused
    as before."""
    index, axis = match.constant("index"), axis_in(int(match.root.attrs.get("axis", 0)), x.ndim)
    if axis is None or index.size != 1 or index.ndim > 1 or index.dtype.kind != "i":
        return None
    at, size = int(index.item()), x.shape[axis]
    if isinstance(size, int):
        if size < 2 or not -size <= at < size:
            return None
    elif index.ndim or at not in (0, -1):
        return None
    return _Part(axis - x.ndim, at, at + 1 if at != -1 else _MOST, drops=not index.ndim)


def _sliced(match: Match, x: TensorSpec) -> _Part | None:
    """At most half of one axis, in order."""
    given = [_numbers(match, name) for name in ("starts", "ends", "axes", "steps")]
    starts, ends = given[:2]
    if starts is None or ends is None:
        return None
    axes, steps = given[2] or range(len(starts)), given[3] or [1] * len(starts)
    cuts = zip(axes, starts, ends, steps, strict=True)
    cut = [(axis, start, end, step) for axis, start, end, step in cuts if (start, step) != (0, 1) or end < _FAR]
    axis = axis_in(cut[0][0], x.ndim) if len(cut) == 1 and cut[0][3] == 1 else None
    if axis is None:
        return None
    start, end, size = *cut[0][1:3], x.shape[axis]
    if isinstance(size, int):
        some = 0 < 2 * len(range(size)[start:end]) <= size
    else:
        some = (start, end) == (0, 1) or (start == -1 and end >= _FAR)
    return _Part(axis - x.ndim, start, end) if some else None


def _numbers(match: Match, name: str) -> Sequence[int] | None:
    """A list that a Slice has as an input, or before opset 10 as an attribute."""
    if name in match.values:
        given = match.constant(name)
        return [int(i) for i in given.reshape(-1)] if given.dtype.kind == "i" else None
    return match.root.attrs.get(name)


@dataclass(frozen=True)
class _Region:
    """Nodes whose results are read in part alone, the last one first, with the axes of their inputs; and which values
    are read along which axes, outside of it too."""

    nodes: Sequence[tuple[Node, Mapping[int, int]]]
    read: Mapping[str, set[int]]

    def edges(self, draft: Draft) -> set[tuple[str, int]]:
        """The values that the rows are taken of in a run, along an axis each."""
        made = {n.outputs[0] for n, _ in self.nodes} | draft.constants.keys()
        return {(value, axis) for value, axes in self.read.items() if value not in made for axis in axes}


def _region(match: Match, part: _Part) -> _Region:
    draft, source = match.draft, match.values["x"]
    nodes: list[tuple[Node, Mapping[int, int]]] = []
    read: dict[str, set[int]] = {source: {part.axis}}
    inside, whole = {id(match.root)}, set[str]()
    todo: list[tuple[int, str]] = []

    def ask(value: str) -> None:
        n = draft.producers.get(value)
        if n is not None:
            heapq.heappush(todo, (-draft.place(n), value))

    ask(source)
    while todo:  # the last value that is left: who reads it has been asked
        _, value = heapq.heappop(todo)
        alone = value not in whole and value not in draft.graph.outputs and inside.issuperset(draft.readers[value])
        axes = axes_of(draft, value, *read[value]) if alone and len(read[value]) == 1 else None
        if axes is None:
            continue
        n = draft.producers[value]
        inside.add(id(n))
        nodes.append((n, axes))
        whole.update(v for i, v in enumerate(n.inputs) if i not in axes)
        for i, axis in axes.items():
            if n.inputs[i] not in read:
                read[n.inputs[i]] = set()
                ask(n.inputs[i])
            read[n.inputs[i]].add(axis)
    return _Region(nodes, read)


# ---- what takes its place


def _pays(match: Match) -> bool:
    """Whether fewer rows of products are computed, and no more values are copied than there are such products."""
    part = _part(match)
    if part is None:
        return False
    region = _region(match, part)
    return sum(n.qualified in PAYING for n, _ in region.nodes) >= max(1, len(region.edges(match.draft)))


class _Made:
    """Nodes over what is read, in order, and their constants."""

    def __init__(self, match: Match, part: _Part, region: _Region) -> None:
        self.match, self.part, self.out = match, part, match.root.outputs[0]
        self.inside = {n.outputs[0] for n, _ in region.nodes}
        self.nodes: list[Node] = []
        self.constants: dict[str, HostArray] = {}
        self.parts: dict[tuple[str, int], str] = {}
        for n, axes in reversed(region.nodes):
            self.over(n, axes)
        if part.drops:
            self.add("Squeeze", 13, (self.nodes[-1].outputs[0], self.numbers("dropped", part.axis)), self.out)

    def over(self, n: Node, axes: Mapping[int, int]) -> None:
        """The node over what is read of these inputs."""
        inputs, attrs = [self.of(v, axes[i]) if i in axes else v for i, v in enumerate(n.inputs)], n.attrs
        if n.op == "Reshape":
            inputs[1], attrs = self.shape(n, axes[0]), {}
        name = made_name(n.outputs[0], "read")
        self.nodes.append(replace(n, inputs=tuple(inputs), outputs=(name,), attrs=attrs))

    def shape(self, n: Node, axis: int) -> str:
        """What a Reshape makes of it: the axes up to this one stay."""
        x = self.match.draft.spec(n.inputs[0])
        assert x is not None
        kept = axis + x.ndim + 1
        return self.numbers(n.outputs[0], *[0] * kept, *shape_after(self.match.draft, n, kept - 1) or ())

    def of(self, value: str, axis: int) -> str:
        """What is read of a value."""
        if value in self.inside:
            return made_name(value, "read")
        name = self.parts.get((value, axis))
        if name is None:
            name = self.parts[value, axis] = made_name(self.out, value, axis)
            start, end, constant = self.part.start, self.part.end, self.match.draft.constants.get(value)
            if constant is not None:
                at = constant.ndim + axis
                self.constants[name] = np.ascontiguousarray(constant[(slice(None),) * at + (slice(start, end),)])
            else:
                numbers = (self.numbers(*named) for named in (("start", start), ("end", end), (f"axis {axis}", axis)))
                self.add("Slice", 10, (value, *numbers), name)
        return name

    def numbers(self, what: str, *values: int) -> str:
        name = made_name(self.out, what, "numbers")
        self.constants[name] = np.array(values, np.int64)
        return name

    def add(self, op: str, since: int, inputs: tuple[str, ...], output: str) -> None:
        self.nodes.append(Node(op, inputs, (output,), name=output, opset=own_opset(self.match.graph, since)))


def _before(match: Match) -> Replacement:
    part = _part(match)
    assert part is not None
    made, root = _Made(match, part, _region(match, part)), match.root
    last = replace(made.nodes[-1], outputs=root.outputs, name=root.name or root.outputs[0])
    return Replacement(last, made.constants, tuple(made.nodes[:-1]))


_W = "float[4, 4] w = {1, -2, 3, 0.5, -1, 2, 1, 4, -3, 0.25, 1, 1, 2, -1, 0.5, 2}"
_EXAMPLE = f"""
        example (float[B, S, 4] x, float[B, 2, S, 2] q, float[B, 2, 2, T] kt, float[B, 2, T, 2] v, float[B, 1, S, T] m)
            => (float[B, 4] y)
        <{_W}, float[4] b = {{1, 2, -3, 0.5}}, int64[3] s = {{0, 0, 4}}, int64 last = {{-1}}> {{
            a = infera.Attention <heads_last = 1> (q, kt, v, m)
            c = Reshape(a, s)
            d = infera.FusedMatMul(c, w, b, x)
            e = LayerNormalization(d, b, b)
            f = infera.FusedMatMul <activation = "relu"> (e, w, b)
            g = MatMul(f, w)
            h = Add(g, d)
            n = LayerNormalization(h, b)
            p = Gather <axis = 1> (n, last)
            y = MatMul(p, w)
        }}"""
_SLICE = f"""
        slice (float[2, 6, 4] x) => (float[2, 2, 4] y)
        <{_W}, int64[2] begin = {{0, 1}}, int64[2] end = {{2147483647, 3}}> {{
            a = MatMul(x, w)
            b = Relu(a)
            y = Slice(b, begin, end)
        }}"""

UNREAD = Fusion(
    name="unread_rows",
    patterns=(node("Gather", "x", "#index"), node("Slice", "x", "?#starts", "?#ends", "?#axes", "?#steps")),
    guard=_pays,
    build=_before,
    reassociates=True,
    example=_EXAMPLE,
    near_misses=(
        changed(_EXAMPLE, ("example (", "rows_are_an_output ("), ("y)", "y, float[B, S, 4] h)")),
        changed(
            _EXAMPLE,
            ("example (", "other_rows_are_read ("),
            ("y)", "y, float[B, S, 4] z)"),
            ("d)\n", "d)  z = Relu(n)\n"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "sizes_that_may_differ ("),
            ("4] x", "4] x, float[B, R, 4] r"),
            ("Add(g, d)", "Add(g, r)"),
        ),
        changed(_SLICE, ("slice (", "more_than_half ("), ("7, 3}", "7, 5}")),
        changed(_SLICE, ("slice (", "two_axes ("), ("begin = {0, 1}", "begin = {1, 1}")),
        changed(_SLICE, ("slice (", "along_the_rows ("), ("Relu(a)", "Softmax <axis = 1> (a)")),
        changed(_SLICE, ("slice (", "of_no_product ("), ("MatMul(x, w)", "Neg(x)")),
        changed(
            _SLICE, ("slice (", "rows_joined ("), ("Relu(a)", "Reshape(a, t)"), ("<", "<int64[3] t = {2, 12, 2}, ")
        ),
        changed(
            _SLICE,
            ("slice (", "columns ("),
            ("int64[2] begin = {0, 1}", "int64[3] begin = {0, 0, 1}"),
            ("int64[2] end = {2147483647, 3}", "int64[3] end = {2147483647, 2147483647, 3}"),
        ),
        changed(
            _SLICE,
            ("slice (", "backwards ("),
            ("begin, end)", "begin, end, axes, steps)"),
            ("{0, 1}", "{0, 5}"),
            ("<", "<int64[2] axes = {0, 1}, int64[2] steps = {1, -1}, "),
        ),
        changed(
            _SLICE,
            ("slice (", "two_copies_for_one_product ("),
            ("4] x)", "4] x, float[2, 6, 4] r)"),
            ("Relu(a)", "Add(a, r)"),
        ),
        f"""
        an_index_that_may_not_be_there (float[B, S, 4] x) => (float[B, 1, 4] y) <{_W}, int64[1] i = {{0}}> {{
            a = MatMul(x, w)
            y = Gather <axis = 1> (a, i)
        }}""",
    ),
)
"""Fewer rows may be summed in another order."""

FUSIONS = (UNREAD,)
