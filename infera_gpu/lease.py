"""Memory that runs borrow, one run at a time, of one session or of several."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import is_
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from infera_gpu.bind import NOWHERE, Bound, bind
from infera_gpu.constants import MAX_FOLDED, Constants
from infera_gpu.destinations import destinations
from infera_gpu.devices.base import Device, usual_buffers
from infera_gpu.dry import missing
from infera_gpu.errors import DeviceError, InputError, OutOfMemoryError
from infera_gpu.garbage import settle, uncollected
from infera_gpu.layout import Space, dense
from infera_gpu.plan import Plan, Where
from infera_gpu.spec import Array, TensorSpec

MAX_BOUND = 256
"""Plans that stay bound to a lease's arenas, as many as are kept; the least recently used is let go beyond that."""


MAX_DIRECT = 4
"""Sets of the caller's arrays on the device that plans stay bound to; as long as they are, their memory is held."""

_Key: TypeAlias = tuple[Plan, tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]


class Direct(NamedTuple):
    """Arrays of the caller's on the device, to which a plan is bound: inputs that are read where they lie, and outputs
    that are written where he wants them."""

    given: Mapping[str, Array]
    written: Mapping[str, Array]


class Repeated(NamedTuple):
    """What the last run was bound to, where it read all of its inputs where they lie, and wrote what it could of the
    `wanted` outputs."""

    plan: Plan
    arrays: Direct
    wanted: int
    bound: Bound

    def suits(self, plan: Plan, entering: Mapping[str, Array], out: Mapping[str, Array]) -> bool:
        """Whether they are the same arrays: of what shape the plan says, and an array's address does not change."""
        given, written = self.arrays
        return (
            self.plan is plan
            and self.wanted == len(out)
            and all(map(is_, map(entering.get, given), given.values()))
            and all(map(is_, map(out.get, written), written.values()))
        )


SHRINK_ABOVE = 1 << 26
SHRINK_AFTER = 64
"""An arena over SHRINK_ABOVE bytes and four times what each of the last SHRINK_AFTER plans needed is given back."""


class Memory:
    """An arena a memory space, for one run at a time.

    Where one is replaced, every lease lets go of what is bound to it: a session that does not run again soon would keep
    the old one.
    """

    def __init__(self) -> None:
        self.claim: tuple[object, object] | None = None
        """Whose run has it, and which run; one value, so that an interrupt finds both or neither."""
        self.arenas: dict[Where, Any] = {}
        self.sizes: dict[Where, int] = {}
        self.leases: WeakSet[Lease] = WeakSet()
        self.reserved: Mapping[Where, int] = {}
        """Sizes below which arenas neither begin nor shrink."""
        self._needed = 0
        self._served = 0
        _MEMORIES.add(self)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def clear(self) -> None:
        self.unbind()
        self.arenas.clear()
        self.sizes.clear()

    def unbind(self) -> None:
        """Let go of all that is bound to these arenas, of all sessions that share them."""
        for lease in self.leases:
            lease.forget()

    def consider(self, plan: Plan, device: Device) -> None:
        """Give arenas back that have been far too large for a while: one huge request must not hold its memory.

        Raises OutOfMemoryError where what is reserved is not to be had again.
        """
        self._served += 1
        if plan.nbytes > self._needed:
            self._needed = plan.nbytes
        if self._served >= SHRINK_AFTER:
            if self.nbytes > max(SHRINK_ABOVE, 4 * self._needed, sum(self.reserved.values())):
                self.clear()
                self.restore(device)
            self._served, self._needed = 0, 0

    def restore(self, device: Device) -> None:
        """Take what is reserved again, of a memory that is clear. Raises OutOfMemoryError."""
        for space, nbytes in self.reserved.items():
            self._take(space, nbytes, device)

    def fit(self, plan: Plan, device: Device) -> None:
        """Grow to what the plan needs. Raises OutOfMemoryError."""
        for space, nbytes in plan.memory.items():
            if nbytes > self.sizes.get(space, -1):
                self.unbind()
                if not plan.carried:  # give the old one back before asking for the new one
                    self.arenas.pop(space, None)
                    self.sizes.pop(space, None)
                old, had = self.arenas.get(space), self.sizes.get(space, 0)
                self._take(space, max(nbytes, self.reserved.get(space, 0)), device)
                if old is not None and had and space != "staging":
                    _keep(old, self.arenas[space], had, space, device)

    def _take(self, space: Where, nbytes: int, device: Device) -> None:
        self.arenas[space] = device.alloc(nbytes, "host" if space == "staging" else space)
        self.sizes[space] = nbytes


