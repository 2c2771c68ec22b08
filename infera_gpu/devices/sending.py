"""What worker processes are told: the calls of a region, where all of them can be."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from types import BuiltinMethodType, MethodDescriptorType
from typing import Any

import numpy as np

from infera_gpu.devices.shared import SharedMemory
from infera_gpu.op import Call
from infera_kernels.cpu.process import Told, ufunc

SHARED_ABOVE = 1 << 16
"""Bytes of a constant from which on it lies in shared memory; smaller ones are sent."""

FEW_CALLS = 8
"""Threads make the parts of a region that no process knows yet, where each is of so few calls: more of them meet at the
interpreter's lock too often to gain anything."""

_NUMPYS = type(np.copyto)
"""Of functions of NumPy's that are written in C."""


class Unsendable(Exception):
    """What no process can be told."""


class _Writer(pickle.Pickler):
    """Writes calls; arrays in shared memory are named by where they lie. Others are taken for constants: large ones are
    copied there, small ones go along, and workers cannot write to either."""

    def __init__(self, memory: SharedMemory) -> None:
        self.data = BytesIO()
        super().__init__(self.data, pickle.HIGHEST_PROTOCOL)
        self._memory = memory

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Told):
            return value.function
        if not isinstance(value, np.ndarray):
            return None
        place = self._memory.place_of(value)
        if place is not None:
            return place, value.shape, value.dtype, value.strides, value.flags.writeable
        if value.dtype.hasobject:
            raise Unsendable
        if value.nbytes >= SHARED_ABOVE:
            place = self._memory.place_of_copy(value)
            return place, value.shape, value.dtype, value.strides, False
        return value.tobytes(), value.shape, value.dtype, None, False

    def reducer_override(self, value: Any) -> Any:
        """A ufunc by its name in NumPy: pickle would take the first module that has one of this name."""
        if not isinstance(value, np.ufunc):
            return NotImplemented
        name = str(value.__name__)
        if getattr(np, name, None) is not value:
            raise Unsendable
        return ufunc, (name,)


def _sendable(fn: Callable[..., object]) -> bool:
    """Whether a process may be told to call it: a function of NumPy's, a compiled one, or one that says so."""
    if isinstance(fn, partial):
        return _sendable(fn.func)
    if isinstance(fn, BuiltinMethodType):
        return isinstance(fn.__self__, np.ufunc)
    return (
        isinstance(fn, np.ufunc | MethodDescriptorType | _NUMPYS)
        or hasattr(fn, "told")
        or getattr(fn, "sendable", False)
    )


def _as_told(fn: Callable[..., object], args: tuple[Any, ...]) -> Call:
    """The call as it is sent: what numba compiled is named by where the worker finds it."""
    told = getattr(fn, "told", None)
    return fn if told is None else Told(told(args)), args


class Region:
    """The parts of a step, at most `threads` of which are made at a time; `otherwise(parts, threads)` has threads make
    them."""

    __slots__ = ("__weakref__", "few", "name", "otherwise", "parts", "runs", "sent", "workers")

    def __init__(self, parts: Sequence[Sequence[Call]], threads: int, otherwise: Callable[..., None]) -> None:
        self.parts, self.otherwise = parts, otherwise
        self.workers = min(len(parts), threads) - 1
        self.few = max(map(len, parts)) <= FEW_CALLS
        self.runs = 0
        self.name = -1
        self.sent: object = None
        """The workers that know it; False where they cannot."""

    def alone(self) -> None:
        """Make the calls in this process."""
        if self.few:
            self.otherwise(self.parts, self.workers + 1)
            return
        self.make(0, 1)

    def make(self, i: int, step: int) -> None:
        """Every `step`-th part from the i-th on."""
        for part in self.parts[i::step]:
            for fn, args in part:
                fn(*args)


def message(memory: SharedMemory, gone: Sequence[int], region: Region, part: int, number: int) -> bytes:
    """What one of `number` processes is told: which regions it may forget, and every `number`-th part of this one from
    `part` on. Raises Unsendable or PicklingError."""
    calls = [call for calls in region.parts[part::number] for call in calls]
    if not all(_sendable(fn) for fn, _ in calls):
        raise Unsendable
    writer = _Writer(memory)
    writer.dump((gone, region.name, [_as_told(*call) for call in calls]))
    return writer.data.getvalue()
