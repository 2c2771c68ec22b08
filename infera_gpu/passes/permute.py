"""How operators are computed on tensors whose axes stand in another order: one rule a family.

An order says which axis stands where: `stored = Transpose(x, perm=order)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.ops import channels_last
from infera_gpu.ops.conv import SPELLINGS

Order: TypeAlias = tuple[int, ...]


def inverse(order: Order) -> Order:
    """The order that undoes this one."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def last_order(rank: int) -> Order:
    """The order in which channels, axis 1, stand last."""
    return (0, *range(2, rank), 1)


class Facts(Protocol):
    """What a rule may know of values."""

    def rank(self, value: str) -> int | None:
        """None where it is not known."""
        ...

    def constant(self, value: str) -> HostArray | None: ...

    def opset(self, node: Node) -> int: ...


@dataclass(frozen=True)
class Moved:
    """What is computed in place of a node.

    The nodes read the values in `reads`, and make those in `makes`, in these orders and under their own names; all
    other values are as they were.
    """

    nodes: tuple[Node, ...]
    reads: Mapping[str, Order]
    makes: Mapping[str, Order]
    constants: Mapping[str, HostArray] = field(default_factory=dict)


Rule: TypeAlias = Callable[[Facts, Node, Order], Moved | None]
"""The node with its input 0 (or, where it broadcasts, an input of highest rank) in this order; None where it cannot."""


def _only_output(node: Node) -> bool:
    return not any(node.outputs[1:])


def _with(node: Node, **attrs: Any) -> Node:
    return replace(node, attrs={**node.attrs, **attrs})


def _simple(node: Node, order: Order, reads: Sequence[str] | None = None) -> Moved:
    """The node as it stands, over these inputs (input 0 where none are given) in this order."""
    names = node.inputs[:1] if reads is None else reads
    return Moved((node,), dict.fromkeys(names, order), {o: order for o in node.outputs if o})


def _constants(node: Node, given: Mapping[int, HostArray]) -> tuple[Node, dict[str, HostArray]]:
    """The node with other constants as its inputs of these numbers."""
    inputs = [*node.inputs, *[""] * (max(given, default=0) + 1 - len(node.inputs))]
    made = {}
    for i, value in given.items():
        inputs[i] = made_name(node.outputs[0], "input", i)
        made[inputs[i]] = value
    return replace(node, inputs=tuple(inputs)), made


def _given(facts: Facts, node: Node, i: int) -> HostArray | None:
    """The value of input i where it is constant."""
    return facts.constant(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] else None


def _is_left_out(node: Node, i: int) -> bool:
    return len(node.inputs) <= i or not node.inputs[i]


# ---- element by element


def _pointwise(facts: Facts, node: Node, order: Order) -> Moved | None:
    """One tensor; other inputs are single numbers."""
    if not _only_output(node):
        return None
    for value in node.inputs[1:]:
        given = facts.constant(value) if value else None
        if value and facts.rank(value) != 0 and (given is None or given.size != 1):
            return None
    return _simple(node, order)


def _broadcast(facts: Facts, node: Node, order: Order) -> Moved | None:
    ranks = [facts.rank(value) for value in node.inputs if value]
    if any(r is None or r > len(order) for r in ranks):
        return None
    return _simple(node, order, [v for v, r in zip(filter(None, node.inputs), ranks, strict=True) if r])


def _quantized(facts: Facts, node: Node, order: Order) -> Moved | None:
    """QuantizeLinear and DequantizeLinear, per tensor or along an axis."""
    if node.attrs.get("block_size", 0) or not _only_output(node):
        return None
    scale = _given(facts, node, 1)
    if scale is not None and scale.size == 1 and scale.ndim <= 1:
        return _simple(node, order)
    if scale is None or scale.ndim != 1 or facts.opset(node) < 13:
        return None
    axis = int(node.attrs.get("axis", 1)) % len(order)
    return _simple(_with(node, axis=order.index(axis)), order)


# ---- along axes


def _along(default: int, since: int = 1) -> Rule:
    """Operators with one attribute `axis`, all of whose inputs and outputs are alike."""

    def rule(facts: Facts, node: Node, order: Order) -> Moved | None:
        axis = int(node.attrs.get("axis", default))
        if facts.opset(node) < since or not -len(order) <= axis < len(order):
            return None
        return _simple(_with(node, axis=order.index(axis % len(order))), order, node.inputs)

    return rule


