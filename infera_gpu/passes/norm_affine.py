"""A norm, and the scale and shift that follow it."""

from __future__ import annotations

from dataclasses import replace

from infera_gpu.graph import Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, infera, node
from infera_gpu.passes.norm import WIDENED, are_rows, may_widen, row_of

_NORMS = ("LayerNormalization", f"infera.{WIDENED}")


def _takes_row(match: Match) -> bool:
    """The norm has neither scale nor shift yet, or not this one, and what comes is a row of its normalised axes.

    A scale that was in the norm before must fit: one that x turns out to be narrower than is an error.
    """
    norm, axis = match.nodes["norm"], _axis_of(match)
    if not are_rows(match, axis, "c") or any(norm.inputs[1 if match.root.op == "Mul" else 2 :]):
        return False
    if match.root.op == "Mul":
        return True
    if norm.op == WIDENED:
        return _has_mean(norm)
    return "scale" not in match.values or not may_widen(match, axis, {"c": row_of(match, "c", axis)})


def _has_mean(norm: Node) -> bool:
    return norm.op == "LayerNormalization" or bool(norm.attrs.get("center", 0))


def _axis_of(match: Match) -> int:
    """The axis of the norm, counted from the last."""
    axis, rank = int(match.nodes["norm"].attrs.get("axis", -1)), match.rank("x")
    return axis if axis < 0 else axis - (rank or 0)


def _with_row(match: Match) -> Replacement:
    norm, name = match.nodes["norm"], made_name(match.root.outputs[0], "row")
    scale = match.values.get("scale", "")
    inputs = (match.values["x"], name) if match.root.op == "Mul" else (match.values["x"], scale, name)
    axis = _axis_of(match)
    rows = {name: row_of(match, "c", axis)}
    if norm.op != WIDENED and may_widen(match, axis, rows):
        attrs = {"axis": axis, "epsilon": norm.attrs.get("epsilon", 1e-5), "center": int(_has_mean(norm))}
        return Replacement(infera(match, WIDENED, inputs, attrs), rows)
    return Replacement(replace(norm, inputs=inputs, outputs=match.root.outputs), rows)


NORM_AFFINE = Fusion(
    name="norm_affine",
    patterns=(
        node("Mul", node((*_NORMS, "RMSNormalization"), "x", name="norm"), "#c", commutes=True),
        node("Add", node(_NORMS, "x", "?scale", name="norm"), "#c", commutes=True),
    ),
    guard=_takes_row,
    build=_with_row,
    example="""
        example (float[B, 3, 4] x) => (float[B, 3, 4] y)
        <float[4] g = {1, -2, 0.5, 3}, float[1, 1, 4] b = {0.5, 1, 2, -1}> {
            n = LayerNormalization(x, g)
            y = Add(b, n)
        }""",
    near_misses=(
        """
        one_value_a_row (float[B, 3, 4] x) => (float[B, 3, 4] y)
        <float[4] g = {1, -2, 0.5, 3}, float[3, 1] b = {0.5, 1, 2}> {
            n = LayerNormalization(x, g)
            y = Add(b, n)
        }""",
        """
        shifted_already (float[B, 3, 4] x) => (float[B, 3, 4] y)
        <float[4] g = {1, -2, 0.5, 3}, float[4] b = {0.5, 1, 2, -1}> {
            n = LayerNormalization(x, g, b)
            y = Add(b, n)
        }""",
        """
        norm_is_an_output (float[B, 3, 4] x) => (float[B, 3, 4] y, float[B, 3, 4] n)
        <float[4] g = {1, -2, 0.5, 3}, float[4] b = {0.5, 1, 2, -1}> {
            n = LayerNormalization(x, g)
            y = Add(b, n)
        }""",
    ),
)

FUSIONS = (NORM_AFFINE,)
