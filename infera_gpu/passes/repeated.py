"""Heads of keys and values that serve several of queries need no copies (grouped-query attention)."""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.attention import INPUTS, OPERANDS
from infera_gpu.passes.engine import CPU_AND_TRITON, Fusion, Match, Replacement, changed, infera, node
from infera_gpu.passes.pattern import P, axis_in
from infera_gpu.passes.sizes import reshaped

_SHAPES = ("wide_k", "flat_k", "wide_v", "flat_v")
_HEADS_FIRST = (0, 2, 1, 3)


def _repeated(x: str) -> P:
    beside = node("Unsqueeze", x, f"?#axes_{x}", name=f"beside_{x}")
    return node("Reshape", node("Expand", beside, f"wide_{x}"), f"flat_{x}", name=f"merged_{x}")


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


# ---- heads after the sequence, as PaddlePaddle's attention takes them


def _repeats(match: Match, x: str) -> tuple[int, int, int] | None:
    """How many heads (batch, sequence, heads, size) has, how often each is repeated beside itself, and their size."""
    spec, beside = match.spec(x), match.axes(f"beside_{x}")
    wide, flat = (match.draft.sizes(match.values[f"{name}_{x}"]) for name in ("wide", "flat"))
    if spec is None or not spec.ranked or spec.ndim != 4 or beside is None or [axis_in(a, 5) for a in beside] != [3]:
        return None
    heads, size = spec.shape[2:]
    repeats = wide[3] if wide is not None and len(wide) == 5 else None
    if not (isinstance(heads, int) and isinstance(size, int) and isinstance(repeats, int)) or repeats < 1:
        return None
    made = (*spec.shape[:3], repeats, size)
    widens = wide is None or any(target not in (1, d) for target, d in zip(wide, made, strict=True))
    if widens or flat is None or match.nodes[f"merged_{x}"].attrs.get("allowzero", 0):
        return None
    merged = (*spec.shape[:2], heads * repeats, size)
    return (heads, repeats, size) if reshaped(made, flat, keeps=True) == merged else None


def _are_after_the_sequence(match: Match) -> bool:
    perms = [tuple(match.nodes[name].attrs.get("perm", ())) for name in ("turned_k", "turned_v")]
    swaps = bool(match.nodes["attention"].attrs.get("swap_keys", 0))
    if perms != [_HEADS_FIRST if swaps else (0, 2, 3, 1), _HEADS_FIRST]:
        return False
    k, v = _repeats(match, "k"), _repeats(match, "v")
    return k is not None and v is not None and k[:2] == v[:2]


def _grouped_by_heads(match: Match) -> Replacement:
    """Heads first, and repeated as attention repeats them: each in its place, whatever the sizes of a run are."""
    out = match.root.outputs[0]
    shapes: dict[str, HostArray] = {}
    turned: list[Node] = []
    for x in "kv":
        found = _repeats(match, x)
        assert found is not None
        heads, repeats, size = found
        shapes[made_name(out, f"wide_{x}")] = np.array([1, 1, repeats, 1, 1])
        shapes[made_name(out, f"flat_{x}")] = np.array([0, heads * repeats, -1, size])
        turned.append(Node("Transpose", (match.values[x],), (made_name(out, x),), {"perm": _HEADS_FIRST}))
    values = {**match.values, "kt": turned[0].outputs[0], "v": turned[1].outputs[0]}
    inputs = (*(values.get(name, "") for name in INPUTS), *shapes)
    attrs = {**match.nodes["attention"].attrs, "swap_keys": 1, "repeated": 1}
    return Replacement(infera(match, "Attention", inputs, attrs), shapes, tuple(turned))


_EXAMPLE = """
        example (float[B, 6, 4, 5] q, float[B, S, 2, 5] k, float[B, S, 2, 5] v, float[B, 1, 4, S] m)
            => (float[B, 6, 4, 5] y)
        <int64[1] three = {3}, int64[5] wide = {1, 1, 1, 3, 1}, int64[4] flat = {0, 0, -1, 5}> {
            a = Unsqueeze(k, three)
            b = Expand(a, wide)
            c = Reshape(b, flat)
            d = Transpose <perm = [0, 2, 3, 1]> (c)
            e = Unsqueeze(v, three)
            f = Expand(e, wide)
            g = Reshape(f, flat)
            h = Transpose <perm = [0, 2, 1, 3]> (g)
            y = infera.Attention <scale = 0.5> (q, d, h, m)
        }"""

AFTER_THE_SEQUENCE = Fusion(
    name="attention_repeated_heads_after_the_sequence",
    patterns=(
        node(
            "infera.Attention",
            "q",
            node("Transpose", _repeated("k"), name="turned_k"),
            node("Transpose", _repeated("v"), name="turned_v"),
            *OPERANDS[3:],
            name="attention",
        ),
    ),
    guard=_are_after_the_sequence,
    build=_grouped_by_heads,
    kinds=CPU_AND_TRITON,
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE,
            ("example (", "copies_of_all_heads ("),
            (
                "int64[1] three = {3}, int64[5] wide = {1, 1, 1, 3, 1}",
                "int64[1] three = {2}, int64[5] wide = {1, 1, 3, 1, 1}",
            ),
        ),
        changed(
            _EXAMPLE, ("example (", "keys_are_an_output ("), ("[B, 6, 4, 5] y)", "[B, 6, 4, 5] y, float[B, S, 6, 5] c)")
        ),
        changed(
            _EXAMPLE,
            ("example (", "sequence_and_size_swapped ("),
            ("Transpose <perm = [0, 2, 3, 1]>", "Transpose <perm = [0, 2, 1, 3]>"),
            ("float[B, 1, 4, S] m", "float[B, 1, 4, 5] m"),
            ("q, float[B, S, 2, 5] k", "q, float[B, 5, 2, 5] k"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "batch_widens ("),
            ("float[B, S, 2, 5] k", "float[1, S, 2, 5] k"),
            ("wide = {1, 1, 1, 3, 1}", "wide = {2, 1, 1, 3, 1}"),
        ),
    ),
)

FUSIONS = (REPEATED, AFTER_THE_SEQUENCE)
