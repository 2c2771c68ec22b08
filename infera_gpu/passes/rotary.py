"""Rotary position embedding as PyTorch's exporters write it, pairs half a head apart."""

from __future__ import annotations

from infera_gpu.passes.attention import rank_of
from infera_gpu.passes.engine import Fusion, Match, fused, node

_FAR = 2.0**63
_TURNED = node(
    "Concat",
    node("Neg", node("Slice", "x", "half", _FAR, "%axis", 1.0, name="second")),
    node("Slice", "x", 0.0, "half", "%axis_too", 1.0, name="first"),
    name="turned",
)


def _along_heads(match: Match) -> bool:
    """Whether it is the last axis that is cut in two and put together again."""
    rank = rank_of(match, "x")
    axes = (match.number("axis"), match.number("axis_too"), float(match.nodes["turned"].attrs["axis"]))
    return all(axis == -1 or (rank is not None and axis == rank - 1) for axis in axes)


HALVES = Fusion(
    name="rotate_halves",
    patterns=(
        node(
            "Add",
            node("Mul", "x", "cos", commutes=True),
            node("Mul", _TURNED, "sin", commutes=True),
            commutes=True,
        ),
    ),
    guard=_along_heads,
    build=fused("RotateHalves", ("x", "cos", "sin", "half")),
    kinds=frozenset({"cpu"}),
    example="""
        example (float[2, 3, 5, 8] x, float[2, 1, 5, 8] cos, float[2, 1, 5, 8] sin) => (float[2, 3, 5, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] far = {9223372036854775807}, int64[1] axis = {3},
         int64[1] one = {1}> {
            a = Slice(x, zero, half, axis, one)
            b = Slice(x, half, far, axis, one)
            c = Neg(b)
            d = Concat <axis = -1> (c, a)
            e = Mul(d, sin)
            f = Mul(cos, x)
            y = Add(f, e)
        }""",
    near_misses=(
        """
        halves_in_order (float[2, 3, 5, 8] x, float[2, 1, 5, 8] cos, float[2, 1, 5, 8] sin) => (float[2, 3, 5, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] far = {9223372036854775807}, int64[1] axis = {3},
         int64[1] one = {1}> {
            a = Slice(x, zero, half, axis, one)
            b = Slice(x, half, far, axis, one)
            c = Neg(b)
            d = Concat <axis = -1> (a, c)
            e = Mul(d, sin)
            f = Mul(cos, x)
            y = Add(f, e)
        }""",
        """
        cut_twice (float[2, 3, 5, 8] x, float[2, 1, 5, 8] cos, float[2, 1, 5, 8] sin) => (float[2, 3, 5, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] other = {3}, int64[1] far = {9223372036854775807},
         int64[1] axis = {3}, int64[1] one = {1}> {
            a = Slice(x, zero, half, axis, one)
            b = Slice(x, other, far, axis, one)
            c = Neg(b)
            d = Concat <axis = -1> (c, a)
            e = Mul(d, sin)
            f = Mul(cos, x)
            y = Add(f, e)
        }""",
        """
        along_the_sequence (float[2, 3, 8, 8] x, float[2, 1, 8, 8] cos, float[2, 1, 8, 8] sin) => (float[2, 3, 8, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] far = {9223372036854775807}, int64[1] axis = {2},
         int64[1] one = {1}> {
            a = Slice(x, zero, half, axis, one)
            b = Slice(x, half, far, axis, one)
            c = Neg(b)
            d = Concat <axis = 2> (c, a)
            e = Mul(d, sin)
            f = Mul(cos, x)
            y = Add(f, e)
        }""",
        """
        another_value (float[2, 3, 5, 8] x, float[2, 3, 5, 8] z, float[2, 1, 5, 8] sin) => (float[2, 3, 5, 8] y)
        <int64[1] zero = {0}, int64[1] half = {4}, int64[1] far = {9223372036854775807}, int64[1] axis = {3},
         int64[1] one = {1}> {
            a = Slice(x, zero, half, axis, one)
            b = Slice(x, half, far, axis, one)
            c = Neg(b)
            d = Concat <axis = -1> (c, a)
            e = Mul(d, sin)
            f = Mul(z, z)
            y = Add(f, e)
        }""",
    ),
)

FUSIONS = (HALVES,)
