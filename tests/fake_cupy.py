"""Enough of CuPy, over NumPy, to run the CUDA device without a GPU: memory with addresses, streams with a log.

It shows what the device asks CuPy for and in which order, refuses what CuPy 14 refuses (arrays that `set` and `get`
cannot copy at once), and counts memory. It shows nothing about CuPy's kernels or a GPU.

There may be several GPUs. Each has its memory, its streams and its events, a pool keeps blocks of each apart, and every
thread has a current one, by which most calls go. What CUDA refuses while another GPU is current is refused: launches
and events on a stream of another, ufuncs on arrays of another (peers cannot reach each other).
"""

from __future__ import annotations

import itertools
import sys
import threading
import types
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
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


INVALID_HANDLE = 400


class _Thread(threading.local):
    """What CUDA and CuPy keep for each thread."""

    def __init__(self) -> None:
        self.device = 0
        self.devices: list[int] = []
        """Those that were current before."""
        self.streams: defaultdict[int, list[Stream]] = defaultdict(lambda: [NULL])
        """By GPU, the current one last."""
        self.allocators: list[Callable[[int], MemoryPointer]] = []


class Vram:
    """How much memory of a GPU is out, blocks that a pool keeps for later included."""

    def __init__(self, total: int, device_id: int = 0) -> None:
        self.total, self.used, self.taken, self.device_id = total, 0, 0, device_id
        self.blocks: WeakSet[Memory] = WeakSet()
        """What is out."""

    def take(self, nbytes: int) -> None:
        if self.used + nbytes > self.total:
            raise CUDARuntimeError(2)
        self.used += nbytes
        self.taken += 1


class Memory:
    """A block of `vram`, given back when the last pointer to it goes; pooled blocks are given back to their pool."""

    def __init__(self, vram: Vram, nbytes: int, pool: MemoryPool | None = None) -> None:
        self._vram, self._pool, self.nbytes, self.device_id = vram, pool, nbytes, vram.device_id
        refuse_faulty(self.device_id)
        if pool is not None and pool.cached[self.device_id] >= nbytes:
            pool.cached[self.device_id] -= nbytes
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
            self._pool.cached[self.device_id] += self.nbytes


class UnownedMemory:
    """Memory that its owner keeps."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int) -> None:
        self.block, self._owner, self.device_id = owner.memory.block, owner, device_id
        assert (ptr, device_id) == (owner.memory.ptr, owner.memory.device_id)


class Chunk:
    """A block that an allocator gave a pool, which keeps it for later."""

    def __init__(self, pool: MemoryPool, whole: MemoryPointer) -> None:
        self._pool, self._whole = pool, whole
        self.block: np.ndarray[Any, Any] = whole.memory.block
        self.device_id: int = whole.memory.device_id

    def __del__(self) -> None:
        self._pool.kept[self.device_id].append(self._whole)


class MemoryPool:
    """What it gives and what it frees is the current GPU's."""

    def __init__(self, vrams: Sequence[Vram], allocator: Callable[[int], MemoryPointer] | None = None) -> None:
        self._vrams, self._allocator = vrams, allocator
        self.cached: Counter[int] = Counter()
        self.kept: defaultdict[int, list[MemoryPointer]] = defaultdict(list)

    def malloc(self, nbytes: int) -> MemoryPointer:
        try:
            vram = self._vrams[CURRENT.device]
            return MemoryPointer(self._chunk(nbytes) if self._allocator else Memory(vram, nbytes, self), 0)
        except CUDARuntimeError as error:
            if error.status != 2:
                raise
            raise PoolError(nbytes) from None

    def _chunk(self, nbytes: int) -> Chunk:
        """What was kept of this size, or what the allocator gives; its errors pass, but for the driver's."""
        assert self._allocator is not None
        kept = self.kept[CURRENT.device]
        sizes = [whole.memory.block.nbytes for whole in kept]
        return Chunk(self, kept.pop(sizes.index(nbytes)) if nbytes in sizes else self._allocator(nbytes))

    def free_all_blocks(self) -> None:
        here = CURRENT.device
        self._vrams[here].used -= self.cached.pop(here, 0)
        self.kept[here].clear()


class MemoryPointer:
    def __init__(self, memory: Memory | UnownedMemory | Chunk, offset: int) -> None:
        self.memory, self.offset, self.device_id = memory, offset, memory.device_id

    @property
    def ptr(self) -> int:
        return int(self.memory.block.__array_interface__["data"][0]) + self.offset

    def __add__(self, by: int) -> MemoryPointer:
        return MemoryPointer(self.memory, self.offset + by)

    def copy_from_device_async(self, source: MemoryPointer, size: int, stream: Stream) -> None:
        here, there = (p.memory.block[p.offset :][:size] for p in (self, source))
        stream.put(f"copy {size}", lambda: np.copyto(here, there))


