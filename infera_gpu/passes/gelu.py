"""GELU as exporters write it: x/2 (1 + erf(x/√2)), and the tanh approximation."""

from __future__ import annotations

from infera_gpu.passes.engine import Fusion, Match, changed, either, fused, node
from infera_gpu.passes.pattern import Arg, P

SQRT_HALF = 0.7071067811865476
TANH_SCALE = 0.7978845608028654  # √(2/π)
CUBIC = 0.044715


def _times(a: Arg, b: Arg) -> P:
    return node("Mul", a, b, commutes=True)


def _plus(a: Arg, b: Arg) -> P:
    return node("Add", a, b, commutes=True)


def _half(of: Arg) -> Arg:
    return either(_times(of, 0.5), node("Div", of, 2.0))


def _products(odd: P) -> tuple[P, ...]:
    """Every order in which x · ½ · (1 + odd) is written."""
    factor = _plus(odd, 1.0)
    product = _times("x", factor)
    return (
        _times("x", _plus(_half(odd), 0.5)),
        _times(product, 0.5),
        node("Div", product, 2.0),
        _times(_half("x"), factor),
        _times("x", _half(factor)),
    )


def _erf_forms() -> tuple[P, ...]:
    scaled = either(node("Div", "x", 2 * SQRT_HALF), _times("x", SQRT_HALF))
    return _products(node("Erf", scaled))


def _tanh_forms() -> tuple[P, ...]:
    square = either(_times("x", "x"), node("Pow", "x", 2.0))
    cube = either(node("Pow", "x", 3.0), _times("x", square))
    small = _times("x", CUBIC)
    cubic = either(_times(cube, CUBIC), _times(small, square), _times("x", _times("x", small)))
    slope = either(_plus(_times(square, CUBIC), 1.0), _plus(_times("x", small), 1.0))
    inner = either(
        _times(_plus("x", cubic), TANH_SCALE),
        _times(_times("x", TANH_SCALE), slope),
        _times(_times("x", slope), TANH_SCALE),
        _times("x", _times(slope, TANH_SCALE)),
    )
    return _products(node("Tanh", inner))


_GELU_EXAMPLE = """
        example (float[3, 7] x) => (float[3, 7] y) <float r = {1.4142135}, float one = {1.0}, float half = {0.5}> {
            a = Div(x, r)
            b = Erf(a)
            c = Add(b, one)
            d = Mul(x, c)
            y = Mul(d, half)
        }"""

GELU = Fusion(
    name="gelu",
    patterns=_erf_forms(),
    guard=Match.keeps_shape,
    build=fused("Gelu", ("x",), approximate="none"),
    reassociates=True,
    example=_GELU_EXAMPLE,
    near_misses=(
        changed(_GELU_EXAMPLE, ("example (", "other_divisor ("), ("float r = {1.4142135}", "float r = {1.5}")),
        """
        numbers_give_a_scalar_an_axis (float x) => (float[1] y)
        <float[1] r = {1.4142135}, float[1] one = {1.0}, float[1] half = {0.5}> {
            a = Div(x, r)
            b = Erf(a)
            c = Add(b, one)
            d = Mul(x, c)
            y = Mul(d, half)
        }""",
        changed(
            _GELU_EXAMPLE, ("example (", "erf_read_elsewhere ("), ("float[3, 7] y)", "float[3, 7] y, float[3, 7] b)")
        ),
        changed(
            _GELU_EXAMPLE,
            ("example (", "a_half_of_one_term ("),
            ("c = Add(b, one)", "h = Mul(b, half)  c = Add(h, one)"),
            ("d = Mul(x, c)", "y = Mul(x, c)"),
            ("            y = Mul(d, half)\n", ""),
        ),
        changed(
            _GELU_EXAMPLE,
            ("example (", "another_factor ("),
            ("float[3, 7] x)", "float[3, 7] x, float[3, 7] z)"),
            ("d = Mul(x, c)", "d = Mul(z, c)"),
        ),
    ),
)

_GELU_TANH_EXAMPLE = """
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
        }"""

GELU_TANH = Fusion(
    name="gelu_tanh",
    patterns=_tanh_forms(),
    guard=Match.keeps_shape,
    build=fused("Gelu", ("x",), approximate="tanh"),
    reassociates=True,
    example=_GELU_TANH_EXAMPLE,
    near_misses=(
        changed(
            _GELU_TANH_EXAMPLE,
            ("example (", "square ("),
            ("float three = {3.0}", "float two = {2.0}"),
            ("a = Pow(x, three)", "a = Pow(x, two)"),
        ),
    ),
)

FUSIONS = (GELU, GELU_TANH)
