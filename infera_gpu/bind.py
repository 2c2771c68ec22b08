"""Plan + memory -> calls. Everything that a run does is decided here, once."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np

from infera_gpu.constants import Constants
from infera_gpu.devices.base import Device, host_block, host_view
from infera_gpu.devices.ports import Ports
from infera_gpu.errors import InferaError, InputError, PlanError, planning
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space, contiguous_strides
from infera_gpu.memory import ALIGN, aligned
from infera_gpu.op import Call, Launcher
from infera_gpu.plan import Plan, Step, unpacked
from infera_gpu.recipe import Form, Recipe, Surroundings, Written, followed, tell
from infera_gpu.spec import Array
from infera_gpu.specialize import Placed
from infera_kernels.cpu.interleave import interleaved

if TYPE_CHECKING:
    from infera_kernels.tuning import Tuned


class LazyInputs(Sequence["Array | None"]):
    """A step's inputs on a GPU, each made when it is asked for: a constant that its kernel packs is not uploaded as
    well."""

    def __init__(self, operands: Sequence[Operand | None], make: Callable[[Operand], Array]) -> None:
        self._operands, self._make = operands, make
        self._made: dict[int, Array] = {}

    def __len__(self) -> int:
        return len(self._operands)

    @overload
    def __getitem__(self, i: int) -> Array | None: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Array | None, ...]: ...
    def __getitem__(self, i: int | slice) -> Array | tuple[Array | None, ...] | None:
        if isinstance(i, slice):
            return tuple([self[j] for j in range(len(self._operands))[i]])
        operand = self._operands[i]
        if operand is None:
            return None
        i %= len(self._operands)
        made = self._made.get(i)
        if made is None:
            made = self._made[i] = self._make(operand)
        return made

    def __iter__(self) -> Iterator[Array | None]:
        return map(self.__getitem__, range(len(self._operands)))


Scratch: TypeAlias = Callable[[int], tuple[Any, int]]
"""Bytes -> a block of memory, and where in it they begin."""


class BoundBuffers:
    """What a kernel is bound to: implements op.Buffers over arena memory."""

    def __init__(
        self,
        device: Device,
        constants: Constants,
        placed: Placed,
        ins: Sequence[Array | None],
        outs: tuple[Array, ...],
        space: Space,
        scratch: Scratch,
    ) -> None:
        self.ins, self.outs = ins, outs
        self.xp: Any = np if space == "host" else device.xp
        self._device, self._constants, self._placed, self._space = device, constants, placed, space
        self._scratch = scratch
        self.threads = device.threads if space == "host" else 1
        self.least_ns = device.least_ns
        self.strict, self.tf32 = device.strict, device.tf32

    @property
    def launcher(self) -> Launcher:
        return self._device.launcher

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        return self._device.parallel(parts)

    def scratch(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        dtype = np.dtype(dtype)
        block, offset = self._scratch(math.prod(shape) * dtype.itemsize)
        if self._space == "host":
            return np.ndarray(shape, dtype, block, offset)
        shape = tuple(map(int, shape))
        strides = contiguous_strides(shape, dtype.itemsize)
        return self._device.view(block, Operand("scratch", self._space, shape, dtype, strides, offset))

    def pack(self, i: int, tag: str, build: Callable[[HostArray], HostArray]) -> Array:
        value = self._placed.site.value(i)
        if value is None:
            raise self._placed.site.fail(f"input {i} is not constant and cannot be packed")
        return self._constants.get(value, self._space, tag, build)

    def constant(self, value: HostArray) -> Array:
        return self._device.constant(np.ascontiguousarray(value), self._space)


def _view(device: Device, block: Any, operand: Operand) -> Array:
    return host_view(block, operand) if operand.space == "host" else device.view(block, operand)


class Given:
    """An array of the caller's, during a run."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: HostArray | None = None

    def copy_to(self, target: HostArray) -> None:
        assert self.array is not None
        np.copyto(target, self.array)


Apart: TypeAlias = tuple[tuple[Callable[..., object], ...], tuple[tuple[Any, ...], ...]]
"""Calls: what is called, and what with."""


def _apart(calls: Sequence[Call]) -> Apart:
    return tuple([fn for fn, _ in calls]), tuple([args for _, args in calls])


Arenas: TypeAlias = Mapping[Space | Literal["staging"], Any]

NOWHERE: Mapping[str, Array] = MappingProxyType({})
"""None of the caller's arrays."""


