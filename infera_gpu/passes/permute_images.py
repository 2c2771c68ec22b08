"""Rules of operators on images, and the table of all rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.ops import channels_last, quantized
from infera_gpu.ops.channels_last_rest import CONV_TRANSPOSE, LRN
from infera_gpu.ops.conv import SPELLINGS
from infera_gpu.passes import permute_axes
from infera_gpu.passes.permute import (
    Facts,
    Moved,
    Order,
    Rule,
    axes_of,
    given,
    is_last,
    is_left_out,
    last_order,
    only_output,
    simple,
    with_attrs,
)


def _resize(facts: Facts, node: Node, order: Order) -> Moved | None:
    """Resize and Upsample: a region, scales and sizes of every axis, or of those that `axes` names."""
    if "axes" in node.attrs:
        axes = axes_of(facts, node, 9, len(order))
        return None if axes is None else simple(with_attrs(node, axes=tuple(order.index(a) for a in axes)), order)
    if "scales" in node.attrs:
        return simple(with_attrs(node, scales=tuple(node.attrs["scales"][a] for a in order)), order)
    region = facts.opset(node) >= 11
    constants: dict[str, HostArray] = {}
    before: list[Node] = []
    inputs = list(node.inputs)
    for i, value in enumerate(node.inputs[1:], 1):
        found = facts.constant(value) if value else None
        if not value or (found is not None and not found.size):
            continue
        picks = [*order, *(len(order) + a for a in order)] if region and i == 1 else list(order)
        inputs[i] = made_name(node.outputs[0], "input", i)
        if found is not None:
            if found.size != len(picks):
                return None
            constants[inputs[i]] = found.reshape(-1)[picks]
        else:
            at = made_name(inputs[i], "axes")
            constants[at] = np.array(picks, np.int64)
            before.append(Node("Gather", (value, at), (inputs[i],), name=inputs[i]))
    made = node.over(tuple(inputs))
    return Moved((*before, made), {node.inputs[0]: order}, {node.outputs[0]: order}, constants)


def convolution(facts: Facts, node: Node, order: Order) -> Moved | None:
    """A convolution of floats, with weights that are constant."""
    weight = given(facts, node, 1)
    if weight is None or weight.dtype not in facts.floats:
        return None
    return _convolution(facts, node, order, weight, channels_last.CONV.name)


def _quantized_convolution(facts: Facts, node: Node, order: Order) -> Moved | None:
    """A convolution of integers with all that follows it."""
    weight = given(facts, node, 1)
    if weight is None or weight.ndim > 4:
        return None
    return _convolution(facts, node, order, weight, quantized.CONV.name)


def _convolution(facts: Facts, node: Node, order: Order, weight: HostArray, name: str) -> Moved | None:
    """The operator of this name for channels last, with the residual, input 3, in the same order."""
    if weight.ndim not in facts.ranks:
        return None
    if order != last_order(weight.ndim) or not only_output(node):
        return None
    if facts.rank(node.inputs[0]) not in (weight.ndim, None):  # planning says so; as an image it might be broadcast
        return None
    reads = {node.inputs[0]: order}
    if not is_left_out(node, 3):
        rank = facts.rank(node.inputs[3])
        if rank is None or rank > len(order):
            return None
        reads[node.inputs[3]] = order
    attrs = dict(node.attrs)
    if attrs.get("activation", ""):
        spelled = str(attrs["activation"])
        attrs["activation"] = SPELLINGS.get(node.domain, {}).get(spelled, spelled)
    made = Node(name, node.inputs, node.outputs, attrs, "infera", node.name)
    return Moved((made,), reads, {node.outputs[0]: order})


def _twin(facts: Facts, node: Node, order: Order) -> Moved | None:
    """An operator that there is for channels last."""
    if not is_last(order) or not only_output(node):
        return None
    return simple(replace(node, op=f"{node.op}{channels_last.SUFFIX}", domain="infera", opset=0), order)


def _batch_norm(facts: Facts, node: Node, order: Order) -> Moved | None:
    training = node.attrs.get("training_mode", 0) or not node.attrs.get("spatial", 1)
    kept = {k: v for k, v in node.attrs.items() if k == "epsilon"}
    return None if training else _twin(facts, replace(node, attrs=kept), order)


def _quantized_mean(facts: Facts, node: Node, order: Order) -> Moved | None:
    if not is_last(order) or node.attrs.get("channels_last", 0):
        return None
    return simple(with_attrs(node, channels_last=1), order)


def _quantized_sum(facts: Facts, node: Node, order: Order) -> Moved | None:
    """com.microsoft.QLinearAdd: images of one rank, with single scales."""
    operands = [node.inputs[0], node.inputs[3]]
    return simple(node, order, operands) if all(facts.rank(v) == len(order) for v in operands) else None


RULES: Mapping[str, Rule] = {
    **permute_axes.RULES,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys((moved.first.name for moved in (*channels_last.POOLS, LRN, CONV_TRANSPOSE)), _twin),
    "BatchNormalization": _batch_norm,
    "com.microsoft.QLinearGlobalAveragePool": _quantized_mean,
    "com.microsoft.QLinearAdd": _quantized_sum,
}
"""By qualified name. What an operator without a rule reads has its axes in their own order."""

CONVOLUTIONS: Mapping[str, Rule] = {
    **dict.fromkeys(("Conv", "infera.FusedConv", "com.microsoft.FusedConv"), convolution),
    "infera.QuantizedConv": _quantized_convolution,
}
"""Operators for whose sake tensors are put in another order."""
