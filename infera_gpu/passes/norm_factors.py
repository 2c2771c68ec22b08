"""Layer and RMS normalisation whose scale is multiplied in on the way, and means as sums over a number."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from infera_gpu.graph import HostArray, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, either, node, standard
from infera_gpu.passes.norm import (
    CENTERED,
    MEAN,
    are_rows,
    inverse_root,
    is_standardized,
    normalization,
    trailing_axis,
    unrolled,
    variance,
)
from infera_gpu.passes.pattern import Arg, P, is_close

# ---- means


def _count(match: Match) -> int | None:
    """How many elements a sum adds up; None where that is not known."""
    x, axes = match.spec("x"), match.axes("sum")
    if x is None or not x.ranked or x.dtype.kind != "f" or not axes:
        return None
    sizes = [x.shape[axis] for axis in axes]
    return math.prod(d for d in sizes if isinstance(d, int)) if all(isinstance(d, int) for d in sizes) else None


def _is_mean(match: Match) -> bool:
    """Of axes that are kept: what norms need. Others are as well left to the arithmetic that follows."""
    count = _count(match)
    x = match.spec("x")
    if x is None or not count or not match.nodes["sum"].attrs.get("keepdims", 1) or not match.keeps_shape():
        return False
    factor = match.number("share") if "share" in match.values else 1 / match.number("count")
    return is_close(factor * count, 1, x.dtype)


def _mean(match: Match) -> Replacement:
    axes = match.axes("sum")
    if match.opset() < 18:
        return Replacement(standard(match, "ReduceMean", 1, (match.values["x"],), {"axes": axes}))
    name = made_name(match.root.outputs[0], "axes")
    constants: dict[str, HostArray] = {name: np.array(axes, np.int64)}
    return Replacement(standard(match, "ReduceMean", 1, (match.values["x"], name), {}), constants)


_SUM = node("ReduceSum", "x", "?#axes", name="sum")

MEAN_OF_SUM = Fusion(
    name="mean_of_sum",
    patterns=(node("Mul", _SUM, "%share", commutes=True), node("Div", _SUM, "%count")),
    guard=_is_mean,
    build=_mean,
    reassociates=True,
    example="""
        example (float[B, 3, 4] x) => (float[B, 1, 1] y) <int64[2] last = {1, -1}, float share = {0.083333333}> {
            s = ReduceSum(x, last)
            y = Mul(share, s)
        }""",
    near_misses=(
        """
        other_share (float[B, 3, 4] x) => (float[B, 1, 1] y) <int64[2] last = {1, -1}, float share = {0.08}> {
            s = ReduceSum(x, last)
            y = Mul(share, s)
        }""",
        """
        size_is_unknown (float[B, 3, N] x) => (float[B, 3, 1] y) <int64[1] last = {-1}, float count = {4}> {
            s = ReduceSum(x, last)
            y = Div(s, count)
        }""",
        """
        axis_is_dropped (float[B, 3, 4] x) => (float[B, 3] y) <int64[1] last = {-1}, float count = {4}> {
            s = ReduceSum <keepdims = 0> (x, last)
            y = Div(s, count)
        }""",
        """
        share_adds_an_axis (float[4] x) => (float[1, 1] y) <int64[1] last = {-1}, float[1, 1] share = {0.25}> {
            s = ReduceSum(x, last)
            y = Mul(share, s)
        }""",
        """
        integers (int32[B, 4] x) => (int32[B, 1] y) <int64[1] last = {-1}, int32 count = {4}> {
            s = ReduceSum(x, last)
            y = Div(s, count)
        }""",
    ),
)


def _is_mean_of_squares(match: Match) -> bool:
    """For a norm: a small number is added to it, and nothing else is made of it."""
    readers = [*match.draft.readers.get(match.root.outputs[0], {}).values()]
    small = len(readers) == 1 and readers[0].qualified == "Add"
    return small and any(i in match.graph.constants for i in readers[0].inputs) and _is_mean(match)


def _mean_of_squares(match: Match) -> Replacement:
    mean, squares = _mean(match), made_name(match.root.outputs[0], "squares")
    square = standard(match, "Mul", 7, (match.values["x"],) * 2, {})
    made = replace(mean.node, inputs=(squares, *mean.node.inputs[1:]))
    return Replacement(made, mean.constants, (replace(square, outputs=(squares,), name=squares),))


_SUM_OF_SQUARES = node("ReduceSumSquare", "x", "?#axes", name="sum")
_MEAN_SQUARE = """
        example (float[B, 3, 4] x) => (float[B, 3, 1] y) <int64[1] last = {-1}, float count = {4}, float e = {1e-6}> {
            s = ReduceSumSquare(x, last)
            m = Div(s, count)
            y = Add(m, e)
        }"""

MEAN_SQUARE = Fusion(
    name="mean_of_sum_of_squares",
    patterns=(node("Mul", _SUM_OF_SQUARES, "%share", commutes=True), node("Div", _SUM_OF_SQUARES, "%count")),
    guard=_is_mean_of_squares,
    build=_mean_of_squares,
    reassociates=True,
    opset=18,
    example=_MEAN_SQUARE,
    near_misses=(
        changed(_MEAN_SQUARE, ("example (", "another_count ("), ("count = {4}", "count = {3}")),
        changed(_MEAN_SQUARE, ("example (", "no_norm ("), ("y = Add(m, e)", "y = Mul(m, e)")),
        changed(_MEAN_SQUARE, ("example (", "size_is_unknown ("), ("float[B, 3, 4] x", "float[B, 3, N] x")),
        changed(
            _MEAN_SQUARE,
            ("example (", "sum_is_an_output ("),
            ("float[B, 3, 1] y)", "float[B, 3, 1] y, float[B, 3, 1] s)"),
        ),
    ),
)


def _size(of: Arg) -> Arg:
    return node("Cast", node("Size", of))


def _is_mean_of_counted(match: Match) -> bool:
    """Of axes that are kept, and what is counted has the shape of what is summed."""
    counted, x = match.spec("counted"), match.spec("x")
    if counted is None or x is None or x.dtype.kind != "f" or not (counted.ranked and x.ranked):
        return False
    alike = None not in x.shape and counted.shape == x.shape
    return alike and match.axes("sum") is not None and bool(match.nodes["sum"].attrs.get("keepdims", 1))


MEAN_BY_COUNT = Fusion(
    name="mean_by_count",
    patterns=(node("Div", _SUM, node("Div", _size("counted"), _size(_SUM))),),
    guard=_is_mean_of_counted,
    build=_mean,
    reassociates=True,
    example="""
        example (float[B, 3, 8] x, float[B, 3, 1] m) => (float[B, 3, 1] y) <int64[1] last = {-1}> {
            c = Sub(x, m)
            t = ReduceSum(c, last)
            a = Size(c)
            b = Size(t)
            d = Cast <to = 1> (a)
            e = Cast <to = 1> (b)
            n = Div(d, e)
            y = Div(t, n)
        }""",
    near_misses=(
        """
        counts_another_value (float[B, 3, 8] x, float[C, 3, 8] z) => (float[B, 3, 1] y) <int64[1] last = {-1}> {
            t = ReduceSum(x, last)
            a = Size(z)
            b = Size(t)
            d = Cast <to = 1> (a)
            e = Cast <to = 1> (b)
            n = Div(d, e)
            y = Div(t, n)
        }""",
        """
        less_one (float[B, 3, 8] x) => (float[B, 3, 1] y) <int64[1] last = {-1}, float one = {1}> {
            t = ReduceSum(x, last)
            a = Size(x)
            b = Size(t)
            d = Cast <to = 1> (a)
            e = Cast <to = 1> (b)
            n = Div(d, e)
            f = Sub(n, one)
            y = Div(t, f)
        }""",
    ),
)
"""Paddle's `var` divides a sum by how many elements go into each of its own."""

