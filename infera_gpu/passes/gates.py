"""Gates that exporters spell out, hard and soft: HardSigmoid, HardSwish, Sigmoid, Swish, Softplus, Mish."""

from __future__ import annotations

from infera_gpu.passes.activation import bounds, is_float, made
from infera_gpu.passes.engine import CPU, Fusion, Match, Replacement, either, infera, node
from infera_gpu.passes.pattern import Arg, P, is_close


def _clip_to(x: Arg, name: str) -> P:
    return node("Clip", x, "?#low", "?#high", name=name)


def _clips(match: Match, name: str, low: float, high: float) -> bool:
    return bounds(match.graph.constants, match.nodes[name]) == (low, high)


_RAMP = _clip_to(node("Add", "x", 3.0, commutes=True), "clip")
"""min(max(x + 3, 0), 6)"""


def _sixth(of: Arg) -> Arg:
    return either(node("Div", of, 6.0), node("Mul", of, 1 / 6, commutes=True))


HARD_SIGMOID = Fusion(
    name="hard_sigmoid",
    patterns=(
        node("Div", _RAMP, 6.0, name="sixth"),
        node("Mul", _RAMP, 1 / 6, commutes=True, name="sixth"),
        _clip_to(node("Add", node("Mul", "x", "%alpha", commutes=True), "%beta", commutes=True), "clip"),
    ),
    guard=lambda match: is_float(match) and _clips(match, "clip", 0, 6 if "sixth" in match.nodes else 1),
    build=made(
        "HardSigmoid",
        6,
        lambda match: (
            {"alpha": 1 / 6, "beta": 0.5}
            if "sixth" in match.nodes
            else {"alpha": match.number("alpha"), "beta": match.number("beta")}
        ),
    ),
    reassociates=True,
    example="""
        example (float[3, 7] x) => (float[3, 7] y) <float three = {3}, float low = {0}, float six = {6}> {
            a = Add(x, three)
            b = Clip(a, low, six)
            y = Div(b, six)
        }""",
    near_misses=(
        """
        clipped_at_five (float[3, 7] x) => (float[3, 7] y)
        <float three = {3}, float low = {0}, float five = {5}, float six = {6}> {
            a = Add(x, three)
            b = Clip(a, low, five)
            y = Div(b, six)
        }""",
        """
        bounds_are_inputs (float[3, 7] x, float low) => (float[3, 7] y) <float three = {3}, float six = {6}> {
            a = Add(x, three)
            b = Clip(a, low, six)
            y = Div(b, six)
        }""",
    ),
)


def _is_sixth_and_half(match: Match) -> bool:
    if "clip" in match.nodes:
        return is_float(match) and _clips(match, "clip", 0, 6)
    attrs = match.nodes["gate"].attrs
    alpha, beta = float(attrs.get("alpha", 0.2)), float(attrs.get("beta", 0.5))
    x = match.spec("x")
    return x is not None and is_float(match) and is_close(alpha, 1 / 6, x.dtype) and beta == 0.5


HARD_SWISH = Fusion(
    name="hard_swish",
    patterns=(
        node("Mul", "x", node("HardSigmoid", "x", name="gate"), commutes=True),
        node("Mul", "x", _sixth(_RAMP), commutes=True),
        node("Mul", _sixth("x"), _RAMP, commutes=True),
        node("Div", node("Mul", "x", _RAMP, commutes=True), 6.0),
        node("Mul", node("Mul", "x", _RAMP, commutes=True), 1 / 6, commutes=True),
    ),
    guard=_is_sixth_and_half,
    build=made("HardSwish", 14),
    reassociates=True,
    example="""
        example (float[3, 7] x) => (float[3, 7] y) <float three = {3}, float low = {0}, float six = {6}> {
            a = Add(x, three)
            b = Clip(a, low, six)
            c = Mul(x, b)
            y = Div(c, six)
        }""",
    near_misses=(
        """
        gate_of_another_value (float[3, 7] x, float[3, 7] z) => (float[3, 7] y)
        <float three = {3}, float low = {0}, float six = {6}> {
            a = Add(z, three)
            b = Clip(a, low, six)
            c = Mul(x, b)
            y = Div(c, six)
        }""",
        """
        fifth (float[3, 7] x) => (float[3, 7] y) { a = HardSigmoid <alpha = 0.2> (x)  y = Mul(a, x) }""",
    ),
)

_ONE_PLUS_EXP = node("Add", node("Exp", node("Neg", "x")), 1.0, commutes=True)

