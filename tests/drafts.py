"""A graph in the making, to which steps add nodes that fit what is there."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
LARGEST = 600
"""Elements of a value."""

Shape: TypeAlias = tuple[int, ...]
Value: TypeAlias = tuple[int, Shape]
"""An element type and a shape."""


class Unfit(Exception):
    """No value fits this step."""


class Draft:
    """A graph in the making. `values` are all that a node may read; in a branch, those around it too."""

    def __init__(
        self,
        rng: random.Random,
        steps: Sequence[Callable[[Draft], None]],
        values: Mapping[str, Value] | None = None,
        prefix: str = "",
    ) -> None:
        self.rng, self.steps, self.prefix = rng, steps, prefix
        self.numbers = np.random.default_rng(rng.getrandbits(32))
        self.values: dict[str, Value] = dict(values or {})
        self.outer = frozenset(self.values)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.unsized: list[str] = []
        """Values whose shapes depend on data: graph outputs, but no step's inputs."""

    @property
    def is_branch(self) -> bool:
        return bool(self.prefix)

    def pick(self, kinds: Sequence[int] = (FLOAT,), fits: Callable[[Shape], bool] = lambda shape: True) -> str:
        """A value of one of the element types, a recent one more often than not."""
        kind = self.rng.choice(kinds)
        found = [name for name, (k, shape) in self.values.items() if k == kind and fits(shape)]
        if not found:
            raise Unfit
        return self.rng.choice(found[-6:] if self.rng.random() < 0.6 else found)

    def shape(self, name: str) -> Shape:
        return self.values[name][1]

    def kind(self, name: str) -> int:
        return self.values[name][0]

    def maybe(self, chance: float = 0.5) -> bool:
        return self.rng.random() < chance

    def name(self) -> str:
        return f"{self.prefix}v{len(self.nodes)}_{len(self.constants)}_{len(self.values)}"

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"{self.name()}_c"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def normal(self, *shape: int) -> str:
        return self.constant(self.numbers.standard_normal(shape), np.float32)

    def node(self, op: str, ins: Sequence[str], outs: int = 1, **attrs: Any) -> list[str]:
        """A node whose outputs no step reads unless they are given a shape."""
        names = [f"{self.name()}_{i}" for i in range(outs)]
        self.nodes.append(helper.make_node(op, ins, names, **attrs))
        return names

    def emit(self, op: str, ins: Sequence[str], shape: Shape, kind: int = FLOAT, **attrs: Any) -> str:
        """A node of one output that steps may read."""
        if math.prod(shape) > LARGEST:
            raise Unfit
        (name,) = self.node(op, ins, **attrs)
        self.values[name] = (kind, shape)
        return name

    def step(self) -> None:
        """One of the steps, another where it does not fit."""
        for _ in range(5):
            with suppress(Unfit):
                self.rng.choice(self.steps)(self)
                return


def joined(*shapes: Shape) -> Shape:
    """The broadcast shape. Raises Unfit where there is none."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise Unfit from None


def joins(shape: Shape) -> Callable[[Shape], bool]:
    def fits(other: Shape) -> bool:
        try:
            return math.prod(np.broadcast_shapes(shape, other)) <= LARGEST
        except ValueError:
            return False

    return fits


def filled(shape: Shape) -> bool:
    return len(shape) > 0 and 0 not in shape