def _keep(old: Any, new: Any, nbytes: int, space: Space, device: Device) -> None:
    """Copy what earlier segments of this very run left behind."""
    operand = dense("arena", space, TensorSpec((nbytes,), np.dtype(np.uint8)))
    copy, args = device.transfer(device.view(old, operand), device.view(new, operand))
    copy(*args)
    device.synchronize()


_MEMORIES: WeakSet[Memory] = WeakSet()
_ARENAS: WeakSet[Arena] = WeakSet()


def _of_its_own() -> None:
    """The child of a fork takes arenas of its own: those on the host may be in memory that its parent writes to."""
    for memory in list(_MEMORIES):
        if "device" not in memory.sizes:
            memory.clear()
    for arena in list(_ARENAS):
        arena.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_of_its_own)


class Arena:
    """Memory for `max_concurrency` runs at once, of all sessions that are loaded with it: others wait for their turn.

    `load(..., arena=arena)` lets models that need not run at the same time share one arena, as large as the largest of
    their plans. All of them run on one device. The memory is given back when the last of the sessions is closed.
    """

    def __init__(self, max_concurrency: int = 1) -> None:
        if not isinstance(max_concurrency, int) or max_concurrency < 1:
            raise InputError(f"max_concurrency is {max_concurrency!r}, expected a positive number")
        self.max_concurrency = max_concurrency
        self._memories: list[Memory] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        """Threads that wait for a change: mostly none, and nobody has to be told."""

        self._users: WeakKeyDictionary[object, Device] = WeakKeyDictionary()
        self._shared = False
        """Whether there were several when one joined or left: each run asks, and most arenas are one session's."""

        _ARENAS.add(self)

    def disown(self) -> None:
        """For the child of a fork: what threads borrowed that it has not is free, and so is the lock."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        for memory in self._memories:
            memory.claim = None

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated now."""
        with self._lock:
            return sum(m.nbytes for m in self._memories)

    def serves_others(self, device: Device) -> bool:
        """Whether sessions with a device of their own use it too, whose streams know nothing of this one's."""
        return self._shared and any(other is not device for other in list(self._users.values()))

    def join(self, user: object, device: Device) -> None:
        """`user` may borrow from now on. Raises DeviceError where others run on another device."""
        with self._lock:
            other = next((d.name for d in self._users.values() if d.name != device.name), None)
            if other is not None:
                raise DeviceError(f"the arena is on {other}, a session on {device.name} cannot share it")
            self._users[user] = device
            self._shared = len(self._users) > 1

    def leave(self, user: object) -> None:
        """Wait for what `user` has borrowed; it may not borrow again. The last one that leaves frees the memory."""
        with self._lock:
            self._changed.notify_all()  # those of its runs that wait are refused
            while any(m.claim is not None and m.claim[0] is user for m in self._memories):
                self._wait()
            self._users.pop(user, None)
            self._shared = len(self._users) > 1
            if not self._users:
                self._memories.clear()

    def borrow(self, user: object, run: object, refuse: Callable[[], None]) -> Memory:
        """Memory for one run of `user`. Waits for it; `refuse` raises where the run may not start any more.

        Who asks gives it back in any case, even where an interrupt came before he had it.
        """
        with self._lock:
            refuse()
            while True:
                for memory in self._memories:
                    if memory.claim is None:
                        memory.claim = (user, run)
                        return memory
                if len(self._memories) < self.max_concurrency:
                    self._memories.append(Memory())
                    continue
                self._wait()
                refuse()

    def _wait(self) -> None:
        self._waiting += 1
        try:
            self._changed.wait()
        finally:
            self._waiting -= 1

    def give_back(self, run: object) -> None:
        """What the run has, if it has anything."""
        with self._lock:
            for memory in self._memories:
                if memory.claim is not None and memory.claim[1] is run:
                    memory.claim = None
            if self._waiting:
                self._changed.notify_all()


def largest(*needs: Mapping[Where, int]) -> dict[Where, int]:
    """The most bytes of each memory that any of them asks for."""
    return {space: max(n.get(space, 0) for n in needs) for needed in needs for space in needed}


