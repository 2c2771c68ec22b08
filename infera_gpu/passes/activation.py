"""Activations that exporters spell out: bounds, and slopes below zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import CPU, Fusion, Match, Replacement, changed, node, standard


def bounds(constants: Mapping[str, HostArray], clip: Node) -> tuple[float, float] | None:
    """The bounds of a Clip of floats, from its attributes or its constant inputs; None where they are not known."""
    limits = []
    for i, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), 1):
        if len(clip.inputs) > i and clip.inputs[i]:
            constant = constants.get(clip.inputs[i])
            if constant is None or constant.size != 1 or constant.dtype.kind != "f":
                return None
            limits.append(float(constant.reshape(-1)[0]))
        else:
            limits.append(float(clip.attrs.get(name, default)))
    return limits[0], limits[1]


def is_float(match: Match, name: str = "x") -> bool:
    """Whether a value is known to hold floats, and the numbers of the match add no axis to it."""
    spec = match.spec(name)
    return spec is not None and spec.dtype.kind == "f" and match.keeps_shape(name)


def made(
    op: str, since: int, attrs: Callable[[Match], Mapping[str, Any]] = lambda match: {}
) -> Callable[[Match], Replacement]:
    """A `build`: the standard operator, of version `since` in older models, over x."""
    return lambda match: Replacement(standard(match, op, since, (match.values["x"],), attrs(match)))


# ---- bounds


def _clipped(match: Match, low: float, high: float) -> Replacement:
    """Clip between two numbers, as the model's opset has it."""
    x, root = match.values["x"], match.root
    if match.opset() < 11:
        return Replacement(standard(match, "Clip", 6, (x,), {"min": low, "max": high}))
    spec = match.spec("x")
    assert spec is not None
    limits: dict[str, HostArray] = {
        made_name(root.outputs[0], name): np.array(value, spec.dtype) for name, value in (("low", low), ("high", high))
    }
    return Replacement(standard(match, "Clip", 11, (x, *limits), {}), limits)


def _between(match: Match) -> Replacement:
    return _clipped(match, match.number("low"), match.number("high"))


CLIP = Fusion(
    name="clip",
    patterns=(
        node("Min", node("Max", "x", "%low", commutes=True), "%high", commutes=True),
        node("Max", node("Min", "x", "%high", commutes=True), "%low", commutes=True),
    ),
    guard=lambda match: is_float(match) and match.number("low") <= match.number("high"),
    build=_between,
    example="""
        example (float[3, 7] x) => (float[3, 7] y) <float low = {-0.5}, float[1] high = {1.25}> {
            a = Max(low, x)
            y = Min(a, high)
        }""",
    near_misses=(
        """
        bounds_cross (float[3, 7] x) => (float[3, 7] y) <float low = {0.5}, float high = {0.25}> {
            a = Max(low, x)
            y = Min(a, high)
        }""",
        """
        bound_adds_an_axis (float[7] x) => (float[1, 7] y) <float low = {-0.5}, float[1, 1] high = {1.25}> {
            a = Max(low, x)
            y = Min(a, high)
        }""",
        """
        integers (int32[3, 7] x) => (int32[3, 7] y) <int32 low = {-1}, int32 high = {1}> {
            a = Max(low, x)
            y = Min(a, high)
        }""",
    ),
)

CLIP_OF_RELU = Fusion(
    name="clip_of_relu",
    patterns=(
        node("Min", node("Relu", "x"), "%high", commutes=True),
        node("Clip", node("Relu", "x"), "?#low", "?#most", name="clip"),
    ),
    guard=lambda match: is_float(match) and _upper(match) >= 0,
    build=lambda match: _clipped(match, max(0.0, _lower(match)), _upper(match)),
    example="""
        example (float[3, 7] x) => (float[3, 7] y) <float six = {6}> {
            a = Relu(x)
            y = Min(six, a)
        }""",
    near_misses=(
        """
        below_zero (float[3, 7] x) => (float[3, 7] y) <float high = {-6}> {
            a = Relu(x)
            y = Min(high, a)
        }""",
        """
        relu_read_elsewhere (float[3, 7] x) => (float[3, 7] y, float[3, 7] z) <float six = {6}> {
            a = Relu(x)
            y = Min(six, a)
            z = Neg(a)
        }""",
    ),
)


def _known(match: Match) -> tuple[float, float]:
    """The bounds that follow the Relu. Raises TypeError where they are not known."""
    if "clip" not in match.nodes:
        return -np.inf, match.number("high")
    found = bounds(match.graph.constants, match.nodes["clip"])
    if found is None or found[0] > found[1]:
        raise TypeError
    return found


def _lower(match: Match) -> float:
    return _known(match)[0]


def _upper(match: Match) -> float:
    return _known(match)[1]


