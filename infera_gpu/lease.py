"""Arenas that runs borrow, one run at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from infera_gpu.bind import MAX_FOLDED, Bound, Constants, bind
from infera_gpu.devices.base import Device
from infera_gpu.layout import Space, dense
from infera_gpu.plan import Plan
from infera_gpu.spec import Array, TensorSpec

MAX_BOUND = 32
"""Plans that stay bound to a lease's arenas; the least recently used is let go beyond that."""


MAX_DIRECT = 4
"""Sets of the caller's arrays on the device that plans stay bound to; as long as they are, their memory is held."""

_Key: TypeAlias = tuple[Plan, tuple[int, ...]]

SHRINK_ABOVE = 1 << 26
SHRINK_AFTER = 64
"""An arena over SHRINK_ABOVE bytes and four times what each of the last SHRINK_AFTER plans needed is given back."""


class Lease:
    """Arenas that one run at a time may use, and the plans bound to them."""

    def __init__(self, device: Device, constants: Constants) -> None:
        self._device, self._constants = device, constants
        self._arenas: dict[Space, Any] = {}
        self._sizes: dict[Space, int] = {}
        self._bound: OrderedDict[Plan, Bound] = OrderedDict()
        self._folded: dict[Plan, int] = {}
        self._direct: OrderedDict[_Key, tuple[Bound, Mapping[str, Array]]] = OrderedDict()
        self._last: tuple[_Key, Mapping[str, Array]] | None = None
        self._needed = 0
        self._served = 0

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    def bound(self, plan: Plan, entering: Mapping[str, Array]) -> Bound:
        """The plan bound to these arenas, which grow first if it needs more than they have.

        Arrays on the device that enter twice in a row are read where they lie from then on: binding a plan anew costs
        more than copying once.
        """
        if not plan.carried:
            self._consider(plan)
        given = self._on_device(plan, entering)
        if given:
            blocks: list[Any] = [self._device.block_of(a) for a in given.values()]
            key = (plan, tuple(int(block.ptr) for block in blocks))
            again = self._last is not None and self._last[0] == key
            self._last = (key, given)  # which keeps the arrays, so that their addresses stay theirs
            if again or key in self._direct:
                return self._bound_to(key, given)
        found = self._bound.get(plan)
        if found is None:
            self._fit(plan)
            found = self._bound[plan] = bind(plan, self._arenas, self._device, self._constants)
            self._folded[plan] = self._constants.folded(plan)
            while len(self._bound) > MAX_BOUND or (sum(self._folded.values()) > MAX_FOLDED and len(self._bound) > 1):
                del self._folded[self._bound.popitem(last=False)[0]]
        else:
            self._bound.move_to_end(plan)
        return found

    def _on_device(self, plan: Plan, entering: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs that could be read where they lie: later segments look for what they need in the arena."""
        if not plan.segment.is_last or plan.carried:
            return {}
        return {n: entering[n] for n in plan.inputs if self._device.block_of(entering[n]) is not None}

    def _bound_to(self, key: _Key, given: Mapping[str, Array]) -> Bound:
        found = self._direct.get(key)
        if found is None:
            self._fit(key[0])
            bound = bind(key[0], self._arenas, self._device, self._constants, given)
            found = self._direct[key] = (bound, given)
            while len(self._direct) > MAX_DIRECT:
                self._direct.popitem(last=False)
        return found[0]

    def _forget(self) -> None:
        """Let go of everything bound to the arenas."""
        self._bound.clear()
        self._folded.clear()
        self._direct.clear()

    def _consider(self, plan: Plan) -> None:
        """Give arenas back that have been far too large for a while: one huge request must not hold its memory."""
        self._served += 1
        self._needed = max(self._needed, plan.arena_bytes)
        if self._served >= SHRINK_AFTER:
            if self.nbytes > max(SHRINK_ABOVE, 4 * self._needed):
                self._forget()
                self._arenas.clear()
                self._sizes.clear()
            self._served, self._needed = 0, 0

    def _fit(self, plan: Plan) -> None:
        for space, nbytes in plan.arenas.items():
            if nbytes > self._sizes.get(space, -1):
                self._forget()
                if not plan.carried:  # give the old one back before asking for the new one
                    self._arenas.pop(space, None)
                    self._sizes.pop(space, None)
                old, had = self._arenas.get(space), self._sizes.get(space, 0)
                self._arenas[space] = self._device.alloc(nbytes, space)
                self._sizes[space] = nbytes
                if old is not None and had:
                    self._keep(old, self._arenas[space], had, space)

    def _keep(self, old: Any, new: Any, nbytes: int, space: Space) -> None:
        """Copy what earlier segments of this very run left behind."""
        operand = dense("arena", space, TensorSpec((nbytes,), np.dtype(np.uint8)))
        copy, args = self._device.transfer(self._device.view(old, operand), self._device.view(new, operand))
        copy(*args)
        self._device.synchronize()
