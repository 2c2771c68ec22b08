"""Reshape and Flatten of a tensor that is stored with its axes in another order, to one that is stored so too.

x is Transpose(stored, perm), and what is made is Transpose(Reshape(x), order). Where shapes allow it that is one
Reshape of what is stored: `passes/layout.py` expects it, and a plan finds out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.layout import contiguous_strides
from infera_gpu.op import REQUIRED, Case, Expansion, Op, Site, f32
from infera_gpu.ops import shape
from infera_gpu.ops._families import i64
from infera_gpu.spec import Array, TensorSpec

SUFFIX = "Stored"
"""What the name of ONNX's operator gets."""


def _permuted(dims: Sequence[int], perm: Sequence[int]) -> tuple[int, ...]:
    return tuple(dims[axis] for axis in perm)


def reshaped(stored: Sequence[int], perm: Sequence[int], dims: Sequence[int]) -> HostArray | None:
    """Transpose(stored, perm) with these dimensions, over no memory: for its strides. None where that takes a copy."""
    dense = as_strided(np.empty(1, np.int8), tuple(stored), contiguous_strides(tuple(stored), 1), writeable=False)
    try:
        return dense.transpose(perm).reshape(tuple(dims), copy=False)
    except ValueError:
        return None


def order_of(stored: Sequence[int], perm: Sequence[int], dims: Sequence[int]) -> tuple[int, ...] | None:
    """The order in which Transpose(stored, perm) with these dimensions lies dense; None where it takes a copy."""
    made = reshaped(stored, perm, dims) if math.prod(stored) else None
    return None if made is None else tuple(sorted(range(made.ndim), key=lambda axis: -made.strides[axis]))


@dataclass(frozen=True)
class Reordered:
    """Reshape or Flatten, `first`, of Transpose(input 0, perm), stored in an order."""

    first: Op

    def _site(self, site: Site) -> Site:
        """The same node as `first` would meet it."""
        spec, perm = site.spec(0), site.attrs["perm"]
        if sorted(perm) != list(range(spec.ndim)):
            raise site.fail(f"perm {list(perm)} does not permute the axes of {spec}")
        given = TensorSpec(_permuted(spec.dims, perm), spec.dtype)
        node = replace(site.node, op=self.first.name, domain="")
        return replace(site, node=node, ins=(given, *site.ins[1:]), outs=())

    def _dims(self, site: Site) -> tuple[int, ...]:
        """What `first` makes. Raises PlanError where `order` does not fit it."""
        (made,) = self.first.infer(self._site(site))
        assert made is not None
        if sorted(site.attrs["order"]) != list(range(made.ndim)):
            raise site.fail(f"order {list(site.attrs['order'])} does not permute the axes of {made}")
        return made.dims

    def infer(self, site: Site) -> Sequence[TensorSpec]:
        return (TensorSpec(_permuted(self._dims(site), site.attrs["order"]), site.spec(0).dtype),)

    def compute(self, xp: Any, site: Site, x: Array, *_: Array) -> Array:
        made = x.transpose(site.attrs["perm"]).reshape(self._dims(site))
        return xp.ascontiguousarray(made.transpose(site.attrs["order"]))

    def expand(self, site: Site) -> Expansion:
        """One Reshape, or `first` between Transposes."""
        node, perm, order, dims = site.node, site.attrs["perm"], site.attrs["order"], self._dims(site)
        made = reshaped(site.spec(0).dims, perm, dims) if site.spec(0).size else None
        if made is not None and made.transpose(order).flags.c_contiguous:
            target = made_name(node.outputs[0], "dims")
            stored = np.array(_permuted(dims, order), np.int64)
            return Expansion(
                (Node("Reshape", (node.inputs[0], target), node.outputs, name=node.name),), {target: stored}
            )
        before, after = (made_name(node.outputs[0], part) for part in ("before", "after"))
        kept = {k: v for k, v in node.attrs.items() if k not in ("perm", "order")}
        return Expansion(
            (
                Node("Transpose", node.inputs[:1], (before,), {"perm": perm}, name=before),
                Node(self.first.name, (before, *node.inputs[1:]), (after,), kept, name=node.name),
                Node("Transpose", (after,), node.outputs, {"perm": order}, name=after),
            )
        )

    def op(self, *cases: Case) -> Op:
        attrs = {**self.first.attrs, "perm": REQUIRED, "order": REQUIRED}
        return Op(
            f"{self.first.name}{SUFFIX}", 1, self.infer, self.compute, cases, attrs, "infera",
            values=self.first.values, expand=self.expand,
        )  # fmt: skip


_LAST = (0, 3, 1, 2)

OPS: tuple[Op, ...] = (
    Reordered(next(o for o in shape.OPS if (o.name, o.since) == ("Reshape", 14))).op(
        Case("channels-split", (f32(2, 5, 7, 6), i64(0, 3, 2, 5, 7)), {"perm": _LAST, "order": (0, 3, 4, 1, 2)}),
        Case(
            "channels-merged", (f32(2, 5, 7, 3, 2), i64(0, -1, 5, 7)), {"perm": (0, 3, 4, 1, 2), "order": (0, 2, 3, 1)}
        ),
        Case("pixels", (f32(2, 5, 7, 6), i64(2, 6, -1)), {"perm": _LAST, "order": (0, 2, 1)}),
        Case("copied", (f32(2, 5, 7, 6), i64(-1, 7)), {"perm": _LAST, "order": (1, 0)}),
        Case("empty", (f32(0, 5, 7, 6), i64(0, 6, 35)), {"perm": _LAST, "order": (0, 2, 1)}),
    ),
    Reordered(next(o for o in shape.OPS if o.name == "Flatten")).op(
        Case("pixel", (f32(2, 1, 1, 6),), {"perm": _LAST, "order": (0, 1)}),
        Case("copied", (f32(2, 5, 7, 6),), {"perm": _LAST, "order": (0, 1)}),
    ),
)  # fmt: skip