RELU = Fusion(
    name="relu",
    patterns=(node("Max", "x", 0.0, commutes=True),),
    guard=is_float,
    build=made("Relu", 6),
    example="example (float[3, 7] x) => (float[3, 7] y) <float z = {0}> { y = Max(z, x) }",
    near_misses=(
        "integers (int32[3, 7] x) => (int32[3, 7] y) <int32 z = {0}> { y = Max(z, x) }",
        "zero_of_64_bits (float[3, 7] x) => (float[3, 7] y) <double z = {0}> { y = Max(z, x) }",
        "another_number (float[3, 7] x) => (float[3, 7] y) <float z = {0.1}> { y = Max(z, x) }",
    ),
)


# ---- slopes below zero

_LEAN = node("Mul", "x", "%alpha", commutes=True)

LEAKY_RELU = Fusion(
    name="leaky_relu",
    patterns=(
        node("Max", "x", _LEAN, commutes=True, name="larger"),
        node("Where", node(("Less", "LessOrEqual"), "x", 0.0), _LEAN, "x"),
        node("Where", node(("Greater", "GreaterOrEqual"), "x", 0.0), "x", _LEAN),
    ),
    guard=lambda match: is_float(match) and ("larger" not in match.nodes or 0 < match.number("alpha") <= 1),
    build=made("LeakyRelu", 6, lambda match: {"alpha": match.number("alpha")}),
    example="""
        example (float[3, 7] x) => (float[3, 7] y) <float k = {0.1}> { a = Mul(x, k)  y = Max(a, x) }""",
    near_misses=(
        """
        no_number_at_infinity (float[3, 7] x) => (float[3, 7] y) <float k = {0}> { a = Mul(x, k)  y = Max(a, x) }""",
        """
        steeper (float[3, 7] x) => (float[3, 7] y) <float k = {1.1}> { a = Mul(x, k)  y = Max(a, x) }""",
        """
        sides_swapped (float[3, 7] x) => (float[3, 7] y) <float k = {0.1}, float z = {0}> {
            a = Mul(x, k)
            b = Less(x, z)
            y = Where(b, x, a)
        }""",
        """
        split_at_one (float[3, 7] x) => (float[3, 7] y) <float k = {0.1}, float z = {1}> {
            a = Mul(x, k)
            b = Less(x, z)
            y = Where(b, a, x)
        }""",
    ),
)

_BELOW = node("Relu", node("Neg", "x"))
"""-min(x, 0)"""


def _slopes(match: Match) -> HostArray:
    """What x is multiplied by below zero."""
    slope = match.constant("slope")
    return -slope if "rising" in match.nodes else slope


def _has_slopes(match: Match) -> bool:
    """The slopes broadcast to x, as far as its shape is known, and add no axis."""
    x, slope = match.spec("x"), match.constant("slope")
    if x is None or not x.ranked or x.dtype != slope.dtype or x.dtype.kind != "f" or slope.ndim > x.ndim:
        return False
    return all(s in (1, d) for s, d in zip(slope.shape[::-1], x.shape[::-1], strict=False))


def _prelu(match: Match) -> Replacement:
    name = made_name(match.root.outputs[0], "slope")
    return Replacement(standard(match, "PRelu", 7, (match.values["x"], name), {}), {name: _slopes(match)})


_PRELU_EXAMPLE = """
        example (float[B, 3, 5] x) => (float[B, 3, 5] y) <float[3, 1] k = {-0.1, -0.2, -0.3}> {
            a = Relu(x)
            b = Neg(x)
            c = Relu(b)
            d = Mul(k, c)
            y = Add(a, d)
        }"""

PRELU = Fusion(
    name="prelu",
    patterns=(
        node("Add", node("Relu", "x"), node("Mul", _BELOW, "#slope", commutes=True, name="rising"), commutes=True),
        node("Sub", node("Relu", "x"), node("Mul", _BELOW, "#slope", commutes=True)),
        node("Add", node("Relu", "x"), node("Mul", node("Neg", _BELOW), "#slope", commutes=True), commutes=True),
    ),
    guard=_has_slopes,
    build=_prelu,
    kinds=CPU,
    example=_PRELU_EXAMPLE,
    near_misses=(
        changed(_PRELU_EXAMPLE, ("example (", "slopes_widen ("), ("float[B, 3, 5] x)", "float[B, 1, 5] x)")),
        """
        another_value (float[B, 3, 5] x, float[B, 3, 5] z) => (float[B, 3, 5] y) <float k = {-0.1}> {
            a = Relu(x)
            b = Neg(z)
            c = Relu(b)
            d = Mul(k, c)
            y = Add(a, d)
        }""",
    ),
)

FUSIONS = (CLIP, CLIP_OF_RELU, RELU, LEAKY_RELU, PRELU)