# ---- scales


def _affine(match: Match) -> tuple[str, ...]:
    return tuple(name for name in ("scale", "shift") if name in match.values)


def _is_scaled(match: Match) -> bool:
    """By finite numbers: infinity times the mean, less infinity times x, is none."""
    axis = trailing_axis(match, "variance")
    rows = axis is not None and are_rows(match, axis, *_affine(match))
    return rows and is_standardized(match) and bool(np.isfinite(match.constant("scale")).all())


def _factor(x: Arg) -> P:
    return node("Mul", inverse_root(variance(x)), "#scale", commutes=True, name="factor")


def _scaled(x: Arg) -> tuple[P, P]:
    """x (scale / √variance), and (scale x) / √variance."""
    root = either(node("Sqrt", variance(x)), node("Pow", variance(x), 0.5))
    return node("Mul", x, _factor(x), commutes=True), node("Div", node("Mul", x, "#scale", commutes=True), root)


_LAYER_NORM_AS_FACTORS_EXAMPLE = """
        example (float[B, 3, 4] x) => (float[B, 3, 4] y)
        <float e = {1e-5}, float[4] g = {1, -2, 0.5, 3}, float[4] b = {0.5, 1, 2, -1}> {
            m = ReduceMean <axes = [2]> (x)
            c = Sub(x, m)
            s = Mul(c, c)
            v = ReduceMean <axes = [2]> (s)
            a = Add(e, v)
            r = Sqrt(a)
            i = Reciprocal(r)
            f = Mul(i, g)
            p = Mul(f, x)
            q = Mul(m, f)
            t = Sub(b, q)
            y = Add(p, t)
        }"""