def _split(facts: Facts, node: Node, order: Order) -> Moved | None:
    axis = int(node.attrs.get("axis", 0))
    if not -len(order) <= axis < len(order):
        return None
    return _simple(_with(node, axis=order.index(axis % len(order))), order)


def _without(order: Order, dropped: Sequence[int]) -> Order:
    """The order of the axes that are left."""
    kept = [axis for axis in range(len(order)) if axis not in dropped]
    return tuple(kept.index(axis) for axis in order if axis in kept)


def _axes_of(facts: Facts, node: Node, i: int, rank: int) -> tuple[int, ...] | None:
    """Axes, from the attribute or from input i where it is constant, as numbers from 0; None where not known."""
    axes = node.attrs.get("axes")
    if axes is None:
        given = _given(facts, node, i)
        axes = None if given is None else given.reshape(-1).tolist()
    if axes is None or not all(-rank <= a < rank for a in axes):
        return None
    return tuple(int(a) % rank for a in axes)


def _with_axes(node: Node, i: int, axes: Sequence[int]) -> tuple[Node, dict[str, HostArray]]:
    """The node with other axes, where it had them: in the attribute or in input i."""
    if "axes" in node.attrs:
        return _with(node, axes=tuple(axes)), {}
    return _constants(node, {i: np.array(axes, np.int64)})


def _reduce(facts: Facts, node: Node, order: Order) -> Moved | None:
    axes = _axes_of(facts, node, 1, len(order))
    if not axes:
        return None
    made, constants = _with_axes(node, 1, sorted(order.index(a) for a in axes))
    target = order if node.attrs.get("keepdims", 1) else _without(order, axes)
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: target}, constants)


def _arg(facts: Facts, node: Node, order: Order) -> Moved | None:
    axis = int(node.attrs.get("axis", 0)) % len(order)
    target = order if node.attrs.get("keepdims", 1) else _without(order, (axis,))
    made = _with(node, axis=order.index(axis))
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: target})


def _squeeze(facts: Facts, node: Node, order: Order) -> Moved | None:
    axes = _axes_of(facts, node, 1, len(order))
    if not axes:
        return None
    made, constants = _with_axes(node, 1, sorted(order.index(a) for a in axes))
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: _without(order, axes)}, constants)


def _unsqueeze(facts: Facts, node: Node, order: Order) -> Moved | None:
    """New axes stay where they are, the others fill the places between them in their order."""
    count = len(node.attrs["axes"]) if "axes" in node.attrs else getattr(_given(facts, node, 1), "size", 0)
    rank = len(order) + count
    added = _axes_of(facts, node, 1, rank)
    if not added:
        return None
    places = [axis for axis in range(rank) if axis not in added]
    rest = iter(order)
    target = tuple(axis if axis in added else places[next(rest)] for axis in range(rank))
    return Moved((node,), {node.inputs[0]: order}, {node.outputs[0]: target})


def _slice(facts: Facts, node: Node, order: Order) -> Moved | None:
    inputs = facts.opset(node) >= 10
    starts = _given(facts, node, 1) if inputs else node.attrs.get("starts")
    if _is_left_out(node, 3) and "axes" not in node.attrs:
        axes: tuple[int, ...] | None = None if starts is None else tuple(range(len(starts)))
    else:
        axes = _axes_of(facts, node, 3, len(order))
    if axes is None:
        return None
    places = [order.index(a) for a in axes]
    if inputs:
        made, constants = _constants(node, {3: np.array(places, np.int64)})
    else:
        made, constants = _with(node, axes=tuple(places)), {}
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: order}, constants)


def _pad(facts: Facts, node: Node, order: Order) -> Moved | None:
    def moved(pads: Sequence[int]) -> list[int]:
        half = len(order)
        return [pads[half * end + axis] for end in (0, 1) for axis in order]

    if not _is_left_out(node, 3):
        axes = _axes_of(facts, node, 3, len(order))
        if axes is None:
            return None
        made, constants = _constants(node, {3: np.array([order.index(a) for a in axes], np.int64)})
    elif "pads" in node.attrs:
        if len(node.attrs["pads"]) != 2 * len(order):
            return None
        made, constants = _with(node, pads=tuple(moved(node.attrs["pads"]))), {}
    else:
        pads = _given(facts, node, 1)
        if pads is None or pads.size != 2 * len(order):
            return None
        made, constants = _constants(node, {1: np.array(moved(pads.reshape(-1).tolist()), np.int64)})
    return Moved((made,), {node.inputs[0]: order}, {node.outputs[0]: order}, constants)


