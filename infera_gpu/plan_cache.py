"""Plans of graphs that are kept on disk, kept beside them: what is loaded often need not be planned either.

A plan lies in the folder of its graph (`graph_cache`), whose name begins its own, and is found by what it depends on
beyond that: the shapes of the inputs, the device, the sizes of blocks, the BLAS and the sources of kernels. A session
of a graph that was kept takes plans from there and keeps those that it has to make, PLANS of them at most: text comes
in ever new lengths. With the first plans of a session is kept how they were bound (`recipe`), and in a file for all of
them what was packed of the graph's constants for that, where this is small. A plan that cannot be bound, or fails when
it runs, is made anew (`Stages.distrust`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import infera_kernels
from infera_gpu.bind import Bound, recipe_of
from infera_gpu.constants import Constants
from infera_gpu.devices.base import Device
from infera_gpu.graph import Graph
from infera_gpu.graph_cache import MAX_BYTES, content, fingerprint, make_room
from infera_gpu.graph_codec import Damaged, Reader, Unencodable, Writer, framed, unframed
from infera_gpu.op import Registry
from infera_gpu.plan import Plan
from infera_gpu.plan_codec import decoded, encoded
from infera_gpu.recipe import Form, Written
from infera_gpu.stages import Shapes
from infera_kernels.cpu.blas import spoken
from infera_kernels.cpu.caches import block_of
from infera_kernels.disk import replace_file

PLANS = 8
"""Plans that a session keeps."""

RECIPES = 2
"""Of these, with how they were bound: to tell it takes about as long as to bind."""

MAX_FOLDED = 1 << 20
"""Bytes of constants that planning computed and that a plan is kept with, at most: more take long to read."""

MAX_RECIPE = 1 << 22
"""Bytes of what kernels packed of a graph's constants, and of what else a recipe is kept with, at most."""

MAX_CALLS = 1 << 11
"""Calls of a plan that is kept with a recipe."""

log = logging.getLogger(__name__)


class KeptPlans:
    """The plans of a graph that lies at `entry`: implements stages.Shelf."""

    def __init__(self, entry: Path, graph: Graph, device: Device, registry: Registry) -> None:
        self._entry, self._graph, self._registry = entry, graph, registry
        asked = [device.name, device.concurrency, device.threads, device.strict, device.kinds, block_of(1), spoken()]
        self._asked = asked
        self._left, self._recipes = PLANS, RECIPES
        self._forms: set[tuple[str, str]] | None = None
        """What is kept of what was packed, names and tags; None as long as nobody has looked."""
        self._keeping = threading.Lock()

    def take(self, shapes: Shapes, constants: Constants) -> Plan | None:
        """The plan for inputs of these shapes; None where none is kept, or what is kept is damaged. What has been
        packed for it is in `constants` then."""
        path = self._path(f"{shapes}.plan")
        try:
            plan = None if path is None else decoded(content(path), self._graph, self._registry)
        except (OSError, Damaged):
            return None
        if plan is None or plan.recipe is None or self._found(constants).issuperset(plan.recipe.packed):
            return plan
        return replace(plan, recipe=None)

    def distrust(self) -> None:
        """What has been packed and kept may be wrong: from now on what is packed here takes its place."""
        self._forms = set()

    def keep(self, shapes: Shapes, bound: Bound, constants: Constants) -> None:
        """Keep a plan that has been bound, where it can be, and how, where that can be told."""
        plan, path, own = bound.plan, self._path(f"{shapes}.plan"), self._graph.constants
        folded = sum(a.nbytes for k, a in plan.constants.items() if own.get(k) is not a)
        if path is None or folded > MAX_FOLDED:
            return
        with self._keeping:
            if self._left < 1:
                return
            self._left -= 1
            try:
                made = encoded(plan, self._graph, self._recipe(bound, constants))
                if len(made) <= MAX_BYTES:
                    replace_file(path, made)
                    os.utime(self._entry)  # what is oldest goes first, and plans are nothing without their graph
                    make_room(path.parent.parent)
            except (OSError, Unencodable):
                return
            except Exception:  # a run must not fail for what only later ones gain by
                log.warning("a plan of '%s' is not kept", self._graph.name, exc_info=True)

    def _recipe(self, bound: Bound, constants: Constants) -> Written | None:
        """How the plan was bound; None where that is too much, or cannot be kept."""
        if self._recipes < 1 or len(bound.made[0]) > MAX_CALLS:
            return None
        self._recipes -= 1
        own, known = self._graph.constants, bound.plan.constants
        held = [
            (name, tag, array)
            for name, tag, array in constants.held(bound.plan)
            if not tag or known[name] is own.get(name)  # what others find by that name
        ]
        recipe = recipe_of(bound, held)
        written = Written.of(recipe)
        return written if written.nbytes <= MAX_RECIPE and self._keep_forms(recipe.forms, constants) else None

    def _keep_forms(self, forms: Sequence[Form], constants: Constants) -> bool:
        """Keep what has been packed, with what is kept already; whether all of it is kept now."""
        kept = self._found(constants)
        if kept.issuperset((name, tag) for name, tag, _ in forms):
            return True
        there = {(name, tag): array for name, tag, array in forms}
        there |= {(name, tag): constants.form(self._graph.constants[name], tag) for name, tag in kept}
        path = self._path("packed")
        if path is None or sum(array.nbytes for array in there.values()) > MAX_RECIPE:
            return False
        writer = Writer()
        said = [[name, tag, writer.array(np.asarray(array))] for (name, tag), array in there.items()]
        replace_file(path, framed(said, writer.arrays))
        self._forms = set(there)
        return True

    def _found(self, constants: Constants) -> set[tuple[str, str]]:
        """What is kept of what was packed. It is in `constants` from the first time on."""
        if self._forms is None:
            path, self._forms = self._path("packed"), set()
            with suppress(OSError, Damaged):
                for name, tag, array in unframed(content(path), _forms_of) if path is not None else ():
                    if name in self._graph.constants:
                        constants.bring(self._graph.constants[name], tag, array)
                        self._forms.add((name, tag))
        return self._forms

    def _path(self, what: str) -> Path | None:
        """Of a file beside the graph, found by what it depends on beyond that."""
        sources = _sources()
        if sources is None:
            return None
        key = hashlib.sha256(json.dumps([*self._asked, sources, what]).encode())
        return self._entry.with_name(f"{self._entry.stem}-{key.hexdigest()[:32]}.{what.rpartition('.')[2]}")


def _forms_of(reader: Reader, said: Sequence[Any]) -> list[Form]:
    return [(name, tag, reader.array(*array)) for name, tag, array in said]


@cache
def _sources() -> str | None:
    """`fingerprint` of what else decides how nodes are planned and bound on the CPU. Looked at once a process."""
    import infera_gpu

    folders = [os.path.join(place, "devices") for place in infera_gpu.__path__]
    return fingerprint(
        [*folders, *(os.path.join(place, part) for place in infera_kernels.__path__ for part in ("", "cpu", "jit"))]
    )
