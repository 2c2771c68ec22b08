"""Enough of cuBLASLt, over NumPy, to compute what its descriptors say: column-major matrices at addresses of the host.

It refuses what the library refuses by its header: leading dimensions below the rows, and pointers and a workspace that
are aligned less than the algorithm wants. It shows nothing about the library's speed or a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from infera_kernels.launch.cublaslt import CublasLt

INVALID, UNSUPPORTED = 7, 15
TYPES = {0: np.dtype(np.float32), 2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16)}


@dataclass
class Layout:
    """cublasLtMatrixLayout_t"""

    type: int
    rows: int
    columns: int
    line: int
    attributes: dict[int, Any] = field(default_factory=dict)

    def at(self, address: int) -> np.ndarray[Any, Any]:
        """The matrices (batch, rows, columns) at an address."""
        dtype, batch, step = TYPES[self.type], self.attributes.get(5, 1), self.attributes.get(6, 0)
        item = dtype.itemsize
        reach = (batch - 1) * step + (self.columns - 1) * self.line + self.rows
        memory = (ctypes.c_uint8 * (reach * item)).from_address(address)
        return np.ndarray((batch, self.rows, self.columns), dtype, memory, 0, (step * item, item, self.line * item))


@dataclass
class Operation:
    """cublasLtMatmulDesc_t"""

    compute: int
    scale: int
    attributes: dict[int, Any] = field(default_factory=dict)


def value_of(argument: Any) -> Any:
    """What a C argument of ctypes' holds, or points to."""
    argument = getattr(argument, "_obj", argument)
    return getattr(argument, "value", argument)


class FakeCublasLt:
    """Functions by name. `asked` are the products that were computed; `status`, by name, is what a function returns
    instead of working."""

    def __init__(self) -> None:
        self.asked: list[Operation] = []
        self.alive: dict[int, Any] = {}
        self.status: dict[str, int] = {}
        self.heuristics = 0
        self._numbers = itertools.count(1)

    def __getitem__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if status := self.status.get(name, 0):
                return status
            found: Any = getattr(self, name.removeprefix("cublasLt"))(*args)
            return int(found or 0)

        return call  # functions of ctypes' have a `restype`, as those of Python may

    def _new(self, pointer: Any, made: Any) -> None:
        pointer._obj.value = next(self._numbers)
        self.alive[pointer._obj.value] = made

    def GetVersion(self) -> int:
        return 130100  # 13.1.0

    def Create(self, pointer: Any) -> None:
        self._new(pointer, "handle")

    def MatmulDescCreate(self, pointer: Any, compute: int, scale: int) -> None:
        self._new(pointer, Operation(compute, scale))

    def MatmulDescSetAttribute(self, made: Any, attribute: int, value: Any, size: Any) -> None:
        assert ctypes.sizeof(value._obj) == value_of(size)
        self.alive[made.value].attributes[attribute] = value_of(value)

    def MatrixLayoutCreate(self, pointer: Any, type: int, rows: Any, columns: Any, line: Any) -> int:
        made = Layout(type, *map(value_of, (rows, columns, line)))
        self._new(pointer, made)
        return INVALID if made.line < made.rows else 0

    MatrixLayoutSetAttribute = MatmulDescSetAttribute

    def MatmulPreferenceCreate(self, pointer: Any) -> None:
        self._new(pointer, Operation(0, 0))

    MatmulPreferenceSetAttribute = MatmulDescSetAttribute

    def MatmulDescDestroy(self, made: Any) -> None:
        del self.alive[made.value]

    Destroy = MatrixLayoutDestroy = MatmulPreferenceDestroy = MatmulDescDestroy

    def MatmulAlgoGetHeuristic(
        self,
        handle: Any,
        operation: Any,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        wanted: Any,
        most: int,
        found: Any,
        count: Any,
    ) -> None:
        """The algorithm notes what pointers must be aligned to, the bias included."""
        assert self.alive[handle.value] == "handle"
        assert most == 1
        self.heuristics += 1
        attributes = self.alive[wanted.value].attributes
        assert attributes[3] == 2  # no sums in the output's type
        found._obj.algorithm[:4] = [attributes[i] for i in (5, 6, 7, 8)]
        found._obj.workspace, found._obj.state, count._obj.value = attributes[1], 0, 1

    def Matmul(
        self, handle: Any, operation: Any, alpha: Any, a: Any, a_layout: Any, b: Any, b_layout: Any, beta: Any, c: Any,
        c_layout: Any, d: Any, d_layout: Any, algorithm: Any, workspace: Any, nbytes: Any, stream: Any,
    ) -> int:  # fmt: skip
        made, pointers = self.alive[operation.value], [value_of(p) for p in (a, b, c, d)]
        layouts = [self.alive[value_of(x)] for x in (a_layout, b_layout, c_layout, d_layout)]
        if any(at % aligned for at, aligned in zip(pointers, algorithm._obj.algorithm[:4], strict=True)):
            return INVALID
        if value_of(workspace) % 256 or value_of(nbytes) != algorithm._obj.workspace:
            return INVALID
        left, right, added, out = (x.at(p) for x, p in zip(layouts, pointers, strict=True))
        left, right = (
            (np.swapaxes(x, 1, 2) if made.attributes[i] else x).astype(np.float64) for i, x in ((3, left), (4, right))
        )
        if left.shape[2] != right.shape[1] or out.shape[1:] != (left.shape[1], right.shape[2]):
            return INVALID
        total = value_of(alpha) * (left @ right)
        if value_of(beta):
            total += value_of(beta) * added.astype(np.float64)
        epilogue = made.attributes[7]
        if epilogue & 4:
            memory = (ctypes.c_uint8 * (out.shape[1] * out.itemsize)).from_address(made.attributes[8])
            total += np.ndarray((out.shape[1], 1), out.dtype, memory).astype(np.float64)
        if epilogue & 2:
            total = np.maximum(total, 0)
        if epilogue & 32:
            total *= 0.5 * (1 + np.tanh(0.7978845608028654 * (total + 0.044715 * total**3)))
        out[...] = total
        self.asked.append(made)
        return 0


def with_library(launcher: Any, library: FakeCublasLt, nbytes: int = 1 << 12) -> Any:
    """The launcher, with cuBLASLt, which works in so many bytes."""
    launcher.library = CublasLt(library, 0, 0x50)
    launcher.target = replace(launcher.target, library_bytes=nbytes)
    return launcher
