"""Shapes that are changed for what computes element by element, and then changed back."""

from __future__ import annotations

from dataclasses import replace

from infera_gpu.graph import Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node
from infera_gpu.passes.sinking import ACTIVATIONS
from infera_gpu.passes.sizes import product
from infera_gpu.spec import Dim

_UNARY = (*ACTIVATIONS, *("Abs", "Ceil", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Round", "Sign", "Sqrt"))
_BINARY = ("Add", "Sub", "Mul", "Div")
_BACK = ("Reshape", "Squeeze")
_THERE = node(("Reshape", "Unsqueeze"), "x", "?there", name="there")

FURTHEST = 16
"""Nodes between a shape that is changed and where it is changed back."""


def _shape(match: Match, value: str) -> tuple[Dim, ...] | None:
    """A shape of which every size has a number or a name."""
    spec = match.draft.spec(value)
    return spec.shape if spec is not None and spec.ranked and None not in spec.shape else None


def _is_possible(match: Match) -> bool:
    """Whether the first shape holds as many elements as x has, so that no error is hidden."""
    x, there = _shape(match, match.values["x"]), _shape(match, match.nodes["there"].outputs[0])
    return x is not None and there is not None and product(x) == product(there)


def _is_pointwise(match: Match, n: Node) -> bool:
    others = [i for i in n.inputs if i not in match.graph.constants]
    return len(others) == 1 and not n.domain and n.op in (*_UNARY, *_BINARY, "Clip")


def _comes_back(match: Match) -> bool:
    """Whether what the match makes goes through such nodes alone to one that gives it the shape of x again."""
    value, x = match.root.outputs[0], _shape(match, match.values["x"])
    for _ in range(FURTHEST):
        readers = [*match.draft.readers.get(value, {}).values()]
        if x is None or value in match.graph.outputs or len(readers) != 1:
            return False
        (reader,) = readers
        if reader.qualified in _BACK:
            return reader.inputs[0] == value and _shape(match, reader.outputs[0]) == x
        if not _is_pointwise(match, reader):
            return False
        value = reader.outputs[0]
    return False


def _broadcasts(match: Match) -> bool:
    """A constant is one number, or one for each place of a last axis that stays, and adds no axis."""
    if "c" not in match.values:
        return True
    c, shapes = match.constant("c"), (_shape(match, match.values["x"]), _shape(match, match.nodes["there"].outputs[0]))
    for shape in shapes:
        row = c.ndim == 1 and shape is not None and shape[-1:] == c.shape
        if shape is None or not (row or (c.size == 1 and c.ndim <= len(shape))):
            return False
    return True


def _moved(match: Match) -> Replacement:
    root, there, name = match.root, match.nodes["there"], made_name(match.root.outputs[0], "before")
    inputs = tuple(match.values["x"] if i == there.outputs[0] else i for i in root.inputs)
    made = replace(there, inputs=(name, *there.inputs[1:]), outputs=root.outputs)
    return Replacement(made, before=(replace(root.over(inputs), outputs=(name,), name=root.name or name),))


_MOVED = """
        example (float[B, 3, 4, 5] x) => (float[B, 3, 4, 5] y)
        <int64[2] flat = {-1, 60}, float half = {0.5}, int64[4] back = {-1, 3, 4, 5}> {
            a = Reshape(x, flat)
            b = Mul(half, a)
            c = Identity(b)
            y = Reshape(b, back)
        }"""

MOVED = Fusion(
    name="elementwise_before_reshape",
    patterns=(
        node(_UNARY, _THERE),
        node("Clip", _THERE, "?#low", "?#high"),
        node(_BINARY, _THERE, "#c"),
        node(_BINARY, "#c", _THERE),
    ),
    guard=lambda match: _is_possible(match) and _broadcasts(match) and _comes_back(match),
    build=_moved,
    example=_MOVED.replace("            c = Identity(b)\n", ""),
    near_misses=(
        changed(_MOVED, ("example (", "read_by_another ("), ("[B, 3, 4, 5] y)", "[B, 3, 4, 5] y, float[B, 60] c)")),
        changed(
            _MOVED,
            ("example (", "another_shape ("),
            ("            c = Identity(b)\n", ""),
            ("back = {-1, 3, 4, 5}", "back = {-1, 4, 3, 5}"),
            ("(float[B, 3, 4, 5] y)", "(float[B, 4, 3, 5] y)"),
        ),
        changed(
            _MOVED,
            ("example (", "may_be_impossible ("),
            ("            c = Identity(b)\n", ""),
            ("flat = {-1, 60}", "flat = {-1, 7}"),
        ),
        changed(
            _MOVED,
            ("example (", "along_an_axis ("),
            ("            c = Identity(b)\n", ""),
            ("Mul(half, a)", "Softmax(a)"),
        ),
        """
        a_number_for_each (float[B, 3, 2] x) => (float[B, 3, 2] y)
        <int64[2] flat = {-1, 6}, float[6] row = {1, 2, 3, 4, 5, 6}, int64[3] back = {-1, 3, 2}> {
            a = Reshape(x, flat)
            b = Add(row, a)
            y = Reshape(b, back)
        }""",
        """
        a_number_with_more_axes (float[6] x) => (float[6] y)
        <int64[2] there = {2, 3}, float[1, 1] one = {1}, int64[1] back = {6}> {
            a = Reshape(x, there)
            b = Add(a, one)
            y = Reshape(b, back)
        }""",
    ),
)

_CANCELLED = """
        example (float[B, 3] x) => (float[B, 3] z) <int64[1] one = {1}> {
            a = Unsqueeze(x, one)
            y = Squeeze(a, one)
            z = Softmax(y)
        }"""


def _is_as_it_was(match: Match) -> bool:
    return _is_possible(match) and _shape(match, match.values["x"]) == _shape(match, match.root.outputs[0])


CANCELLED = Fusion(
    name="reshape_and_back",
    patterns=(node(_BACK, _THERE, "?back"),),
    guard=_is_as_it_was,
    build=lambda match: Replacement(Node("Identity", (match.values["x"],), match.root.outputs, name=match.root.name)),
    example=_CANCELLED,
    near_misses=(
        changed(
            _CANCELLED,
            ("example (", "another_axis ("),
            ("int64[1] one = {1}", "int64[1] one = {1}, int64[1] first = {0}"),
            ("Squeeze(a, one)", "Squeeze(a, first)"),
        ),
        """
        impossible (float[2, 3] x) => (float[2, 3] y) <int64[2] there = {5, 5}, int64[2] back = {2, 3}> {
            a = Reshape(x, there)
            y = Reshape(a, back)
        }""",
        changed(_CANCELLED, ("example (", "every_axis_of_one ("), ("Squeeze(a, one)", "Squeeze(a)")),
        changed(
            _CANCELLED, ("example (", "read_elsewhere ("), ("(float[B, 3] z)", "(float[B, 3] z, float[B, 1, 3] a)")
        ),
    ),
)

FUSIONS = (MOVED, CANCELLED)
