"""An NVIDIA GPU through CuPy: arenas in VRAM, launches on one stream, transfers beside them.

Written against CuPy 14. Its calls that take no stream use the thread's current one, which `running` sets.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from infera_gpu.budget import VramBudget
from infera_gpu.devices.base import Args, compute_into, host_memory, host_view, out_of_host_memory, quiet_numpy
from infera_gpu.devices.cuda_current import Current
from infera_gpu.devices.graphs import CapturedCalls, Turnstile
from infera_gpu.devices.ipc import SharedVram
from infera_gpu.devices.ports import Ports, StagedPorts, Streams
from infera_gpu.devices.timing import EventTimer
from infera_gpu.devices.vram import Vram
from infera_gpu.errors import DeviceError, DeviceLostError, OutOfMemoryError
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space
from infera_gpu.op import Call, Launcher
from infera_gpu.plan import Step
from infera_gpu.source import usual_room
from infera_gpu.spec import Array
from infera_kernels.calls import LEAST_NS, one_after_the_other
from infera_kernels.cpu.aligned import Slabs
from infera_kernels.launch.nvidia import LibraryError
from infera_kernels.tuning import DeviceTiles, Tuned

OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation; CuPy's Python modules have no name for it."""

LOST = frozenset(
    {
        *(4, 100, 999),  # the driver unloads, there is no device, an unknown error
        *(46, 214, 220, 226),  # the device is unavailable, memory or NVLink failed beyond correction, contained or not
        *(700, 702, 709, 710),  # illegal address, launch timeout, the context is destroyed, an assertion
        *(714, 715, 716, 717, 718, 719, 721),  # faults of kernels: stack, instruction, alignment, address space, pc
        *(810, 911),  # the MPS client is ended, a device outside of this one failed
    }
)
"""The errors, as the CUDA runtime and driver number them, after which every call in the process's context fails."""

CUPY = frozenset({"cupy", "cupy_backends", "cupyx", "cuda"})
"""Packages whose exceptions are failures of a GPU or of one of CUDA's libraries, each of a class and with numbers of
its own. The last is cuda-pathfinder's, which looks for libraries."""

WIDEST_LOAD = 16
"""Bytes. Kernels for arrays that are aligned less are others, which may add in another order."""

_lost: dict[int, str] = {}
"""What happened, by GPU: a CUDA context cannot be mended, and a process has one a GPU."""

INSTALL = "pip install 'infera-gpu[cuda12]' or 'infera-gpu[cuda13]', whichever CUDA the driver supports, never both"


NO_DRIVER = "CuPy has no NVIDIA driver here"


def why_unavailable() -> str | None:
    """Why no GPU can be used, in one line; None where one can."""
    if find_spec("cupy") is None:
        return f"CuPy is not installed: {INSTALL}"
    try:
        import cupy

        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # a missing driver library surfaces as ImportError, OSError or CUDARuntimeError
        made, supported = releases()
        return NO_DRIVER if made and not supported else f"CuPy finds no usable driver: {error}"
    return None if count else "the driver reports no GPU"


def libraries() -> dict[str, tuple[str, Exception | None]]:
    """What CuPy loads when it first needs it: the release, where it tells one, or why it cannot be loaded. None without
    CuPy."""
    if find_spec("cupy") is None:
        return {}
    found: dict[str, tuple[str, Exception | None]] = {}
    for name, load in (("NVRTC", _nvrtc), ("cuBLAS", _cublas)):
        try:
            found[name] = load(), None
        except Exception as error:  # of the import, or of cuda-pathfinder, which looks for the library
            found[name] = "", error
    return found


def _nvrtc() -> str:
    from cupy.cuda import nvrtc

    return "{}.{}".format(*nvrtc.getVersion())


def _cublas() -> str:
    import_module("cupy_backends.cuda.libs.cublas")
    return ""


