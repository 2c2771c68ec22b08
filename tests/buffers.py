"""What a kernel is bound to in tests: poisoned outputs and scratch, guard bytes around every array."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import Border, Call, Launcher
from infera_gpu.spec import TensorSpec
from infera_kernels.calls import LEAST_NS

GUARD = 64
PATTERN = 0xA5
POISON = 0xFF
"""As bytes of a float this is a NaN."""


Memory: TypeAlias = Callable[[int], HostArray]
"""So many bytes."""


def _private(nbytes: int) -> HostArray:
    return np.empty(nbytes, np.uint8)


class Guarded:
    """An array with guard bytes around it; a `strided` one is a window into a larger one, all of which guards it.

    One of `rows` is too, but its last two axes are contiguous; one of `slices` is one along its last axis alone.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        *,
        strided: bool = False,
        rows: bool = False,
        slices: bool = False,
        memory: Memory = _private,
    ) -> None:
        more = [3] * len(shape) if strided else [0] * len(shape)
        if rows:
            more = [*[3] * (len(shape) - 1), 0]
        if slices:
            more = [*[0] * (len(shape) - 1), 3]
        around = tuple(d + m for d, m in zip(shape, more, strict=True))
        nbytes = int(np.prod(around, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._raw = memory(nbytes + 2 * GUARD)
        self._raw[...] = PATTERN
        whole = self._raw[GUARD : GUARD + nbytes].view(dtype).reshape(around)
        starts = [min(1, m) for m in more]
        window: tuple[Any, ...] = (*(slice(a, a + d) for a, d in zip(starts, shape, strict=True)), ...)
        self.array: HostArray = whole[window]
        marked = np.zeros(around, np.bool_)
        marked[window] = True
        inner = np.repeat(marked.reshape(-1), np.dtype(dtype).itemsize)
        self._inner = np.concatenate([np.zeros(GUARD, np.bool_), inner, np.zeros(GUARD, np.bool_)])
        self.poison()

    def poison(self) -> None:
        """Makes every element one that no kernel writes: NaN, or all bits set."""
        self._raw[self._inner] = POISON

    def check(self, what: str) -> None:
        """Raises AssertionError where something was written outside the array."""
        assert (self._raw[~self._inner] == PATTERN).all(), f"{what}: the kernel wrote outside the array"


class GuardedBuffers:
    """`infera_gpu.op.Buffers` over guarded arrays. `values` are the inputs that are constant.

    The others are poisoned until `fill`, as they are uninitialised memory while a plan is bound. One array given for
    several inputs is one array here.
    """

    def __init__(
        self,
        ins: Sequence[HostArray | None],
        specs: Sequence[TensorSpec],
        values: Sequence[HostArray | None],
        *,
        strided: bool = False,
        strided_out: bool = False,
        rows_out: bool = False,
        slices_out: bool = False,
        border: Border | None = None,
        inplace: int | None = None,
        threads: int = 1,
        least_ns: float = LEAST_NS,
        memory: Memory = _private,
    ) -> None:
        self.xp: Any = np
        self._memory = memory
        self.threads, self.least_ns, self.strict, self.tf32 = threads, least_ns, False, False
        self._values = tuple(values)
        self._out = [
            Guarded(s.dims, s.dtype, strided=strided_out, rows=rows_out, slices=slices_out, memory=memory)
            for s in specs
        ]
        self._scratch: list[Guarded] = []
        self._given = tuple(ins)
        self.outs: tuple[HostArray, ...] = tuple(g.array for g in self._out)
        self._held: list[HostArray | None] = []
        """Each input's memory, writable; None for an input left out."""
        shared: dict[tuple[int, bool], HostArray] = {}
        for i, x in enumerate(ins):
            if x is None or i == inplace:
                self._held.append(None if x is None else self.outs[0])
                continue
            key = id(x), self._is_constant(i)
            if key not in shared:
                shared[key] = _like(x, strided, memory)
                if self._is_constant(i):
                    np.copyto(shared[key], x)
            self._held.append(shared[key])
        self.ins: tuple[HostArray | None, ...] = tuple(
            x if x is None or i == inplace else _read_only(x) for i, x in enumerate(self._held)
        )
        if border is not None:
            self._surround(border)

    def _surround(self, border: Border) -> None:
        """Input 0 with a border around it that the kernel has to set."""
        x = self._given[0]
        assert x is not None
        guarded = Guarded([a + d + b for d, (a, b) in zip(x.shape, border, strict=True)], x.dtype, memory=self._memory)
        self._scratch.append(guarded)
        self._held[0] = guarded.array[tuple(slice(a, a + d) for d, (a, _) in zip(x.shape, border, strict=True))]
        self.ins = (guarded.array, *self.ins[1:])

    def _is_constant(self, i: int) -> bool:
        return i < len(self._values) and self._values[i] is not None

    @property
    def launcher(self) -> Launcher:
        raise AssertionError("a kernel for NumPy asked for a Triton launcher")

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        """Part after part, the last first: nobody may rely on an order."""
        return [call for part in reversed(parts) for call in part]

    def scratch(self, shape: Sequence[int], dtype: Any = np.float32) -> HostArray:
        self._scratch.append(Guarded(shape, dtype, memory=self._memory))
        return self._scratch[-1].array

    def pack(self, i: int, tag: str, build: Callable[[HostArray], HostArray]) -> HostArray:
        value = self._values[i]
        assert value is not None, f"pack('{tag}') of input {i}, which is not constant"
        return build(value)

    def constant(self, value: HostArray) -> HostArray:
        return _read_only(value)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of everything that was asked for."""
        return sum(g.array.nbytes for g in self._scratch)

    def prepare(self, wrong: Sequence[HostArray], ins: Sequence[HostArray | None] | None = None) -> None:
        """Before a run: scratch poisoned, outputs holding `wrong` values, inputs as given, or `ins`."""
        for g in self._scratch:
            g.poison()
        for out, bad in zip(self.outs, wrong, strict=True):
            np.copyto(out, bad)
        self.fill(self._given if ins is None else ins)

    def fill(self, ins: Sequence[HostArray | None]) -> None:
        """Gives the inputs that are not constant their values."""
        for i, (held, x) in enumerate(zip(self._held, ins, strict=True)):
            if held is not None and x is not None and not self._is_constant(i):
                np.copyto(held, x)

    def check(self) -> None:
        """After a run: nothing was written outside the arrays."""
        for i, g in enumerate(self._out):
            g.check(f"output {i}")
        for i, g in enumerate(self._scratch):
            g.check(f"scratch {i}")


def _like(x: HostArray, strided: bool, memory: Memory) -> HostArray:
    """A poisoned array of x's shape and dtype."""
    shape = (*x.shape[:-1], 2 * x.shape[-1]) if strided and x.ndim else x.shape
    raw = memory(math.prod(shape) * x.itemsize)
    raw[...] = POISON
    made: HostArray = np.ndarray(shape, x.dtype, raw, order="F" if strided else "C")
    return made[..., ::2] if strided and x.ndim else made


def _read_only(x: HostArray) -> HostArray:
    view = x.view()
    view.flags.writeable = False
    return view
