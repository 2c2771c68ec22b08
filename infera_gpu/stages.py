"""The trees of segments: what follows depends on values that only a run can tell, and is planned once for each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from infera_gpu.bind import Constants, measurer
from infera_gpu.devices.base import Device
from infera_gpu.errors import PlanError, planning
from infera_gpu.graph import Graph, HostArray
from infera_gpu.layout import Operand
from infera_gpu.lower import lower
from infera_gpu.op import Registry
from infera_gpu.plan import Plan
from infera_gpu.spec import TensorSpec, spec_of
from infera_gpu.specialize import Segment, specialize

MAX_STAGES = 256
"""Planned segments that a session keeps, over all shapes and values; the least recently used is dropped beyond that."""

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
Told: TypeAlias = tuple[tuple[object, ...], ...]
"""What a continuation depends on: the values waited for, and the shapes of what eager nodes made."""

Read: TypeAlias = Callable[[str], HostArray]
"""Fetches a value that a run left."""


@dataclass(eq=False)
class Stage:
    """A planned segment. `final` are the graph's outputs that it makes, `missing` those that later stages make."""

    plan: Plan
    final: tuple[str, ...]
    missing: tuple[str, ...]
    next: dict[Told, Stage] = field(default_factory=dict)

    @property
    def segment(self) -> Segment:
        return self.plan.segment

    @property
    def is_last(self) -> bool:
        return self.segment.is_last


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a stage hangs: in a map, under a key."""

    map: dict[Shapes, Stage] | dict[Told, Stage]
    key: Shapes | Told

    def cut(self) -> None:
        self.map.pop(self.key, None)  # type: ignore[arg-type]


class Stages:
    """Plans a graph, stage by stage, each once. Finding a planned stage takes no lock; planning takes one."""

    def __init__(self, graph: Graph, device: Device, registry: Registry, constants: Constants) -> None:
        self._graph, self._device, self._registry = graph, device, registry
        self._measure = measurer(device, constants)
        self._first: dict[Shapes, Stage] = {}
        self._recent: OrderedDict[Stage, _Place] = OrderedDict()
        self._planning = threading.Lock()

    def __len__(self) -> int:
        """Stages that are kept."""
        return len(self._recent)

    def known(self, shapes: Shapes) -> bool:
        """Whether inputs of these shapes have been planned."""
        return shapes in self._first

    def first(self, shapes: Shapes) -> Stage:
        """The stage that starts with the graph's inputs, in their order. Raises PlanError."""
        stage = self._first.get(shapes)
        if stage is None:
            with self._planning:
                stage = self._first.get(shapes)
                if stage is None:
                    stage = self._first[shapes] = self._start(shapes)
                    self._keep(stage, _Place(self._first, shapes))
        self._touch(stage)
        return stage

    def advance(self, stage: Stage, read: Read) -> tuple[Stage, Mapping[str, HostArray]]:
        """The stage after `stage`, with what its eager nodes made."""
        segment = stage.segment

        def value(name: str) -> HostArray:
            known = segment.constants.get(name)
            return read(name) if known is None else known

        told = {name: value(name) for name in segment.waits}
        made: dict[str, HostArray] = {}
        for placed in segment.eager:
            with planning(placed.node):
                arrays = placed.op.outputs(np, placed.site, [value(i) if i else None for i in placed.node.inputs])
            made.update((n, np.asarray(a)) for n, a in zip(placed.node.outputs, arrays, strict=False) if n)
        key: Told = (
            *((a.shape, a.tobytes()) for a in told.values()),
            *((a.shape, a.dtype) for a in made.values()),
        )
        following = stage.next.get(key)
        if following is None:
            with self._planning:
                following = stage.next.get(key)
                if following is None:
                    following = self._follow(stage, told, {k: spec_of(v) for k, v in made.items()})
                    stage.next[key] = following
                    self._keep(following, _Place(stage.next, key))
        self._touch(following)
        return following, made

    def clear(self) -> None:
        """Forget every stage."""
        with self._planning:
            self._first.clear()
            self._recent.clear()

    def _touch(self, stage: Stage) -> None:
        with suppress(KeyError):  # another thread may have dropped it just now
            self._recent.move_to_end(stage)

    def _keep(self, stage: Stage, place: _Place) -> None:
        self._recent[stage] = place
        while len(self._recent) > MAX_STAGES:
            dropped, where = self._recent.popitem(last=False)
            where.cut()
            todo = list(dropped.next.values())
            while todo:  # nothing leads to these any more
                below = todo.pop()
                self._recent.pop(below, None)
                todo += below.next.values()

    def _start(self, shapes: Shapes) -> Stage:
        inputs = self._graph.inputs
        segment = specialize(
            self._graph.nodes,
            specs={n: TensorSpec(s, spec.dtype) for (n, spec), s in zip(inputs.items(), shapes, strict=True)},
            constants=self._graph.constants,
            outputs=self._graph.outputs,
            opsets=self._graph.opsets,
            registry=self._registry,
        )
        return self._plan(segment, tuple(self._graph.outputs), {})

    def _follow(self, stage: Stage, told: Mapping[str, HostArray], made: Mapping[str, TensorSpec]) -> Stage:
        segment = stage.segment
        carried = {v: o for v, o in stage.plan.outputs.items() if v not in told and not o.constant}
        following = specialize(
            segment.rest,
            specs={v: TensorSpec(o.shape, o.dtype) for v, o in carried.items()} | dict(made),
            constants={**segment.constants, **told},
            outputs=stage.missing,
            opsets=self._graph.opsets,
            registry=self._registry,
        )
        return self._plan(following, stage.missing, carried)

    def _plan(self, segment: Segment, wanted: tuple[str, ...], carried: Mapping[str, Operand]) -> Stage:
        plan = lower(segment, self._device, self._measure, carried)
        final = tuple(o for o in wanted if o in plan.outputs)
        missing = tuple(o for o in wanted if o not in plan.outputs)
        if segment.is_last and missing:
            raise PlanError(f"output '{missing[0]}' is made by no node")
        return Stage(plan, final, missing)
