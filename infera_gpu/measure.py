"""How much scratch a kernel asks for and into how many parts it splits, found out while planning."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np

from infera_gpu.bind import BoundBuffers
from infera_gpu.constants import Constants
from infera_gpu.devices.base import Device, host_memory, require_host_memory
from infera_gpu.errors import OutOfMemoryError
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand
from infera_gpu.memory import aligned
from infera_gpu.op import Call, Kernel, Site
from infera_gpu.specialize import Placed


class Measurer:
    """A lower.Measure: binds a kernel to host dummies, adds up the scratch that it asks for and counts its parts.

    Binding is most of what planning costs, and models repeat their layers: of nodes that are alike one is asked.
    """

    def __init__(self, device: Device, constants: Constants) -> None:
        self._device, self._constants = device, constants
        self._room = Room()

    def __call__(
        self, kernel: Kernel, placed: Placed, ins: tuple[Operand | None, ...], outs: tuple[Operand, ...]
    ) -> tuple[int, int]:
        if not any(o.nbytes for o in outs):
            return 0, 1

        def measured(_: Site) -> tuple[int, int]:
            return _scratch_bytes(self._device, self._constants, kernel, placed, ins, outs, self._room)

        lying = tuple([o and (o.shape, o.strides) for o in (*ins, *outs)])
        return placed.site.told(lying, measured)

    def rest(self) -> None:
        """Give the dummies' memory back: a plan is done."""
        self._room.close()


class _Dummies(BoundBuffers):
    """What a kernel is bound to while planning. `parts` is into how many it splits; it does not make their calls."""

    parts = 1

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        self.parts = max(self.parts, len(parts))
        return []


def _scratch_bytes(
    device: Device,
    constants: Constants,
    kernel: Kernel,
    placed: Placed,
    ins: tuple[Operand | None, ...],
    outs: tuple[Operand, ...],
    room: Room,
) -> tuple[int, int]:
    total = 0

    def scratch(nbytes: int) -> tuple[HostArray, int]:
        nonlocal total
        total += aligned(nbytes)
        return room.take(nbytes)

    def dummy(operand: Operand | None, value: HostArray | None = None) -> HostArray | None:
        if operand is None or (value is not None and value.flags.c_contiguous):
            return value
        low, high = operand.bounds()
        block, offset = room.take(high - low)
        made: HostArray = np.ndarray(
            operand.shape, operand.dtype, block, offset + operand.offset - low, operand.strides
        )
        return made

    try:
        dummies = tuple(map(dummy, ins, placed.site.values))
        io = _Dummies(device, constants, placed, dummies, tuple(map(dummy, outs)), "host", scratch)
        kernel.bind(placed.site, io)
    finally:
        room.clear()
    return total, io.parts


class Room:
    """Host memory that is given out and never touched: the system has to find none for it.

    It is mapped rather than allocated, as `malloc` writes its notes into the first page of a block, which where pages
    have 2 MiB takes longer than planning a node.
    """

    AHEAD = 1 << 26

    def __init__(self) -> None:
        self._block, self._used = _NOTHING, 0

    def take(self, nbytes: int) -> tuple[HostArray, int]:
        """A block, and where in it so many bytes are free."""
        at, self._used = self._used, self._used + aligned(nbytes)
        if self._used > self._block.nbytes:
            self._block = _mapped(aligned(nbytes), max(aligned(nbytes), self.AHEAD))
            at, self._used = 0, aligned(nbytes)
        return self._block, at

    def clear(self) -> None:
        """All of it is free again."""
        self._used = 0

    def close(self) -> None:
        """Keep none."""
        self._block, self._used = _NOTHING, 0


_NOTHING: HostArray = np.empty(0, np.uint8)

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}


def _mapped(least: int, most: int) -> HostArray:
    """The most bytes, or the least where the system refuses so many. Raises OutOfMemoryError where it refuses those."""
    require_host_memory("the arena", least)
    for nbytes in (most, least):
        with suppress(OSError, OverflowError):
            return np.frombuffer(mmap.mmap(-1, nbytes, **_PRIVATE), np.uint8)
    raise OutOfMemoryError("the arena", needed=least, available=host_memory() or 0)
