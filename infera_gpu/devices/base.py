"""What a device offers: memory, transfers, and the kinds of kernels it runs. Which kernel runs is never its choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVarTuple

import numpy as np

from infera_gpu.devices.ports import Ports
from infera_gpu.errors import OutOfMemoryError, PlanError
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space
from infera_gpu.memory import ALIGN
from infera_gpu.op import Call, Launcher
from infera_gpu.plan import Step
from infera_gpu.spec import Array
from infera_kernels.cpu.aligned import LARGE_PAGE, Slabs, begun

if TYPE_CHECKING:
    from infera_gpu.devices.timing import Timer
    from infera_kernels.tuning import DeviceTiles, Tuned

Args = TypeVarTuple("Args")

UFUNC_BUFFER = 64
"""Elements. NumPy's ufuncs take buffers of this size for operands that they cannot walk in one stride or must cast;
with its default a run would take and give back 32 KB for each."""

USUAL_BUFFER = 8192
"""NumPy's default, in elements."""


class _Settings(NamedTuple):
    """The variable in which NumPy keeps a context's settings, and a value of it."""

    variable: ContextVar[Any]
    quiet: object


@cache
def _settings() -> _Settings | None:
    """Those of `quiet_numpy`, made once: `np.errstate` makes them anew each time, which shows in small runs
    (`python -m bench.dispatch`). It is a private variable of NumPy's; None where there is none."""
    variable = getattr(import_module("numpy._core.umath"), "_extobj_contextvar", None)
    if not isinstance(variable, ContextVar):
        return None
    with np.errstate(all="ignore"):
        np.setbufsize(UFUNC_BUFFER)
        return _Settings(variable, variable.get())


class quiet_numpy:  # with contextlib a function would take twice as long
    """How plans run on NumPy: no floating-point warnings, small ufunc buffers. Restores the settings afterwards.

    Memory that NumPy does not get is an OutOfMemoryError.
    """

    __slots__ = ("_before", "_known")
    _before: Any

    def __enter__(self) -> None:
        known = self._known = _settings()
        if known is not None:
            self._before = known.variable.set(known.quiet)
            return
        self._before = np.errstate(all="ignore")
        self._before.__enter__()
        np.setbufsize(UFUNC_BUFFER)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._known is not None:
            self._known.variable.reset(self._before)
        else:
            self._before.__exit__(kind, error, trace)
        if isinstance(error, MemoryError):
            raise out_of_host_memory(error) from error


def out_of_host_memory(error: MemoryError) -> OutOfMemoryError:
    """What is raised for NumPy's error."""
    needed = math.prod(getattr(error, "shape", ())) * getattr(error, "dtype", np.dtype(np.uint8)).itemsize
    return OutOfMemoryError("an array on the host", needed=needed, available=host_memory() or 0)


@contextmanager
def usual_buffers() -> Iterator[None]:
    """NumPy's own buffers, within `quiet_numpy` too: for what casts large arrays once, while planning or binding."""
    if np.getbufsize() == USUAL_BUFFER:
        yield
        return
    with np.errstate():
        np.setbufsize(USUAL_BUFFER)
        yield


