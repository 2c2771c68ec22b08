"""Scaled dot-product attention as exporters write it: products, scale, mask, softmax and the guard against NaN."""

from __future__ import annotations

from collections.abc import Callable

from infera_gpu.passes.engine import (
    CPU_AND_TRITON,
    Fusion,
    Match,
    Replacement,
    changed,
    either,
    infera,
    named,
    node,
    standard,
)
from infera_gpu.passes.pattern import Arg, P, is_close

INPUTS = ("q", "kt", "v", "mask", "condition", "further")
OPERANDS: tuple[Arg, ...] = ("q", "kt", "v", "?mask", "?condition", "?further")


def rank_of(match: Match, value: str) -> int | None:
    """How many axes a value has; heads that a Transpose puts first show it by the permutation."""
    made_by = match.producers.get(value)
    perm = made_by.attrs.get("perm") if made_by is not None and made_by.qualified == "Transpose" else None
    if perm is not None:
        return len(perm)
    spec = match.draft.spec(value)
    return spec.ndim if spec is not None and spec.ranked else None


# ---- PyTorch swaps the last two axes of keys through three axes


def _keys() -> P:
    shape, last = node("Shape", "k"), 2.0**63
    heads, length, size = (
        node("Slice", shape, begin, end) for begin, end in ((-last, -2.0), (-2.0, -1.0), (-1.0, last))
    )
    flat = node("Reshape", "k", node("Concat", -1.0, length, size, name="flat"))
    return node("Reshape", node("Transpose", flat, name="swap"), node("Concat", heads, size, length, name="whole"))


def _swaps(match: Match) -> bool:
    """Whether the axes are known, and lists of sizes are joined as such."""
    lists = all(match.nodes[name].attrs["axis"] in (0, -1) for name in ("flat", "whole"))
    return lists and rank_of(match, match.values["k"]) is not None and match.nodes["swap"].attrs["perm"] == (0, 2, 1)


def _swapped(match: Match) -> Replacement:
    axes = range(rank_of(match, match.values["k"]) or 0)
    perm = (*axes[:-2], *axes[:-3:-1])
    return Replacement(standard(match, "Transpose", 1, (match.values["k"],), {"perm": perm}))


_KEYS_EXAMPLE = """
        example (float[2, 3, 4, 5] k) => (float[2, 3, 5, 4] y)
        <int64[1] low = {-9223372036854775808}, int64[1] two = {-2}, int64[1] one = {-1},
         int64[1] high = {9223372036854775807}> {
            s = Shape(k)
            heads = Slice(s, low, two)
            length = Slice(s, two, one)
            size = Slice(s, one, high)
            a = Concat <axis = 0> (one, length, size)
            b = Reshape(k, a)
            c = Transpose <perm = [0, 2, 1]> (b)
            d = Concat <axis = 0> (heads, size, length)
            y = Reshape(c, d)
        }"""

KEYS = Fusion(
    name="transposed_keys",
    patterns=(_keys(),),
    guard=_swaps,
    build=_swapped,
    example=_KEYS_EXAMPLE,
    near_misses=(
        changed(
            _KEYS_EXAMPLE,
            ("example (", "not_swapped_back ("),
            ("float[2, 3, 5, 4] y)", "float[2, 3, 4, 5] y)"),
            ("d = Concat <axis = 0> (heads, size, length)", "d = Concat <axis = 0> (heads, length, size)"),
        ),
        changed(
            _KEYS_EXAMPLE,
            ("example (", "other_permutation ("),
            ("c = Transpose <perm = [0, 2, 1]> (b)", "c = Transpose <perm = [1, 0, 2]> (b)"),
        ),
    ),
)


# ---- the core

_PRODUCTS = ("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul")
"""As onnxruntime's optimiser writes a product with a factor, or of keys that are not transposed."""


def plain(scores: Arg) -> Arg:
    return node("Softmax", scores, name="softmax")


def filled(scores: Arg) -> Arg:
    return either(
        node("Where", "condition", scores, "%fill", name="kept"),
        node("Where", "condition", "%fill", scores, name="filled"),
    )


def _masked(scores: Arg) -> Arg:
    """Hidden scores have one number, to which masks are added."""
    seen = either(filled(scores), scores)
    masked = node("Add", seen, "mask", commutes=True)
    return either(node("Add", masked, "further", commutes=True), masked, seen)


def core(weights: Callable[[Arg], Arg], terms: Callable[[Arg], Arg] = _masked) -> P:
    scores = node(("MatMul", *_PRODUCTS), "q", "kt", name="scores")
    scaled = either(node("Mul", scores, "%factor", commutes=True), node("Div", scores, "%divisor"), scores)
    inner = either(node("Div", scaled, "%cap"), node("Mul", scaled, "%inverse_cap", commutes=True))
    capped = either(node("Mul", node("Tanh", inner), "%height", commutes=True), scaled)
    softmax = weights(terms(capped))
    guarded = node("Where", node("IsNaN", softmax), 0.0, softmax, name="guard")
    return node("MatMul", either(guarded, softmax), "v")


def is_last_axis(match: Match) -> bool:
    """Whether the softmax goes along the keys, scores are capped evenly, and the numbers add no axis."""
    softmax = match.nodes["softmax"]
    axis = int(softmax.attrs.get("axis", -1 if match.opset() >= 13 else 1))
    spec = match.draft.spec(softmax.inputs[0])
    last = axis == -1 or (spec is not None and spec.ranked and axis == spec.ndim - 1)
    scores = match.nodes["scores"].attrs
    if any(scores.get(flag, 0) for flag in ("transA", "transBatchA", "transBatchB")):
        return False
    return last and _is_cap(match) and (match.numbers_rank <= 1 or match.keeps_shape("q"))


