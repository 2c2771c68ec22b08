"""A session's constants on its device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_gpu.devices.base import Device, host_memory, usual_buffers
from infera_gpu.graph import Graph, HostArray
from infera_gpu.layout import Space, contiguous_strides
from infera_gpu.memory import ALIGN, aligned
from infera_gpu.plan import Plan
from infera_gpu.spec import Array
from infera_kernels.cpu.aligned import begun, within
from infera_kernels.cpu.packed import copied

Key: TypeAlias = tuple[int, str, Space]
"""The id of a constant, the tag of its packed form, and where it lies."""

POOLED = 512
"""Bytes. CuPy's pool gives out multiples of it."""

MAX_AHEAD = 1 << 28
"""Bytes of packed forms that are kept from when they are counted to when they are uploaded; beyond that, those that
take no more than half of the host's memory that is left. Others are packed twice."""

MAX_FOLDED = 1 << 27
"""Bytes of constants that planning computed for the shapes that are kept; a plan that has more is kept alone."""


@dataclass(slots=True)
class Wanted:
    """Bytes of a GPU that a plan's constants take: those of what lasts, and of what is bound with the plan. And how
    many launches each of its steps is."""

    lasting: dict[Key, int] = field(default_factory=dict)
    passing: int = 0
    launches: list[int] = field(default_factory=list)


class Constants:
    """A session's constants as the device holds them: each one, and each packed form of it, made once.

    Only the arrays of `graph` are kept; what planning folded for one shape lives as long as what is bound to it.
    """

    def __init__(self, device: Device, graph: Graph) -> None:
        self._device = device
        self._lasting = {id(a): a for g in graph.walk() for a in g.constants.values()}
        self._made: dict[Key, Array] = {}
        self._brought: set[Key] = set()
        self.wanted: WeakKeyDictionary[Plan, Wanted] = WeakKeyDictionary()
        """What plans take, of those that were counted (`infera_gpu.dry`)."""

        self._sizes: dict[tuple[int, str], tuple[tuple[int, ...], np.dtype[Any]]] = {}
        """The shapes and types of packed forms of constants that last, once they were counted."""
        self._ahead: dict[tuple[int, str], HostArray] = {}
        self.making = threading.RLock()
        """Held while a plan is bound: each of two threads would make what both lack, and both would keep it."""

    def get(
        self, host: HostArray, space: Space, tag: str = "", build: Callable[[HostArray], HostArray] | None = None
    ) -> Array:
        """`host` in `space`, or what `build` makes of it. `tag` names the packed form."""
        key = (id(host), tag, space)
        found = self._made.get(key)
        if found is None:
            lasting = id(host) in self._lasting
            packed = host
            if build is not None:
                ahead = self._ahead.pop((id(host), tag), None) if space == self._device.space else None
                packed = self._packed(host, build) if ahead is None else ahead
            found = self._device.constant(packed, space, lasting=lasting, packed=build is not None)
            if lasting:
                self._made[key] = found
        return found

    def _packed(self, host: HostArray, build: Callable[[HostArray], HostArray]) -> HostArray:
        with usual_buffers(), within(self._device.slabs if id(host) in self._lasting else None):
            return np.ascontiguousarray(build(host))

    def has(self, key: Key) -> bool:
        """Whether it is there."""
        return key in self._made

    def counted(
        self, host: HostArray, tag: str, build: Callable[[HostArray], HostArray] | None, wanted: Wanted
    ) -> HostArray:
        """Adds what `get` takes of a GPU to `wanted`; an array like the one that it makes, whose elements are not."""
        lasting, known = id(host) in self._lasting, self._sizes.get((id(host), tag))
        like = host
        if known is not None:
            like = hollow(*known)
        elif build is not None:
            like = self._packed(host, build)
            if lasting:
                self._sizes[id(host), tag] = like.shape, like.dtype
                kept = sum(a.nbytes for a in self._ahead.values()) + like.nbytes
                if kept <= MAX_AHEAD or like.nbytes <= (host_memory() or 0) // 2:
                    self._ahead[id(host), tag] = like
        if lasting:
            wanted.lasting[id(host), tag, "device"] = aligned(like.nbytes)
        else:
            wanted.passing += pooled(like.nbytes)
        return like

    @contextmanager
    def binding(self) -> Iterator[None]:
        """What is made meanwhile on a GPU is given back where the binding fails."""
        before = set(self._made)
        try:
            yield
        except BaseException:
            for key in self._made.keys() - before:
                if key[2] == "device":
                    self._made.pop(key, None)
            raise
        finally:
            self._ahead.clear()

    def folded(self, plan: Plan) -> int:
        """Bytes of the plan's constants that are none of the graph's."""
        return sum(a.nbytes for a in plan.constants.values() if id(a) not in self._lasting)

    def held(self, plan: Plan) -> list[tuple[str, str, Array]]:
        """The plan's constants in host memory, and what has been packed of them: (name, tag, array), where the tag of a
        constant itself is empty."""
        names = {id(a): name for name, a in plan.constants.items()}
        kept = [(names[i], tag, a) for (i, tag, space), a in self._kept() if i in names and tag and space == "host"]
        packed = [(n, tag, a) for n, tag, a in kept if not _is_view(a, plan.constants[n])]
        return [*((name, "", a) for name, a in plan.constants.items()), *packed]

    def bring(self, host: HostArray, tag: str, packed: HostArray) -> None:
        """What another process packed of `host`, in host memory: copied, unless it has been packed here."""
        with self.making:
            key: Key = (id(host), tag, "host")
            if key not in self._made and id(host) in self._lasting:
                self.get(host, "host", tag, lambda _: copied(packed))
                self._brought.add(key)

    def form(self, host: HostArray, tag: str) -> HostArray:
        """What has been packed of `host` in host memory. Raises KeyError where that has not been."""
        return self._made[id(host), tag, "host"]  # type: ignore[no-any-return]

    def distrust(self) -> None:
        """Let go of what other processes packed; what is bound to it keeps it."""
        with self.making:
            for key in self._brought:
                self._made.pop(key, None)
            self._brought.clear()

    def clear(self) -> None:
        """Let every constant go."""
        for held in (self._lasting, self._made, self.wanted, self._sizes, self._ahead):
            held.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the constants in the device's space, packed forms included."""
        return sum(int(a.nbytes) for (_, _, space), a in self._kept() if space == self._device.space)

    @property
    def packed(self) -> int:
        """Bytes of the packed forms, wherever they lie, but for those that are views of the constant."""
        lasting = self._lasting.copy()
        return sum(int(a.nbytes) for (i, tag, _), a in self._kept() if tag and not _is_view(a, lasting.get(i)))

    def _kept(self) -> list[tuple[Key, Array]]:
        """What is there now; another thread may be binding."""
        return list(self._made.items())


def _is_view(made: Array, host: HostArray | None) -> bool:
    return isinstance(made, np.ndarray) and host is not None and np.may_share_memory(made, host)


def pooled(nbytes: int) -> int:
    """What CuPy's pool takes for so many bytes."""
    return -(-nbytes // POOLED) * POOLED


_NOWHERE = begun(2 * ALIGN, ALIGN)


def hollow(
    shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None = None, offset: int = 0
) -> HostArray:
    """An array over no memory of its own, aligned as at this offset: its elements are nobody's to read or write."""
    strides = contiguous_strides(shape, dtype.itemsize) if strides is None else strides
    one: HostArray = np.ndarray((1,), f"V{dtype.itemsize}", _NOWHERE, offset % ALIGN)
    return as_strided(one, shape, strides).view(dtype)
