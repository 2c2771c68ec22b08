"""What a graph computes of a size, for each remainder that the size leaves when it is divided by a number.

A size n is written as number · t + remainder. Whatever exporters make of it by adding, multiplying and dividing by the
number (padding to a multiple, cropping what was padded) is a · t + b then, exactly, for every n that leaves it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import TypeAlias

from infera_gpu.graph import Node
from infera_gpu.passes.draft import Draft

Line: TypeAlias = tuple[int, int]
"""(a, b): a · t + b."""

DEEP = 64
"""Nodes between the Shape and what is asked for."""


@dataclass(frozen=True)
class Residue:
    """Sizes of this name that leave a remainder when they are divided by a number."""

    draft: Draft
    size: str
    number: int
    remainder: int

    def line(self, value: str, i: int, depth: int = DEEP) -> Line | None:
        """Element i, in row-major order, of integers; None where it is no such line, or that is not known."""
        given, n = self.draft.constants.get(value), self.draft.producers.get(value)
        if given is not None:
            return (0, int(given.reshape(-1)[i])) if given.dtype.kind in "iub" and i < given.size else None
        if n is None or n.domain or not depth:
            return None
        if n.op == "Shape":
            x = self.draft.spec(n.inputs[0])
            dims = x.shape[n.attrs.get("start", 0) : n.attrs.get("end")] if x is not None and x.ranked else ()
            return self.of(dims[i]) if i < len(dims) else None
        if n.op in _COMPUTED:
            return self._computed(n, i, depth)
        found = _place(self.draft, n, value, i)
        return None if found is None else self.line(*found, depth - 1)

    def of(self, size: int | str | None) -> Line | None:
        """A dimension."""
        if size == self.size:
            return self.number, self.remainder
        return (0, size) if isinstance(size, int) else None

    def _computed(self, n: Node, i: int, depth: int) -> Line | None:
        lines: list[Line] = []
        for operand in n.inputs:
            count = _count(self.draft, operand)
            line = None if count is None else self.line(operand, 0 if count == 1 else i, depth - 1)
            if line is None:
                return None
            lines.append(line)
        return _COMPUTED[n.op](*lines)


def _count(draft: Draft, value: str) -> int | None:
    spec = draft.spec(value)
    dims = [d for d in spec.shape if isinstance(d, int)] if spec is not None and spec.ranked else None
    return prod(dims) if dims is not None and spec is not None and len(dims) == spec.ndim else None


def _is_vector(draft: Draft, value: str) -> bool:
    spec = draft.spec(value)
    return spec is not None and spec.ranked and spec.ndim == 1


def _place(draft: Draft, n: Node, value: str, i: int) -> tuple[str, int] | None:
    """Where an element of what a node moves comes from."""
    if n.op in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
        return n.inputs[0], i
    axis = int(n.attrs.get("axis", 0))
    if n.op == "Concat":
        for part in n.inputs:
            count = _count(draft, part)
            if count is None or axis not in (0, *((-1,) if _is_vector(draft, part) else ())):
                return None
            if i < count:
                return part, i
            i -= count
    if not _is_vector(draft, n.inputs[0]):
        return None
    if n.op == "Split":
        for part in n.outputs:
            if part == value:
                return n.inputs[0], i + sum(_count(draft, p) or 0 for p in n.outputs[: n.outputs.index(part)])
    constants = [draft.constants.get(v) for v in n.inputs[1:]]
    if n.op == "Gather" and constants[0] is not None and constants[0].ndim < 2:
        return n.inputs[0], int(constants[0].reshape(-1)[i])
    whole = _count(draft, n.inputs[0])
    if n.op == "Slice" and whole is not None and len(constants) > 1 and all(c is not None for c in constants):
        start, end, _, step = [*(int(c.reshape(-1)[0]) for c in constants if c is not None), 0, 1][:4]
        kept = range(whole)[slice(start, end, step if len(constants) > 3 else 1)]
        return (n.inputs[0], kept[i]) if i < len(kept) else None
    return None


def _times(a: Line, b: Line) -> Line | None:
    return (a[0] * b[1], a[1] * b[1]) if not b[0] else _times(b, a) if not a[0] else None


def _over(a: Line, b: Line) -> Line | None:
    """Integers are rounded towards zero: down, where they are not negative."""
    if b[0] or b[1] < 1 or min(a) < 0 or a[0] % b[1]:
        return None
    return a[0] // b[1], a[1] // b[1]


def _equal(a: Line, b: Line) -> Line | None:
    return None if a[0] != b[0] else (0, int(a[1] == b[1]))


def _larger(a: Line, b: Line) -> Line | None:
    return (a[0], max(a[1], b[1])) if a[0] == b[0] else None


_COMPUTED: Mapping[str, Callable[..., Line | None]] = MappingProxyType(
    {
        "Add": lambda a, b: tuple(map(operator.add, a, b)),
        "Sub": lambda a, b: tuple(map(operator.sub, a, b)),
        "Neg": lambda a: (-a[0], -a[1]),
        "Mul": _times,
        "Div": _over,
        "Max": _larger,
        "Equal": _equal,
        "Not": lambda a: (0, 1 - a[1]),
    }
)
