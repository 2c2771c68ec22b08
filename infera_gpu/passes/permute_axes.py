"""Rules of operators that work element by element or along axes: their numbers of axes change, little else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.ops import channels_last, reordered
from infera_gpu.ops.reordered import order_of
from infera_gpu.passes.pattern import axis_in
from infera_gpu.passes.permute import (
    Facts,
    Moved,
    Order,
    Rule,
    axes_of,
    given,
    inverse,
    is_last,
    is_left_out,
    last_order,
    only_output,
    simple,
    with_attrs,
    with_axes,
    with_constants,
    without,
)


def _pointwise(facts: Facts, node: Node, order: Order) -> Moved | None:
    """One tensor; other inputs are single numbers."""
    if not only_output(node):
        return None
    for value in node.inputs[1:]:
        found = facts.constant(value) if value else None
        if value and facts.rank(value) != 0 and (found is None or found.size != 1):
            return None
    return simple(node, order)


def _broadcast(facts: Facts, node: Node, order: Order) -> Moved | None:
    ranks = [facts.rank(value) for value in node.inputs if value]
    if any(r is None or r > len(order) for r in ranks):
        return None
    return simple(node, order, [v for v, r in zip(filter(None, node.inputs), ranks, strict=True) if r])


def _quantized(facts: Facts, node: Node, order: Order) -> Moved | None:
    """QuantizeLinear and DequantizeLinear, per tensor or along an axis."""
    if node.attrs.get("block_size", 0) or not only_output(node):
        return None
    scale = given(facts, node, 1)
    if scale is not None and scale.size == 1 and scale.ndim <= 1:
        return simple(node, order)
    if scale is None or scale.ndim != 1 or facts.opset(node) < 13:
        return None
    axis = axis_in(int(node.attrs.get("axis", 1)), len(order))
    return None if axis is None else simple(with_attrs(node, axis=order.index(axis)), order)


def _along(default: int, since: int = 1, *, first: bool = False) -> Rule:
    """Operators with one attribute `axis`, all of whose inputs and outputs are alike; or the `first` input alone is."""

    def rule(facts: Facts, node: Node, order: Order) -> Moved | None:
        axis = axis_in(int(node.attrs.get("axis", default)), len(order))
        if facts.opset(node) < since or axis is None:
            return None
        moved = with_attrs(node, axis=order.index(axis))
        return simple(moved, order, node.inputs[:1] if first else node.inputs)

    return rule


def _unit(facts: Facts, node: Node, order: Order) -> Moved | None:
    """Unit vectors, unless norms were expanded to a shape."""
    return _along(-1)(facts, node, order) if len(node.inputs) == 1 else None


def _reduce(facts: Facts, node: Node, order: Order) -> Moved | None:
    axes = axes_of(facts, node, 1, len(order))
    if not axes:
        return None
    places = tuple(sorted(order.index(a) for a in axes))
    target = order if node.attrs.get("keepdims", 1) else without(order, axes)
    pool = _GLOBAL.get(node.op)
    if pool is not None and is_last(order) and places == tuple(range(1, len(order) - 1)) and _is_float(facts, node):
        return _pooled(node, f"{pool}{channels_last.SUFFIX}", order, target)
    made, constants = with_axes(node, 1, places)
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: target}, constants)


_GLOBAL = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}
"""What pixels are reduced by as well: these are one product, or one pass, with channels last."""


def _is_float(facts: Facts, node: Node) -> bool:
    spec = facts.example(node.inputs[0])
    return spec is not None and spec.dtype in facts.floats


def _pooled(node: Node, pool: str, order: Order, target: Order) -> Moved:
    """The pool of node's input, its axes of one pixel dropped where `target` has none."""
    made = Node(pool, node.inputs[:1], node.outputs, domain="infera", name=node.name)
    if len(target) == len(order):
        return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: target})
    pooled, pixels = made_name(node.outputs[0], "pooled"), tuple(range(1, len(order) - 1))
    dropped = Node("Squeeze", (pooled,), node.outputs, {"axes": pixels}, name=pooled, opset=11)
    return Moved((replace(made, outputs=(pooled,)), dropped), {node.inputs[0]: order}, {node.outputs[0]: target})


def _arg(facts: Facts, node: Node, order: Order) -> Moved | None:
    axis = axis_in(int(node.attrs.get("axis", 0)), len(order))
    if axis is None:
        return None
    target = order if node.attrs.get("keepdims", 1) else without(order, (axis,))
    made = with_attrs(node, axis=order.index(axis))
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: target})


