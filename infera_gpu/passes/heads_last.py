"""Attention that writes the heads of a query beside each other, where a Transpose followed."""

from __future__ import annotations

import dataclasses

import numpy as np

from infera_gpu.graph import made_name
from infera_gpu.passes.attention import OPERANDS, with_inputs
from infera_gpu.passes.engine import CPU_AND_TRITON, Fusion, Match, Replacement, either, node, standard
from infera_gpu.passes.pattern import axis_in


def _heads_go_last(match: Match) -> bool:
    """The permutation swaps heads and queries; an axis of one element may stand among them."""
    perm, axes = list(match.nodes["swap"].attrs.get("perm", ())), match.axes("unit") if "unit" in match.nodes else ()
    if axes is None or match.nodes["attention"].attrs.get("heads_last", 0):
        return False
    added = {axis_in(a, len(perm)) for a in axes}
    kept = [axis for axis in range(len(perm)) if axis not in added]
    return None not in added and [kept.index(axis) for axis in perm if axis not in added] == [0, 2, 1, 3]


def _with_heads_last(match: Match) -> Replacement:
    attended = with_inputs(match, heads_last=1)
    if "unit" not in match.nodes:
        return attended
    out, perm = match.root.outputs[0], match.nodes["swap"].attrs["perm"]
    inner, name = made_name(out, "attended"), made_name(out, "axes")
    added = {axis_in(a, len(perm)) for a in match.axes("unit") or ()}
    axes = tuple(i for i, axis in enumerate(perm) if axis in added)
    before = (dataclasses.replace(attended.node, outputs=(inner,)),)
    if match.opset() < 13:
        return Replacement(standard(match, "Unsqueeze", 1, (inner,), {"axes": axes}), before=before)
    return Replacement(standard(match, "Unsqueeze", 13, (inner, name), {}), {name: np.array(axes, np.int64)}, before)


_ATTENDED = node("infera.Attention", *OPERANDS, name="attention")

HEADS_LAST = Fusion(
    name="attention_heads_last",
    patterns=(node("Transpose", either(node("Unsqueeze", _ATTENDED, "?#axes", name="unit"), _ATTENDED), name="swap"),),
    guard=_heads_go_last,
    build=_with_heads_last,
    kinds=CPU_AND_TRITON,
    example="""
        example (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v, bool[4, 6] c)
            => (float[2, 4, 3, 5] y) {
            a = infera.Attention <fill = -10000.0> (q, kt, v, , c)
            y = Transpose <perm = [0, 2, 1, 3]> (a)
        }""",
    near_misses=(
        """
        elements_first (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v) => (float[2, 3, 5, 4] y) {
            a = infera.Attention(q, kt, v)
            y = Transpose <perm = [0, 1, 3, 2]> (a)
        }""",
        """
        swapped_already (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v) => (float[2, 3, 4, 5] y) {
            a = infera.Attention <heads_last = 1> (q, kt, v)
            y = Transpose <perm = [0, 2, 1, 3]> (a)
        }""",
    ),
)

FUSIONS = (HEADS_LAST,)
