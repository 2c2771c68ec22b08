"""Heads of keys and values that serve several of queries need no copies (grouped-query attention)."""

from __future__ import annotations

from infera_gpu.passes.attention import INPUTS, OPERANDS
from infera_gpu.passes.engine import CPU_AND_TRITON, Fusion, Match, Replacement, infera, node
from infera_gpu.passes.pattern import P

_SHAPES = ("wide_k", "flat_k", "wide_v", "flat_v")


def _repeated(x: str) -> P:
    beside = node("Unsqueeze", x, f"?#axes_{x}", name=f"beside_{x}")
    return node("Reshape", node("Expand", beside, f"wide_{x}"), f"flat_{x}")


def _are_heads(match: Match) -> bool:
    """Copies lie beside each head, and the last two axes of keys are swapped once in all."""
    if any(match.axes(f"beside_{x}") != (2,) for x in "kv"):
        return False
    swaps = bool(match.nodes["attention"].attrs.get("swap_keys", 0))
    if "swap" not in match.nodes:
        return swaps
    return not swaps and tuple(match.nodes["swap"].attrs.get("perm", ())) == (0, 1, 3, 2)


def _grouped(match: Match) -> Replacement:
    values = {**match.values, "kt": match.values["k"]}
    inputs = tuple(values.get(name, "") for name in (*INPUTS, *_SHAPES))
    attrs = {**match.nodes["attention"].attrs, "swap_keys": 1, "repeated": 1}
    return Replacement(infera(match, "Attention", inputs, attrs))


_REST = (_repeated("v"), *OPERANDS[3:])

REPEATED = Fusion(
    name="attention_repeated_heads",
    patterns=(
        node("infera.Attention", "q", node("Transpose", _repeated("k"), name="swap"), *_REST, name="attention"),
        node("infera.Attention", "q", _repeated("k"), *_REST, name="attention"),
    ),
    guard=_are_heads,
    build=_grouped,
    kinds=CPU_AND_TRITON,
    example="""
        example (float[2, 6, 4, 5] q, float[2, 2, 7, 5] k, float[2, 2, 7, 5] v, float[2, 1, 4, 7] m)
            => (float[2, 4, 6, 5] y)
        <int64[1] two = {2}, int64[5] wide = {2, 2, 3, 7, 5}, int64[4] flat = {2, 6, -1, 5}> {
            a = Unsqueeze(k, two)
            b = Expand(a, wide)
            c = Reshape(b, flat)
            d = Transpose <perm = [0, 1, 3, 2]> (c)
            e = Unsqueeze(v, two)
            f = Expand(e, wide)
            g = Reshape(f, flat)
            y = infera.Attention <scale = 0.5, heads_last = 1> (q, d, g, m)
        }""",
    near_misses=(
        """
        copies_of_all_heads (float[2, 6, 4, 5] q, float[2, 2, 7, 5] k, float[2, 2, 7, 5] v) => (float[2, 6, 4, 5] y)
        <int64[1] one = {1}, int64[5] wide = {2, 3, 2, 7, 5}, int64[4] flat = {2, 6, 7, 5}> {
            a = Unsqueeze(k, one)
            b = Expand(a, wide)
            c = Reshape(b, flat)
            d = Transpose <perm = [0, 1, 3, 2]> (c)
            e = Unsqueeze(v, one)
            f = Expand(e, wide)
            g = Reshape(f, flat)
            y = infera.Attention(q, d, g)
        }""",
        """
        keys_are_an_output (float[2, 6, 4, 5] q, float[2, 2, 7, 5] k, float[2, 2, 7, 5] v)
            => (float[2, 6, 4, 5] y, float[2, 6, 7, 5] c)
        <int64[1] two = {2}, int64[5] wide = {2, 2, 3, 7, 5}, int64[4] flat = {2, 6, 7, 5}> {
            a = Unsqueeze(k, two)
            b = Expand(a, wide)
            c = Reshape(b, flat)
            d = Transpose <perm = [0, 1, 3, 2]> (c)
            e = Unsqueeze(v, two)
            f = Expand(e, wide)
            g = Reshape(f, flat)
            y = infera.Attention(q, d, g)
        }""",
        """
        not_swapped (float[2, 6, 7, 7] q, float[2, 2, 7, 7] k, float[2, 2, 7, 7] v) => (float[2, 6, 7, 7] y)
        <int64[1] two = {2}, int64[5] wide = {2, 2, 3, 7, 7}, int64[4] flat = {2, 6, 7, 7}> {
            a = Unsqueeze(k, two)
            b = Expand(a, wide)
            c = Reshape(b, flat)
            e = Unsqueeze(v, two)
            f = Expand(e, wide)
            g = Reshape(f, flat)
            y = infera.Attention(q, c, g)
        }""",
    ),
)

FUSIONS = (REPEATED,)
