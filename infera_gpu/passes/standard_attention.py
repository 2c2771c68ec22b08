"""ONNX's Attention without caches becomes the fused operator, whose heads move and repeat without copies."""

from __future__ import annotations

import numpy as np

from infera_gpu.passes.attention import rank_of
from infera_gpu.passes.engine import CPU_AND_TRITON, Fusion, Match, Replacement, infera, node

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_PLAIN = {
    "is_causal": 0,
    "softmax_precision": 0,
    "left_window_size": -1,
    "right_window_size": -1,
    "q_num_heads": 0,
    "kv_num_heads": 0,
}
"""Attributes that the fused operator has no counterpart of, with the values that change nothing."""


def _is_plain(match: Match) -> bool:
    """Whether heads are apart, each query sees all keys, and types and the scale are known."""
    attention = match.nodes["attention"]
    attrs = attention.attrs
    if len(attention.outputs) != 1 or any((attrs.get(name) or plain) != plain for name, plain in _PLAIN.items()):
        return False
    q, mask = match.draft.spec(match.values["q"]), match.values.get("mask", "")
    given = match.draft.spec(mask) if mask else None
    if q is None or q.dtype.name not in _FLOATS or rank_of(match, match.values["q"]) != 4 or attrs.get("scale") is None:
        return False
    return not mask or (given is not None and given.dtype in (q.dtype, np.dtype(np.bool_)))


def _fused(match: Match) -> Replacement:
    attrs, values = match.nodes["attention"].attrs, match.values
    mask = values.get("mask", "")
    spec = match.draft.spec(mask) if mask else None
    seen = spec is not None and spec.dtype == np.bool_
    inputs: tuple[str, ...] = (values["q"], values["k"], values["v"])
    if mask:
        inputs = (*inputs, "", mask) if seen else (*inputs, mask)
    made: dict[str, float] = {"scale": float(attrs["scale"]), "swap_keys": 1, "guarded": 2}
    if attrs.get("softcap"):
        made["cap"] = float(attrs["softcap"])
    if seen:
        made["fill"] = -np.inf
    return Replacement(infera(match, "Attention", inputs, made))


STANDARD = Fusion(
    name="standard_attention",
    patterns=(node("Attention", "q", "k", "v", "?mask", name="attention"),),
    guard=_is_plain,
    build=_fused,
    opset=23,
    kinds=CPU_AND_TRITON,
    example="""
        example (float[2, 3, 4, 5] q, float[2, 3, 6, 5] k, float[2, 3, 6, 7] v, bool[4, 6] m) => (float[2, 3, 4, 7] y) {
            y = Attention <scale = 0.3, softcap = 2.0> (q, k, v, m)
        }""",
    near_misses=(
        """
        causal (float[2, 3, 4, 5] q, float[2, 3, 6, 5] k, float[2, 3, 6, 7] v) => (float[2, 3, 4, 7] y) {
            y = Attention <scale = 0.3, is_causal = 1> (q, k, v)
        }""",
        """
        default_scale (float[2, 3, 4, 5] q, float[2, 3, 6, 5] k, float[2, 3, 6, 7] v) => (float[2, 3, 4, 7] y) {
            y = Attention(q, k, v)
        }""",
        """
        merged_heads (float[2, 4, 15] q, float[2, 6, 15] k, float[2, 6, 21] v) => (float[2, 4, 21] y) {
            y = Attention <scale = 0.3, q_num_heads = 3, kv_num_heads = 3> (q, k, v)
        }""",
        """
        with_a_past (float[2, 3, 4, 5] q, float[2, 3, 6, 5] k, float[2, 3, 6, 5] v, float[2, 3, 2, 5] p)
            => (float[2, 3, 4, 5] y, float[2, 3, 8, 5] a, float[2, 3, 8, 5] b) {
            y, a, b = Attention <scale = 0.3> (q, k, v, , p, p)
        }""",
    ),
)

FUSIONS = (STANDARD,)