LAYER_NORM_AS_FACTORS = Fusion(
    name="layer_norm_as_factors",
    patterns=(
        node(
            "Add",
            node("Mul", "x", _factor(CENTERED), commutes=True),
            node("Sub", "#shift", node("Mul", MEAN, _factor(CENTERED), commutes=True)),
            commutes=True,
        ),
        unrolled(_factor(CENTERED)),
        *_scaled(CENTERED),
    ),
    guard=_is_scaled,
    build=lambda match: normalization("LayerNormalization", 1, *_affine(match))(match),
    reassociates=True,
    opset=13,
    example=_LAYER_NORM_AS_FACTORS_EXAMPLE,
    near_misses=(
        changed(
            _LAYER_NORM_AS_FACTORS_EXAMPLE,
            ("example (", "scale_of_another_axis ("),
            ("float[4] g = {1, -2, 0.5, 3}", "float[3, 1] g = {1, -2, 0.5}"),
        ),
        """
        one_scale_a_row (float[B, 3, 4] x) => (float[B, 3, 4] y) <float e = {1e-5}, float[3, 1] g = {1, -2, 0.5}> {
            m = ReduceMean <axes = [2]> (x)
            c = Sub(x, m)
            s = Mul(c, c)
            v = ReduceMean <axes = [2]> (s)
            a = Add(e, v)
            r = Sqrt(a)
            p = Mul(g, c)
            y = Div(p, r)
        }""",
    ),
)

_RMS_NORM_AS_FACTORS_EXAMPLE = """
        example (float[B, 3, 4] x) => (float[B, 3, 4] y) <float e = {1e-5}, float[4] g = {1, -2, 0.5, 3}> {
            s = Mul(x, x)
            v = ReduceMean <axes = [2]> (s)
            a = Add(e, v)
            r = Sqrt(a)
            i = Reciprocal(r)
            f = Mul(i, g)
            y = Mul(f, x)
        }"""

RMS_NORM_AS_FACTORS = Fusion(
    name="rms_norm_as_factors",
    patterns=_scaled("x"),
    guard=_is_scaled,
    build=lambda match: normalization("RMSNormalization", 23, *_affine(match))(match),
    reassociates=True,
    opset=13,
    example=_RMS_NORM_AS_FACTORS_EXAMPLE,
    near_misses=(
        changed(
            _RMS_NORM_AS_FACTORS_EXAMPLE,
            ("example (", "factor_of_another_value ("),
            ("float[B, 3, 4] x)", "float[B, 3, 4] x, float[B, 3, 4] z)"),
            ("s = Mul(x, x)", "s = Mul(z, z)"),
        ),
    ),
)

FUSIONS = (MEAN_OF_SUM, MEAN_SQUARE, MEAN_BY_COUNT, LAYER_NORM_AS_FACTORS, RMS_NORM_AS_FACTORS)
