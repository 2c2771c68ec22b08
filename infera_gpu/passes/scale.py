"""Factors and terms that exporters write in any case: Paddle's `scale` is a product and a sum, whatever they are by."""

from __future__ import annotations

from infera_gpu.graph import Node
from infera_gpu.passes.engine import Fusion, Match, Replacement, node, standard


def _adds_nothing(match: Match) -> bool:
    """Zero of the other operand's type, without an axis more."""
    x, zero = match.spec("x"), match.constant("zero")
    return x is not None and x.dtype == zero.dtype and match.number("zero") == 0 and match.keeps_shape()


ZERO = Fusion(
    name="zero_term",
    patterns=(node("Add", "x", "%zero", commutes=True),),
    guard=_adds_nothing,
    build=lambda match: Replacement(
        Node("Identity", (match.values["x"],), match.root.outputs, name=match.root.name or match.root.outputs[0])
    ),
    reassociates=True,  # -0 + 0 is 0; what every bit stays the same with has vanished before (`same`)
    example="""
        example (float[B, 3] x) => (float[B, 3] z) <float[1] half = {0.5}, float zero = {0}> {
            a = Mul(x, half)
            y = Add(a, zero)
            z = Sigmoid(y)
        }""",
    near_misses=(
        "another_number (float[B, 3] x) => (float[B, 3] y) <float one = {1}> { y = Add(x, one) }",
        "adds_an_axis (float[3] x) => (float[1, 3] y) <float[1, 1] zero = {0}> { y = Add(x, zero) }",
        "a_zero_each (float[3, 1] x) => (float[3, 2] y) <float[2] zero = {0, 0}> { y = Add(x, zero) }",
        "of_another_type (float[3] x) => (float[3] y) <double zero = {0}> { y = Add(x, zero) }",
    ),
)


def _changes_signs(match: Match) -> bool:
    """-1 of the other operand's type, without an axis more."""
    x, minus = match.spec("x"), match.constant("minus")
    return x is not None and x.dtype == minus.dtype and match.number("minus") == -1 and match.keeps_shape()


NEGATION = Fusion(
    name="negation",
    patterns=(node("Mul", "x", "%minus", commutes=True), node("Div", "x", "%minus")),
    guard=_changes_signs,
    build=lambda match: Replacement(standard(match, "Neg", 6, (match.values["x"],), {})),
    example="example (float[B, 3] x) => (float[B, 3] y) <float[1] minus = {-1}> { y = Mul(minus, x) }",
    near_misses=(
        "divides (float[B, 3] x) => (float[B, 3] y) <float minus = {-1}> { y = Div(minus, x) }",
        "adds_an_axis (float[3] x) => (float[1, 3] y) <float[1, 1] minus = {-1}> { y = Mul(x, minus) }",
        "of_another_type (float[3] x) => (float[3] y) <double minus = {-1}> { y = Mul(x, minus) }",
        "twice (float[B, 3] x) => (float[B, 3] y) <float minus = {-2}> { y = Mul(x, minus) }",
    ),
)

FUSIONS = (ZERO, NEGATION)
