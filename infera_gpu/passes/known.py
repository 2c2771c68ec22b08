"""What rules say of a value's type before any shape is known, and what they may ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from infera_gpu.graph import HostArray, Node
from infera_gpu.passes.sizes import Sizes, is_lesser
from infera_gpu.spec import Dim, DType, TensorSpec

MAX_RANK = 64
"""Of arrays, as NumPy has it: a file may ask for more."""

Known: TypeAlias = TensorSpec | None


class Asked(Protocol):
    """What rules ask of `Facts`."""

    def constant(self, value: str) -> HostArray | None: ...

    def sizes(self, value: str) -> Sizes | None: ...


Rule: TypeAlias = Callable[[Asked, Node, Sequence[Known]], Known]
"""The type of output 0, from the node and what is known of its inputs. It need not refuse what is wrong."""


def unranked(spec: Known, dtype: DType | None = None) -> Known:
    return None if spec is None else TensorSpec((), dtype or spec.dtype, ranked=False)


def with_dtype(spec: Known, dtype: DType) -> TensorSpec:
    return TensorSpec((), dtype, ranked=False) if spec is None else TensorSpec(spec.shape, dtype, spec.ranked)


def broadcast(shapes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The shape that shapes broadcast to, as far as it is known."""
    rank = max(map(len, shapes))
    found: list[Dim] = []
    for column in zip(*((1,) * (rank - len(s)) + s for s in shapes), strict=True):
        wide = {d for d in column if d != 1}
        wide = {d for d in wide if not is_lesser(d, wide)}  # who has less than another fits beside it where it has one
        sizes = [d for d in wide if isinstance(d, int)]
        if not wide:
            found.append(1)
        elif sizes or len(wide) > 1:
            found.append(sizes[0] if len(sizes) == 1 else None)  # two that differ do not: running tells so
        else:
            found.append(wide.pop())
    return tuple(found)
