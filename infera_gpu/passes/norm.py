"""LayerNormalization and RMSNormalization as exporters write them out.

`norm_factors` has what is scaled on the way, `norm_affine` what is scaled afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from infera_gpu.graph import HostArray, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, either, infera, node, standard
from infera_gpu.passes.pattern import Arg, P, axis_in

WIDENED = "WidenedNormalization"
"""A norm whose axes are not known, with a scale: what has one element there becomes as wide as the scale."""


def squared(x: Arg) -> Arg:
    """x², both ways."""
    return either(node("Pow", x, 2.0), node("Mul", x, x))


_MEANS = ("ReduceMean", "GlobalAveragePool")
"""tf2onnx writes the mean along the last of three axes as a pool."""


def variance(x: Arg) -> P:
    """The mean of squares, and a small number."""
    return node("Add", node(_MEANS, squared(x), "?#axes", name="variance"), "%epsilon", commutes=True)


def inverse_root(variance: Arg) -> Arg:
    """1 / √variance, every way."""
    root = node("Sqrt", variance)
    return either(
        node("Reciprocal", root),
        node("Div", 1.0, root),
        node("Pow", variance, -0.5),
        node("Sqrt", node("Reciprocal", variance)),
    )


def standardized(x: Arg, variance: P) -> tuple[P, ...]:
    """x / √variance, and the same narrowed by a Cast."""
    over = node("Div", x, either(node("Sqrt", variance), node("Pow", variance, 0.5)))
    times = node("Mul", x, inverse_root(variance), commutes=True)
    return (node("Cast", either(over, times), name="narrowed"), over, times)


MEAN = node(_MEANS, "x", "?#mean_axes", name="mean")
CENTERED = node("Sub", "x", MEAN, name="centered")


def unrolled(factor: Arg) -> P:
    """x · factor − mean · factor, as TensorFlow's batch_normalization writes what has no shift."""
    return node(
        "Add",
        node("Mul", "x", factor, commutes=True),
        node("Mul", node("Neg", MEAN), factor, commutes=True),
        commutes=True,
    )


def trailing_axis(match: Match, reduction: str) -> int | None:
    """The first of the trailing axes that a named reduction of x goes over and keeps, counted from the last.

    None where it goes over other axes, or where that is not known.
    """
    axes, rank = match.axes(reduction), match.rank("x")
    if axes is None or not match.nodes[reduction].attrs.get("keepdims", 1):
        return None
    if any(a >= 0 for a in axes):
        if rank is None or any(axis_in(a, rank) is None for a in axes):
            return None
        axes = tuple(a % rank - rank for a in axes)
    return -len(axes) if sorted(axes) == list(range(-len(axes), 0)) else None


def _source(match: Match) -> str:
    """What is normalised: where the result is narrowed by a Cast, what was widened before."""
    x = match.values["x"]
    widened = match.producers.get(x)
    return widened.inputs[0] if "narrowed" in match.nodes and widened is not None and widened.op == "Cast" else x


def is_standardized(match: Match) -> bool:
    """Floats over trailing axes, the same for mean and variance; and a Cast that follows undoes the one before."""
    axis, x = trailing_axis(match, "variance"), match.spec("x")
    if axis is None or x is None or x.dtype.kind != "f" or match.number("epsilon") < 0 or not match.keeps_shape():
        return False
    if "mean" in match.nodes and trailing_axis(match, "mean") != axis:
        return False
    if "narrowed" not in match.nodes:
        return True
    source, made = match.draft.spec(_source(match)), match.draft.spec(match.root.outputs[0])
    if x.dtype != np.float32 or source is None or made is None:
        return False
    return source.dtype == made.dtype and source.dtype in (np.float16, np.float32)


def normalization(op: str, since: int, *affine: str) -> Callable[[Match], Replacement]:
    """The operator over the source and the constants of these names, each one row."""

    def build(match: Match) -> Replacement:
        axis = trailing_axis(match, "variance")
        assert axis is not None
        rows = {made_name(match.root.outputs[0], name): row_of(match, name, axis) for name in affine}
        attrs = {"axis": axis, "epsilon": match.number("epsilon")}
        inputs = (_source(match), *rows)
        if may_widen(match, axis, rows):
            return Replacement(infera(match, WIDENED, inputs, attrs | {"center": int("mean" in match.nodes)}), rows)
        return Replacement(standard(match, op, since, inputs, attrs), rows)

    return build