def _squeeze(facts: Facts, node: Node, order: Order) -> Moved | None:
    axes = axes_of(facts, node, 1, len(order))
    if not axes:
        return None
    made, constants = with_axes(node, 1, sorted(order.index(a) for a in axes))
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: without(order, axes)}, constants)


def _unsqueeze(facts: Facts, node: Node, order: Order) -> Moved | None:
    """New axes stand before the axis that follows them in the model, or after the last one."""
    count = len(node.attrs["axes"]) if "axes" in node.attrs else getattr(given(facts, node, 1), "size", 0)
    rank = len(order) + count
    added = axes_of(facts, node, 1, rank)
    if not added:
        return None
    places = [axis for axis in range(rank) if axis not in added]
    target = [places[axis] for axis in order]
    for axis in sorted(added, reverse=True):
        target.insert(target.index(axis + 1) if axis + 1 < rank else target.index(places[-1]) + 1, axis)
    made, constants = with_axes(node, 1, [target.index(axis) for axis in added])
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: tuple(target)}, constants)


def _slice(facts: Facts, node: Node, order: Order) -> Moved | None:
    inputs = facts.opset(node) >= 10
    starts = given(facts, node, 1) if inputs else node.attrs.get("starts")
    if is_left_out(node, 3) and "axes" not in node.attrs:
        axes: tuple[int, ...] | None = None if starts is None else tuple(range(len(starts)))
    else:
        axes = axes_of(facts, node, 3, len(order))
    if axes is None:
        return None
    places = [order.index(a) for a in axes]
    if inputs:
        made, constants = with_constants(node, {3: np.array(places, np.int64)})
    else:
        made, constants = with_attrs(node, axes=tuple(places)), {}
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: order}, constants)


def _pad(facts: Facts, node: Node, order: Order) -> Moved | None:
    def moved(pads: Sequence[int]) -> list[int]:
        half = len(order)
        return [pads[half * end + axis] for end in (0, 1) for axis in order]

    if not is_left_out(node, 3):
        axes = axes_of(facts, node, 3, len(order))
        if axes is None:
            return None
        made, constants = with_constants(node, {3: np.array([order.index(a) for a in axes], np.int64)})
    elif "pads" in node.attrs:
        if len(node.attrs["pads"]) != 2 * len(order):
            return None
        made, constants = with_attrs(node, pads=tuple(moved(node.attrs["pads"]))), {}
    else:
        pads = given(facts, node, 1)
        if pads is None or pads.size != 2 * len(order):
            return None
        made, constants = with_constants(node, {1: np.array(moved(pads.reshape(-1).tolist()), np.int64)})
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: order}, constants)


def _shape(facts: Facts, node: Node, order: Order) -> Moved | None:
    """The sizes of the tensor as it is stored, picked in the order that is asked for."""
    asked = range(len(order))[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    whole, at = (made_name(node.outputs[0], part) for part in ("stored", "axes"))
    nodes = (
        replace(node, outputs=(whole,), attrs={}),
        Node("Gather", (whole, at), node.outputs, name=node.name),
    )
    return Moved(nodes, {node.inputs[0]: order}, {}, {at: np.array([order.index(a) for a in asked], np.int64)})


def _reshape(facts: Facts, node: Node, order: Order) -> Moved | None:
    """Reshape and Flatten, where that is a view of what is stored, or where channels, split before, are joined again.

    That is told from an example of the shapes; whatever they are, the operator gives the right result.
    """
    examples = facts.example(node.inputs[0]), facts.example(node.outputs[0])
    if examples[0] is None or examples[1] is None or examples[0].ndim != len(order):
        return None
    x, y = examples[0].dims, examples[1].dims
    target = order_of([x[axis] for axis in order], inverse(order), y)
    if target is None and len(x) == 5 and len(y) == 4:
        target = last_order(4)
        joined = order_of([y[axis] for axis in target], inverse(target), x)
        if joined is None:
            return None
        order = joined
    if target is None:
        return None
    made = replace(
        with_attrs(node, perm=inverse(order), order=target), op=f"{node.op}{reordered.SUFFIX}", domain="infera", opset=0
    )
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: target})


_POINTWISE = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh"),
    *("Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN"),
    *("LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign"),
    *("Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
    *("infera.Centre", "infera.Gelu", "com.microsoft.Gelu", "com.microsoft.QuickGelu"),
)

_BROADCAST = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod"),
    *("Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
)

_REDUCE = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantized),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _along(-1, since=13)),
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCE), _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    "Concat": _along(1),
    "LpNormalization": _along(-1),
    "infera.L2Normalization": _unit,
    "infera.AxisNormalization": _along(-1, first=True),
    "Pad": _pad,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _along(0, first=True),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
"""By qualified name."""
