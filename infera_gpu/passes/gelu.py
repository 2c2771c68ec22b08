"""GELU as exporters write it: x/2 (1 + erf(x/√2)), and the tanh approximation."""

from __future__ import annotations

from infera_gpu.passes.engine import Fusion, Match, fused, node
from infera_gpu.passes.pattern import P

SQRT_HALF = 0.7071067811865476
TANH_SCALE = 0.7978845608028654  # √(2/π)


def _products(x: str, factor: P) -> tuple[P, ...]:
    """Every order in which x · ½ · factor is written."""
    return (
        node("Mul", node("Mul", x, factor, commutes=True), 0.5, commutes=True),
        node("Mul", node("Mul", x, 0.5, commutes=True), factor, commutes=True),
        node("Mul", x, node("Mul", factor, 0.5, commutes=True), commutes=True),
    )


def _erf_forms() -> tuple[P, ...]:
    scaled = (node("Div", "x", 2 * SQRT_HALF), node("Mul", "x", SQRT_HALF, commutes=True))
    factors = [node("Add", node("Erf", s), 1.0, commutes=True) for s in scaled]
    return tuple(p for f in factors for p in _products("x", f))


def _tanh_forms() -> tuple[P, ...]:
    cubes = (
        node("Pow", "x", 3.0),
        node("Mul", node("Mul", "x", "x"), "x", commutes=True),
    )
    inner = [node("Add", "x", node("Mul", cube, 0.044715, commutes=True), commutes=True) for cube in cubes]
    scaled = [node("Mul", i, TANH_SCALE, commutes=True) for i in inner]
    factors = [node("Add", node("Tanh", s), 1.0, commutes=True) for s in scaled]
    return tuple(p for f in factors for p in _products("x", f))


GELU = Fusion(
    name="gelu",
    patterns=_erf_forms(),
    guard=Match.keeps_shape,
    build=fused("Gelu", ("x",), approximate="none"),
    example="""
        example (float[3, 7] x) => (float[3, 7] y) <float r = {1.4142135}, float one = {1.0}, float half = {0.5}> {
            a = Div(x, r)
            b = Erf(a)
            c = Add(b, one)
            d = Mul(x, c)
            y = Mul(d, half)
        }""",
    near_misses=(
        """
        other_divisor (float[3, 7] x) => (float[3, 7] y) <float r = {1.5}, float one = {1.0}, float half = {0.5}> {
            a = Div(x, r)
            b = Erf(a)
            c = Add(b, one)
            d = Mul(x, c)
            y = Mul(d, half)
        }""",
        """
        numbers_give_a_scalar_an_axis (float x) => (float[1] y)
        <float[1] r = {1.4142135}, float[1] one = {1.0}, float[1] half = {0.5}> {
            a = Div(x, r)
            b = Erf(a)
            c = Add(b, one)
            d = Mul(x, c)
            y = Mul(d, half)
        }""",
        """
        erf_read_elsewhere (float[3, 7] x) => (float[3, 7] y, float[3, 7] b)
        <float r = {1.4142135}, float one = {1.0}, float half = {0.5}> {
            a = Div(x, r)
            b = Erf(a)
            c = Add(b, one)
            d = Mul(x, c)
            y = Mul(d, half)
        }""",
        """
        another_factor (float[3, 7] x, float[3, 7] z) => (float[3, 7] y)
        <float r = {1.4142135}, float one = {1.0}, float half = {0.5}> {
            a = Div(x, r)
            b = Erf(a)
            c = Add(b, one)
            d = Mul(z, c)
            y = Mul(d, half)
        }""",
    ),
)

GELU_TANH = Fusion(
    name="gelu_tanh",
    patterns=_tanh_forms(),
    guard=Match.keeps_shape,
    build=fused("Gelu", ("x",), approximate="tanh"),
    example="""
        example (float[3, 7] x) => (float[3, 7] y)
        <float three = {3.0}, float k = {0.044715}, float s = {0.7978845608}, float one = {1.0}, float half = {0.5}> {
            a = Pow(x, three)
            b = Mul(k, a)
            c = Add(x, b)
            d = Mul(c, s)
            e = Tanh(d)
            f = Add(one, e)
            g = Mul(half, x)
            y = Mul(g, f)
        }""",
    near_misses=(
        """
        square (float[3, 7] x) => (float[3, 7] y)
        <float two = {2.0}, float k = {0.044715}, float s = {0.7978845608}, float one = {1.0}, float half = {0.5}> {
            a = Pow(x, two)
            b = Mul(k, a)
            c = Add(x, b)
            d = Mul(c, s)
            e = Tanh(d)
            f = Add(one, e)
            g = Mul(half, x)
            y = Mul(g, f)
        }""",
    ),
)

FUSIONS = (GELU, GELU_TANH)