class PinnedMemory:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class PinnedMemoryPointer(bytearray):
    def __init__(self, memory: PinnedMemory, offset: int) -> None:
        super().__init__(memory.nbytes - offset)


class ndarray(np.ndarray):
    """An array in "device" memory, which it keeps."""

    memory: Memory | UnownedMemory | Chunk | None = None
    device_id = 0

    def __new__(cls, shape: Sequence[int], dtype: Any, memptr: MemoryPointer, strides: Any = None) -> ndarray:
        array = np.ndarray.__new__(cls, tuple(shape), dtype, memptr.memory.block.data, memptr.offset, strides)
        array.memory, array.device_id = memptr.memory, memptr.memory.device_id
        return array

    def __array_finalize__(self, parent: Any) -> None:
        self.memory = getattr(parent, "memory", None)
        self.device_id = getattr(parent, "device_id", CURRENT.device)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """Of what a ufunc made of arrays."""
        for used in context[1] if context else ():
            refuse_elsewhere(used)
        return super().__array_wrap__(array, context, return_scalar)

    @property
    def device(self) -> Any:
        return types.SimpleNamespace(id=self.device_id)

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
        with Device(self.device_id):
            stream.put(f"h2d {host.nbytes}", lambda: np.copyto(self, host))

    def get(self, stream: Stream, order: str = "C", out: Any = None, blocking: bool = True) -> Any:
        assert not isinstance(out, ndarray)
        out = np.empty(self.shape, self.dtype) if out is None else out
        if not (out.flags.c_contiguous or out.flags.f_contiguous):
            raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        stream.refuse_while_recording()
        with Device(self.device_id):
            stream.put(f"d2h {self.nbytes}", lambda: np.copyto(out, self))
        if blocking:
            stream.synchronize()
        return out


def refuse_elsewhere(array: Any) -> None:
    """As CuPy's kernels do, where a GPU cannot read its peer's memory."""
    if isinstance(array, ndarray) and array.device_id != CURRENT.device:
        raise ValueError(
            f"The device where the array resides ({array.device_id}) is different from the current device "
            f"({CURRENT.device}). Peer access is unavailable between these devices."
        )


def refuse_faulty(device_id: int) -> None:
    if fault := Device.faults.get(device_id):
        raise CUDARuntimeError(fault)


class Event:
    """Knows which stream it was recorded on, and behind how many calls. It is the GPU's that was current."""

    def __init__(self, disable_timing: bool = False) -> None:
        assert disable_timing
        refuse_faulty(CURRENT.device)
        self.device_id = CURRENT.device
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

    def __init__(self, non_blocking: bool = False, name: str = "a stream", device_id: int | None = None) -> None:
        self.ptr, self.name, self.active = next(_stream_addresses), name, 0
        self._device_id = CURRENT.device if device_id is None else device_id
        self.log: list[str] = []
        self.recorded: list[Callable[[], object]] | None = None
        self._waiting: deque[Callable[[], object]] = deque()
        self._asked = self._made = 0
        self._making = False
        self._lock = threading.RLock()

    @property
    def device_id(self) -> int:
        """The null stream is whichever GPU's is current."""
        return CURRENT.device if self._device_id < 0 else self._device_id

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
        if self.device_id != CURRENT.device:
            raise CUDARuntimeError(INVALID_HANDLE)
        refuse_faulty(self.device_id)
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
        if self.device_id != CURRENT.device:
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with the current device "
                f"({CURRENT.device})"
            )
        CURRENT.streams[self.device_id].append(self)
        with self._lock:
            self.active += 1
        return self

    def __exit__(self, *_: object) -> None:
        CURRENT.streams[self.device_id].pop()
        with self._lock:
            self.active -= 1

    def record(self, event: Event) -> Event:
        if event.device_id != self.device_id:
            raise CUDARuntimeError(INVALID_HANDLE)
        refuse_faulty(self.device_id)
        event.stream, event.behind = self, self._asked
        return event

    def wait_event(self, event: Event) -> None:
        stream, behind = event.stream, event.behind
        assert stream is not None
        self.log.append(f"wait for {stream.name}")
        self._ask(lambda: stream.finish(behind))

    def synchronize(self) -> None:
        self.refuse_while_recording()
        refuse_faulty(self.device_id)
        self.log.append("sync")
        self.finish(self._asked)


