"""Rotary position embedding as exporters write it: pairs half a head apart or neighbours, by tables or by members."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from infera_gpu.graph import Node
from infera_gpu.passes.attention import rank_of
from infera_gpu.passes.engine import CPU_AND_TRITON, Fusion, Match, Replacement, either, infera, node
from infera_gpu.passes.pattern import Arg, P

_END = 2**31 - 1
"""Where a Slice ends that goes on to the end, at least."""


@dataclass(frozen=True)
class _Cut:
    """What the members of pairs were cut from, and what the operator is told of how: its inputs 3 and 4."""

    x: str
    by: tuple[str, ...] = ()


def _is_last(match: Match, axis: int, value: str, more: int = 0) -> bool:
    """Whether an axis is the last of a value, or of one with so many more axes."""
    rank = rank_of(match, value)
    return axis == -1 or (rank is not None and axis == rank - 1 + more)


def _integers(match: Match, value: str) -> list[int] | None:
    """A constant's integers as a flat list."""
    constant = match.graph.constants.get(value)
    return None if constant is None else [int(i) for i in constant.reshape(-1)]


@dataclass(frozen=True)
class _Part:
    """A range along the last axis of x: the values that say where it starts and ends, and the step."""

    x: str
    start: str
    end: str
    step: int


def _part(match: Match, value: str) -> _Part | None:
    """What a Slice takes of the last axis."""
    n = match.producers.get(value)
    if n is None or n.qualified != "Slice" or len(n.inputs) < 4:
        return None
    axes, steps = (_integers(match, i) for i in (*n.inputs[3:], "")[:2])
    if axes is None or len(axes) != 1 or not _is_last(match, axes[0], n.inputs[0]):
        return None
    x, start, end = n.inputs[:3]
    return _Part(x, start, end, 1 if len(n.inputs) < 5 or not n.inputs[4] else (steps or [0])[0])


def _split(match: Match, a: str, b: str) -> Node | None:
    """The Split in two along the last axis that makes a and b, in this order."""
    n = match.producers.get(a)
    if n is None or n.qualified != "Split" or n.outputs != (a, b):
        return None
    return n if _is_last(match, int(n.attrs.get("axis", 0)), n.inputs[0]) else None


def _halves(match: Match, a: str, b: str) -> _Cut | None:
    split = _split(match, a, b)
    if split is not None:
        sizes = split.attrs.get("split") or (_integers(match, split.inputs[1]) if len(split.inputs) > 1 else None)
        return _Cut(split.inputs[0]) if sizes is None or sizes[0] == sizes[1] else None
    first, second = _part(match, a), _part(match, b)
    if first is None or second is None or first.x != second.x or (first.step, second.step) != (1, 1):
        return None
    cut = _Cut(first.x, (second.start, second.end))
    return cut if first.end == second.start and _integers(match, first.start) == [0] else None


def _neighbours(match: Match, a: str, b: str) -> _Cut | None:
    """Every second element, or the members of an axis of pairs."""
    parts = _part(match, a), _part(match, b)
    back = match.values.get("shape", "")
    if parts[0] is None or parts[1] is None:
        pairs = match.producers.get(_paired(match, a, b))
        return _Cut(pairs.inputs[0], (pairs.inputs[1], back)) if pairs is not None and pairs.op == "Reshape" else None
    if parts[0].x != parts[1].x or any(p is None or p.step != 2 for p in parts):
        return None
    starts, ends = ([_integers(match, getattr(p, at)) for p in parts] for at in ("start", "end"))
    cut = _Cut(parts[0].x, ("", back))
    return cut if starts == [[0], [1]] and all(e is not None and e[0] >= _END for e in ends) else None


