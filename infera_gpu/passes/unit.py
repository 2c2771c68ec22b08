"""Vectors over their length, x / ‖x‖, and what exporters keep the length from being zero by."""

from __future__ import annotations

import numpy as np

from infera_gpu.passes.activation import bounds
from infera_gpu.passes.engine import Fusion, Match, Replacement, either, infera, named, node
from infera_gpu.passes.norm import inverse_root, squared
from infera_gpu.passes.pattern import Arg, P
from infera_gpu.passes.softmax import one_axis

_SQUARE = either(squared("x"), node("Pow", node("Abs", "x"), 2.0))
_SUM = either(node("ReduceSum", _SQUARE, "?#axes", name="sum"), node("ReduceSumSquare", "x", "?#axes", name="sum"))


def _root(of: Arg) -> tuple[P, P]:
    return node("Sqrt", of), node("Pow", of, 0.5)


def _bounded(n: Arg, name: str) -> Arg:
    return either(
        node(("Max", "Add"), n, "%epsilon", commutes=True, name=name), node("Clip", n, "?#low", "?#most", name=name)
    )


_LENGTH = either(node("ReduceL2", "x", "?#axes", name="sum"), *_root(_SUM))
_BOUNDED_SUM = _bounded(_SUM, "bounded_sum")
_NORM = either(_bounded(_LENGTH, "bounded"), *_root(_BOUNDED_SUM), _LENGTH)


def _bound(match: Match) -> tuple[str, float, bool] | None:
    """How the length or its square is kept from zero, by how much, and whether from infinity; None where that is not
    known."""
    n = match.nodes.get("bounded") or match.nodes.get("bounded_sum")
    if n is None:
        return "add", 0.0, False
    if n.op != "Clip":
        return n.op.lower(), match.number("epsilon"), False
    limits = bounds(match.graph.constants, n)
    x = match.spec("x")
    if limits is None or x is None or x.dtype.kind != "f" or not limits[1] >= np.finfo(x.dtype).max:
        return None  # a bound that is no number is none of them
    return "max", limits[0], limits[1] < np.inf  # Paddle clips by the largest number where nothing is to be


def _is_unit(match: Match) -> bool:
    x, bound = match.spec("x"), _bound(match)
    if x is None or x.dtype not in (np.float32, np.float64) or bound is None or not bound[1] >= 0:
        return False
    return one_axis(match, "sum") is not None and match.keeps_shape()


def _unit(match: Match) -> Replacement:
    bound = _bound(match)
    assert bound is not None
    kind, epsilon, finite = bound
    attrs = {"axis": one_axis(match, "sum"), "epsilon": epsilon, "bound": kind, "finite": int(finite)}
    attrs["squared"] = int("bounded_sum" in match.nodes)
    return Replacement(infera(match, "L2Normalization", named(match, ("x", "shape")), attrs))


UNIT = Fusion(
    name="l2_normalization",
    patterns=(
        node("Div", "x", either(node("Expand", _NORM, "shape"), _NORM)),
        node("Mul", "x", either(node("Reciprocal", _NORM), node("Div", 1.0, _NORM)), commutes=True),
        node("Mul", "x", either(inverse_root(_BOUNDED_SUM), inverse_root(_SUM)), commutes=True),
    ),
    guard=_is_unit,
    build=_unit,
    reassociates=True,
    example="""
        example (float[B, 3, 8] x) => (float[B, 3, 8] y) <float e = {1e-12}> {
            n = ReduceL2 <axes = [-1]> (x)
            c = Clip(n, e)
            s = Shape(x)
            w = Expand(c, s)
            y = Div(x, w)
        }""",
    near_misses=(
        """
        length_of_another_value (float[B, 3, 8] x, float[B, 3, 8] z) => (float[B, 3, 8] y) <float e = {1e-12}> {
            n = ReduceL2 <axes = [-1]> (z)
            c = Clip(n, e)
            y = Div(x, c)
        }""",
        """
        bounded_above (float[B, 3, 8] x) => (float[B, 3, 8] y) <float e = {1e-12}, float most = {5}> {
            n = ReduceL2 <axes = [-1]> (x)
            c = Clip(n, e, most)
            y = Div(x, c)
        }""",
        """
        bounded_above_by_a_number_of_32_bits (double[B, 3, 8] x) => (double[B, 3, 8] y)
        <double e = {1e-12}, double most = {3.4028234663852886e38}> {
            n = ReduceL2 <axes = [-1]> (x)
            c = Clip(n, e, most)
            y = Div(x, c)
        }""",
        """
        bounded_by_no_number (float[B, 3, 8] x) => (float[B, 3, 8] y) <float e = {1e-12}, float most = {nan}> {
            n = ReduceL2 <axes = [-1]> (x)
            c = Clip(n, e, most)
            y = Div(x, c)
        }""",
        """
        two_axes (float[B, 3, 8] x) => (float[B, 3, 8] y) <float e = {1e-12}> {
            n = ReduceL2 <axes = [1, 2]> (x)
            c = Max(n, e)
            y = Div(x, c)
        }""",
        """
        axis_is_dropped (float[8, 8] x) => (float[8, 8] y) <float e = {1e-12}> {
            n = ReduceL2 <axes = [-1], keepdims = 0> (x)
            c = Max(n, e)
            y = Div(x, c)
        }""",
        """
        length_is_an_output (float[B, 3, 8] x) => (float[B, 3, 8] y, float[B, 3, 1] n) <float e = {1e-12}> {
            n = ReduceL2 <axes = [-1]> (x)
            c = Add(n, e)
            y = Div(x, c)
        }""",
        """
        integers (int32[B, 3, 8] x) => (int32[B, 3, 8] y) <int32 e = {1}> {
            s = ReduceSumSquare <axes = [-1]> (x)
            c = Max(s, e)
            y = Div(x, c)
        }""",
    ),
)

FUSIONS = (UNIT,)