def _resize(facts: Facts, node: Node, order: Order) -> Moved | None:
    """Resize and Upsample: a region, scales and sizes of every axis, or of those that `axes` names."""
    if "axes" in node.attrs:
        axes = _axes_of(facts, node, 9, len(order))
        return None if axes is None else _simple(_with(node, axes=tuple(order.index(a) for a in axes)), order)
    if "scales" in node.attrs:
        return _simple(_with(node, scales=tuple(node.attrs["scales"][a] for a in order)), order)
    region = facts.opset(node) >= 11
    constants: dict[str, HostArray] = {}
    before: list[Node] = []
    inputs = list(node.inputs)
    for i, value in enumerate(node.inputs[1:], 1):
        given = facts.constant(value) if value else None
        if not value or (given is not None and not given.size):
            continue
        picks = [*order, *(len(order) + a for a in order)] if region and i == 1 else list(order)
        inputs[i] = made_name(node.outputs[0], "input", i)
        if given is not None:
            if given.size != len(picks):
                return None
            constants[inputs[i]] = given.reshape(-1)[picks]
        else:
            at = made_name(inputs[i], "axes")
            constants[at] = np.array(picks, np.int64)
            before.append(Node("Gather", (value, at), (inputs[i],), name=inputs[i]))
    made = replace(node, inputs=tuple(inputs))
    return Moved((*before, made), {node.inputs[0]: order}, {node.outputs[0]: order}, constants)


def _shape(facts: Facts, node: Node, order: Order) -> Moved | None:
    """The sizes of the tensor as it is stored, picked in the order that is asked for."""
    asked = range(len(order))[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    whole, at = (made_name(node.outputs[0], part) for part in ("stored", "axes"))
    nodes = (
        replace(node, outputs=(whole,), attrs={}),
        Node("Gather", (whole, at), node.outputs, name=node.name),
    )
    return Moved(nodes, {node.inputs[0]: order}, {}, {at: np.array([order.index(a) for a in asked], np.int64)})


# ---- channels last


def _is_last(order: Order) -> bool:
    return len(order) > 2 and order == last_order(len(order))


def convolution(facts: Facts, node: Node, order: Order) -> Moved | None:
    """A convolution of floats over one or two axes, with weights that are constant."""
    weight = _given(facts, node, 1)
    if weight is None or weight.ndim not in (3, 4) or weight.dtype not in (np.float32, np.float64):
        return None
    if order != last_order(weight.ndim) or not _only_output(node):
        return None
    reads = {node.inputs[0]: order}
    if not _is_left_out(node, 3):
        rank = facts.rank(node.inputs[3])
        if rank is None or rank > len(order):
            return None
        reads[node.inputs[3]] = order
    attrs = dict(node.attrs)
    if attrs.get("activation", ""):
        name = str(attrs["activation"])
        attrs["activation"] = SPELLINGS.get(node.domain, {}).get(name, name)
    made = replace(node, op=channels_last.CONV.name, domain="infera", attrs=attrs, opset=0)
    return Moved((made,), reads, {node.outputs[0]: order})


def _twin(facts: Facts, node: Node, order: Order) -> Moved | None:
    """An operator that there is for channels last."""
    if not _is_last(order) or not _only_output(node):
        return None
    return _simple(replace(node, op=f"{node.op}{channels_last.SUFFIX}", domain="infera", opset=0), order)


def _batch_norm(facts: Facts, node: Node, order: Order) -> Moved | None:
    training = node.attrs.get("training_mode", 0) or not node.attrs.get("spatial", 1)
    kept = {k: v for k, v in node.attrs.items() if k == "epsilon"}
    return None if training else _twin(facts, replace(node, attrs=kept), order)


_POINTWISE = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh"),
    *("Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN"),
    *("LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign"),
    *("Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
    *("infera.Gelu", "com.microsoft.Gelu", "com.microsoft.QuickGelu"),
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
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys((moved.first.name for moved in channels_last.POOLS), _twin),
    "BatchNormalization": _batch_norm,
    "Concat": _along(1),
    "LpNormalization": _along(-1),
    "Pad": _pad,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
"""By qualified name. What an operator without a rule reads has its axes in their own order."""

CONVOLUTIONS: Mapping[str, Rule] = dict.fromkeys(("Conv", "infera.FusedConv", "com.microsoft.FusedConv"), convolution)
"""Operators for whose sake tensors are put in another order."""