def releases() -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The CUDA that the installed CuPy is for, and the one that the driver supports; None where that is not known."""
    try:
        from cupy.cuda import runtime

        found = int(runtime.runtimeGetVersion()), int(runtime.driverGetVersion())  # 12080 is 12.8, 0 no driver
    except Exception:
        return None, None
    made, supported = ((n // 1000, n % 1000 // 10) if n else None for n in found)
    return made, supported


def gpu_count() -> int:
    """How many GPUs CUDA shows. Raises DeviceError where none can be used."""
    reason = why_unavailable()
    if reason:
        raise DeviceError(f"there is no GPU: {reason}")
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def shared_vram(handle: bytes, index: int, nbytes: int) -> SharedVram:
    """Memory of another process on GPU `index`, see `SharedVram`. Raises DeviceError where there is no such GPU."""
    if index >= (count := gpu_count()):
        raise DeviceError(f"cuda:{index} does not exist; this machine has {count} GPU(s)")
    import cupy

    return SharedVram(cupy, handle, index, nbytes)


class CudaDevice:
    """GPU `index`. Raises DeviceError where there is none, saying why.

    One non-blocking stream orders the steps: kernel launches, copies, and the portable operators, which run on CuPy.
    What comes from the host and goes there travels on streams of its own, see `ports`. Runs of several threads share
    them. Each keeps its own order, their arenas are disjoint, and memory that one gives back is used again only behind
    what was queued before; so nothing needs a lock, and the GPU works on one run at a time.

    Weights and arenas come from the driver directly, what CuPy allocates for portable operators and constants of one
    shape from a pool of the device's own: closing gives all of it back, whatever else in the process uses CuPy. All of
    it counts against `budget`.
    """

    slabs: Slabs | None = None
    space: Space = "device"
    runs_portable = True
    threads = 1
    least_ns = LEAST_NS
    room = staticmethod(usual_room)
    concurrency = ""

    def __init__(
        self,
        index: int = 0,
        strict: bool = False,
        *,
        captures: bool = True,
        tf32: bool = False,
        batch_invariant: bool = False,
        budget: VramBudget | None = None,
    ) -> None:
        self.strict, self.captures, self.tf32, self.batch_invariant = strict, captures, tf32, batch_invariant
        reason = why_unavailable()
        if reason:
            raise DeviceError(f"cuda:{index} is not available: {reason}")
        import cupy

        count = int(cupy.cuda.runtime.getDeviceCount())
        if index >= count:
            raise DeviceError(
                f"cuda:{index} does not exist; this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}"
            )
        self.index, self.name, self.xp = index, f"cuda:{index}", cupy
        self._refuse_lost()
        self._device = Current(cupy, index)
        with self._failures("opening it"), self._device:
            self._streams = Streams(cupy)
            self._stream, self._ready = self._streams.compute, _Ready(cupy)
            self._callers_stream = cupy.cuda.get_current_stream
            self._vram = Vram(cupy, budget)
        self.channels_last = find_spec("triton") is not None
        self.kinds: tuple[str, ...] = ("triton", "cupy") if self.channels_last else ("cupy",)
        self._launcher: Launcher | None = None
        self._tiles: DeviceTiles | None = None
        self._turnstile = Turnstile()

    @property
    def launcher(self) -> Launcher:
        if self._launcher is None:
            from infera_gpu.devices import dependent
            from infera_kernels.launch import CudaLauncher

            with self._failures("opening it"), self._device:
                pdl = dependent.works(self.xp, self.index, self._vram.pool.malloc)
            self._launcher = CudaLauncher(self.index, self._stream, libraries=not self.batch_invariant, pdl=pdl)
        return self._launcher

    @property
    def tiles(self) -> DeviceTiles | None:
        if self._tiles is None and "triton" in self.kinds:
            self._tiles = DeviceTiles.of(self.launcher)
        return self._tiles

    @tiles.setter
    def tiles(self, tiles: DeviceTiles) -> None:
        """What is planned from now on goes by them."""
        self._tiles = tiles

    @property
    def tuned(self) -> Tuned | None:
        tiles = self.tiles
        return None if tiles is None else tiles.tuned

    def timer(self) -> EventTimer:
        properties = self.xp.cuda.runtime.getDeviceProperties(self.index)
        return EventTimer(self.xp, self._stream, int(properties["l2CacheSize"]))

    @contextmanager
    def running(self) -> Iterator[None]:
        """This device, its stream and its pool are the thread's; what fails in CUDA is a DeviceError.

        The stream waits for what the caller has queued on a stream of his own: it may still be writing the arrays that
        he gives, or reading those that he wants results in.
        """
        self._refuse_lost()
        with self._turnstile, quiet_numpy(), self._failures("a run"), self._device:
            self._wait_for_caller()
            with self._stream, self.xp.cuda.using_allocator(self._vram.pool.malloc):
                yield

    def launch(self, run: Callable[[*Args], None], *args: *Args) -> None:
        if self.index in _lost:
            self._refuse_lost()
        with self._turnstile:
            try:
                with self._device:
                    self._wait_for_caller()
                    with self._stream:
                        run(*args)
            except Exception as error:
                self._raise_for(error, "a run")
                raise

    def _wait_for_caller(self) -> None:
        self._stream.wait_event(self._callers_stream().record(self._ready.event))

    @property
    def lost(self) -> str:
        return _lost.get(self.index, "")

    def _refuse_lost(self) -> None:
        if self.index in _lost:
            raise DeviceLostError(self.lost)

    def _failures(self, what: str, nbytes: int = 0, space: Space = "device") -> _Failures:
        """A context that raises OutOfMemoryError or DeviceError for CuPy's exceptions; `nbytes` is what was asked for,
        where known.

        Around `self._device`: to enter and to leave a GPU that is lost fails too, and its error takes the place of the
        one that came before.
        """
        return _Failures(self, what, nbytes, space)

    def _raise_for(self, error: Exception, what: str, nbytes: int = 0, space: Space = "device") -> None:
        """Raises what `_failures` says, with the notes of the error, which name the step. Nothing where that is another
        one."""
        failure = self._failure(error, what, nbytes, space)
        if failure is not None:
            for note in getattr(error, "__notes__", ()):
                failure.add_note(note)
            try:
                raise failure from error
            finally:
                del failure  # else it and this frame would hold each other, and the session with them

    def _failure(self, error: Exception, what: str, nbytes: int, space: Space) -> DeviceError | None:
        cuda = self.xp.cuda
        if isinstance(error, cuda.memory.OutOfMemoryError):  # of the pool
            needed = int(getattr(error, "_size", nbytes))
            return OutOfMemoryError(f"{what} on {self.name}", needed=needed, available=self._free())
        if isinstance(error, MemoryError):
            return out_of_host_memory(error)
        if isinstance(error, cuda.runtime.CUDARuntimeError | cuda.driver.CUDADriverError):
            status = error.status
        elif isinstance(error, LibraryError | ImportError) or type(error).__module__.split(".")[0] in CUPY:
            status = self._met() or (OUT_OF_MEMORY if "ALLOC_FAILED" in str(error) else 0)
        else:
            return None
        if status in LOST:
            _lost[self.index] = (
                f"{self.name} is lost to this process: {what} met '{error}', and no call works after that; "
                "restart the process"
            )
            return DeviceLostError(self.lost)
        if status != OUT_OF_MEMORY:
            missing = isinstance(error, ImportError) or type(error).__module__.startswith("cuda.")
            advice = "; `infera doctor` says which of CUDA's libraries are there" if missing else ""
            return DeviceError(f"{self.name} failed in {what}: {error}{advice}")
        available = self._free() if space == "device" else host_memory() or 0
        return OutOfMemoryError(f"{what} on {self.name}", needed=nbytes, available=available)

    def _met(self) -> int:
        """What CUDA has met, as it numbers it, where a library has failed, which does not say; 0 where nothing."""
        try:
            self._stream.synchronize()
        except Exception as error:
            return getattr(error, "status", 0)
        return 0

    def _free(self) -> int:
        with self._device:
            return self._vram.available()

    def require(self, what: str, nbytes: int) -> None:
        with self._failures(what), self._device:
            if nbytes > self._free():
                self._vram.pool.free_all_blocks()
            if nbytes > (free := self._free()):
                budget = self._vram.budget
                raise OutOfMemoryError(
                    f"{what} on {self.name}",
                    needed=nbytes,
                    available=free,
                    limit=None if budget is None else budget.limit,
                )

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        return one_after_the_other(parts)

    def parts_of(self, call: Call) -> None:
        return None

    def alloc(self, nbytes: int, space: Space) -> Any:
        self._refuse_lost()
        cuda = self.xp.cuda
        what = "the arena" if space == "device" else "the pinned arena"
        with self._failures(what, nbytes, space), self._device:
            if space == "host":  # pinned, so that transfers are asynchronous; freed with its last view, as is VRAM
                pinned = cuda.PinnedMemoryPointer(cuda.PinnedMemory(max(nbytes, 1)), 0)
                return np.frombuffer(pinned, np.uint8)
            self.require("the arena", nbytes)
            return self._vram.take(f"the arena on {self.name}", max(nbytes, 1))

    def view(self, block: Any, operand: Operand) -> Array:
        if operand.space == "host":
            return host_view(block, operand)
        return self.xp.ndarray(operand.shape, operand.dtype, block + operand.offset, operand.strides)

    @contextmanager
    def weights(self, nbytes: int) -> Iterator[None]:
        with ExitStack() as stack:
            with self._failures("the weights", nbytes), self._device:
                stack.enter_context(self._vram.weights(f"the weights on {self.name}", nbytes))
            yield

    def constant(self, host: HostArray, space: Space, *, lasting: bool = False, packed: bool = False) -> Array:
        if space == "host":
            return host
        what = f"a constant of {host.nbytes:,} bytes"
        with self._failures(what, host.nbytes), self._device, self._stream:
            memory = (
                self._vram.weight(f"{what} on {self.name}", host.nbytes)
                if lasting
                else self._vram.pool.malloc(host.nbytes)
            )
            array = self.xp.ndarray(host.shape, host.dtype, memory)
            array.set(host, self._stream)
            if packed:  # it is gone when this returns; where memory is coherent the GPU reads it as it lies
                self._stream.synchronize()
        return array

    def transfer(self, source: Array, target: Array) -> Call:
        here = self.xp.ndarray
        match isinstance(source, here), isinstance(target, here):
            case True, True:
                return self._copy(source, target)
            case True, False:
                return self._download, (source, target)
            case False, True:
                return target.set, (source, self._stream)
            case _:
                return self._after_stream, (np.copyto, (target, source))

    def _copy(self, source: Array, target: Array) -> Call:
        """Dense arrays by the driver; others by the kernel that permutes axes through shared memory, where it can.

        Elements of one byte are copied as such: CuPy's own copies know few of their types.
        """
        if source.dtype == target.dtype and source.dtype.itemsize == 1:
            source, target = source.view(np.uint8), target.view(np.uint8)
        dense = source.flags.c_contiguous and target.flags.c_contiguous
        if not dense and "triton" in self.kinds:
            from infera_kernels.triton.elementwise import copy, supports_copy

            if supports_copy(source, target):
                (call,) = copy(source, target, self.launcher)
                return call
        return self.xp.copyto, (target, source)

    def _download(self, source: Array, target: HostArray) -> None:
        if target.flags.c_contiguous or target.flags.f_contiguous:
            source.get(self._stream, out=target)
        else:
            np.copyto(target, source.get(self._stream))

    def _after_stream(self, fn: Any, args: tuple[Any, ...]) -> None:
        self._stream.synchronize()
        fn(*args)

    def compute(self, step: Step, ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> Call:
        if step.space == "host":
            return self._after_stream, (compute_into, (np, step, ins, outs))
        return compute_into, (self.xp, step, ins, outs)

    def wrap(self, step: Step, calls: list[Call], ins: Sequence[Array | None], outs: tuple[Array, ...]) -> list[Call]:
        """A kernel for NumPy waits: an upload may still be reading the memory that it writes."""
        return [(self._after_stream, call) for call in calls[:1]] + calls[1:] if step.space == "host" else calls

    def ports(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], staging: Any) -> Ports:
        return StagedPorts(self, self._streams, inputs, outputs, staging)

    def graph(self, calls: Sequence[Call]) -> Call:
        return CapturedCalls(calls, self._stream, self._turnstile), ()

    def accepts(self, value: object) -> Array | None:
        """A CuPy array on this GPU as it is; anything else that offers its GPU memory through DLPack, wrapped."""
        cupy = self.xp
        if isinstance(value, cupy.ndarray):
            return value if value.data.device_id == self.index else None
        if not hasattr(value, "__dlpack_device__"):
            return None
        kind, index = value.__dlpack_device__()
        if (int(kind), index) != (2, self.index):  # 2 is kDLCUDA
            return None
        with self._failures("reading an array"), self._device:
            return cupy.from_dlpack(value)  # what made it comes before the current stream, for which `running` waits

    def block_of(self, array: Array) -> Any | None:
        if not isinstance(array, self.xp.ndarray) or not array.flags.c_contiguous:
            return None
        return None if self.batch_invariant and array.data.ptr % WIDEST_LOAD else array.data

    def synchronize(self) -> None:
        """Not while a run records: to wait for a stream ends what it records."""
        with self._turnstile, self._failures("waiting"):
            self._streams.synchronize()

    def close(self) -> None:
        """Gives back the pool's memory that no array holds. Of a lost GPU nothing can be given back."""
        if not self.lost:
            with self._failures("closing it"), self._device:
                self.synchronize()
                self._vram.pool.free_all_blocks()

    def __del__(self) -> None:
        """CuPy's pools keep their memory when they go, and free that of the current GPU."""
        if not sys.is_finalizing():
            with suppress(Exception), self._device:  # it was not opened, or is lost
                self._vram.pool.free_all_blocks()


class _Failures:  # with contextlib it would take three times as long, and each run has one
    """See `CudaDevice._failures`."""

    __slots__ = ("_about", "_device")

    def __init__(self, device: CudaDevice, *about: *tuple[str, int, Space]) -> None:
        self._device, self._about = device, about

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self._device._raise_for(error, *self._about)


class _Ready(threading.local):
    """An event of each thread's, for what it has queued before a run."""

    def __init__(self, cupy: Any) -> None:
        self.event = cupy.cuda.Event(disable_timing=True)
