"""Layer and RMS normalisation along one axis that is not the last: of the channels of images, in most networks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.graph import HostArray, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, infera, node
from infera_gpu.passes.norm import CENTERED, inverse_root, standardized, unrolled, variance
from infera_gpu.passes.norm_factors import LAYER_NORM_AS_FACTORS, RMS_NORM_AS_FACTORS
from infera_gpu.passes.softmax import one_axis


def _is_along_an_axis(match: Match) -> bool:
    x, axis = match.spec("x"), one_axis(match, "variance")
    if x is None or x.dtype not in (np.float32, np.float64) or not x.ranked or axis in (None, x.ndim - 1):
        return False
    if "mean" in match.nodes and one_axis(match, "mean") != axis:
        return False
    return match.number("epsilon") >= 0 and match.keeps_shape()


def _along(match: Match) -> Replacement:
    return Replacement(infera(match, "AxisNormalization", (match.values["x"],), _attrs(match)))


def _attrs(match: Match) -> dict[str, float | None]:
    center = int("mean" in match.nodes)
    return {"axis": one_axis(match, "variance"), "epsilon": match.number("epsilon"), "center": center}


_AXIS_NORM_EXAMPLE = """
        example (float[B, 6, 5, 3] x) => (float[B, 6, 5, 3] y) <float two = {2}, float e = {1e-6}> {
            m = ReduceMean <axes = [1]> (x)
            c = Sub(x, m)
            s = Pow(c, two)
            v = ReduceMean <axes = [1]> (s)
            a = Add(v, e)
            r = Sqrt(a)
            y = Div(c, r)
        }"""

AXIS_NORM = Fusion(
    name="axis_norm",
    patterns=(
        *standardized(CENTERED, variance(CENTERED))[1:],
        *standardized("x", variance("x"))[1:],
        unrolled(inverse_root(variance(CENTERED))),
    ),
    guard=_is_along_an_axis,
    build=_along,
    reassociates=True,
    opset=13,
    example=_AXIS_NORM_EXAMPLE,
    near_misses=(
        """
        rank_is_unknown (float[B, 6] z, int64[N] shape) => (float[B, 6] y) <float two = {2}, float e = {1e-6}> {
            x = Reshape(z, shape)
            m = ReduceMean <axes = [1]> (x)
            c = Sub(x, m)
            s = Pow(c, two)
            v = ReduceMean <axes = [1]> (s)
            a = Add(v, e)
            r = Sqrt(a)
            y = Div(c, r)
        }""",
        changed(
            _AXIS_NORM_EXAMPLE,
            ("example (", "other_axes ("),
            ("v = ReduceMean <axes = [1]> (s)", "v = ReduceMean <axes = [1, 2]> (s)"),
        ),
        """
        last_axis (float[B, 6, 5] x) => (float[B, 6, 5] y) <float two = {2}, float e = {1e-6}> {
            s = Pow(x, two)
            v = ReduceMean <axes = [2]> (s)
            a = Add(v, e)
            r = Sqrt(a)
            y = Div(x, r)
        }""",
    ),
)


def _row(match: Match, name: str, axis: int) -> HostArray | None:
    """A constant with one element for each place on the normalised axis, as a row; None for any other."""
    x, c = match.spec("x"), match.constant(name)
    if x is None or not x.ranked or c.dtype != x.dtype or not x.ndim - axis <= c.ndim <= x.ndim:
        return None
    size, length = c.shape[axis - x.ndim], x.shape[axis]
    known = length == size
    return c.reshape(-1) if c.size == size and known else None


def _takes_row(match: Match) -> bool:
    axis = int(match.nodes["norm"].attrs["axis"])
    return _row(match, "c", axis) is not None and not any(
        match.nodes["norm"].inputs[1 if match.root.op == "Mul" else 2 :]
    )


def _with_row(match: Match) -> Replacement:
    row, name = _row(match, "c", int(match.nodes["norm"].attrs["axis"])), made_name(match.root.outputs[0], "row")
    assert row is not None
    scale = () if match.root.op == "Mul" else (match.values.get("scale", ""),)
    made = replace(match.nodes["norm"], inputs=(match.values["x"], *scale, name), outputs=match.root.outputs)
    return Replacement(made, {name: row})


AXIS_AFFINE = Fusion(
    name="axis_norm_affine",
    patterns=(
        node("Mul", node("infera.AxisNormalization", "x", name="norm"), "#c", commutes=True),
        node("Add", node("infera.AxisNormalization", "x", "?scale", name="norm"), "#c", commutes=True),
    ),
    guard=_takes_row,
    build=_with_row,
    example="""
        example (float[B, 3, 4] x) => (float[B, 3, 4] y) <float[3] g = {1, -2, 0.5}, float[1, 3, 1] b = {0.5, 1, 2}> {
            n = infera.AxisNormalization <axis = 1> (x, g)
            y = Add(b, n)
        }""",
    near_misses=(
        """
        one_value_a_column (float[B, 3, 3] x) => (float[B, 3, 3] y) <float[3] b = {0.5, 1, 2}> {
            n = infera.AxisNormalization <axis = 1> (x)
            y = Mul(b, n)
        }""",
        """
        scaled_already (float[B, 3, 4] x) => (float[B, 3, 4] y)
        <float[3] g = {1, -2, 0.5}, float[3, 1] b = {0.5, 1, 2}> {
            n = infera.AxisNormalization <axis = 1> (x, g)
            y = Mul(b, n)
        }""",
        """
        length_is_unknown (float[B, C, 4] x) => (float[B, 3, 4] y) <float[3, 1] b = {0.5, 1, 2}> {
            n = infera.AxisNormalization <axis = 1> (x)
            y = Mul(b, n)
        }""",
        """
        one_value_for_all (float[B, C, 4] x) => (float[B, C, 4] y) <float[1, 1] b = {0.5}> {
            n = infera.AxisNormalization <axis = 1> (x)
            y = Add(b, n)
        }""",
        """
        norm_is_an_output (float[B, 3, 4] x) => (float[B, 3, 4] y, float[B, 3, 4] n)
        <float[3, 1] b = {0.5, 1, 2}> {
            n = infera.AxisNormalization <axis = 1> (x)
            y = Add(b, n)
        }""",
    ),
)


def _rows(match: Match) -> list[HostArray | None]:
    """The scale, and the shift where there is one, of the axis that is normalised."""
    axis = one_axis(match, "variance")
    return [_row(match, name, axis or 0) for name in ("scale", "shift") if name in match.values]


def _is_scaled(match: Match) -> bool:
    """By finite numbers: infinity times the mean, less infinity times x, is none."""
    if not _is_along_an_axis(match) or any(row is None for row in _rows(match)):
        return False
    return bool(np.isfinite(match.constant("scale")).all())


def _with_rows(match: Match) -> Replacement:
    named = zip(("scale", "shift"), _rows(match), strict=False)
    rows = {made_name(match.root.outputs[0], name): row for name, row in named if row is not None}
    return Replacement(infera(match, "AxisNormalization", (match.values["x"], *rows), _attrs(match)), rows)


AXIS_NORM_AS_FACTORS = Fusion(
    name="axis_norm_as_factors",
    patterns=(*LAYER_NORM_AS_FACTORS.patterns, *RMS_NORM_AS_FACTORS.patterns),
    guard=_is_scaled,
    build=_with_rows,
    reassociates=True,
    opset=13,
    example="""
        example (float[B, 3, 4, 5] x) => (float[B, 3, 4, 5] y)
        <float[1, 1, 1, 1] e = {1e-5}, float[1, 3, 1, 1] g = {1, -2, 0.5}, float[1, 3, 1, 1] b = {0.5, 1, 2}> {
            m = ReduceMean <axes = [1]> (x)
            c = Sub(x, m)
            s = Mul(c, c)
            v = ReduceMean <axes = [1]> (s)
            a = Add(e, v)
            r = Sqrt(a)
            i = Reciprocal(r)
            f = Mul(i, g)
            p = Mul(f, x)
            q = Mul(m, f)
            t = Sub(b, q)
            y = Add(p, t)
        }""",
    near_misses=(
        """
        scale_adds_an_axis (float[B, 3, 4] x) => (float[1, B, 3, 4] y)
        <float e = {1e-5}, float[1, 1, 3, 1] g = {1, -2, 0.5}> {
            s = Mul(x, x)
            v = ReduceMean <axes = [1]> (s)
            a = Add(e, v)
            r = Sqrt(a)
            i = Reciprocal(r)
            f = Mul(i, g)
            y = Mul(f, x)
        }""",
        """
        mean_of_another_axis (float[B, 3, 4, 5] x) => (float[B, 3, 4, 5] y)
        <float e = {1e-5}, float[3, 1, 1] g = {1, -2, 0.5}, float[3, 1, 1] b = {0.5, 1, 2}> {
            m = ReduceMean <axes = [2]> (x)
            c = Sub(x, m)
            s = Mul(c, c)
            v = ReduceMean <axes = [1]> (s)
            a = Add(e, v)
            r = Sqrt(a)
            i = Reciprocal(r)
            f = Mul(i, g)
            p = Mul(f, x)
            q = Mul(m, f)
            t = Sub(b, q)
            y = Add(p, t)
        }""",
    ),
)

FUSIONS = (AXIS_NORM, AXIS_NORM_AS_FACTORS, AXIS_AFFINE)