class Binder:
    """Binds the steps of a plan to arenas. Inputs in `given` and outputs in `written`, dense arrays on the device, stay
    where they lie."""

    def __init__(
        self,
        plan: Plan,
        arenas: Arenas,
        device: Device,
        constants: Constants,
        given: Mapping[str, Array],
        written: Mapping[str, Array],
    ) -> None:
        self.plan, self.device = plan, device
        self._arenas, self._constants = dict(arenas), constants
        self.direct = {name: Given() for name in plan.direct}
        self.asked = False
        """Whether a kernel has been asked for its calls."""
        lying = [(plan.inputs[n], a) for n, a in given.items()] + [(plan.outputs[n], a) for n, a in written.items()]
        self._elsewhere = {o.root: (device.block_of(a), o.offset) for o, a in lying}

    @property
    def arena(self) -> HostArray:
        """In host memory."""
        return self._arenas.get("host", host_block(0))  # type: ignore[no-any-return]

    def followed(self, recipe: Written) -> list[list[Call] | None]:
        """The calls of each step that a recipe tells. Raises PlanError where it does not suit."""
        constants, get = self.plan.constants, self._constants.get
        around = Surroundings(
            self.arena,
            lambda name: get(constants[name], "host"),
            lambda name, tag: self._constants.form(constants[name], tag),
            self.direct,
            self.device.parallel,
        )
        try:
            return followed(recipe.recipe(), around)
        except Exception as error:
            raise PlanError(f"a plan that was kept does not suit: {error}") from error

    def array(self, o: Operand) -> Array:
        """The operand's window, or constant."""
        if o.constant:
            return self._constants.get(self.plan.constants[o.root], o.space)
        if o.root in self._elsewhere:
            block, start = self._elsewhere[o.root]
            return _view(self.device, block, o.moved(-start))
        return _view(self.device, self._arenas[o.space], o)

    def calls(self, step: Step) -> list[Call]:
        """The calls of a step, in the arenas."""
        self.asked = True
        if step.kind == "copy" and step.ins[0] is not None and step.ins[0].root in self.direct:
            return [(self.direct[step.ins[0].root].copy_to, (self.array(step.outs[0]),))]
        outs = tuple(map(self.array, step.outs))
        if not any(o.nbytes for o in step.outs):
            return []  # nothing is computed on nothing; kernels need not know empty arrays
        if step.kernel is not None:
            top = step.workspace.offset if step.workspace else 0
            end = top + (step.workspace.nbytes if step.workspace else 0)

            def scratch(nbytes: int) -> tuple[Any, int]:
                nonlocal top
                at, top = top, top + aligned(nbytes)
                if top > end:
                    raise AssertionError(f"{step.label}: its kernel asks for more scratch than it did while planning")
                return self._arenas[step.space] if nbytes else host_block(0), at if nbytes else 0

            assert step.placed is not None
            return self._kernel(step, step.placed, outs, scratch)
        ins = LazyInputs(step.ins, self.array)
        if step.placed is None:
            (source,) = ins
            assert source is not None
            pieces = interleaved(source, outs[0]) if step.kind == "copy" and step.space == "host" else [(source, *outs)]
            return [self.device.transfer(piece, target) for piece, target in pieces]
        return [self.device.compute(step, tuple(ins), outs)]

    def apart(self, step: Step, tuned: Tuned, outs: tuple[Array, ...]) -> list[Call]:
        """The calls of a step with a kernel, bound as `tuned` says to outputs and scratch of its own: what lies in the
        arenas stays as it is. Raises LaunchError or OutOfMemoryError."""
        assert step.placed is not None
        placed = step.placed._replace(site=replace(step.placed.site, tuned=tuned))
        return self._kernel(step, placed, outs, lambda nbytes: (self.device.alloc(max(nbytes, 1), step.space), 0))

    def room(self, step: Step) -> tuple[Array, ...]:
        """Arrays that lie as the step's outputs do, elsewhere."""
        return tuple(map(self._elsewhere_like, step.outs))

    def _elsewhere_like(self, o: Operand) -> Array:
        low, high = o.bounds()
        shift = low % ALIGN  # what alignment there is stays
        return _view(self.device, self.device.alloc(high - low + shift, o.space), o.moved(shift - low))

    def _kernel(self, step: Step, placed: Placed, outs: tuple[Array, ...], scratch: Scratch) -> list[Call]:
        assert step.kernel is not None
        ins: Sequence[Array | None] = (
            tuple([o and self.array(o) for o in step.ins]) if step.space == "host" else LazyInputs(step.ins, self.array)
        )
        io = BoundBuffers(self.device, self._constants, placed, ins, outs, step.space, scratch)
        return self.device.wrap(step, list(step.kernel.bind(placed.site, io)), ins, outs)