def may_widen(match: Match, axis: int, rows: Mapping[str, HostArray]) -> bool:
    """Whether x may have one element where the rows have more: its normalised axes are not known."""
    x = match.spec("x")
    known = x.shape[axis:] if x is not None and x.ranked else ()
    return any(row.shape != known for row in rows.values())


def row_of(match: Match, name: str, axis: int) -> np.ndarray:
    """A constant in the shape of the normalised axes: without axes of size 1 before them."""
    value = match.constant(name)
    return value.reshape(value.shape[axis:])


_LAYER_NORM_EXAMPLE = """
        example (float[B, 3, 8] x) => (float[B, 3, 8] y) <float two = {2}, float e = {1e-5}> {
            m = ReduceMean <axes = [-1]> (x)
            c = Sub(x, m)
            s = Pow(c, two)
            v = ReduceMean <axes = [-1]> (s)
            a = Add(v, e)
            r = Sqrt(a)
            y = Div(c, r)
        }"""

LAYER_NORM = Fusion(
    name="layer_norm",
    patterns=(*standardized(CENTERED, variance(CENTERED)), unrolled(inverse_root(variance(CENTERED)))),
    guard=is_standardized,
    build=normalization("LayerNormalization", 1),
    reassociates=True,
    opset=13,
    example=_LAYER_NORM_EXAMPLE,
    near_misses=(
        changed(
            _LAYER_NORM_EXAMPLE,
            ("example (", "other_axes ("),
            ("v = ReduceMean <axes = [-1]> (s)", "v = ReduceMean <axes = [-2, -1]> (s)"),
        ),
        changed(
            _LAYER_NORM_EXAMPLE,
            ("example (", "inner_axis ("),
            ("m = ReduceMean <axes = [-1]> (x)", "m = ReduceMean <axes = [1]> (x)"),
            ("v = ReduceMean <axes = [-1]> (s)", "v = ReduceMean <axes = [1]> (s)"),
        ),
        changed(
            _LAYER_NORM_EXAMPLE,
            ("example (", "cubes ("),
            ("float two = {2}", "float three = {3}"),
            ("s = Pow(c, two)", "s = Pow(c, three)"),
        ),
        changed(
            _LAYER_NORM_EXAMPLE,
            ("example (", "deviation_is_an_output ("),
            ("float[B, 3, 8] y)", "float[B, 3, 8] y, float[B, 3, 1] r)"),
        ),
    ),
)


def are_rows(match: Match, axis: int, *names: str) -> bool:
    """Whether constants have the shape of the axes from `axis` on, as far as that is known, and add none."""
    x = match.spec("x")
    known = x.shape[axis:] if x is not None and x.ranked else (None,) * -axis
    rank = x.ndim if x is not None and x.ranked else -axis
    return all(
        -axis <= value.ndim <= rank
        and value.size == np.prod(value.shape[axis:])
        and (x is None or value.dtype == x.dtype)
        and all(
            d == size if isinstance(d, int) else size > 1 for d, size in zip(known, value.shape[axis:], strict=True)
        )
        for value in map(match.constant, names)
    )


_RMS_NORM_EXAMPLE = """
        example (float[B, 3, 8] x) => (float[B, 3, 8] y)
        <float two = {2}, float e = {1e-6}, float one = {1}, int64[1] last = {-1}> {
            s = Pow(x, two)
            v = ReduceMean(s, last)
            a = Add(v, e)
            r = Sqrt(a)
            i = Div(one, r)
            y = Mul(x, i)
        }"""

RMS_NORM = Fusion(
    name="rms_norm",
    patterns=standardized("x", variance("x")),
    guard=is_standardized,
    build=normalization("RMSNormalization", 23),
    reassociates=True,
    opset=18,
    example=_RMS_NORM_EXAMPLE,
    near_misses=(
        changed(
            _RMS_NORM_EXAMPLE,
            ("example (", "every_axis ("),
            ("float one = {1}, int64[1] last = {-1}", "float one = {1}"),
            ("v = ReduceMean(s, last)", "v = ReduceMean(s)"),
        ),
        changed(
            _RMS_NORM_EXAMPLE,
            ("example (", "another_value ("),
            ("float[B, 3, 8] x)", "float[B, 3, 8] x, float[B, 3, 8] z)"),
            ("s = Pow(x, two)", "s = Pow(z, two)"),
        ),
        changed(
            _RMS_NORM_EXAMPLE,
            ("example (", "two_over_the_root ("),
            ("float e = {1e-6}, float one = {1}", "float e = {1e-6}"),
            ("i = Div(one, r)", "i = Div(two, r)"),
        ),
    ),
)

FUSIONS = (LAYER_NORM, RMS_NORM)
