"""Llama's gated feed-forward: an activated product times another of the same value is one node."""

from __future__ import annotations

from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, infera, node
from infera_gpu.passes.half import BFLOAT16, FLOAT16, FLOAT32
from infera_gpu.passes.products import DEFAULTS


def _is_gated(match: Match) -> bool:
    """One product is activated, and otherwise they are alike and plain, of two matrices of one shape and type."""
    gate, up = ({**DEFAULTS, **match.nodes[name].attrs} for name in ("gate", "up"))
    plain = {**DEFAULTS, "transB": up["transB"]}
    weight = match.spec("wg")
    return (
        gate["activation"] != ""
        and {**gate, "activation": ""} == up == plain
        and weight is not None
        and weight == match.spec("wu")
        and weight.ranked
        and weight.ndim == 2
        and None not in weight.shape
        and weight.dtype in (FLOAT16, BFLOAT16, FLOAT32)
    )


def _gated(match: Match) -> Replacement:
    attrs = {name: match.nodes["gate"].attrs.get(name, DEFAULTS[name]) for name in ("activation", "transB")}
    return Replacement(infera(match, "GatedMatMul", tuple(match.values[name] for name in ("x", "wg", "wu")), attrs))


_EXAMPLE = """
        example (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] u = {1, 2, 3, 4, 5, 6}, float[3, 2] v = {-1, 7, 0.5, 4, -2, 8}> {
            g = infera.FusedMatMul <activation = "silu"> (x, u)
            p = MatMul(x, v)
            y = Mul(p, g)
        }"""

GATED = Fusion(
    name="gated_products",
    patterns=(
        node(
            "Mul",
            node("infera.FusedMatMul", "x", "wg", name="gate"),
            node(("MatMul", "infera.FusedMatMul"), "x", "wu", name="up"),
            commutes=True,
        ),
    ),
    guard=_is_gated,
    build=_gated,
    reassociates=True,
    kinds=frozenset({"triton"}),
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE, ("example (float[2, 3] x", "of_two_values (float[2, 3] x, float[2, 3] z"), ("(x, v)", "(z, v)")
        ),
        changed(_EXAMPLE, ("example (", "scaled ("), ('"silu"', '"silu", alpha = 0.5')),
        changed(_EXAMPLE, ("example (", "not_activated ("), ('activation = "silu"', "alpha = 1.0")),
        changed(
            _EXAMPLE, ("example (", "with_a_bias ("), ("(x, u)", "(x, u, b)"), ("8}>", "8}, float[2] b = {0.5, -1}>")
        ),
        changed(_EXAMPLE, ("example (", "added ("), ("Mul(p, g)", "Add(p, g)")),
        changed(_EXAMPLE, ("=> (float[2, 2] y)", "=> (float[2, 2] y, float[2, 2] g)"), ("example (", "output (")),
        changed(
            _EXAMPLE,
            ("example (", "both_activated ("),
            ("MatMul(x, v)", 'infera.FusedMatMul <activation = "relu"> (x, v)'),
        ),
        changed(
            _EXAMPLE,
            ("example (", "of_one_column ("),
            ("float[3, 2] v = {-1, 7, 0.5, 4, -2, 8}", "float[3, 1] v = {-1, 7, 0.5}"),
        ),
        changed(
            _EXAMPLE,
            ("example (float[2, 3] x", "many_matrices (float[2, 3] x"),
            ("float[3, 2] u", "float[1, 3, 2] u"),
            ("float[3, 2] v", "float[1, 3, 2] v"),
            ("=> (float[2, 2] y)", "=> (float[1, 2, 2] y)"),
        ),
        """
        transposed_in_one (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] u = {1, 2, 3, 4}, float[2, 2] v = {-1, 7, 0.5, 4}> {
            g = infera.FusedMatMul <activation = "silu", transB = 1> (x, u)
            p = MatMul(x, v)
            y = Mul(p, g)
        }""",
        """
        of_doubles (double[2, 3] x) => (double[2, 2] y)
        <double[3, 2] u = {1, 2, 3, 4, 5, 6}, double[3, 2] v = {-1, 7, 0.5, 4, -2, 8}> {
            g = infera.FusedMatMul <activation = "relu"> (x, u)
            p = MatMul(x, v)
            y = Mul(p, g)
        }""",
    ),
)

FUSIONS = (GATED,)
"""After those that give a product its activation, and those that move what is read before it."""
