"""Plans of graphs that are kept on disk, kept beside them: what is loaded often need not be planned either.

A plan lies in the folder of its graph (`graph_cache`), whose name begins its own, and is found by what it depends on
beyond that: the shapes of the inputs, the device, the sizes of blocks, the BLAS and the sources of kernels. A session
of a graph that was kept takes plans from there and keeps those that it has to make, PLANS of them at most: text comes
in ever new lengths. With a plan is kept how it was bound, and what was packed for that, where this is small (`recipe`).
A plan that cannot be bound is made anew (`Stages.distrust`).
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import infera_kernels
from infera_gpu.bind import Bound, told
from infera_gpu.constants import Constants
from infera_gpu.devices.base import Device
from infera_gpu.graph import Graph
from infera_gpu.graph_cache import MAX_BYTES, content, fingerprint, make_room
from infera_gpu.graph_codec import Damaged, Unencodable
from infera_gpu.op import Registry
from infera_gpu.plan import Plan
from infera_gpu.plan_codec import decoded, encoded
from infera_gpu.stages import Shapes
from infera_kernels.cpu.blas import spoken
from infera_kernels.cpu.caches import block_of
from infera_kernels.disk import replace_file

PLANS = 8
"""Plans that a session keeps."""

MAX_FOLDED = 1 << 20
"""Bytes of constants that planning computed and that a plan is kept with, at most: more take long to read."""

MAX_RECIPE = 1 << 22
"""Bytes of arrays that kernels made and that a recipe is kept with, at most."""


class KeptPlans:
    """The plans of a graph that lies at `entry`: implements stages.Shelf."""

    def __init__(self, entry: Path, graph: Graph, device: Device, registry: Registry) -> None:
        self._entry, self._graph, self._registry = entry, graph, registry
        told = [device.name, device.concurrency, device.threads, device.strict, device.kinds, block_of(1), spoken()]
        self._told = told
        self._left = PLANS

    def take(self, shapes: Shapes) -> Plan | None:
        """The plan for inputs of these shapes; None where none is kept, or what is kept is damaged."""
        path = self._path(shapes)
        try:
            return None if path is None else decoded(content(path), self._graph, self._registry)
        except (OSError, Damaged):
            return None

    def keep(self, shapes: Shapes, bound: Bound, constants: Constants) -> None:
        """Keep a plan that has been bound, where it can be, and how, where that can be told."""
        plan, path, own = bound.plan, self._path(shapes), self._graph.constants
        folded = sum(a.nbytes for k, a in plan.constants.items() if own.get(k) is not a)
        if path is None or self._left < 1 or folded > MAX_FOLDED:
            return
        self._left -= 1
        held = constants.held(plan)
        packed = sum(array.nbytes for _, tag, array in held if tag)
        recipe = told(bound, held) if packed <= MAX_RECIPE else None
        if recipe is not None and recipe.nbytes > MAX_RECIPE:
            recipe = None
        with suppress(OSError, Unencodable):
            made = encoded(plan, self._graph, recipe)
            if len(made) <= MAX_BYTES:
                replace_file(path, made)
                make_room(path.parent.parent)

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
