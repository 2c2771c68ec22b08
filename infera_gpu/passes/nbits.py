"""Products with weights of few bits, and what is added to them, in one node."""

from __future__ import annotations

from dataclasses import replace

from infera_gpu.graph import made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, infera, node

TRITON = frozenset({"triton"})
PRODUCT = node("com.microsoft.MatMulNBits", "a", "#w", "s", "?z", "?g", "?b", name="mm")
BIAS_INPUT, RESIDUAL_INPUT = 5, 6


def _with(match: Match, i: int, value: str) -> tuple[str, ...]:
    """The product's inputs with this one as input i, the last."""
    inner = match.nodes["mm"]
    return (*inner.inputs[:i], *[""] * (i - len(inner.inputs)), value)


def _is_row(match: Match) -> bool:
    """One value a column, with no more axes than the product has."""
    bias, a = match.constant("c"), match.spec("a")
    columns = int(match.nodes["mm"].attrs["N"])
    return (
        a is not None
        and "b" not in match.values
        and bias.shape[-1:] == (bias.size,) == (columns,)
        and bias.ndim <= (a.ndim if a.ranked else 1)
        and bias.dtype == a.dtype
    )


def _with_bias(match: Match) -> Replacement:
    out = match.root.outputs[0]
    bias = made_name(out, "bias")
    made = replace(
        match.nodes["mm"], inputs=_with(match, BIAS_INPUT, bias), outputs=(out,), name=match.root.name or out
    )
    return Replacement(made, {bias: match.constant("c").reshape(-1)})


def _with_residual(match: Match) -> Replacement:
    inner, residual = match.nodes["mm"], match.values["r"]
    return Replacement(infera(match, "FusedMatMulNBits", _with(match, RESIDUAL_INPUT, residual), inner.attrs))


_WEIGHT = "uint8[2, 1, 8] w = {16, 50, 84, 118, 152, 186, 220, 254, 1, 35, 69, 103, 137, 171, 205, 239}"
_BIASED = f"""
        example (float[2, 3] a) => (float[2, 2] y)
        <{_WEIGHT}, float[2, 1] s = {{0.5, 0.25}}, float[1, 2] c = {{0.5, -1}}> {{
            t = com.microsoft.MatMulNBits <K = 3, N = 2, block_size = 16> (a, w, s)
            y = Add(c, t)
        }}"""

BIAS = Fusion(
    name="few_bits_bias",
    patterns=(node("Add", PRODUCT, "#c", commutes=True),),
    guard=_is_row,
    build=_with_bias,
    kinds=TRITON,
    example=_BIASED,
    near_misses=(
        changed(_BIASED, ("example (", "of_one_number ("), ("float[1, 2] c = {0.5, -1}", "float[1] c = {0.5}")),
        changed(_BIASED, ("example (", "a_column ("), ("float[1, 2] c", "float[2, 1] c")),
        changed(
            _BIASED,
            ("example (", "with_more_axes ("),
            ("float[1, 2] c", "float[1, 1, 2] c"),
            ("=> (float[2, 2] y)", "=> (float[1, 2, 2] y)"),
        ),
        changed(
            _BIASED,
            ("example (", "biased_already ("),
            ("float[1, 2] c = {0.5, -1}", "float[2] c = {0.5, -1}"),
            ("(a, w, s)", '(a, w, s, "", "", c)'),
        ),
        changed(
            _BIASED,
            ("example (", "product_is_an_output ("),
            ("=> (float[2, 2] y)", "=> (float[2, 2] y, float[2, 2] t)"),
        ),
    ),
)

_ADDED = f"""
        example (float[2, 3] a, float[2, 2] r) => (float[2, 2] y) <{_WEIGHT}, float[2, 1] s = {{0.5, 0.25}}> {{
            t = com.microsoft.MatMulNBits <K = 3, N = 2, block_size = 16> (a, w, s)
            y = Add(r, t)
        }}"""

RESIDUAL = Fusion(
    name="few_bits_residual",
    patterns=(node("Add", PRODUCT, "r", commutes=True),),
    guard=lambda match: match.values["r"] not in match.graph.constants,
    build=_with_residual,
    kinds=TRITON,
    example=_ADDED,
    near_misses=(
        changed(_ADDED, ("example (", "the_product_twice ("), ("Add(r, t)", "Add(t, t)")),
        changed(_ADDED, ("example (", "multiplied ("), ("Add(r, t)", "Mul(r, t)")),
        changed(
            _ADDED, ("example (", "product_is_an_output ("), ("=> (float[2, 2] y)", "=> (float[2, 2] y, float[2, 2] t)")
        ),
    ),
)

FUSIONS = (BIAS, RESIDUAL)
