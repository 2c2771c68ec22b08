"""What runs a graph: feeds in, segments one after the other, results out, from several threads at once."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self
from weakref import WeakSet

import numpy as np

from infera_gpu.bind import Bound
from infera_gpu.bodies import Inside, Nested
from infera_gpu.constants import Constants
from infera_gpu.devices import Device
from infera_gpu.devices.base import CHECK_ABOVE, Args, require_host_memory
from infera_gpu.entry import Entering, Entry
from infera_gpu.errors import DeviceError, InputError, OutOfMemoryError, PlanError
from infera_gpu.feeds import not_feeds
from infera_gpu.graph import Graph, T
from infera_gpu.lease import Arena, Lease, Memory
from infera_gpu.ops import registry
from infera_gpu.passes import Precision, Report, optimize
from infera_gpu.passes.gradient import differentiated
from infera_gpu.plan import Plan, Where
from infera_gpu.results import RESULTS
from infera_gpu.spec import Array, TensorSpec, ValueSpec, tensors_of
from infera_gpu.stages import Shelf, Stage, Stages

MAX_OVERRIDING = 8
"""Sets of overridden constants for which a session keeps plans; the least recently used is dropped beyond that."""


def optimized(graph: Graph, device: Device, report: Report | None = None, precision: Precision = "fp32") -> Graph:
    """What the passes make of a graph for a device."""
    return optimize(
        graph,
        registry(),
        report,
        strict=device.strict,
        kinds=device.kinds,
        channels_last=device.channels_last,
        precision=precision,
    )


class Running(ABC):
    """A graph on a device, and its runs, which several threads may make.

    `graph` is what passes made of the model's where `fuse` is set; where it is `optimised`, they have made it already.
    `overridable` are the constants that a run may be given values for. `again` reads the model's graph again: with it,
    constants that passes replaced are not kept, unless runs may override some; an `optimised` graph needs it.
    """

    def __init__(
        self,
        graph: Graph,
        device: Device,
        *,
        fuse: bool = True,
        arena: Arena | None = None,
        constants: Constants | None = None,
        again: Callable[[], Graph] | None = None,
        precision: Precision = "fp32",
        optimised: bool = False,
    ) -> None:
        self._again = again if fuse and not graph.overridable else None
        self._loaded = None if self._again else graph
        self.graph = optimized(graph, device, precision=precision) if fuse and not optimised else graph
        self.fuse, self.precision = fuse, precision
        self.device = device
        self.name = graph.name
        self.inputs: Mapping[str, ValueSpec] = graph.inputs
        self.outputs: Mapping[str, ValueSpec] = graph.outputs
        self.overridable: Mapping[str, ValueSpec] = graph.overridable
        self._no_results: dict[str, Any] = dict.fromkeys(self.outputs)
        self._constants = constants or Constants(device, self.graph)
        self._stages = self._planning()
        self.tuning_left = 0.0
        """Seconds for which runs with new shapes may still measure tiles first."""
        self.most: Mapping[Where, int] = {}
        """Bytes beyond which arenas do not grow; none where they may."""
        self._measuring = threading.Lock()
        self._overriding: OrderedDict[frozenset[str], Self] = OrderedDict()
        self._dropped: WeakSet[Running] = WeakSet()
        self._inner: WeakSet[Running] = WeakSet()
        self._deriving = threading.Lock()
        self._guests = 0
        self._entry = Entry(self.inputs, device)
        self._arena = arena or Arena()
        self._arena.join(self, device)
        self._inside = Arena(self._arena.max_concurrency)
        self._inside.join(self, device)
        self._leases: dict[Memory, Lease] = {}
        self._available = threading.Condition()
        self._closed = False

    def keep_plans(self, shelf: Shelf) -> None:
        """Take plans from there, and keep those there that must be made."""
        self._stages.shelf = shelf

    def _planning(self) -> Stages:
        return Stages(self.graph, self.device, registry(), self._constants, self._nested)

    # ---- running

    @property
    def loaded(self) -> Graph:
        """The graph as the file has it; read again from there where it is not kept. Raises InvalidModel."""
        if self._loaded is None:
            assert self._again is not None
            return differentiated(self._again())
        return self._loaded

    @property
    def tensor_inputs(self) -> Mapping[str, TensorSpec]:
        """`inputs`, where all of them are tensors. Raises InputError otherwise."""
        try:
            return tensors_of(self.inputs, "input")
        except TypeError as error:
            raise InputError(str(error)) from None

    def run(self, feeds: Mapping[str, Any], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run the model: arrays in by name, arrays out by name.

        Constants that the model lists as inputs too, `overridable`, may be given as well; each set of them that is
        given has a session of its own, kept for later runs, with its own plans and its own copy of the other constants.

        Arrays that lie on the session's GPU (CuPy, or anything with DLPack) never go through the host: the same array
        given again is read where it lies, others are copied on the device. Results are new NumPy arrays, except those
        named in `out`, which are written in place and must match in shape and dtype; with every output in `out` a run
        allocates no array. After an error they may hold anything. `out` may name arrays that are inputs too. Raises
        InputError naming the feed that does not fit, or the node that met an index out of range.
        """
        if out:
            self._check_out(feeds, out)
        if self.overridable and (session := self._for(feeds)) is not self:
            with self._hosting():
                return session.run(feeds, out)
        entering = self._check(feeds)
        if self.tuning_left > 0 and not self._stages.known(entering.shapes):
            self._tune_first(feeds)
        return self._collect(entering, out)

    @abstractmethod
    def _tune_first(self, feeds: Mapping[str, Any]) -> None:
        """Measure tiles in runs with these feeds, within `tuning_left`, which that shortens."""

    def _check_out(self, feeds: object, out: Mapping[str, Array]) -> None:
        # The feeds may be in the place of `out`, as onnxruntime has them.
        if type(feeds) is not dict and not isinstance(feeds, Mapping):
            raise not_feeds(feeds)
        if type(out) is not dict and not isinstance(out, Mapping):
            raise InputError(
                f"out is a {type(out).__name__}, expected the arrays to write to, by output name; all outputs are "
                "returned by name, infera_gpu.InferenceSession takes names of some"
            )
        for name, target in out.items():
            if not hasattr(target, "dtype"):
                raise InputError(f"out['{name}'] is a {type(target).__name__}, expected an array to write to")
            if name not in self.outputs:
                raise InputError(f"out['{name}'] is not an output; the outputs are: {', '.join(self.outputs)}")

    def _collect(self, entering: Entering, out: Mapping[str, Array] | None = None) -> dict[str, Any]:
        results = self._no_results.copy()
        if out:
            entering.out = out

        def take(stage: Stage, bound: Bound) -> None:
            bound.run()
            self._read(bound, stage, results, out)
            for name in stage.plan.segment.objects:
                results[name] = entering.objects[name] if name in entering.objects else stage.segment.constants[name]

        self._with_lease(self._run_again, entering, take)
        return results

    def _for(self, feeds: Mapping[str, Any]) -> Self:
        """The session that takes these feeds: this one, or one whose inputs are some overridable constants as well."""
        if not self.overridable or not isinstance(feeds, Mapping):
            return self
        given = frozenset(self.overridable.keys() & feeds.keys())
        if not given:
            return self
        with self._deriving:  # not the lock that runs wait for: passes take their time
            self._refuse_closed()
            session = self._overriding.get(given)
            if session is None:
                session = self._overriding[given] = type(self)(
                    self.loaded.overriding(given),
                    self.device,
                    fuse=self.fuse,
                    arena=self._arena,
                    precision=self.precision,
                )
                if len(self._overriding) > MAX_OVERRIDING:
                    self._dropped.add(self._overriding.popitem(last=False)[1])  # it may still run
            self._overriding.move_to_end(given)
            return session

    def _nested(self, graph: Graph) -> Nested:
        """A subgraph of this session's graph, callable; on the same device, with the same constants.

        What a stage holds of it goes with the stage. Subgraphs never run at the same time within one run, and share an
        arena.
        """
        inner = type(self)(graph, self.device, fuse=False, arena=self._inside, constants=self._constants)
        self._inner.add(inner)
        return inner

    def called(self, *values: Any) -> list[Any]:
        """A run of a subgraph: inputs in their order in, outputs in theirs out."""
        return list(self._collect(self._entry.sort(dict(zip(self.inputs, values, strict=True)))).values())

    @property
    def planned(self) -> tuple[Plan, ...]:
        """The plans that are kept, of every shape and segment."""
        return self._stages.plans

    def inside(self) -> list[Inside]:
        """The plans by which subgraphs of Loop, Scan and their kind have been run, on the way of plans that are kept.

        An If has none: the branch that is taken is planned with what follows.
        """
        return self._stages.inside()

    def _run(self, feeds: Entering, run: Callable[[Stage, Bound], None]) -> None:
        """The segments of one run, one after the other: `run` makes the calls and takes the outputs.

        It returns when the steps are done: what follows copies to memory that they use.
        """
        self._with_lease(self._run_stages, feeds, run)

    def _run_again(self, lease: Lease, feeds: Entering, run: Callable[[Stage, Bound], None]) -> None:
        """The same, shorter where a run repeats an earlier one: for a `run` that only launches and copies where the
        plan's steps do."""
        if lease.repeated is None or not self._repeats(lease, feeds, run):
            self._run_stages(lease, feeds, run)

    def _repeats(self, lease: Lease, feeds: Entering, run: Callable[[Stage, Bound], None]) -> bool:
        """Whether that was a run of what a plan was bound to before, and which only launches."""
        stage = self._stages.kept(feeds.shapes)
        if stage is None or not stage.plan.only_launches:
            return False
        try:
            if self.most:
                self._refuse_larger(stage.plan)
            bound = lease.again(stage.plan, feeds.arrays, feeds.out)
            if bound is None:
                return False
            self.device.launch(run, stage, bound)
        except (PlanError, OutOfMemoryError):
            if not stage.taken:
                raise
            return False
        return True

    def _run_stages(self, lease: Lease, feeds: Entering, run: Callable[[Stage, Bound], None]) -> None:
        with self.device.running():
            stage = self._stages.first(feeds.shapes)
            entering: Mapping[str, Array] = feeds.arrays
            while True:
                try:
                    if self.most and not stage.plan.carried:
                        self._refuse_larger(stage.plan)
                    bound = lease.bound(stage.plan, entering, feeds.out)
                    bound.ports.fill(entering)
                    if bound.direct:
                        bound.give(entering)
                    try:
                        run(stage, bound)
                    finally:
                        if bound.direct:
                            bound.let_go()
                except (PlanError, OutOfMemoryError):
                    if not stage.taken:
                        raise
                    self._stages.distrust()
                    stage = self._stages.first(feeds.shapes)
                    continue
                if stage.is_last:
                    return
                stage, entering = self._advance(stage, bound, feeds.objects)
                del bound  # it holds its arena, in whose place there may soon be a larger one

    def _refuse_larger(self, plan: Plan) -> None:
        for space, nbytes in plan.memory.items():
            if nbytes > (most := self.most.get(space, 0)):
                given = ", ".join(f"{name}{list(o.shape)}" for name, o in plan.inputs.items())
                where = self.device.name if space == "device" else "the host"
                raise OutOfMemoryError(
                    f"a run of '{self.name}' with {given}, larger than the shapes that it was loaded for, on {where}",
                    needed=nbytes,
                    available=most,
                )

    def _read(self, bound: Bound, stage: Stage, results: dict[str, Array], out: Mapping[str, Array] | None) -> None:
        targets: dict[str, Array] = {}
        for name, shape, dtype, nbytes in stage.made:
            target = out.get(name) if out else None
            if target is None:
                if nbytes > CHECK_ABOVE:
                    require_host_memory(f"output '{name}'", nbytes)
                target = RESULTS.empty(shape, dtype, nbytes)
            elif target.shape != shape or target.dtype != dtype:
                swapped = target.dtype == dtype.newbyteorder()
                raise InputError(
                    f"out['{name}'] is {target.dtype.name}{list(target.shape)}"
                    f"{' of the other byte order' if swapped else ''}, "
                    f"the output is {dtype.name}{list(shape)}"
                )
            elif isinstance(target, np.ndarray) and not target.flags.writeable:
                raise InputError(f"out['{name}'] is read-only")
            if name in bound.written:
                results[name] = target
            else:
                targets[name] = target
        bound.ports.read(targets)
        results.update(targets)

    def _advance(self, stage: Stage, bound: Bound, objects: dict[str, Any]) -> tuple[Stage, Mapping[str, Array]]:
        """The stage that follows, now that the values it waits for are there; and what eager nodes made."""

        def read(name: str) -> np.ndarray[Any, Any]:
            source = stage.plan.outputs[name]
            host = np.empty(source.shape, source.dtype)
            bound.ports.read({name: host})
            return host

        return self._stages.advance(stage, read, objects)

    @contextmanager
    def _hosting(self) -> Iterator[None]:
        """A run of an overriding session, which `close` waits for."""
        with self._available:
            self._refuse_closed()
            self._guests += 1
        try:
            yield
        finally:
            with self._available:
                self._guests -= 1
                self._available.notify_all()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise DeviceError(f"the session of '{self.name}' is closed")

    def _with_lease(self, work: Callable[[Lease, *Args], T], *args: *Args) -> T:
        """What `work` makes of memory that nothing else uses meanwhile."""
        run = object()
        try:
            memory = self._arena.borrow(self, run, self._refuse_closed)
            lease = self._leases.get(memory)
            if lease is None:
                lease = self._leases[memory] = Lease(self.device, self._constants, memory, self._stages.bound)
                lease.begin_with(self.most)
            made = work(lease, *args)
            if self._arena.serves_others(self.device):
                self.device.synchronize()  # another session's device may have a stream of its own
            return made
        except BaseException:
            with suppress(Exception):  # what the run has begun may still use the memory
                self.device.synchronize()
            raise
        finally:
            self._arena.give_back(run)

    # ---- feeds

    def _check(self, feeds: Mapping[str, Any]) -> Entering:
        found = self._entry.take(feeds)
        if not self._stages.known(found.shapes):
            self._entry.check_shapes(found.shapes)
        return found

    # ---- the rest

    @property
    def constant_bytes(self) -> int:
        """Bytes of the graph's constants, those of its subgraphs included; see `packed_bytes`."""
        return sum(a.nbytes for graph in self.graph.walk() for a in graph.constants.values())

    @property
    def packed_bytes(self) -> int:
        """Bytes of what kernels made of constants for the shapes that have come so far, in memory beside the constants
        until the session is closed."""
        return self._constants.packed

    def close(self) -> None:
        """Give the memory back. Runs that go on finish; later ones raise DeviceError."""
        with self._available:
            if self._closed:
                return
            self._closed = True
            while self._guests:
                self._available.wait()
        everyone: list[Running] = [*self._overriding.values(), *self._dropped, self]
        for session in everyone:
            session._let_go()
        self._overriding.clear()
        self.device.close()

    def _let_go(self) -> None:
        self._closed = True
        self._arena.leave(self)
        for session in list(self._inner):
            session._let_go()
        self._inside.leave(self)
        self._leases.clear()
        RESULTS.clear()
        self._stages.clear()
        self._constants.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        ins = ", ".join(f"{k} {s}" for k, s in self.inputs.items())
        outs = ", ".join(f"{k} {s}" for k, s in self.outputs.items())
        return f"<{type(self).__name__} {self.name} on {self.device.name}: {ins} -> {outs}>"
