"""What only a product reads is normalised by it: one launch less where a decoder takes a step of one sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, infera, named, node
from infera_gpu.passes.half import BFLOAT16, FLOAT16, FLOAT32
from infera_gpu.passes.products import DEFAULTS
from infera_gpu.spec import Dim

_NORM = node(("RMSNormalization", "SimplifiedLayerNormalization"), "x", "scale", name="norm")


def _attrs(match: Match) -> dict[str, Any]:
    return {**DEFAULTS, **match.root.attrs}


def _normalizes(match: Match, deep: Dim) -> bool:
    """The last axis alone is normalised, with a number for each of so many elements."""
    x, scale = match.spec("x"), match.spec("scale")
    return (
        x is not None
        and scale is not None
        and x.ranked
        and scale.ranked
        and int(match.nodes["norm"].attrs.get("axis", -1)) in (-1, x.ndim - 1)
        and x.dtype == scale.dtype
        and x.dtype in (FLOAT16, BFLOAT16, FLOAT32)
        and deep is not None
        and scale.shape == (deep,)
    )


def _normalizes_rows(match: Match) -> bool:
    """Rows are normalised, and a matrix of their type follows."""
    scale, weight = match.spec("scale"), match.spec("w")
    if scale is None or weight is None or weight.dtype != scale.dtype or not weight.ranked or weight.ndim != 2:
        return False
    return _normalizes(match, weight.shape[1 if _attrs(match)["transB"] else 0])


def _is_plain(match: Match) -> bool:
    """The product adds a row, or nothing. One that takes matrices alone goes on refusing others."""
    attrs, x = _attrs(match), match.spec("x")
    if attrs != {**DEFAULTS, "transB": attrs["transB"], "matrices": attrs["matrices"]} or not _normalizes_rows(match):
        return False
    if attrs["matrices"] and (x is None or x.ndim != 2):
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
        changed(
            _EXAMPLE,
            (
                "example (float[2, 3] x) => (float[2, 2] y)",
                "of_matrices_alone (float[1, 2, 3] x) => (float[1, 2, 2] y)",
            ),
            ("FusedMatMul (", "FusedMatMul <matrices = 1> ("),
        ),
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

_FEW_BITS_EXAMPLE = """
        example (float[2, 3] x) => (float[2, 2] y)
        <uint8[2, 1, 8] w = {16, 50, 84, 118, 152, 186, 220, 254, 1, 35, 69, 103, 137, 171, 205, 239},
         float[2, 1] f = {0.5, 0.25}, float[3] s = {-1, 7, 0.5}> {
            n = RMSNormalization <axis = 1> (x, s)
            y = com.microsoft.MatMulNBits <K = 3, N = 2, block_size = 16> (n, w, f)
        }"""

FEW_BITS = Fusion(
    name="normalized_few_bits",
    patterns=(
        node(
            ("com.microsoft.MatMulNBits", "infera.FusedMatMulNBits"),
            *(_NORM, "#w", "factors", "?zeros", "?groups", "?bias", "?residual"),
            name="mm",
        ),
    ),
    guard=lambda match: "groups" not in match.values and _normalizes(match, int(match.root.attrs["K"])),
    build=_build(
        "FusedMatMulNBits",
        ("x", "w", "factors", "zeros", "groups", "bias", "residual", "scale"),
        ("K", "N", "accuracy_level", "bits", "block_size", "weight_prepacked"),
    ),
    reassociates=True,
    kinds=frozenset({"triton"}),
    opset=23,
    example=_FEW_BITS_EXAMPLE,
    near_misses=(
        *_misses(_FEW_BITS_EXAMPLE, "RMSNormalization <axis = 1> (x, s)"),
        changed(
            _FEW_BITS_EXAMPLE,
            ("example (", "in_groups ("),
            ("float[3] s", "int32[3] g = {0, 0, 0}, float[3] s"),
            ("(n, w, f)", '(n, w, f, "", g)'),
        ),
    ),
)

FUSIONS = (NORMALIZED, GATED, FEW_BITS)
"""After products that share a factor are one."""
