"""A device that plans like CUDA and computes on NumPy: sessions, arenas and transfers are testable without a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from infera_gpu.budget import VramBudget
from infera_gpu.devices.base import Args, compute_into, host_block, host_copy, host_view, quiet_numpy
from infera_gpu.devices.graphs import Calls
from infera_gpu.devices.ports import DirectPorts, Ports
from infera_gpu.devices.timing import Timer
from infera_gpu.errors import DeviceError, OutOfMemoryError
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space
from infera_gpu.op import Call, Launcher
from infera_gpu.plan import Step
from infera_gpu.source import usual_room
from infera_gpu.spec import Array
from infera_kernels.calls import LEAST_NS, one_after_the_other
from infera_kernels.cpu.aligned import Slabs
from infera_kernels.launch import nominal_target
from infera_kernels.tuning import DeviceTiles, Tuned


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the device was asked: `kind` is alloc, constant, transfer, compute, kernel or replay."""

    kind: str
    label: str
    nbytes: int = 0


class RecordingDevice:
    """Prefers Triton kernels as the CUDA device does, so that its plans are the CUDA device's plans.

    `events` lists what was asked, in order. Kernels are bound (to a launcher that records, and where it `remembers`
    holds what it was given) but not launched: the operator's own function fills their outputs, so that a session's
    answers are right and every offset, view, transfer and reuse of memory is put to the test.
    """

    name = "recording"
    slabs: Slabs | None = None
    space: Space = "device"
    runs_portable = True
    xp: Any = np
    threads = 1
    least_ns = LEAST_NS
    room = staticmethod(usual_room)
    concurrency = ""
    lost = ""

    def __init__(
        self,
        strict: bool = False,
        *,
        captures: bool = True,
        tf32: bool = False,
        batch_invariant: bool = False,
        budget: VramBudget | None = None,
        remembers: bool = False,
    ) -> None:
        self.strict, self.captures, self.tf32, self._budget = strict, captures, tf32, budget
        self._remembers = remembers
        self.batch_invariant = batch_invariant
        self.channels_last = find_spec("triton") is not None
        self.kinds: tuple[str, ...] = ("triton", "cupy") if self.channels_last else ("cupy",)
        self.events: list[Event] = []
        self._launcher: Launcher | None = None
        self.tiles = DeviceTiles(nominal_target(90)) if self.channels_last else None

    @property
    def launcher(self) -> Launcher:
        if self._launcher is None:
            from infera_kernels.launch import RecordingLauncher

            self._launcher = RecordingLauncher(forgets=not self._remembers)
        return self._launcher

    @property
    def tuned(self) -> Tuned | None:
        return None if self.tiles is None else self.tiles.tuned

    def timer(self) -> Timer:
        raise DeviceError(f"{self.name} only pretends to launch: there is nothing to measure; tune on a GPU")

    def running(self) -> AbstractContextManager[None]:
        return quiet_numpy()

    def launch(self, run: Callable[[*Args], None], *args: *Args) -> None:
        with self.running():
            run(*args)

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        return one_after_the_other(parts)

    def parts_of(self, call: Call) -> None:
        return None

    def alloc(self, nbytes: int, space: Space) -> HostArray:
        self.events.append(Event("alloc", space, nbytes))
        block = host_block(nbytes)
        if space == "device":
            self._charge("the arena", nbytes, block)
        return block

    def view(self, block: Any, operand: Operand) -> HostArray:
        return host_view(block, operand)

    def require(self, what: str, nbytes: int) -> None:
        if self._budget is not None and nbytes > self._budget.available:
            raise OutOfMemoryError(
                f"{what} on {self.name}", needed=nbytes, available=self._budget.available, limit=self._budget.limit
            )

    def _charge(self, what: str, nbytes: int, array: HostArray) -> None:
        """Counts memory against the budget for as long as the array lives."""
        if self._budget is not None:
            self._budget.take(f"{what} on {self.name}", nbytes)
            weakref.finalize(array, self._budget.give_back, nbytes)

    def weights(self, nbytes: int) -> AbstractContextManager[None]:
        return nullcontext()

    def constant(self, host: HostArray, space: Space, *, lasting: bool = False, packed: bool = False) -> HostArray:
        if space == "device":
            self.events.append(Event("constant", "", host.nbytes))
            host = host.view()  # what the device has, which goes with it
            self._charge("a constant", host.nbytes, host)
        return host

    def transfer(self, source: Array, target: Array) -> Call:
        copy, args = host_copy(source, target)
        return self._record, (Event("transfer", "", target.nbytes), copy, args)

    def compute(self, step: Step, ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> Call:
        event = Event("compute", step.label, sum(o.nbytes for o in outs))
        return self._record, (event, compute_into, (np, step, ins, outs))

    def wrap(self, step: Step, calls: list[Call], ins: Sequence[Array | None], outs: tuple[Array, ...]) -> list[Call]:
        if step.space == "host":
            return calls
        event = Event("kernel", step.label, sum(o.nbytes for o in outs))
        return [*calls, (self._record, (event, compute_into, (np, step, tuple(ins), outs)))]

    def _record(self, event: Event, run: Any, args: tuple[Any, ...]) -> None:
        self.events.append(event)
        run(*args)

    def ports(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], staging: Any) -> Ports:
        return DirectPorts(self, inputs, outputs)

    def graph(self, calls: Sequence[Call]) -> Call:
        event = Event("replay", f"{len(calls)} calls")
        return Calls([(self.events.append, (event,)), *calls]), ()

    def accepts(self, value: object) -> HostArray | None:
        return value if isinstance(value, np.ndarray) else None

    def block_of(self, array: Array) -> None:
        return None

    def synchronize(self) -> None: ...

    def close(self) -> None: ...
