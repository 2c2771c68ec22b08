"""The bias that follows a quantised product is part of it, once constants are folded."""

from __future__ import annotations

import numpy as np

from infera_gpu.passes.engine import Fusion, Match, Replacement, infera, node
from infera_gpu.passes.quant import integer_product


def _is_row(match: Match) -> bool:
    bias = match.constant("bias")
    return bias.dtype == np.float32 and bias.shape == match.constant("b").shape[1:]


def _with_bias(match: Match) -> Replacement:
    inner = match.nodes["product"]
    inputs = (*inner.inputs, *[""] * (5 - len(inner.inputs)), match.values["bias"])
    return Replacement(infera(match, "NarrowMatMul", inputs, inner.attrs))


BIAS = Fusion(
    name="narrow_matmul_bias",
    patterns=(
        node("Add", node("infera.NarrowMatMul", "a", "#b", "#s", "?#z", "?t", name="product"), "#bias", commutes=True),
    ),
    guard=_is_row,
    build=_with_bias,
    example="""
        example (float[2, 3] a) => (float[2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float s = {0.5}, float[2] bias = {0.5, -1}> {
            t = infera.NarrowMatMul(a, b, s)
            y = Add(bias, t)
        }""",
    near_misses=(
        """
        bias_adds_an_axis (float[2, 3] a) => (float[1, 2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float s = {0.5}, float[1, 1, 2] bias = {0.5, -1}> {
            t = infera.NarrowMatMul(a, b, s)
            y = Add(bias, t)
        }""",
        """
        two_biases (float[2, 3] a) => (float[2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float s = {0.5}, float[2] bias = {0.5, -1}> {
            t = infera.NarrowMatMul(a, b, s, , , bias)
            y = Add(bias, t)
        }""",
    ),
)


def _takes_bias(match: Match) -> bool:
    return len(match.nodes["product"].inputs) < 7 and _is_row(match)


def _biased(match: Match) -> Replacement:
    inner = match.nodes["product"].inputs
    return integer_product(match, (*inner, *[""] * (6 - len(inner)), match.values["bias"]), {})


INTEGER_BIAS = Fusion(
    name="integer_matmul_bias",
    patterns=(
        node(
            "Add",
            node("com.microsoft.MatMulIntegerToFloat", "a", "#b", "s", "t", "?z", "?p", name="product"),
            "#bias",
            commutes=True,
        ),
    ),
    guard=_takes_bias,
    build=_biased,
    example="""
        example (uint8[2, 3] a) => (float[2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float s = {0.5}, float[2] bias = {0.5, -1}> {
            t = com.microsoft.MatMulIntegerToFloat(a, b, s, s)
            y = Add(bias, t)
        }""",
    near_misses=(
        """
        bias_adds_an_axis (uint8[2, 3] a) => (float[1, 2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float s = {0.5}, float[1, 1, 2] bias = {0.5, -1}> {
            t = com.microsoft.MatMulIntegerToFloat(a, b, s, s)
            y = Add(bias, t)
        }""",
        """
        two_biases (uint8[2, 3] a) => (float[2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float s = {0.5}, float[2] bias = {0.5, -1}> {
            t = com.microsoft.MatMulIntegerToFloat(a, b, s, s, , , bias)
            y = Add(bias, t)
        }""",
    ),
)

FUSIONS = (BIAS, INTEGER_BIAS)
