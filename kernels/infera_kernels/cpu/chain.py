"""Elementwise operators one after the other on a block, before the next block: intermediates never leave the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import BLOCK, copy, cut

LARGE = 1 << 18
"""Elements of a block: a few operands lie in a level 3 cache, and a call's fixed cost is nothing beside its work.
Smaller blocks gain nothing where level 2 and 3 are about as fast as one ufunc."""

Emit: TypeAlias = Callable[[Sequence[Array], Array, Scratch], Sequence[Call]]
"""`emit(ins, out, scratch)`: the calls of an operator on blocks."""

_OUT = -1
"""The register that is the output's own block."""


@dataclass(frozen=True, slots=True)
class Step:
    """An operator of a chain: `args` count the chain's operands, and after them its steps. `inplace` are the arguments
    whose memory the result may take over."""

    emit: Emit
    args: tuple[int, ...]
    inplace: tuple[int, ...]

    def may_overwrite(self, arg: int) -> bool:
        """Whether an argument's memory may be the result's, wherever it stands."""
        return all(p in self.inplace for p, a in enumerate(self.args) if a == arg)


@dataclass
class _Reused:
    """Scratch for one step after the other: every request of one number and type gets the same memory."""

    scratch: Scratch
    size: int
    found: dict[tuple[int, Any], Array] = field(default_factory=dict)
    count: int = 0

    def again(self) -> _Reused:
        """For the next step."""
        self.count = 0
        return self

    def __call__(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        key, size = (self.count, np.dtype(dtype)), math.prod(shape)
        if key not in self.found:
            self.found[key] = self.scratch((max(min(self.size, BLOCK), size),), dtype)
        self.count += 1
        return self.found[key][:size].reshape(tuple(shape))


def _registers(steps: Sequence[Step], operands: int) -> list[int]:
    """The register of each step's result; one is free again after the last step that reads it.

    The output's block is one of them once operand 0, whose memory it may be, is not read any more. The last step's
    register is `_OUT`, or another where it must not overwrite what it reads.
    """
    last = {arg: i for i, step in enumerate(steps) for arg in step.args}
    free: list[int] = []
    held: list[int] = []
    count = 0
    for i, step in enumerate(steps):
        if i == last.get(0, 0) and step.may_overwrite(0):
            free.append(_OUT)
        dying = {a for a in step.args if a >= operands and last[a] == i}
        mine = {held[a - operands] for a in dying if step.may_overwrite(a)}
        usable = mine.union(free)
        if _OUT in usable and (i == len(steps) - 1 or not mine):
            held.append(_OUT)
        elif usable:
            held.append(max(mine or usable))
        else:
            held.append(count)
            count += 1
        free = [r for r in {*free, *(held[a - operands] for a in dying)} if r != held[-1]]
        if i == last.get(0, 0) and not step.may_overwrite(0):
            free.append(_OUT)
    return held


def chain(
    steps: Sequence[Step],
    ins: Sequence[Array],
    out: Array,
    scratch: Scratch,
    *,
    size: int = LARGE,
    within: Callable[[int, int], bool] = lambda i, count: True,
) -> list[Call]:
    """The last step's result in `out`; operands broadcast to it, and `out` may be operand 0.

    `size` is that of a block. `within(i, blocks)` says which blocks are made, so that parts of the work can run beside
    each other.
    """
    if not out.size:
        return []
    held, size = _registers(steps, len(ins)), min(out.size, size)
    memory = {r: scratch((size,), out.dtype) for r in sorted(set(held)) if r != _OUT}
    reused = _Reused(scratch, size)
    calls: list[Call] = []
    blocks = list(cut([out], ins, size))
    for i, ((target,), operands) in enumerate(blocks):
        if not within(i, len(blocks)):
            continue
        values: list[Array] = list(operands)
        for step, register in zip(steps, held, strict=True):
            made = target if register == _OUT else memory[register][: target.size].reshape(target.shape)
            calls += step.emit([values[a] for a in step.args], made, reused.again())
            values.append(made)
        if held[-1] != _OUT:
            calls.append(copy(target, values[-1]))
    return calls