class Device(Protocol):
    """A place to run.

    `kinds` are kernel kinds in order of preference; `space` is where its arena lies. `threads` is how many parts of a
    step run at a time on the host, `least_ns` how long a part takes at least, `concurrency` says so and why. `strict`
    turns off what changes the order of operations beyond BLAS, `tf32` lets products of float32 round their operands to
    10 bits, `batch_invariant` makes kernels add in the same order whatever the size of the batch. `captures` says that
    its calls are recorded once and replayed (`graph`), `channels_last` that it prefers convolutions whose channels are
    the last axis. A device whose space is "device" has a host arena too, for the steps that run on NumPy. Transfers and
    calls are ordered with each other; `synchronize` waits for all of them. `lost` says why nothing works on it any more
    in this process, and is empty while it does.
    """

    name: str
    space: Space
    kinds: tuple[str, ...]
    runs_portable: bool
    xp: Any
    threads: int
    least_ns: float
    concurrency: str
    strict: bool
    tf32: bool
    batch_invariant: bool
    channels_last: bool
    captures: bool
    slabs: Slabs | None
    """Where packed constants that last are made; None: anywhere."""

    @property
    def tuned(self) -> Tuned | None:
        """The tiles that were measured best on it, of `tiles`; None where no kernel has any."""
        ...

    @property
    def tiles(self) -> DeviceTiles | None: ...

    def timer(self) -> Timer:
        """What tiles are measured with. Raises DeviceError where there is nothing to measure."""
        ...

    @property
    def lost(self) -> str: ...

    @property
    def launcher(self) -> Launcher: ...

    def running(self) -> AbstractContextManager[None]:
        """What binding and running happen in: the thread's current GPU and stream, NumPy's settings."""
        ...

    def launch(self, run: Callable[[*Args], None], *args: *Args) -> None:
        """Make the call as in `running`, where it only launches on the device and copies: nothing is allocated there,
        or computed on the host."""
        ...

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        """Calls that make those of every part, up to `threads` of them at the same time; host memory only."""
        ...

    def parts_of(self, call: Call) -> Sequence[Sequence[Call]] | None:
        """Of what `parallel` made a call; None of other calls."""
        ...

    def alloc(self, nbytes: int, space: Space) -> Any:
        """A block of uninitialised memory, aligned to memory.ALIGN. Raises OutOfMemoryError."""
        ...

    def view(self, block: Any, operand: Operand) -> Array:
        """The operand's window into its block."""
        ...

    def require(self, what: str, nbytes: int) -> None:
        """Raises OutOfMemoryError, saying `what` needs it, where the device has no `nbytes` to give; takes nothing."""
        ...

    def weights(self, nbytes: int) -> AbstractContextManager[None]:
        """Lasting constants that are uploaded meanwhile are expected to take so many bytes, each aligned to
        memory.ALIGN: on a GPU they lie in one block. Raises OutOfMemoryError."""
        ...

    def room(self, nbytes: int) -> HostArray:
        """Host memory that a constant is read into."""
        ...

    def constant(self, host: HostArray, space: Space, *, lasting: bool = False, packed: bool = False) -> Array:
        """The constant in `space`; uploaded at once. A `lasting` one is the model's, others come and go with shapes.
        What was `packed` is in no other hands."""
        ...

    def transfer(self, source: Array, target: Array) -> Call:
        """A call that copies between any two arrays of one shape and dtype, within a space or across."""
        ...

    def compute(self, step: Step, ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> Call:
        """A call that runs the operator's own function for a step without a kernel."""
        ...

    def wrap(self, step: Step, calls: list[Call], ins: Sequence[Array | None], outs: tuple[Array, ...]) -> list[Call]:
        """What to run in place of a bound kernel's calls: the calls, unless the device only pretends."""
        ...

    def ports(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], staging: Any) -> Ports:
        """The ways into a bound plan and out of it; `staging` is a block of host memory, see `Plan.staging`."""
        ...

    def graph(self, calls: Sequence[Call]) -> Call:
        """One call in place of these, which only launch on the device: recorded once, then replayed."""
        ...

    def accepts(self, value: object) -> Array | None:
        """`value` as an array that lies in this device's space, without a copy; None where it does not."""
        ...

    def block_of(self, array: Array) -> Any | None:
        """A block for `view`, with its address as `ptr`, that starts at the array's first element.

        None unless the array lies dense in device memory, aligned as in an arena where the device is batch invariant.
        """
        ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


CHECK_ABOVE = 1 << 26
"""Bytes. Smaller blocks are not worth asking the system how much there is."""


def host_memory() -> int | None:
    """Bytes of memory that the kernel could give without swapping; None where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def require_host_memory(what: str, nbytes: int) -> None:
    """Raises OutOfMemoryError where there is not that much: Linux may promise it, and kill the process later."""
    if nbytes > CHECK_ABOVE:
        available = host_memory()
        if available is not None and nbytes > available:
            raise OutOfMemoryError(what, needed=nbytes, available=available)


ON_LARGE_PAGES = 1 << 22
"""Bytes from which on NumPy asks the system for large pages."""


def host_block(nbytes: int) -> HostArray:
    """Aligned, uninitialised host memory. Raises OutOfMemoryError where there is not that much.

    Where NumPy asks for large pages, it begins with one and has the rest of the last, so that none of it is on small
    ones: each of those is a fault of its own in the first run.
    """
    require_host_memory("the arena", nbytes)
    page = LARGE_PAGE if nbytes >= ON_LARGE_PAGES else ALIGN
    whole: HostArray = begun(-(-nbytes // page) * page, page)
    return whole[:nbytes]


def host_view(block: HostArray, operand: Operand) -> HostArray:
    """The operand's window into host memory."""
    return np.ndarray(operand.shape, operand.dtype, block, operand.offset, operand.strides)


def host_copy(source: Array, target: Array) -> Call:
    return np.copyto, (target, source)


def compute_into(xp: Any, step: Step, ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> None:
    """Run the operator's own function and copy what it returns into `outs`."""
    assert step.placed is not None
    made = step.placed.op.outputs(xp, step.placed.site, ins)
    for out, array in zip(outs, made, strict=False):
        if array.shape != out.shape:
            raise PlanError(f"{step.label}: it made {list(array.shape)}, {list(out.shape)} was inferred")
        xp.copyto(out, array)