class Lease:
    """A session's plans, bound to memory that one run at a time may use. `told` is called with what has been bound."""

    def __init__(self, device: Device, constants: Constants, memory: Memory, told: Callable[[Bound], None]) -> None:
        self._device, self._constants, self._memory, self._told = device, constants, memory, told
        self._bound: OrderedDict[Plan, Bound] = OrderedDict()
        self._folded: dict[Plan, int] = {}
        self._lying: WeakKeyDictionary[Plan, Mapping[str, frozenset[str]]] = WeakKeyDictionary()
        self._direct: OrderedDict[_Key, tuple[Bound, Direct]] = OrderedDict()
        self._last: tuple[_Key, Direct] | None = None
        self.repeated: Repeated | None = None
        self._refused: _Key | None = None
        """What there was no memory to bind once more: such arrays are copied."""

        memory.leases.add(self)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def bound(self, plan: Plan, entering: Mapping[str, Array], out: Mapping[str, Array] = NOWHERE) -> Bound:
        """The plan bound to these arenas, which grow first if it needs more than they have.

        Arrays on the device that enter twice in a row are read where they lie from then on, and so are outputs written
        that are wanted twice in the same place: binding a plan anew costs more than copying once.
        """
        if not plan.carried:
            self._memory.consider(plan, self._device)
        if self._device.space == "host":
            return self._bind(plan)
        if self.repeated is not None and self.repeated.suits(plan, entering, out):
            return self.repeated.bound
        self.repeated = None
        arrays = self._on_device(plan, entering, out)
        if not arrays.given:
            return self._bind(plan)
        key = self._key(plan, arrays)
        found = self._bound_among(key, arrays, len(out))
        self._last = (key, arrays)  # which keeps the arrays, so that their addresses stay theirs
        return found

    def _bound_among(self, key: _Key, arrays: Direct, wanted: int) -> Bound:
        """The plan bound to as many of these arrays as came before, if there are some."""
        plan, last = key[0], self._last
        repeats = len(arrays.given) == len(plan.inputs)
        if not self._known(key, last):  # outputs may be wanted elsewhere every time
            repeats, arrays, key = False, Direct(arrays.given, NOWHERE), (*key[:2], ())
            if last is not None:
                last = (*last[0][:2], ()), last[1]
            if not self._known(key, last):
                return self._bind(plan)
        if key == self._refused:
            return self._bind(plan)
        try:
            found = self._bound_to(key, arrays)
        except OutOfMemoryError:
            self._refused = key
            return self._bind(plan)
        if repeats:
            self.repeated = Repeated(plan, arrays, wanted, found)
        return found

    def _known(self, key: _Key, last: tuple[_Key, Direct] | None) -> bool:
        """Whether these arrays came in the last run, or a plan is bound to them."""
        return key in self._direct or (last is not None and last[0] == key)

    def again(self, plan: Plan, entering: Mapping[str, Array], out: Mapping[str, Array] = NOWHERE) -> Bound | None:
        """What `bound` answers where the plan is bound to these arrays, all of its inputs; None where it is not."""
        last = self.repeated
        if last is None or not last.suits(plan, entering, out):
            last = self.repeated = self._bound_before(plan, entering, out)
            if last is None:
                return None
        self._memory.consider(plan, self._device)
        return last.bound if last is self.repeated else None  # it is not where the arenas have been given back

    def _bound_before(self, plan: Plan, entering: Mapping[str, Array], out: Mapping[str, Array]) -> Repeated | None:
        arrays = self._on_device(plan, entering, out)
        if len(arrays.given) < len(plan.inputs):
            return None
        key = self._key(plan, arrays)
        found = self._direct.get(key)
        if found is None:
            return None
        self._last = (key, arrays)
        return Repeated(plan, arrays, len(out), found[0])

    def _bind(self, plan: Plan) -> Bound:
        """The plan bound to the arenas, once."""
        found = self._bound.get(plan)
        if found is None:
            with self._constants.making, uncollected(), usual_buffers(), self._constants.binding():
                self._require(plan)
                with self._given_back():
                    self._memory.fit(plan, self._device)
                    with self._device.weights(missing(self._device, self._constants, plan, lasting=True)):
                        found = self._bound[plan] = bind(plan, self._memory.arenas, self._device, self._constants)
                settle("bind")
            self._told(found)
            for placed in plan.segment.nodes if found.binder.asked else ():
                placed.site.forget()
            self._folded[plan] = self._constants.folded(plan)
            while len(self._bound) > MAX_BOUND or (sum(self._folded.values()) > MAX_FOLDED and len(self._bound) > 1):
                del self._folded[self._bound.popitem(last=False)[0]]
        else:
            self._bound.move_to_end(plan)
        return found

    def reserve(self, plans: Sequence[Plan]) -> int:
        """Binds these plans to arenas that hold the largest of them, and are kept; the bytes of all memory spaces."""
        with self._device.running(), self._constants.making, self._constants.binding():
            self._require(*plans)
            with self._given_back():
                try:
                    for plan in plans:
                        self._memory.fit(plan, self._device)
                    for plan in plans:
                        self._bind(plan)
                except BaseException:
                    self.forget()  # weights of those that were bound go, too
                    raise
        self._memory.reserved = dict(self._memory.sizes)
        return self.nbytes

    def begin_with(self, sizes: Mapping[Where, int]) -> None:
        """Arenas that are taken from now on are no smaller."""
        self._memory.reserved = largest(self._memory.reserved, sizes)

    @contextmanager
    def _given_back(self) -> Iterator[None]:
        """Arenas that grow meanwhile are given back where what is done fails, but for what is reserved."""
        had = dict(self._memory.sizes)
        try:
            yield
        except BaseException:
            if self._memory.sizes != had:
                self._memory.clear()
                with suppress(OutOfMemoryError):
                    self._memory.restore(self._device)
            raise

    def _require(self, *plans: Plan, yielding: bool = True) -> None:
        """Raises OutOfMemoryError where a GPU cannot hold all that is missing, before anything is allocated.

        What other plans are bound with makes room, if they are `yielding`: they are bound again when they run.
        """
        if self._device.space == "device":
            had = self._memory.sizes.get("device", -1)
            wanted = max([p.arenas.get("device", -1) for p in plans], default=-1)
            carried = any(p.carried for p in plans)  # only else is the old arena given back before a new one is taken
            arena = max(wanted, 1) - (0 if carried else max(had, 0)) if wanted > had else 0
            unbound = [p for p in plans if arena or not yielding or p not in self._bound]
            weights = missing(self._device, self._constants, *unbound)
            what = f"a run ({weights:,} bytes of weights, an arena of {max(wanted, 0):,})"
            try:
                self._device.require(what, arena + weights)
            except OutOfMemoryError:
                if not yielding or not any(lease.holds_plans for lease in self._memory.leases):
                    raise
                self._memory.unbind()
                self._require(*plans)

    def _on_device(self, plan: Plan, entering: Mapping[str, Array], out: Mapping[str, Array]) -> Direct:
        """Inputs that could be read where they lie, and outputs that could be written where they are wanted: later
        segments look for what they need in the arena."""
        if not plan.segment.is_last or plan.carried:
            return Direct(NOWHERE, NOWHERE)
        leaving = {o.root for o in plan.outputs.values()} if out else ()  # results may be wanted in their place
        given = {
            n: entering[n]
            for n, o in plan.inputs.items()
            if o.root not in leaving and self._device.block_of(entering[n]) is not None
        }
        return Direct(given, self._written(plan, given, out) if given and out else NOWHERE)

    def _written(self, plan: Plan, given: Mapping[str, Array], out: Mapping[str, Array]) -> Mapping[str, Array]:
        """Of the wanted outputs those that have the right form, and that lie apart from everything else, or in the very
        place of an input that they may take."""
        lying = self._lying.get(plan)
        if lying is None:
            lying = self._lying[plan] = destinations(plan)
        taken = [(name, *self._extent(a)) for name, a in given.items()]
        found: dict[str, Array] = {}
        for name, over in lying.items():
            a, o = out.get(name), plan.outputs[name]
            if a is None or not self._lies_here(a):
                continue
            begin, end = self._extent(a)
            met = {(n, b, e) for n, b, e in taken if b < end and begin < e}
            if (a.shape, a.dtype) == (o.shape, o.dtype) and met <= {(n, begin, end) for n in over}:
                found[name] = a
            taken.append(("", begin, end))
        return found

    def _lies_here(self, array: Array) -> bool:
        """Whether an array of the caller's is one of the device's own, in one piece."""
        return self._device.accepts(array) is array and self._device.block_of(array) is not None

    def _extent(self, array: Array) -> tuple[int, int]:
        """Where an array on the device, in one piece, begins and ends."""
        begin = int(self._device.block_of(array).ptr)  # type: ignore[union-attr]
        return begin, begin + array.nbytes

    def _key(self, plan: Plan, arrays: Direct) -> _Key:
        """Which arrays a plan is bound to; all of them lie on the device."""
        given, written = ([(n, self._extent(a)[0]) for n, a in some.items()] for some in arrays)
        return plan, tuple(given), tuple(written)

    def _bound_to(self, key: _Key, arrays: Direct) -> Bound:
        found = self._direct.get(key)
        if found is None:
            with self._constants.making, self._constants.binding():
                self._require(key[0], yielding=False)
                with self._given_back():
                    self._memory.fit(key[0], self._device)
                    bound = bind(key[0], self._memory.arenas, self._device, self._constants, *arrays)
            found = self._direct[key] = (bound, arrays)
            while len(self._direct) > MAX_DIRECT:
                self._direct.popitem(last=False)
        return found[0]

    @property
    def holds_plans(self) -> bool:
        return bool(self._bound or self._direct)

    def forget(self) -> None:
        """Let go of everything that is bound to the arenas."""
        self._refused = self.repeated = self._last = None
        self._bound.clear()
        self._folded.clear()
        self._direct.clear()