def _paired(match: Match, *members: str) -> str:
    """The value whose last axis holds these two; "" where there is none."""
    makers = [match.producers.get(m) for m in members]
    if all(n is not None and n.op == "Gather" for n in makers):
        found = [
            n.inputs[0]
            for i, n in enumerate(makers)
            if n is not None
            and np.array_equal(match.graph.constants.get(n.inputs[1], -1), i)
            and _is_last(match, int(n.attrs.get("axis", 0)), n.inputs[0])
        ]
        return found[0] if len(found) == 2 and found[0] == found[1] else ""
    squeezed = [n.inputs[0] for n in makers if n is not None and _drops_last(match, n)]
    if len(squeezed) != 2:
        return ""
    split, parts = _split(match, *squeezed), [_part(match, s) for s in squeezed]
    if split is not None:
        return split.inputs[0]
    (x, *others), ranges = (
        [p.x if p is not None else "" for p in parts],
        [(_integers(match, p.start), _integers(match, p.end), p.step) for p in parts if p is not None],
    )
    return x if others == [x] and ranges == [([0], [1], 1), ([1], [2], 1)] else ""


def _drops_last(match: Match, n: Node) -> bool:
    """Whether a node is a Squeeze of the last axis alone."""
    axes = n.attrs.get("axes") or (_integers(match, n.inputs[1]) if len(n.inputs) > 1 else None)
    return n.qualified == "Squeeze" and axes is not None and len(axes) == 1 and _is_last(match, axes[0], n.inputs[0])


def _joined(first: Arg, second: Arg) -> tuple[P, P]:
    """Two members of pairs back beside each other: as halves, and as neighbours."""
    members = (
        node("Unsqueeze", first, "?#axis_one", name="one"),
        node("Unsqueeze", second, "?#axis_two", name="two"),
    )
    pairs = node("Concat", *members, name="stacked")
    flat = node("Concat", node("Slice", node("Shape", pairs, name="sizes"), 0.0, "%kept", 0.0), -1.0, name="flat")
    return node("Concat", first, second, name="halves"), node("Reshape", pairs, either(flat, "shape"))


def _cut(match: Match) -> _Cut | None:
    """How the pairs were cut; None where they are put together elsewhere than along the last axis."""
    a, b = match.values["a"], match.values["b"]
    if "halves" in match.nodes:
        cut = _halves(match, a, b)
        return cut if cut and _is_last(match, int(match.nodes["halves"].attrs["axis"]), cut.x) else None
    cut = _neighbours(match, a, b)
    if cut is None:
        return None
    axes = [match.axes("one"), match.axes("two"), (int(match.nodes["stacked"].attrs["axis"]),)]
    if any(axis is None or len(axis) != 1 or not _is_last(match, axis[0], cut.x, 1) for axis in axes):
        return None
    if "sizes" not in match.nodes:
        return cut
    rank = rank_of(match, cut.x)
    if match.nodes["flat"].attrs["axis"] not in (0, -1):
        return None
    return cut if match.number("kept") in (-2, (rank or 0) - 1) else None


def _is_turned(match: Match) -> bool:
    """Whether members are of one value, which is x where it is read whole, and has no axis less than the tables.

    A product of complex numbers has no order: tables may have been cut from one value too.
    """
    cut = _cut(match)
    if cut is None or match.values.get("x", cut.x) != cut.x:
        return False
    tables = [match.draft.spec(match.values[name]) for name in ("cos", "sin")]
    if len({spec.dtype for spec in (match.draft.spec(cut.x), *tables) if spec is not None}) > 1:
        return False  # which planning refuses
    ranks = rank_of(match, cut.x), rank_of(match, match.values["cos"])
    return ranks[0] is None or ranks[1] is None or ranks[1] <= ranks[0]


def _rotary(match: Match) -> Replacement:
    cut = _cut(match)
    assert cut is not None
    inputs = [cut.x, match.values["cos"], match.values["sin"], *cut.by]
    while not inputs[-1]:
        inputs.pop()
    attrs = {"interleaved": int("stacked" in match.nodes), "per_pair": int("x" not in match.values)}
    return Replacement(infera(match, "Rotary", tuple(inputs), attrs))


def _times(x: Arg, table: str) -> P:
    return node("Mul", x, table, commutes=True)


