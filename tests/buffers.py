"""What a kernel is bound to in tests: poisoned outputs and scratch, guard bytes around every array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import Launcher
from infera_gpu.spec import TensorSpec

GUARD = 64
PATTERN = 0xA5
POISON = 0xFF
"""As bytes of a float this is a NaN."""


class Guarded:
    """A dense array with guard bytes before and after it."""

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._raw = np.full(nbytes + 2 * GUARD, PATTERN, np.uint8)
        self._inner = self._raw[GUARD : GUARD + nbytes]
        self.array: HostArray = self._inner.view(dtype).reshape(tuple(shape))
        self.poison()

    def poison(self) -> None:
        """Makes every element one that no kernel writes: NaN, or all bits set."""
        self._inner[...] = POISON

    def check(self, what: str) -> None:
        """Raises AssertionError where something was written outside the array."""
        for guard, side in ((self._raw[:GUARD], "before"), (self._raw[self._raw.size - GUARD :], "after")):
            assert (guard == PATTERN).all(), f"{what}: the kernel wrote {side} the array"


class GuardedBuffers:
    """`infera_gpu.op.Buffers` over guarded arrays. `values` are the inputs that are constant."""

    def __init__(
        self,
        ins: Sequence[HostArray | None],
        specs: Sequence[TensorSpec],
        values: Sequence[HostArray | None],
        *,
        strided: bool = False,
        inplace: int | None = None,
    ) -> None:
        self.xp: Any = np
        self._values = tuple(values)
        self._out = [Guarded(s.dims, s.dtype) for s in specs]
        self._scratch: list[Guarded] = []
        self._inplace = inplace
        self._source = None if inplace is None else ins[inplace]
        self.outs: tuple[HostArray, ...] = tuple(g.array for g in self._out)
        self.ins: tuple[HostArray | None, ...] = tuple(
            self.outs[0] if i == inplace else _read_only(x, strided=strided) for i, x in enumerate(ins)
        )

    @property
    def launcher(self) -> Launcher:
        raise AssertionError("a kernel for NumPy asked for a Triton launcher")

    def scratch(self, shape: Sequence[int], dtype: Any = np.float32) -> HostArray:
        self._scratch.append(Guarded(shape, dtype))
        return self._scratch[-1].array

    def pack(self, i: int, tag: str, build: Callable[[HostArray], HostArray]) -> HostArray:
        value = self._values[i]
        assert value is not None, f"pack('{tag}') of input {i}, which is not constant"
        return build(value)

    def prepare(self, wrong: Sequence[HostArray]) -> None:
        """Before a run: scratch poisoned, outputs holding `wrong` values, the input that is overwritten restored."""
        for g in self._scratch:
            g.poison()
        for out, bad in zip(self.outs, wrong, strict=True):
            np.copyto(out, bad)
        if self._source is not None:
            np.copyto(self.outs[0], self._source)

    def check(self) -> None:
        """After a run: nothing was written outside the arrays."""
        for i, g in enumerate(self._out):
            g.check(f"output {i}")
        for i, g in enumerate(self._scratch):
            g.check(f"scratch {i}")


def _read_only(x: HostArray | None, *, strided: bool) -> HostArray | None:
    if x is None:
        return None
    if strided and x.ndim:
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype, order="F")
        copy = wide[..., ::2]
        copy[...] = x
    else:
        copy = np.array(x, order="C")
    copy.flags.writeable = False
    return copy
