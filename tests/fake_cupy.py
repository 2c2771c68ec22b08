"""Enough of CuPy, over NumPy, to run the CUDA device without a GPU: memory with addresses, streams with a log.

It shows what the device asks CuPy for and in which order. It shows nothing about CuPy or a GPU.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np


class ndarray(np.ndarray):
    """An array in "device" memory."""

    def __new__(cls, shape: Sequence[int], dtype: Any = float, memptr: Any = None, strides: Any = None) -> ndarray:
        block, offset = (np.empty(0, np.uint8), 0) if memptr is None else (memptr.block, memptr.offset)
        return np.ndarray.__new__(cls, tuple(shape), dtype, block.data, offset, strides)

    @property
    def device(self) -> Any:
        return types.SimpleNamespace(id=0)

    def set(self, host: np.ndarray[Any, Any], stream: Stream) -> None:
        assert not isinstance(host, ndarray)
        stream.log.append(f"h2d {host.nbytes}")
        np.copyto(self, host)

    def get(self, stream: Stream, order: str = "C", out: Any = None, blocking: bool = True) -> Any:
        assert not isinstance(out, ndarray)
        stream.log.append(f"d2h {self.nbytes}")
        np.copyto(out, self)
        return out


class Memory:
    def __init__(self, nbytes: int) -> None:
        self.block = np.empty(nbytes, np.uint8)


class MemoryPointer:
    def __init__(self, memory: Memory, offset: int) -> None:
        self.memory, self.block, self.offset = memory, memory.block, offset

    def __add__(self, by: int) -> MemoryPointer:
        return MemoryPointer(self.memory, self.offset + by)


class Stream:
    """A stream that logs what is put on it."""

    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr, self.log, self.active = 1, [], 0  # type: ignore[var-annotated]

    def __enter__(self) -> Stream:
        self.active += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.active -= 1

    def synchronize(self) -> None:
        self.log.append("sync")


class Device:
    """A context that can be entered again."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def module(*, gpus: int = 1, free: int = 1 << 30, error: Exception | None = None) -> types.ModuleType:
    """A module to stand in for cupy on a machine with `gpus` GPUs, or with a driver that fails with `error`."""

    def count() -> int:
        if error:
            raise error
        return gpus

    fake = types.ModuleType("cupy")
    fake.__dict__.update(
        {name: getattr(np, name) for name in np.__all__ if name != "ndarray"},
        ndarray=ndarray,
        asarray=lambda a: np.array(a).view(ndarray),
        cuda=types.SimpleNamespace(
            Device=Device,
            Stream=Stream,
            Memory=Memory,
            MemoryPointer=MemoryPointer,
            alloc_pinned_memory=lambda n: bytearray(n),
            runtime=types.SimpleNamespace(getDeviceCount=count, memGetInfo=lambda: (free, 1 << 31)),
        ),
    )
    return fake
