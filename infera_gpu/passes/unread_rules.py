"""Which operators compute each row of their result from that row of their operands alone: see `unread`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from infera_gpu.graph import Node
from infera_gpu.ops.chain import STEPS
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.pattern import LEGACY, axis_in
from infera_gpu.spec import Dim, TensorSpec

Axes: TypeAlias = Mapping[int, int] | None
"""Input -> which of its axes is the output's, counted from the last; inputs that are the same for every row are not in
it. None where rows are not computed each alone."""

Rule: TypeAlias = Callable[[Draft, Node, TensorSpec, int], Axes]
"""The axes of a node's inputs, from its output and the axis there."""


def _along(draft: Draft, n: Node, size: Dim, axes: Mapping[int, int]) -> Axes:
    """Of these inputs, those that have as many elements along these axes; the others must have one there, or not be as
    wide."""
    found: dict[int, int] = {}
    for i, axis in axes.items():
        if i >= len(n.inputs) or not n.inputs[i]:
            continue
        spec = draft.spec(n.inputs[i])
        if spec is None or not spec.ranked:
            return None
        if spec.ndim < -axis or spec.shape[axis] == 1:
            continue
        if spec.shape[axis] != size:
            return None
        found[i] = axis
    return found


def _elementwise(draft: Draft, n: Node, out: TensorSpec, axis: int) -> Axes:
    return None if LEGACY in n.attrs else _along(draft, n, out.shape[axis], dict.fromkeys(range(len(n.inputs)), axis))


def _normalized(default: int) -> Rule:
    """Over an axis and those that follow it. `default`: where the attribute is left out."""

    def rule(draft: Draft, n: Node, out: TensorSpec, axis: int) -> Axes:
        first = axis_in(int(n.attrs.get("axis", default)), out.ndim)
        return _elementwise(draft, n, out, axis) if first is not None and axis + out.ndim < first else None

    return rule


def _product(draft: Draft, n: Node, out: TensorSpec, axis: int) -> Axes:
    """The rows of the first operand, or matrices of both; what is added broadcasts to the product."""
    a, b = (draft.spec(v) for v in n.inputs[:2])
    if a is None or b is None or min(a.ndim, b.ndim) < 2 or axis == -1:
        return None
    if n.attrs.get("transBatchA") or n.attrs.get("transBatchB"):
        return None
    operands = {0: -1 if n.attrs.get("transA") else -2} if axis == -2 else {0: axis, 1: axis}
    return _along(draft, n, out.shape[axis], {**operands, 2: axis, 3: axis})


def _few_bits(draft: Draft, n: Node, out: TensorSpec, axis: int) -> Axes:
    """The rows of the operand, and of the residual."""
    return None if axis == -1 else _along(draft, n, out.shape[axis], {0: axis, 6: axis})


def _attended(draft: Draft, n: Node, out: TensorSpec, axis: int) -> Axes:
    """The queries, and their rows of masks. Keys and values are for all of them."""
    q = draft.spec(n.inputs[0])
    if q is None or q.ndim < 2 or axis != (-3 if n.attrs.get("heads_last") else -2):
        return None
    return _along(draft, n, q.shape[-2], dict.fromkeys((0, 3, 4, 5), -2))


def _transposed(draft: Draft, n: Node, out: TensorSpec, axis: int) -> Axes:
    return {0: n.attrs["perm"][axis] - out.ndim} if "perm" in n.attrs else None


def _resized(draft: Draft, n: Node, out: TensorSpec, axis: int) -> Axes:
    """What changes axes after this one alone."""
    x, at = draft.spec(n.inputs[0]), axis + out.ndim
    same = x is not None and x.ranked and x.ndim > at and x.shape[: at + 1] == out.shape[: at + 1]
    return {0: at - x.ndim} if x is not None and same and len(n.inputs) == 2 and shape_after(draft, n, at) else None


def shape_after(draft: Draft, n: Node, at: int) -> tuple[int, ...] | None:
    """What a Reshape makes of the axes after one that stays, of which its own shape has one left open at most."""
    out, target = draft.spec(n.outputs[0]), draft.sizes(n.inputs[1])
    if out is None or target is None or len(target) != out.ndim:
        return None
    sizes = [size if isinstance(size, int) else -1 for size in out.shape[at + 1 :]]
    left_open = [i for i, size in enumerate(sizes, at + 1) if size == -1]
    return tuple(sizes) if 0 not in sizes and all(target[i] == -1 for i in left_open) else None


_GELUS = ("infera.Gelu", *(f"com.microsoft.{op}" for op in ("Gelu", "FastGelu", "BiasGelu", "QuickGelu")))
_PRODUCTS = ("MatMul", "Gemm", "infera.FusedMatMul", "com.microsoft.FusedMatMul", "com.microsoft.FusedGemm")
_FEW_BITS = ("com.microsoft.MatMulNBits", "infera.FusedMatMulNBits")
_LAYER_NORMS = (
    *("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
    "com.microsoft.SkipLayerNormalization",
)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys((*(STEPS.keys() - {"CastLike", "SwiGLU"}), *_GELUS, "Identity"), _elementwise),
        **dict.fromkeys(_LAYER_NORMS, _normalized(-1)),
        **dict.fromkeys(("Softmax", "LogSoftmax"), _normalized(1)),
        **dict.fromkeys(_PRODUCTS, _product),
        **dict.fromkeys(_FEW_BITS, _few_bits),
        "infera.Attention": _attended,
        "Transpose": _transposed,
        "Reshape": _resized,
    }
)
"""Operator -> its rule."""

PAYING = frozenset({*_PRODUCTS, *_FEW_BITS, "infera.Attention"})
"""Operators whose rows are worth a copy of an operand's."""


def axes_of(draft: Draft, value: str, axis: int) -> Axes:
    """The axes of the inputs of the node that makes a value, where each row along an axis of that, counted from the
    last, is computed alone. None where it is not, where nothing would be less, or where that is not known."""
    n, out = draft.producers[value], draft.spec(value)
    rule = RULES.get(n.qualified)
    if rule is None or out is None or not out.ranked or n.outputs[0] != value or any(n.outputs[1:]):
        return None
    return rule(draft, n, out, axis) or None