ROTARY = Fusion(
    name="rotary",
    patterns=(
        node("Add", _times("x", "cos"), _times(either(*_joined(node("Neg", "b"), "a")), "sin"), commutes=True),
        *_joined(
            node("Sub", _times("a", "cos"), _times("b", "sin")),
            node("Add", _times("b", "cos"), _times("a", "sin"), commutes=True),
        ),
    ),
    guard=_is_turned,
    build=_rotary,
    kinds=CPU_AND_TRITON,
    example="""
        example (float[2, 3, 5, 8] x, float[2, 1, 5, 8] cos, float[2, 1, 5, 8] sin) => (float[2, 3, 5, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] far = {9223372036854775807}, int64[1] axis = {3},
         int64[1] one = {1}> {
            a = Slice(x, zero, half, axis, one)
            b = Slice(x, half, far, axis, one)
            c = Neg(b)
            d = Concat <axis = -1> (c, a)
            e = Mul(d, sin)
            f = Mul(cos, x)
            y = Add(f, e)
        }""",
    near_misses=(
        """
        halves_in_order (float[2, 3, 5, 8] x, float[2, 1, 5, 8] cos, float[2, 1, 5, 8] sin) => (float[2, 3, 5, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] far = {9223372036854775807}, int64[1] axis = {3}> {
            a = Slice(x, zero, half, axis)
            b = Slice(x, half, far, axis)
            c = Neg(b)
            d = Concat <axis = -1> (a, c)
            e = Mul(d, sin)
            f = Mul(cos, x)
            y = Add(f, e)
        }""",
        """
        cut_twice (float[2, 3, 5, 8] x, float[2, 1, 5, 8] cos, float[2, 1, 5, 8] sin) => (float[2, 3, 5, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] other = {3}, int64[1] far = {9223372036854775807},
         int64[1] axis = {3}> {
            a = Slice(x, zero, half, axis)
            b = Slice(x, other, far, axis)
            c = Neg(b)
            d = Concat <axis = -1> (c, a)
            e = Mul(d, sin)
            f = Mul(cos, x)
            y = Add(f, e)
        }""",
        """
        along_the_sequence (float[2, 3, 8, 8] x, float[2, 1, 8, 8] cos, float[2, 1, 8, 8] sin) => (float[2, 3, 8, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] far = {9223372036854775807}, int64[1] axis = {2}> {
            a = Slice(x, zero, half, axis)
            b = Slice(x, half, far, axis)
            c = Neg(b)
            d = Concat <axis = 2> (c, a)
            e = Mul(d, sin)
            f = Mul(cos, x)
            y = Add(f, e)
        }""",
        """
        another_value (float[2, 3, 5, 8] x, float[2, 3, 5, 8] z, float[2, 1, 5, 8] sin) => (float[2, 3, 5, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] far = {9223372036854775807}, int64[1] axis = {3}> {
            a = Slice(x, zero, half, axis)
            b = Slice(x, half, far, axis)
            c = Neg(b)
            d = Concat <axis = -1> (c, a)
            e = Mul(d, sin)
            f = Mul(z, z)
            y = Add(f, e)
        }""",
        """
        every_third (float[2, 9] x, float[2, 6] cos, float[6] sin) => (float[2, 6] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] far = {9223372036854775807}, int64[1] axis = {1},
         int64[1] three = {3}, int64[2] shape = {2, 6}> {
            a = Slice(x, zero, far, axis, three)
            b = Slice(x, one, far, axis, three)
            c = Mul(a, cos)
            d = Mul(b, sin)
            e = Sub(c, d)
            f = Mul(b, cos)
            g = Mul(a, sin)
            h = Add(f, g)
            i = Unsqueeze(e, axis)
            j = Unsqueeze(h, axis)
            k = Concat <axis = -1> (i, j)
            y = Reshape(k, shape)
        }""",
        """
        tables_change_places (float[2, 3, 5, 8] x, float[5, 4] cos, float[5, 4] sin) => (float[2, 3, 5, 8] y) {
            a, b = Split <axis = -1, num_outputs = 2> (x)
            c = Mul(a, cos)
            d = Mul(b, sin)
            e = Sub(c, d)
            f = Mul(a, cos)
            g = Mul(b, sin)
            h = Add(f, g)
            y = Concat <axis = -1> (e, h)
        }""",
    ),
)

FUSIONS = (ROTARY,)
