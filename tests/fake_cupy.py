"""Enough of CuPy, over NumPy, to run the CUDA device without a GPU: memory with addresses, streams with a log.

It shows what the device asks CuPy for and in which order, refuses what CuPy 14 refuses (arrays that `set` and `get`
cannot copy at once), and counts memory. It shows nothing about CuPy's kernels or a GPU.
"""

from __future__ import annotations

import itertools
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest

from infera_gpu.devices import cuda
from infera_gpu.memory import ALIGN


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


class CUDADriverError(CUDARuntimeError):
    pass


class PoolError(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError"""

    def __init__(self, size: int) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes")
        self._size = size


class _Thread(threading.local):
    """What CuPy keeps for each thread."""

    def __init__(self) -> None:
        self.streams: list[Stream] = [NULL]
        self.allocators: list[Callable[[int], MemoryPointer]] = []


class Vram:
    """How much memory is out, blocks that a pool keeps for later included."""

    def __init__(self, total: int) -> None:
        self.total, self.used, self.taken = total, 0, 0
        self.blocks: WeakSet[Memory] = WeakSet()
        """What is out."""

    def take(self, nbytes: int) -> None:
        if self.used + nbytes > self.total:
            raise CUDARuntimeError(2)
        self.used += nbytes
        self.taken += 1


class Memory:
    """A block of `vram`, given back when the last pointer to it goes; pooled blocks are given back to their pool."""

    device_id = 0

    def __init__(self, vram: Vram, nbytes: int, pool: MemoryPool | None = None) -> None:
        self._vram, self._pool, self.nbytes = vram, pool, nbytes
        if pool is not None and pool.cached >= nbytes:
            pool.cached -= nbytes
        else:
            vram.take(nbytes)
        raw = np.empty(nbytes + ALIGN, np.uint8)
        self.block = raw[-raw.ctypes.data % ALIGN :][:nbytes]
        vram.blocks.add(self)

    @property
    def ptr(self) -> int:
        return int(self.block.__array_interface__["data"][0])

    def __del__(self) -> None:
        if not hasattr(self, "block"):
            return
        if self._pool is None:
            self._vram.used -= self.nbytes
        else:
            self._pool.cached += self.nbytes


class UnownedMemory:
    """Memory that its owner keeps."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int) -> None:
        self.block, self._owner = owner.memory.block, owner
        assert ptr == owner.memory.ptr


class Chunk:
    """A block that an allocator gave a pool, which keeps it for later."""

    def __init__(self, pool: MemoryPool, whole: MemoryPointer) -> None:
        self._pool, self._whole = pool, whole
        self.block: np.ndarray[Any, Any] = whole.memory.block

    def __del__(self) -> None:
        self._pool.kept.append(self._whole)


class MemoryPool:
    def __init__(self, vram: Vram, allocator: Callable[[int], MemoryPointer] | None = None) -> None:
        self._vram, self._allocator, self.cached = vram, allocator, 0
        self.kept: list[MemoryPointer] = []

    def malloc(self, nbytes: int) -> MemoryPointer:
        try:
            return MemoryPointer(self._chunk(nbytes) if self._allocator else Memory(self._vram, nbytes, self), 0)
        except CUDARuntimeError:
            raise PoolError(nbytes) from None

    def _chunk(self, nbytes: int) -> Chunk:
        """What was kept of this size, or what the allocator gives; its errors pass, but for the driver's."""
        assert self._allocator is not None
        sizes = [whole.memory.block.nbytes for whole in self.kept]
        return Chunk(self, self.kept.pop(sizes.index(nbytes)) if nbytes in sizes else self._allocator(nbytes))

    def free_all_blocks(self) -> None:
        self._vram.used -= self.cached
        self.cached = 0
        self.kept.clear()


class MemoryPointer:
    def __init__(self, memory: Memory | UnownedMemory | Chunk, offset: int) -> None:
        self.memory, self.offset = memory, offset

    @property
    def ptr(self) -> int:
        return int(self.memory.block.__array_interface__["data"][0]) + self.offset

    def __add__(self, by: int) -> MemoryPointer:
        return MemoryPointer(self.memory, self.offset + by)


class PinnedMemory:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class PinnedMemoryPointer(bytearray):
    def __init__(self, memory: PinnedMemory, offset: int) -> None:
        super().__init__(memory.nbytes - offset)


class ndarray(np.ndarray):
    """An array in "device" memory, which it keeps."""

    memory: Memory | UnownedMemory | Chunk | None = None

    def __new__(cls, shape: Sequence[int], dtype: Any, memptr: MemoryPointer, strides: Any = None) -> ndarray:
        array = np.ndarray.__new__(cls, tuple(shape), dtype, memptr.memory.block.data, memptr.offset, strides)
        array.memory = memptr.memory
        return array

    def __array_finalize__(self, parent: Any) -> None:
        self.memory = getattr(parent, "memory", None)

    @property
    def device(self) -> Any:
        return types.SimpleNamespace(id=0)

    @property
    def data(self) -> Any:
        assert self.memory is not None
        start = self.memory.block.__array_interface__["data"][0]
        return MemoryPointer(self.memory, self.__array_interface__["data"][0] - start)

    def set(self, host: np.ndarray[Any, Any], stream: Stream) -> None:
        assert type(host) is np.ndarray
        assert (host.shape, host.dtype) == (self.shape, self.dtype)
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        stream.refuse_while_recording()
        stream.put(f"h2d {host.nbytes}", lambda: np.copyto(self, host))

    def get(self, stream: Stream, order: str = "C", out: Any = None, blocking: bool = True) -> Any:
        assert not isinstance(out, ndarray)
        out = np.empty(self.shape, self.dtype) if out is None else out
        if not (out.flags.c_contiguous or out.flags.f_contiguous):
            raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        stream.refuse_while_recording()
        stream.put(f"d2h {self.nbytes}", lambda: np.copyto(out, self))
        if blocking:
            stream.synchronize()
        return out


class Event:
    """Knows which stream it was recorded on, and behind how many calls."""

    def __init__(self, disable_timing: bool = False) -> None:
        assert disable_timing
        self.stream: Stream | None = None
        self.behind = 0

    def synchronize(self) -> None:
        assert self.stream is not None
        self.stream.log.append("sync event")
        self.stream.finish(self.behind)


class Graph:
    """What a stream was asked while it recorded."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self._calls = calls

    def launch(self, stream: Stream) -> None:
        stream.put(f"replay {len(self._calls)}", self._replay)

    def _replay(self) -> None:
        for call in self._calls:
            call()


_stream_addresses = itertools.count(0x5000, 0x10)


class Stream:
    """A stream that logs what is put on it, and is as late with it as it may be.

    Calls are made when somebody waits for them. Those of a stream that is some thread's current one are made at once:
    NumPy, which stands for CuPy's kernels, computes at once. One that is not `prompt` leaves those, too, for later, and
    nothing may compute but what is `put` there.
    """

    prompt = True

    def __init__(self, non_blocking: bool = False, name: str = "a stream") -> None:
        self.ptr, self.name, self.active = next(_stream_addresses), name, 0
        self.log: list[str] = []
        self.recorded: list[Callable[[], object]] | None = None
        self._waiting: deque[Callable[[], object]] = deque()
        self._asked = self._made = 0
        self._making = False
        self._lock = threading.RLock()

    def begin_capture(self) -> None:
        assert self.recorded is None
        self.recorded = []

    def end_capture(self) -> Graph:
        """As CUDA does, refuses a recording that something ended which none can hold."""
        recorded, self.recorded = self.recorded, None
        if recorded is None:
            raise CUDARuntimeError(901)
        return Graph(recorded)

    def put(self, what: str, call: Callable[[], object]) -> None:
        if self.recorded is None:
            self.log.append(what)
            self._ask(call)
        else:
            self.recorded.append(call)

    def _ask(self, call: Callable[[], object]) -> None:
        with self._lock:
            if self._making:  # a part of the call that is being made
                call()
                return
            self._waiting.append(call)
            self._asked += 1
            if self.active and self.prompt:
                self.finish(self._asked)

    def finish(self, count: int) -> None:
        """Makes the first `count` calls of all that were ever asked for."""
        with self._lock:
            while self._made < count:
                self._made += 1
                self._making = True
                try:
                    self._waiting.popleft()()
                finally:
                    self._making = False

    def refuse_while_recording(self) -> None:
        if self.recorded is not None:
            self.recorded = None
            raise CUDARuntimeError(900)

    def __enter__(self) -> Stream:
        CURRENT.streams.append(self)
        with self._lock:
            self.active += 1
        return self

    def __exit__(self, *_: object) -> None:
        CURRENT.streams.pop()
        with self._lock:
            self.active -= 1

    def record(self, event: Event) -> Event:
        event.stream, event.behind = self, self._asked
        return event

    def wait_event(self, event: Event) -> None:
        stream, behind = event.stream, event.behind
        assert stream is not None
        self.log.append(f"wait for {stream.name}")
        self._ask(lambda: stream.finish(behind))

    def synchronize(self) -> None:
        self.refuse_while_recording()
        self.log.append("sync")
        self.finish(self._asked)


NULL = Stream(name="the null stream")
CURRENT = _Thread()


class Device:
    """A context that can be entered again. After a fault neither entering nor leaving it works, as any call of CUDA."""

    fault = 0
    """The error of every call from now on, where it is not 0."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> None:
        if Device.fault:
            raise CUDARuntimeError(Device.fault)

    def __exit__(self, *_: object) -> None:
        self.__enter__()


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    CURRENT.allocators.append(allocator)
    yield
    CURRENT.allocators.pop()


def module(*, gpus: int = 1, free: int = 1 << 30, error: Exception | None = None) -> types.ModuleType:
    """A module to stand in for cupy on a machine with `gpus` GPUs, or with a driver that fails with `error`.

    `vram` on it counts the memory that is out.
    """
    vram = Vram(free)
    default = MemoryPool(vram)

    def count() -> int:
        if error:
            raise error
        return gpus

    def empty(shape: Sequence[int], dtype: Any) -> ndarray:
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        allocate = CURRENT.allocators[-1] if CURRENT.allocators else default.malloc
        return ndarray(shape, dtype, allocate(nbytes))

    def asarray(a: Any) -> ndarray:
        array = empty(np.shape(a), np.asarray(a).dtype)
        np.copyto(array, a)
        return array

    def copyto(target: ndarray, source: ndarray) -> None:
        dense = all(a.flags.c_contiguous for a in (target, source))
        if not dense and source.dtype.isbuiltin != 1 and source.dtype.name != "bfloat16":
            raise ValueError(f"Unsupported dtype {source.dtype}")
        CURRENT.streams[-1].put(f"copy {target.nbytes}", lambda: np.copyto(target, source))

    fake = types.ModuleType("cupy")
    fake.__dict__.update(
        {name: getattr(np, name) for name in np.__all__ if name != "ndarray"},
        ndarray=ndarray,
        asarray=asarray,
        empty=empty,
        copyto=copyto,
        vram=vram,
        cuda=types.SimpleNamespace(
            Device=Device,
            Event=Event,
            Stream=Stream,
            Memory=lambda nbytes: Memory(vram, nbytes),
            MemoryPointer=MemoryPointer,
            MemoryPool=lambda allocator=None: MemoryPool(vram, allocator),
            UnownedMemory=UnownedMemory,
            PinnedMemory=PinnedMemory,
            PinnedMemoryPointer=PinnedMemoryPointer,
            get_current_stream=lambda: CURRENT.streams[-1],
            using_allocator=using_allocator,
            memory=types.SimpleNamespace(OutOfMemoryError=PoolError),
            driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
            runtime=types.SimpleNamespace(
                getDeviceCount=count,
                memGetInfo=lambda: (vram.total - vram.used, vram.total),
                CUDARuntimeError=CUDARuntimeError,
            ),
        ),
    )
    return fake


def install(monkeypatch: pytest.MonkeyPatch, fake: types.ModuleType | None = None) -> types.ModuleType:
    """For one test, CuPy is `fake` or a new stand-in, there is no Triton, and no GPU is lost."""
    fake = fake or module()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if name == "cupy" else None)
    monkeypatch.setattr(cuda, "_lost", {})
    monkeypatch.setattr(Device, "fault", 0)
    return fake
