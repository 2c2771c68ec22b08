"""Nodes that planning need not tell apart: what it found out about one holds for the others, in later plans too."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from infera_gpu.errors import UnsupportedOperatorError
from infera_gpu.graph import Attrs, HostArray, Node, version_of
from infera_gpu.op import Op, Registry
from infera_gpu.site import Alike
from infera_gpu.spec import TensorSpec

KEPT = 8192
"""Kinds of nodes that a session remembers, about a kilobyte each; beyond that it forgets all of them."""

SMALL = 16
"""Elements of a constant that count among what a node is; larger ones are like no other, but for ..."""

SMALL_FLOATS = 8
"""... floating-point numbers, of which no more count: weights of so few channels are rare, factors of axes are not."""

LEFT_OUT, UNLIKE = 0, -1
"""Marks of an input that is left out, and of a value that is like no other."""


@dataclass(frozen=True, slots=True, eq=False)
class Sort:
    """What a node is before its inputs are known. `number` is the same for all that are equal; 0: like no other."""

    node: Node
    op: Op
    attrs: Attrs
    opset: int
    number: int


class AlikeNodes:
    """The kinds of nodes that a session has met.

    Values have marks: equal where they have the same spec, are known or not, and where what is known cannot be told
    apart, see op.Kernel. A number is given out once, so that forgetting some of them makes nothing wrong.
    """

    def __init__(self, registry: Registry, opsets: Mapping[str, int], lasting: Sequence[Node] = ()) -> None:
        """`lasting` are nodes that are there as long as this is."""
        self._registry, self._opsets = registry, opsets
        self._lasting = frozenset(map(id, lasting))
        self._numbers = count(1)
        self._numbered: dict[Hashable, int] = {}
        self._sorts: dict[int, Sort] = {}
        self._met: dict[tuple[int, ...], Alike] = {}
        self.met = self._met.get
        """What nodes of a sort over inputs of these marks have in common, if one was met."""

    def sort(self, node: Node) -> Sort:
        """Raises UnsupportedOperatorError, or PlanError for attributes that the operator has not."""
        found = self._sorts.get(id(node))
        if found is None:
            found = self._sort(node)
            if id(node) in self._lasting:
                self._sorts[id(node)] = found
        return found

    def _sort(self, node: Node) -> Sort:
        opset = version_of(node, self._opsets)
        op = self._registry.find(node.domain, node.op, opset)
        if op is None:
            raise UnsupportedOperatorError([(node.qualified, node.name or node.outputs[0])], opset=opset)
        attrs = op.fill(node)
        values, inputs = tuple(attrs.values()), node.inputs
        same = tuple([i and inputs.index(i) for i in inputs])
        key = (id(op), node.domain, node.op, opset, same, tuple(map(bool, node.outputs)), values)
        told_apart = tuple(attrs), tuple(map(type, values)), tuple(map(_zeros, values))
        try:
            number = 0 if node.subgraphs else self._number((*key, *told_apart))
        except TypeError:  # an attribute is an array
            number = 0
        return Sort(node, op, attrs, opset, number)

    def mark(self, spec: TensorSpec, value: HostArray | None = None, *, lasting: bool = False) -> int:
        """That of a value; `lasting` ones are met again in later plans."""
        token: bytes | bool = value is not None
        if value is not None and (value.dtype.kind != "f" or value.size <= SMALL_FLOATS):
            if value.size > SMALL or value.dtype.kind == "O":
                return next(self._numbers) if lasting else UNLIKE
            token = value.tobytes()
        return self._number((spec.shape, spec.dtype, token))

    def clear(self) -> None:
        """Forget all of them."""
        self._sorts.clear()
        self._numbered.clear()
        self._met.clear()

    def _number(self, key: Hashable) -> int:
        found = self._numbered.get(key)
        if found is None:
            if len(self._numbered) >= KEPT:
                self._numbered.clear()
            found = self._numbered[key] = next(self._numbers)
        return found

    def add(self, key: tuple[int, ...], alike: Alike) -> None:
        """Remember what the first of its kind was found to be."""
        if not key[0] or UNLIKE in key:
            return
        if len(self._met) >= KEPT:
            self._met.clear()
        self._met[key] = alike


def _zeros(value: object) -> str:
    """The zeros of an attribute, which are equal, with their signs."""
    values = value if isinstance(value, tuple) else (value,)
    return "".join([str(v) for v in values if isinstance(v, float) and not v])


def are_exact(values: Sequence[HostArray | None]) -> bool:
    """Whether the marks of these values, where they are known, say what their elements are."""
    return not any(v is not None and v.dtype.kind == "f" and v.size > SMALL_FLOATS for v in values)
