"""Arenas that runs borrow, one run at a time."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from infera_gpu.bind import Bound, Constants, bind
from infera_gpu.devices.base import Device
from infera_gpu.layout import Space, dense
from infera_gpu.plan import Plan
from infera_gpu.spec import TensorSpec

MAX_BOUND = 32
"""Plans that stay bound to a lease's arenas; the least recently used is let go beyond that."""


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
        self._needed = 0
        self._served = 0

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    def bound(self, plan: Plan) -> Bound:
        """The plan bound to these arenas, which grow first if it needs more than they have."""
        if not plan.carried:
            self._consider(plan)
        found = self._bound.get(plan)
        if found is None:
            self._fit(plan)
            found = self._bound[plan] = bind(plan, self._arenas, self._device, self._constants)
            while len(self._bound) > MAX_BOUND:
                self._bound.popitem(last=False)
        else:
            self._bound.move_to_end(plan)
        return found

    def _consider(self, plan: Plan) -> None:
        """Give arenas back that have been far too large for a while: one huge request must not hold its memory."""
        self._served += 1
        self._needed = max(self._needed, plan.arena_bytes)
        if self._served >= SHRINK_AFTER:
            if self.nbytes > max(SHRINK_ABOVE, 4 * self._needed):
                self._bound.clear()
                self._arenas.clear()
                self._sizes.clear()
            self._served, self._needed = 0, 0

    def _fit(self, plan: Plan) -> None:
        for space, nbytes in plan.arenas.items():
            if nbytes > self._sizes.get(space, -1):
                self._bound.clear()
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