def recipe_of(bound: Bound, held: Iterable[Form]) -> Recipe:
    """How to bind the plan without its kernels, as it has been bound to host memory, with these constants."""
    arena, parts_of = bound.binder.arena, bound.binder.device.parts_of
    return tell(bound.calls, bound.starts, arena, held, bound.direct, parts_of)


@dataclass(frozen=True)
class Bound:
    """A plan bound to one set of arenas: calls to make, and ports to fill before and to read after. `direct` inputs
    are set.

    The plan's step i makes the calls from `starts[i]` to `starts[i + 1]`. `fast` are the calls of a run: the same, but
    for what a CUDA graph replays at one go. Outputs that are `written` need not be read. What is called and what with
    are kept apart: Python's garbage collection passes by tuples of arrays, but not by those that hold a ufunc too.
    """

    plan: Plan
    ports: Ports
    direct: Mapping[str, Given]
    made: Apart
    starts: tuple[int, ...]
    fast: Apart
    binder: Binder
    written: frozenset[str]

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(zip(*self.made, strict=True))

    def give(self, entering: Mapping[str, Array]) -> None:
        """The `direct` inputs, for a run."""
        for name, given in self.direct.items():
            given.array = entering[name]

    def let_go(self) -> None:
        """Of the `direct` inputs."""
        for given in self.direct.values():
            given.array = None

    def run(self) -> None:
        """Make the calls. What fails is an InferaError naming the node: InputError for an index out of range."""
        fn: Callable[..., object] = self.run
        args: tuple[Any, ...] = ()
        try:
            for fn, args in zip(*self.fast):  # noqa: B905 - `strict` takes as long as half a small call
                fn(*args)
        except InferaError:
            raise
        except IndexError as error:
            raise InputError(f"{self._label(fn, args)}: {error}") from None
        except (ArithmeticError, TypeError, ValueError) as error:
            raise PlanError(f"{self._label(fn, args)}: {error}") from error
        except Exception as error:
            error.add_note(f"in the step {self._label(fn, args)}")
            raise

    def _label(self, fn: Callable[..., object], args: tuple[Any, ...]) -> str:
        """The step that a call belongs to; where a graph makes its calls one by one, that of the last."""
        args = getattr(fn, "args", args)
        at = next((i for i, a in enumerate(self.made[1]) if a is args), None)
        if at is None:
            return "a replayed CUDA graph"
        return self.plan.steps[bisect_right(self.starts, at) - 1].label


def bind(
    plan: Plan,
    arenas: Arenas,
    device: Device,
    constants: Constants,
    given: Mapping[str, Array] = NOWHERE,
    written: Mapping[str, Array] = NOWHERE,
) -> Bound:
    """Bind every step to its memory. Inputs in `given`, dense arrays on the device, are read where they lie, outputs in
    `written` made where those lie: see `destinations`."""
    binder = Binder(plan, arenas, device, constants, given, written)
    calls: list[Call] = []
    starts = [0]
    if plan.recipe is None or given or written:
        known: Sequence[list[Call] | None] = [None] * len(plan.packed)
    else:
        known = binder.followed(plan.recipe)
    with planning() as at:
        for i, own in enumerate(known):
            if own is None:
                step = unpacked(plan.packed[i], plan.segment.nodes)
                at.what = step.label
                own = binder.calls(step)
            calls += own
            starts.append(len(calls))
    fast, done = list[Call](), 0
    for held in plan.graphs or ():
        start, stop = starts[held.start], starts[held.stop]
        fast += [*calls[done:start], *([device.graph(calls[start:stop])] if stop > start else [])]
        done = stop
    made = _apart(calls)
    inputs = {v: binder.array(o) for v, o in plan.inputs.items() if v not in given and v not in binder.direct}
    outputs = {v: binder.array(o) for v, o in plan.outputs.items() if v not in written}
    return Bound(
        plan,
        device.ports(inputs, outputs, arenas.get("staging")),
        binder.direct,
        made,
        tuple(starts),
        _apart([*fast, *calls[done:]]) if fast else made,
        binder,
        frozenset(written),
    )
