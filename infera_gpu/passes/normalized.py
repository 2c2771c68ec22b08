"""What only a product reads is normalised by it: one launch less where a decoder takes a step of one sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, infera, named, node
from infera_gpu.passes.half import BFLOAT16, FLOAT16, FLOAT32
from infera_gpu.passes.products import DEFAULTS

_NORM = node(("RMSNormalization", "SimplifiedLayerNormalization"), "x", "scale", name="norm")


def _attrs(match: Match) -> dict[str, Any]:
    return {**DEFAULTS, **match.root.attrs}


def _normalizes_rows(match: Match) -> bool:
    """The last axis alone is normalised, with a number for each of its elements, and a matrix of their type follows."""
    x, scale, weight = (match.spec(name) for name in ("x", "scale", "w"))
    if x is None or scale is None or weight is None or not (x.ranked and weight.ranked and weight.ndim == 2):
        return False
    deep = weight.shape[1 if _attrs(match)["transB"] else 0]
    return (
        int(match.nodes["norm"].attrs.get("axis", -1)) in (-1, x.ndim - 1)
        and x.dtype == scale.dtype == weight.dtype
        and x.dtype in (FLOAT16, BFLOAT16, FLOAT32)
        and deep is not None
        and scale.ranked
        and scale.shape == (deep,)
    )


def _is_plain(match: Match) -> bool:
    """The product adds a row, or nothing."""
    attrs = _attrs(match)
    if attrs != {**DEFAULTS, "transB": attrs["transB"], "matrices": attrs["matrices"]} or not _normalizes_rows(match):
        return False
    if "bias" not in match.values:
        return True
    bias, weight = match.spec("bias"), match.spec("w")
    columns = None if weight is None else weight.shape[0 if attrs["transB"] else 1]
    return bias is not None and columns is not None and bias.ranked and bias.shape == (columns,)


def _build(op: str, inputs: tuple[str, ...], kept: tuple[str, ...]) -> Callable[[Match], Replacement]:
    """A node of the operator that keeps these attributes of the product."""

    def build(match: Match) -> Replacement:
        attrs = {name: match.root.attrs[name] for name in kept if name in match.root.attrs}
        attrs["epsilon"] = float(match.nodes["norm"].attrs.get("epsilon", 1e-5))
        return Replacement(infera(match, op, named(match, inputs), attrs))

    return build


_EXAMPLE = """
        example (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[3] s = {-1, 7, 0.5}, float[2] b = {3, -4}> {
            n = RMSNormalization <epsilon = 0.25> (x, s)
            y = infera.FusedMatMul (n, w, b)
        }"""
_GATED_EXAMPLE = """
        example (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] u = {1, 2, 3, 4, 5, 6}, float[3, 2] v = {-1, 7, 0.5, 4, -2, 8}, float[3] s = {-1, 7, 0.5}> {
            n = SimplifiedLayerNormalization (x, s)
            y = infera.GatedMatMul <activation = "gelu"> (n, u, v)
        }"""


def _misses(example: str, norm: str) -> tuple[str, ...]:
    """Of what both have, a norm."""
    return (
        changed(example, ("example (", "output ("), ("float[2, 2] y)", "float[2, 2] y, float[2, 3] n)")),
        changed(example, ("example (", "every_axis ("), (norm, "RMSNormalization <axis = 0> (x, s)")),
        changed(example, ("example (", "another_norm ("), (norm, "LayerNormalization (x, s)")),
        changed(example, ("example (", "one_number ("), ("float[3] s = {-1, 7, 0.5}", "float[1] s = {2}")),
    )


NORMALIZED = Fusion(
    name="normalized_products",
    patterns=(
        node(("MatMul", "infera.FusedMatMul"), _NORM, "w"),
        node("infera.FusedMatMul", _NORM, "w", "bias"),
    ),
    guard=_is_plain,
    build=_build("NormalizedMatMul", ("x", "w", "scale", "bias"), ("transB",)),
    reassociates=True,
    kinds=frozenset({"triton"}),
    opset=23,
    example=_EXAMPLE,
    near_misses=(
        *_misses(_EXAMPLE, "RMSNormalization <epsilon = 0.25> (x, s)"),
        changed(_EXAMPLE, ("example (", "activated ("), ("FusedMatMul (", 'FusedMatMul <activation = "relu"> (')),
        changed(_EXAMPLE, ("example (", "scaled ("), ("FusedMatMul (", "FusedMatMul <alpha = 0.5> (")),
        changed(_EXAMPLE, ("example (", "one_term ("), ("float[2] b = {3, -4}", "float[1] b = {3}")),
        changed(_EXAMPLE, ("example (", "with_a_residual ("), ("(n, w, b)", "(n, w, b, b)")),
        changed(
            _EXAMPLE,
            ("example (", "the_right_factor ("),
            ("float[3, 2] w", "float[2, 2] w"),
            ("{1, 2, 3, 4, 5, 6}", "{1, 2, 3, 4}"),
            ("(n, w, b)", "(w, n)"),
            ("=> (float[2, 2]", "=> (float[2, 3]"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "many_matrices ("),
            ("float[3, 2] w", "float[1, 3, 2] w"),
            ("=> (float[2, 2] y)", "=> (float[1, 2, 2] y)"),
        ),
        """
        of_doubles (double[2, 3] x) => (double[2, 2] y)
        <double[3, 2] w = {1, 2, 3, 4, 5, 6}, double[3] s = {-1, 7, 0.5}> {
            n = RMSNormalization (x, s)
            y = MatMul(n, w)
        }""",
    ),
)

GATED = Fusion(
    name="normalized_gated_products",
    patterns=(node("infera.GatedMatMul", _NORM, "w", "up"),),
    guard=_normalizes_rows,
    build=_build("GatedMatMul", ("x", "w", "up", "scale"), ("activation", "transB")),
    reassociates=True,
    kinds=frozenset({"triton"}),
    opset=23,
    example=_GATED_EXAMPLE,
    near_misses=_misses(_GATED_EXAMPLE, "SimplifiedLayerNormalization (x, s)"),
)

FUSIONS = (NORMALIZED, GATED)
"""After products that share a factor are one."""
