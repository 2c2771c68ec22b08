"""A session's constants on its device."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from infera_gpu.devices.base import Device, usual_buffers
from infera_gpu.graph import Graph, HostArray
from infera_gpu.layout import Space
from infera_gpu.memory import aligned
from infera_gpu.plan import Plan
from infera_gpu.spec import Array
from infera_kernels.cpu.aligned import within
from infera_kernels.cpu.packed import copied

MAX_FOLDED = 1 << 27
"""Bytes of constants that planning computed for the shapes that are kept; a plan that has more is kept alone."""


class Constants:
    """A session's constants as the device holds them: each one, and each packed form of it, made once.

    Only the arrays of `graph` are kept; what planning folded for one shape lives as long as what is bound to it.
    """

    def __init__(self, device: Device, graph: Graph) -> None:
        self._device = device
        self._lasting = {id(a): a for g in graph.walk() for a in g.constants.values()}
        self._made: dict[tuple[int, str, Space], Array] = {}
        self._brought: set[tuple[int, str, Space]] = set()
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
                with usual_buffers(), within(self._device.slabs if lasting else None):
                    packed = np.ascontiguousarray(build(host))
            found = self._device.constant(packed, space, lasting=lasting, packed=build is not None)
            if lasting:
                self._made[key] = found
        return found

    def missing(self, plan: Plan, *, lasting: bool = False) -> int:
        """Bytes of the plan's constants that the device does not have yet, each aligned; only of those that last.

        Packed forms are taken to be as large.
        """
        made = {key[0] for key in self._made}
        wanted = {id(a): a for a in plan.constants.values() if id(a) not in made}
        return sum(aligned(a.nbytes) for i, a in wanted.items() if not lasting or i in self._lasting)

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
            key: tuple[int, str, Space] = (id(host), tag, "host")
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
        self._lasting.clear()
        self._made.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the constants in the device's space, packed forms included."""
        return sum(int(a.nbytes) for (_, _, space), a in self._kept() if space == self._device.space)

    @property
    def packed(self) -> int:
        """Bytes of the packed forms, wherever they lie, but for those that are views of the constant."""
        lasting = self._lasting.copy()
        return sum(int(a.nbytes) for (i, tag, _), a in self._kept() if tag and not _is_view(a, lasting.get(i)))

    def _kept(self) -> list[tuple[tuple[int, str, Space], Array]]:
        """What is there now; another thread may be binding."""
        return list(self._made.items())


def _is_view(made: Array, host: HostArray | None) -> bool:
    return isinstance(made, np.ndarray) and host is not None and np.may_share_memory(made, host)