SIGMOID = Fusion(
    name="sigmoid",
    patterns=(node("Div", 1.0, _ONE_PLUS_EXP), node("Reciprocal", _ONE_PLUS_EXP)),
    guard=is_float,
    build=made("Sigmoid", 6),
    example="""
        example (float[3, 7] x) => (float[3, 7] y) <float one = {1}> {
            a = Neg(x)
            b = Exp(a)
            c = Add(one, b)
            y = Div(one, c)
        }""",
    near_misses=(
        """
        rising (float[3, 7] x) => (float[3, 7] y) <float one = {1}> {
            b = Exp(x)
            c = Add(one, b)
            y = Div(one, c)
        }""",
    ),
)

SWISH = Fusion(
    name="swish",
    patterns=(node("Mul", "x", node("Sigmoid", "x"), commutes=True), node("Div", "x", _ONE_PLUS_EXP)),
    guard=is_float,
    build=made("Swish", 24),
    reassociates=True,
    example="example (float[3, 7] x) => (float[3, 7] y) { a = Sigmoid(x)  y = Mul(a, x) }",
    near_misses=(
        "gate_of_another_value (float[3, 7] x, float[3, 7] z) => (float[3, 7] y) { a = Sigmoid(z)  y = Mul(a, x) }",
        "gate_is_an_output (float[3, 7] x) => (float[3, 7] y, float[3, 7] a) { a = Sigmoid(x)  y = Mul(a, x) }",
    ),
)


def _slope(match: Match) -> float:
    if "quick" in match.nodes:
        return float(match.nodes["quick"].attrs.get("alpha", 1.702))
    return match.number("alpha")


STEEP_SWISH = Fusion(
    name="steep_swish",
    patterns=(
        node("Mul", "x", node("Sigmoid", node("Mul", "x", "%alpha", commutes=True)), commutes=True),
        node("com.microsoft.QuickGelu", "x", name="quick"),
    ),
    guard=is_float,
    build=made("Swish", 24, lambda match: {"alpha": _slope(match)}),
    kinds=CPU,
    reassociates=True,
    example="""
        example (float[3, 7] x) => (float[3, 7] y) <float k = {1.702}> {
            a = Mul(x, k)
            b = Sigmoid(a)
            y = Mul(b, x)
        }""",
    near_misses=(
        """
        gate_adds_an_axis (float[7] x) => (float[1, 7] y) <float[1, 1] k = {1.7}> {
            a = Mul(x, k)
            b = Sigmoid(a)
            y = Mul(b, x)
        }""",
        """
        steepness_is_an_input (float[3, 7] x, float k) => (float[3, 7] y) {
            a = Mul(x, k)
            b = Sigmoid(a)
            y = Mul(b, x)
        }""",
    ),
)


SOFTPLUS = Fusion(
    name="softplus",
    patterns=(node("Log", node("Add", node("Exp", "x"), 1.0, commutes=True)),),
    guard=is_float,
    build=made("Softplus", 1),
    reassociates=True,
    example="""
        example (float[3, 7] x) => (float[3, 7] y) <float one = {1}> {
            a = Exp(x)
            b = Add(a, one)
            y = Log(b)
        }""",
    near_misses=(
        """
        two (float[3, 7] x) => (float[3, 7] y) <float two = {2}> {
            a = Exp(x)
            b = Add(a, two)
            y = Log(b)
        }""",
    ),
)

MISH = Fusion(
    name="mish",
    patterns=(node("Mul", "x", node("Tanh", node("Softplus", "x")), commutes=True),),
    guard=is_float,
    build=made("Mish", 18),
    kinds=CPU,
    reassociates=True,
    example="example (float[3, 7] x) => (float[3, 7] y) { a = Softplus(x)  b = Tanh(a)  y = Mul(x, b) }",
    near_misses=(
        "sigmoid (float[3, 7] x) => (float[3, 7] y) { a = Softplus(x)  b = Sigmoid(a)  y = Mul(x, b) }",
        """
        another_value (float[3, 7] x, float[3, 7] z) => (float[3, 7] y) {
            a = Softplus(z)
            b = Tanh(a)
            y = Mul(x, b)
        }""",
    ),
)

# ---- com.microsoft


def _gelu(match: Match) -> Replacement:
    approximate = "tanh" if match.root.op == "FastGelu" else "none"
    return Replacement(infera(match, "Gelu", (match.values["x"],), {"approximate": approximate}))


MS_GELU = Fusion(
    name="ms_gelu",
    patterns=(node(("com.microsoft.Gelu", "com.microsoft.FastGelu"), "x"),),
    build=_gelu,
    example="example (float[3, 7] x) => (float[3, 7] y) { y = com.microsoft.FastGelu(x) }",
    near_misses=("with_a_bias (float[3, 7] x, float[7] b) => (float[3, 7] y) { y = com.microsoft.FastGelu(x, b) }",),
)

FUSIONS = (SIGMOID, SOFTPLUS, HARD_SWISH, HARD_SIGMOID, SWISH, STEEP_SWISH, MISH, MS_GELU)
