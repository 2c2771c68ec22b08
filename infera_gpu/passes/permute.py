"""How operators are computed on tensors whose axes stand in another order: what their rules are made of.

An order says which axis stands where: `stored = Transpose(x, perm=order)`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np

from infera_gpu.graph import JOINT, HostArray, Node, made_name
from infera_gpu.spec import DType, TensorSpec

Order: TypeAlias = tuple[int, ...]


def inverse(order: Order) -> Order:
    """The order that undoes this one."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def ordered_name(value: str, order: Order) -> str:
    """What a value is called whose axes stand in this order."""
    return made_name(value, *order)


def named_order(name: str) -> tuple[str, Order] | None:
    """The value and the order of whose `ordered_name` this may be; None where it is none."""
    parts = name.split(JOINT)
    for start in range(1, len(parts)):
        order = tuple([int(p) for p in parts[start:] if p.isdecimal()])
        if len(order) == len(parts) - start > 1 and sorted(order) == list(range(len(order))):
            return JOINT.join(parts[:start]), order
    return None


def last_order(rank: int) -> Order:
    """The order in which channels, axis 1, stand last."""
    return (0, *range(2, rank), 1)


def is_last(order: Order) -> bool:
    return len(order) > 2 and order == last_order(len(order))


class Facts(Protocol):
    """What a rule may know of values."""

    @property
    def floats(self) -> Container[DType]:
        """The types of numbers whose convolutions and pools are fast with channels last."""
        ...

    @property
    def ranks(self) -> Container[int]:
        """The ranks of images for which that holds."""
        ...

    def rank(self, value: str) -> int | None:
        """None where it is not known."""
        ...

    def example(self, value: str) -> TensorSpec | None:
        """Its type, with an example of its shape; None where that is not known."""
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


def only_output(node: Node) -> bool:
    return not any(node.outputs[1:])


def with_attrs(node: Node, **attrs: Any) -> Node:
    return replace(node, attrs={**node.attrs, **attrs})


def simple(node: Node, order: Order, reads: Sequence[str] | None = None) -> Moved:
    """The node as it stands, over these inputs (input 0 where none are given) in this order."""
    names = node.inputs[:1] if reads is None else reads
    return Moved((node,), dict.fromkeys(names, order), {o: order for o in node.outputs if o})


def with_constants(node: Node, values: Mapping[int, HostArray]) -> tuple[Node, dict[str, HostArray]]:
    """The node with other constants as its inputs of these numbers."""
    inputs = [*node.inputs, *[""] * (max(values, default=0) + 1 - len(node.inputs))]
    made = {}
    for i, value in values.items():
        inputs[i] = made_name(node.outputs[0], "input", i)
        made[inputs[i]] = value
    return node.over(tuple(inputs)), made


def given(facts: Facts, node: Node, i: int) -> HostArray | None:
    """The value of input i where it is constant."""
    return facts.constant(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] else None


def is_left_out(node: Node, i: int) -> bool:
    return len(node.inputs) <= i or not node.inputs[i]


def axes_of(facts: Facts, node: Node, i: int, rank: int) -> tuple[int, ...] | None:
    """Axes, from the attribute or from input i where it is constant, as numbers from 0; None where not known."""
    axes = node.attrs.get("axes")
    if axes is None:
        found = given(facts, node, i)
        axes = None if found is None else found.reshape(-1).tolist()
    if axes is None or not all(-rank <= a < rank for a in axes):
        return None
    return tuple(int(a) % rank for a in axes)


def with_axes(node: Node, i: int, axes: Sequence[int]) -> tuple[Node, dict[str, HostArray]]:
    """The node with other axes, where it had them: in the attribute or in input i."""
    if "axes" in node.attrs:
        return with_attrs(node, axes=tuple(axes)), {}
    return with_constants(node, {i: np.array(axes, np.int64)})


def without(order: Order, dropped: Sequence[int]) -> Order:
    """The order of the axes that are left."""
    kept = [axis for axis in range(len(order)) if axis not in dropped]
    return tuple(kept.index(axis) for axis in order if axis in kept)