CURRENT = _Thread()
NULL = Stream(name="the null stream", device_id=-1)


class Device:
    """A context that can be entered again, by several threads. After a fault no call works for its GPU, nor does the
    first one that makes another current in its place."""

    faults: ClassVar[dict[int, int]] = {}
    """The error of every call from now on, by GPU."""
    told: ClassVar[set[int]] = set()
    """Those whose error was seen by who left them."""

    def __init__(self, device: int) -> None:
        self.id = device

    def use(self) -> None:
        left, CURRENT.device = CURRENT.device, self.id
        if left != self.id and left in Device.faults and left not in Device.told:
            Device.told.add(left)
            refuse_faulty(left)
        refuse_faulty(self.id)

    def __enter__(self) -> Device:
        CURRENT.devices.append(CURRENT.device)
        try:
            self.use()
        except CUDARuntimeError:
            CURRENT.devices.pop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        Device(CURRENT.devices.pop()).use()


def current_stream() -> Stream:
    return CURRENT.streams[CURRENT.device][-1]


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    CURRENT.allocators.append(allocator)
    try:
        yield
    finally:
        CURRENT.allocators.pop()


def module(*, gpus: int = 1, free: int = 1 << 30, error: Exception | None = None) -> types.ModuleType:
    """A module to stand in for cupy on a machine with `gpus` GPUs, or with a driver that fails with `error`.

    `vrams` on it count the memory that is out, a GPU each; `vram` is the first.
    """
    vrams = [Vram(free, i) for i in range(gpus)]
    default = MemoryPool(vrams)

    def count() -> int:
        if error:
            raise error
        return gpus

    def memory_info() -> tuple[int, int]:
        refuse_faulty(CURRENT.device)
        vram = vrams[CURRENT.device]
        return vram.total - vram.used, vram.total

    def empty(shape: Sequence[int], dtype: Any) -> ndarray:
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        allocate = CURRENT.allocators[-1] if CURRENT.allocators else default.malloc
        return ndarray(shape, dtype, allocate(nbytes))

    def asarray(a: Any) -> ndarray:
        array = empty(np.shape(a), np.asarray(a).dtype)
        np.copyto(array, a)
        return array

    def copyto(target: ndarray, source: ndarray) -> None:
        for array in (target, source):
            refuse_elsewhere(array)
        dense = all(a.flags.c_contiguous for a in (target, source))
        if not dense and source.dtype.isbuiltin != 1 and source.dtype.name != "bfloat16":
            raise ValueError(f"Unsupported dtype {source.dtype}")
        current_stream().put(f"copy {target.nbytes}", lambda: np.copyto(target, source))

    fake = types.ModuleType("cupy")
    fake.__dict__.update(
        {name: getattr(np, name) for name in np.__all__ if name != "ndarray"},
        ndarray=ndarray,
        asarray=asarray,
        empty=empty,
        copyto=copyto,
        vram=vrams[0] if vrams else None,
        vrams=vrams,
        get_default_memory_pool=lambda: default,
        cuda=types.SimpleNamespace(
            Device=Device,
            Event=Event,
            Stream=Stream,
            Memory=lambda nbytes: Memory(vrams[CURRENT.device], nbytes),
            MemoryPointer=MemoryPointer,
            MemoryPool=lambda allocator=None: MemoryPool(vrams, allocator),
            UnownedMemory=UnownedMemory,
            PinnedMemory=PinnedMemory,
            PinnedMemoryPointer=PinnedMemoryPointer,
            get_current_stream=current_stream,
            using_allocator=using_allocator,
            memory=types.SimpleNamespace(OutOfMemoryError=PoolError),
            driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
            runtime=types.SimpleNamespace(
                getDeviceCount=count,
                getDevice=lambda: CURRENT.device,
                setDevice=lambda device: Device(device).use(),
                memGetInfo=memory_info,
                CUDARuntimeError=CUDARuntimeError,
            ),
        ),
    )
    return fake


def install(monkeypatch: pytest.MonkeyPatch, fake: types.ModuleType | None = None) -> types.ModuleType:
    """For one test, CuPy is `fake` or a new stand-in, there is no Triton, no GPU is lost, and the first is current."""
    fake = fake or module()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if name == "cupy" else None)
    monkeypatch.setattr(cuda, "_lost", {})
    monkeypatch.setattr(Device, "faults", {})
    monkeypatch.setattr(Device, "told", set())
    monkeypatch.setattr(CURRENT, "device", 0)
    return fake
