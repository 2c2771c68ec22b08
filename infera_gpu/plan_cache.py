"""Plans of graphs that are kept on disk, kept beside them: what is loaded often need not be planned either.

A plan lies in the folder of its graph (`graph_cache`), whose name begins its own, and is found by what it depends on
beyond that: the shapes of the inputs, the device, the sizes of blocks and the sources of kernels. A session of a graph
that was kept takes plans from there and keeps those that it has to make, PLANS of them at most: text comes in ever new
lengths. What else there is to the machine, its BLAS and what that was built for, is not asked: a plan whose kernels
want more memory than it has, or that cannot be bound for other reasons, is made anew (`Stages.distrust`).
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import infera_kernels
from infera_gpu.devices.base import Device
from infera_gpu.graph import Graph
from infera_gpu.graph_cache import MAX_BYTES, content, fingerprint, make_room
from infera_gpu.graph_codec import Damaged, Unencodable
from infera_gpu.op import Registry
from infera_gpu.plan import Plan
from infera_gpu.plan_codec import decoded, encoded
from infera_gpu.stages import Shapes
from infera_kernels.cpu.caches import block_of
from infera_kernels.disk import replace_file

PLANS = 8
"""Plans that a session keeps."""

MAX_FOLDED = 1 << 20
"""Bytes of constants that planning computed and that a plan is kept with, at most: more take long to read."""


class KeptPlans:
    """The plans of a graph that lies at `entry`: implements stages.Shelf."""

    def __init__(self, entry: Path, graph: Graph, device: Device, registry: Registry) -> None:
        self._entry, self._graph, self._registry = entry, graph, registry
        self._told = [device.name, device.concurrency, device.threads, device.strict, device.kinds, block_of(1)]
        self._left = PLANS

    def take(self, shapes: Shapes) -> Plan | None:
        """The plan for inputs of these shapes; None where none is kept, or what is kept is damaged."""
        path = self._path(shapes)
        try:
            return None if path is None else decoded(content(path), self._graph, self._registry)
        except (OSError, Damaged):
            return None

    def keep(self, shapes: Shapes, plan: Plan) -> None:
        """Keep a plan, where it can be."""
        path = self._path(shapes)
        own = self._graph.constants
        folded = sum(a.nbytes for k, a in plan.constants.items() if own.get(k) is not a)
        if path is None or self._left < 1 or folded > MAX_FOLDED:
            return
        self._left -= 1
        try:
            made = encoded(plan, self._graph)
            if len(made) <= MAX_BYTES:
                replace_file(path, made)
                make_room(path.parent.parent)
        except (OSError, Unencodable):
            return

    def _path(self, shapes: Shapes) -> Path | None:
        sources = _sources()
        if sources is None:
            return None
        told = json.dumps([*self._told, sources, shapes]).encode()
        return self._entry.with_name(f"{self._entry.stem}-{hashlib.sha256(told).hexdigest()[:32]}.plan")


@cache
def _sources() -> str | None:
    """`fingerprint` of what else decides how nodes are planned and bound on the CPU. Looked at once a process."""
    import infera_gpu

    folders = [os.path.join(place, "devices") for place in infera_gpu.__path__]
    return fingerprint(
        [*folders, *(os.path.join(place, part) for place in infera_kernels.__path__ for part in ("", "cpu", "jit"))]
    )
