"""MatMul and Gemm with their bias, activation and residual in one node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.graph import made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, either, infera, node
from infera_gpu.passes.epilogue import activated, activation_of

ACTIVATIONS = {name: name for name in ("relu", "tanh", "sigmoid", "gelu", "gelu_tanh")} | {"swish": "silu"}
"""An epilogue's name -> FusedMatMul's."""

ROWS = node("MatMul", "a", "#w", name="mm")
PRODUCT = either(ROWS, node("infera.FusedMatMul", "a", "w", "?b", name="mm"))


def _is_row_bias(match: Match) -> bool:
    """One value a column, with as many axes before as the product has at most."""
    weight, bias = match.constant("w"), match.constant("b")
    columns = weight.shape[-2 if "mm" in match.nodes and match.nodes["mm"].attrs.get("transB", 0) else -1]
    row = bias.size == bias.shape[-1] == columns and bias.ndim <= (match.rank("a") or 1)
    return weight.ndim == 2 and row and bias.dtype == weight.dtype


def _takes_bias(match: Match) -> bool:
    """The product is one alone: without activation, and without factors that the bias is not multiplied by."""
    return not match.nodes["mm"].attrs.get("activation", "") and _is_row_bias(match)


def _with_bias(match: Match) -> Replacement:
    names = tuple(match.values[name] for name in ("a", "w", "b"))
    return Replacement(infera(match, "FusedMatMul", names, match.nodes["mm"].attrs))


BIAS = Fusion(
    name="matmul_bias",
    patterns=(node("Add", node(("MatMul", "infera.FusedMatMul"), "a", "#w", name="mm"), "#b", commutes=True),),
    guard=_takes_bias,
    build=_with_bias,
    example="""
        example (float[2, 3] a) => (float[2, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = MatMul(a, w)
            y = Add(b, t)
        }""",
    near_misses=(
        """
        product_is_an_output (float[2, 3] a) => (float[2, 2] y, float[2, 2] t)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = MatMul(a, w)
            y = Add(b, t)
        }""",
        """
        bias_adds_an_axis (float[2, 3] a) => (float[1, 2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[1, 1, 2] b = {0.5, -1}> {
            t = MatMul(a, w)
            y = Add(t, b)
        }""",
        """
        bias_a_column (float[2, 3] a) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2, 1] b = {0.5, -1}> {
            t = MatMul(a, w)
            y = Add(t, b)
        }""",
    ),
)


def _is_one_number(match: Match) -> bool:
    bias, weight = match.constant("b"), match.constant("w")
    return bias.size == 1 and bias.ndim <= 2 and bias.dtype == weight.dtype and _columns(match) > 1


def _columns(match: Match) -> int:
    """Of the weights of a Gemm, a matrix."""
    rows, columns = match.constant("w").shape
    return int(rows if match.nodes["gemm"].attrs.get("transB", 0) else columns)


def _with_row(match: Match) -> Replacement:
    gemm, name = match.nodes["gemm"], made_name(match.root.outputs[0], "bias")
    row = np.full(_columns(match), match.constant("b").reshape(-1)[0])
    return Replacement(replace(gemm, inputs=(*gemm.inputs[:2], name)), {name: row})


_GEMM_OF_NUMBER = """
        example (float[2, 3] a) => (float[2, 2] y) <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float b = {0.5}> {
            y = Gemm <transB = 1, beta = 2.0> (a, w, b)
        }"""

GEMM_OF_NUMBER = Fusion(
    name="gemm_of_one_number",
    patterns=(node("Gemm", "a", "#w", "#b", name="gemm"),),
    guard=_is_one_number,
    build=_with_row,
    example=_GEMM_OF_NUMBER,
    near_misses=(
        changed(_GEMM_OF_NUMBER, ("example (", "a_row ("), ("float b = {0.5}", "float[2] b = {0.5, 1}")),
        changed(_GEMM_OF_NUMBER, ("example (", "of_another_type ("), ("float b", "double b")),
        changed(_GEMM_OF_NUMBER, ("example (", "three_axes ("), ("float b", "float[1, 1, 1] b")),
        changed(_GEMM_OF_NUMBER, ("example (", "an_input ("), ("a)", "a, float b)"), (", float b = {0.5}", "")),
    ),
)
"""A bias that is one number is a row of it: what goes into weights has one a column."""


def _gelu_of_bias(match: Match) -> Replacement:
    attrs = {"activation": "gelu" if match.root.op == "BiasGelu" else "gelu_tanh"}
    return Replacement(infera(match, "FusedMatMul", tuple(match.values[n] for n in ("a", "w", "b")), attrs))


BIAS_GELU = Fusion(
    name="matmul_bias_gelu",
    patterns=(node(("com.microsoft.BiasGelu", "com.microsoft.FastGelu"), ROWS, "#b"),),
    guard=lambda match: match.constant("b").ndim == 1 and _is_row_bias(match),
    build=_gelu_of_bias,
    example="""
        example (float[2, 3] a) => (float[2, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = MatMul(a, w)
            y = com.microsoft.BiasGelu(t, b)
        }""",
    near_misses=(
        """
        bias_of_two_axes (float[2, 3] a) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[1, 2] b = {0.5, -1}> {
            t = MatMul(a, w)
            y = com.microsoft.BiasGelu(t, b)
        }""",
        """
        bias_is_an_input (float[2, 3] a, float[2] b) => (float[2, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            t = MatMul(a, w)
            y = com.microsoft.BiasGelu(t, b)
        }""",
        """
        product_is_an_output (float[2, 3] a) => (float[2, 2] y, float[2, 2] t)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = MatMul(a, w)
            y = com.microsoft.FastGelu(t, b)
        }""",
    ),
)


def _gemm(match: Match) -> bool:
    g = match.nodes["gemm"]
    matrices = match.rank("a") in (2, None) and match.constant("w").ndim == 2
    return float(g.attrs.get("beta", 1.0)) == 1.0 and matrices and _gemm_bias_is_row(match)


def _gemm_bias_is_row(match: Match) -> bool:
    if "b" not in match.values:
        return True
    bias = match.constant("b")
    return bias.ndim >= 1 and bias.size == bias.shape[-1] == _columns(match) and bias.ndim <= 2


def _from_gemm(match: Match) -> Replacement:
    """What is no matrix is refused as before, where only planning can tell."""
    g = match.nodes["gemm"]
    attrs = {k: v for k, v in g.attrs.items() if k in ("transA", "transB", "alpha")}
    if match.rank("a") is None:
        attrs["matrices"] = 1
    names = tuple(match.values[n] for n in ("a", "w", "b") if n in match.values)
    return Replacement(infera(match, "FusedMatMul", names, attrs))


GEMM = Fusion(
    name="gemm",
    patterns=(node("Gemm", "a", "#w", "?#b", name="gemm"),),
    guard=_gemm,
    build=_from_gemm,
    example="""
        example (float[2, 3] a) => (float[2, 2] y) <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            y = Gemm <transB = 1, alpha = 0.5> (a, w, b)
        }""",
    near_misses=(
        """
        scaled_bias (float[2, 3] a) => (float[2, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            y = Gemm <beta = 2.0> (a, w, b)
        }""",
        """
        no_matrix (float[3] a) => (float[2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            y = Gemm(a, w)
        }""",
        """
        full_bias (float[2, 3] a) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2, 2] b = {0.5, -1, 2, 3}> {
            y = Gemm(a, w, b)
        }""",
    ),
)


def _can_activate(match: Match) -> bool:
    """The product has no activation yet, and this is one that FusedMatMul knows, without parameters."""
    found = activation_of(match, match.root)
    return not match.nodes["mm"].attrs.get("activation", "") and found is not None and found[0] in ACTIVATIONS


def _with_activation(match: Match) -> Replacement:
    inner, found = match.nodes["mm"], activation_of(match, match.root)
    assert found is not None
    return Replacement(infera(match, "FusedMatMul", inner.inputs, {**inner.attrs, "activation": ACTIVATIONS[found[0]]}))


ACTIVATION = Fusion(
    name="matmul_activation",
    patterns=activated(PRODUCT),
    guard=_can_activate,
    build=_with_activation,
    example="""
        example (float[2, 3] a) => (float[2, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = infera.FusedMatMul(a, w, b)
            y = Relu(t)
        }""",
    near_misses=(
        """
        activated_already (float[2, 3] a) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = infera.FusedMatMul <activation = "tanh"> (a, w, b)
            y = Relu(t)
        }""",
        """
        residual_comes_after_the_activation (float[2, 3] a, float[2, 2] r) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = infera.FusedMatMul(a, w, b, r)
            y = Relu(t)
        }""",
    ),
)


def _with_residual(match: Match) -> Replacement:
    inner = match.nodes["mm"]
    inputs = (*inner.inputs, *[""] * (3 - len(inner.inputs)), match.values["r"])
    return Replacement(infera(match, "FusedMatMul", inputs, inner.attrs))


RESIDUAL = Fusion(
    name="matmul_residual",
    patterns=(node("Add", PRODUCT, "r", commutes=True),),
    guard=lambda match: match.values["r"] not in match.graph.constants,
    build=_with_residual,
    example="""
        example (float[2, 3] a, float[2, 2] r) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = infera.FusedMatMul(a, w, b)
            y = Add(r, t)
        }""",
    near_misses=(
        """
        the_product_twice (float[2, 3] a) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = infera.FusedMatMul(a, w, b)
            y = Add(t, t)
        }""",
        """
        two_residuals (float[2, 3] a, float[2, 2] r, float[2, 2] s) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}> {
            t = infera.FusedMatMul(a, w, b, s)
            y = Add(r, t)
        }""",
    ),
)

FUSIONS = (BIAS_GELU, GEMM, ACTIVATION, RESIDUAL)
