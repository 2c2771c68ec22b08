"""Conv with the bias, the residual and the activation that follow it."""

from __future__ import annotations

from infera_gpu.passes.engine import CPU, Fusion, Match, Replacement, either, infera, node
from infera_gpu.passes.epilogue import ALL, activated, activation_of
from infera_gpu.passes.weights import LINEAR, affine, is_per_channel

CONV = node("Conv", "x", "#w", "?#b", name="conv")

BIAS = Fusion(
    name="conv_bias",
    patterns=(node("Add", either(*LINEAR[:2]), "#c", commutes=True),),
    guard=is_per_channel,
    build=affine,
    reassociates=True,
    example="""
        example (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[1, 2, 1, 1] c = {1.5, -0.5},
         float[2] s = {1.5, 0.5}, float[2] b = {0.1, -3}, float[2] m = {0.3, 0.7}, float[2] v = {1.2, 0.4}> {
            t = Conv(x, w)
            u = Add(t, c)
            y = BatchNormalization(u, s, b, m, v)
        }""",
    near_misses=(
        """
        a_term_for_each_row (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[1, 1, 2, 1] c = {1.5, -0.5}> {
            t = Conv(x, w)
            y = Add(t, c)
        }""",
    ),
)
"""A bias that a node of its own adds, before a BatchNormalization that follows goes into the weights."""


def _with_residual(match: Match) -> Replacement:
    conv = match.nodes["conv"]
    inputs = (*conv.inputs, *[""] * (3 - len(conv.inputs)), match.values["r"])
    return Replacement(infera(match, "FusedConv", inputs, conv.attrs))


RESIDUAL = Fusion(
    name="conv_residual",
    patterns=(node(("Add", "Sum"), CONV, "r", commutes=True),),
    guard=lambda match: match.values["r"] not in match.graph.constants,
    build=_with_residual,
    example="""
        example (float[1, 1, 3, 3] x, float[1, 2, 2, 2] r) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = Add(r, t)
        }""",
    near_misses=(
        """
        the_convolution_twice (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = Add(t, t)
        }""",
        """
        sum_of_three (float[1, 1, 3, 3] x, float[1, 2, 2, 2] r) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = Sum(r, t, r)
        }""",
    ),
)

_PRODUCT = either(CONV, node("infera.FusedConv", "x", "#w", "?#b", "?r", name="conv"))


def _can_activate(match: Match) -> bool:
    return not match.nodes["conv"].attrs.get("activation", "") and activation_of(match, match.root) is not None


def _with_activation(match: Match) -> Replacement:
    conv, found = match.nodes["conv"], activation_of(match, match.root)
    assert found is not None
    name, params = found
    attrs = {**conv.attrs, "activation": name, **({"activation_params": params} if params else {})}
    return Replacement(infera(match, "FusedConv", conv.inputs, attrs))


SIMPLE = ("Relu", "LeakyRelu", "Clip")
"""What costs nothing beside a convolution, however it is computed."""

ACTIVATION = Fusion(
    name="conv_activation",
    patterns=activated(_PRODUCT, SIMPLE),
    guard=_can_activate,
    build=_with_activation,
    example="""
        example (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float low = {-1.0}, float high = {6.0}> {
            t = Conv(x, w)
            y = Clip(t, low, high)
        }""",
    near_misses=(
        """
        activated_already (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = infera.FusedConv <activation = "relu"> (x, w)
            y = LeakyRelu(t)
        }""",
        """
        bounds_are_inputs (float[1, 1, 3, 3] x, float low) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = Clip(t, low)
        }""",
    ),
)

GATE = Fusion(
    name="conv_gate",
    patterns=activated(_PRODUCT, [op for op in ALL if op not in SIMPLE]),
    guard=_can_activate,
    build=_with_activation,
    kinds=CPU,
    example="""
        example (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = infera.Gelu(t)
        }""",
    near_misses=(
        """
        activated_already (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = infera.FusedConv <activation = "relu"> (x, w)
            y = Sigmoid(t)
        }""",
        """
        sums_are_an_output (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y, float[1, 2, 2, 2] t)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = HardSigmoid(t)
        }""",
    ),
)

FUSIONS = (RESIDUAL, ACTIVATION, GATE)