def _is_cap(match: Match) -> bool:
    """Whether scores are multiplied by what they were divided by before the tanh."""
    if "height" not in match.values:
        return True
    height = match.number("height")
    cap = match.number("cap") if "cap" in match.values else 1 / match.number("inverse_cap")
    return height > 0 and is_close(cap, height, match.constant("height").dtype)


def fused(match: Match) -> Replacement:
    scores = match.nodes["scores"].attrs
    attrs: dict[str, float] = {"scale": factor_of(match) * float(scores.get("alpha", 1.0))}
    if scores.get("transB", 0):
        attrs["swap_keys"] = 1
    if "height" in match.values:
        attrs["cap"] = match.number("height")
    if "fill" in match.values:
        attrs |= {"fill": match.number("fill"), "fill_where": int("filled" in match.nodes)}
    if "guard" in match.nodes:
        attrs["guarded"] = 1
    return Replacement(infera(match, "Attention", named(match, INPUTS), attrs))


def factor_of(match: Match) -> float:
    """What the scale of a match multiplies by."""
    if "divisor" in match.values:
        return 1 / match.number("divisor")
    return match.number("factor") if "factor" in match.values else 1.0


ATTENTION = Fusion(
    name="attention",
    patterns=(core(plain),),
    guard=is_last_axis,
    build=fused,
    reassociates=True,
    kinds=CPU_AND_TRITON,
    example="""
        example (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v, float[2, 1, 1, 6] m)
            => (float[2, 3, 4, 5] y) <float root = {2.2360679}, float zero = {0}> {
            a = MatMul(q, kt)
            b = Div(a, root)
            c = Add(m, b)
            d = Softmax <axis = -1> (c)
            e = IsNaN(d)
            f = Where(e, zero, d)
            y = MatMul(f, v)
        }""",
    near_misses=(
        """
        softmax_over_queries (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v) => (float[2, 3, 4, 5] y) {
            a = MatMul(q, kt)
            b = Softmax <axis = 2> (a)
            y = MatMul(b, v)
        }""",
        """
        weights_are_an_output (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v)
            => (float[2, 3, 4, 5] y, float[2, 3, 4, 6] b) {
            a = MatMul(q, kt)
            b = Softmax <axis = -1> (a)
            y = MatMul(b, v)
        }""",
        """
        guarded_by_one (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v) => (float[2, 3, 4, 5] y)
        <float one = {1}> {
            a = MatMul(q, kt)
            b = Softmax <axis = -1> (a)
            c = IsNaN(b)
            d = Where(c, one, b)
            y = MatMul(d, v)
        }""",
        """
        queries_transposed (float[2, 3, 5, 4] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v) => (float[2, 3, 4, 5] y) {
            a = com.microsoft.FusedMatMul <transA = 1> (q, kt)
            b = Softmax <axis = -1> (a)
            y = MatMul(b, v)
        }""",
        """
        another_height (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v) => (float[2, 3, 4, 5] y)
        <float cap = {50}, float height = {30}> {
            a = MatMul(q, kt)
            b = Div(a, cap)
            c = Tanh(b)
            d = Mul(c, height)
            e = Softmax <axis = -1> (d)
            y = MatMul(e, v)
        }""",
        """
        values_first (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 5, 4] v) => (float[2, 3, 5, 6] y) {
            a = MatMul(q, kt)
            b = Softmax <axis = -1> (a)
            y = MatMul(v, b)
        }""",
    ),
)


# ---- a scale on queries or keys


def with_inputs(match: Match, **attrs: float) -> Replacement:
    """The attention of a match over the inputs of the match, with other attributes."""
    inner = match.nodes["attention"]
    return Replacement(infera(match, "Attention", named(match, INPUTS), {**inner.attrs, **attrs}))


def scaled(x: Arg) -> Arg:
    return either(node("Mul", x, "%factor", commutes=True), node("Div", x, "%divisor"))


SCALE = Fusion(
    name="attention_scale",
    patterns=(
        node("infera.Attention", scaled("q"), *OPERANDS[1:], name="attention"),
        node("infera.Attention", "q", scaled("kt"), *OPERANDS[2:], name="attention"),
    ),
    guard=lambda match: match.numbers_rank <= 1 or match.keeps_shape("q"),
    build=lambda match: with_inputs(
        match, scale=float(match.nodes["attention"].attrs.get("scale", 1.0)) * factor_of(match)
    ),
    reassociates=True,
    kinds=CPU_AND_TRITON,
    example="""
        example (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v) => (float[2, 3, 4, 5] y)
        <float s = {0.6687403}> {
            a = Mul(s, q)
            y = infera.Attention <scale = 0.5> (a, kt, v)
        }""",
    near_misses=(
        """
        a_factor_for_each (float[2, 3, 4, 2] q, float[2, 3, 2, 6] kt, float[2, 3, 6, 5] v) => (float[2, 3, 4, 5] y)
        <float[2] s = {0.5, 0.25}> {
            a = Mul(s, q)
            y = infera.Attention(a, kt, v)
        }""",
        """
        queries_read_elsewhere (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v)
            => (float[2, 3, 4, 5] y, float[2, 3, 4, 5] a) <float s = {0.5}> {
            a = Mul(s, q)
            y = infera.Attention(a, kt, v)
        }""",
    ),
)

FUSIONS = (KEYS, ATTENTION, SCALE)
