"""The tree of segments: what follows depends on values that only a run can tell, and is planned once for each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from infera_gpu.bind import Constants, measurer
from infera_gpu.devices.base import Device
from infera_gpu.errors import PlanError
from infera_gpu.graph import Graph, HostArray
from infera_gpu.lower import lower
from infera_gpu.op import Registry
from infera_gpu.plan import Plan
from infera_gpu.spec import TensorSpec, spec_of
from infera_gpu.specialize import Segment, specialize

MAX_CHILDREN = 64
"""Continuations of one segment that are kept; the oldest is dropped beyond that."""


@dataclass(eq=False)
class Stage:
    """A planned segment, and the stages known to follow it. `final` are the graph's outputs that it makes."""

    plan: Plan
    final: tuple[str, ...]
    missing: tuple[str, ...]
    children: OrderedDict[Any, Stage] = field(default_factory=OrderedDict)

    @property
    def segment(self) -> Segment:
        return self.plan.segment

    @property
    def is_last(self) -> bool:
        return self.segment.is_last


class Stages:
    """Plans a graph, stage by stage."""

    def __init__(self, graph: Graph, device: Device, registry: Registry, constants: Constants) -> None:
        self._graph, self._device, self._registry = graph, device, registry
        self._measure = measurer(device, constants)

    def first(self, specs: Mapping[str, TensorSpec]) -> Stage:
        """The stage that starts with the graph's inputs."""
        return self._plan(
            specialize(
                self._graph.nodes,
                specs=specs,
                constants=self._graph.constants,
                outputs=self._graph.outputs,
                opsets=self._graph.opsets,
                registry=self._registry,
            ),
            tuple(self._graph.outputs),
            {},
        )

    def _plan(self, segment: Segment, wanted: tuple[str, ...], carried: Mapping[str, Any]) -> Stage:
        plan = lower(segment, self._device, self._measure, carried)
        final = tuple(o for o in wanted if o in plan.outputs)
        missing = tuple(o for o in wanted if o not in plan.outputs)
        if segment.is_last and missing:
            raise PlanError(f"output '{missing[0]}' is made by no node")
        return Stage(plan, final, missing)

    def advance(self, stage: Stage, read: Callable[[str], HostArray]) -> tuple[Stage, Mapping[str, HostArray]]:
        """The stage after `stage`, with what its eager nodes made. `read` fetches a value that the run left."""
        segment = stage.segment

        def value(name: str) -> HostArray:
            known = segment.constants.get(name)
            return read(name) if known is None else known

        told = {name: value(name) for name in segment.waits}
        made: dict[str, HostArray] = {}
        for placed in segment.eager:
            arrays = placed.op.outputs(np, placed.site, [value(i) if i else None for i in placed.node.inputs])
            made.update((n, np.asarray(a)) for n, a in zip(placed.node.outputs, arrays, strict=False) if n)
        key = (
            tuple((a.shape, a.tobytes()) for a in told.values()),
            tuple((a.shape, a.dtype) for a in made.values()),
        )
        child = stage.children.get(key)
        if child is None:
            child = stage.children[key] = self._next(stage, told, {k: spec_of(v) for k, v in made.items()})
            while len(stage.children) > MAX_CHILDREN:
                stage.children.popitem(last=False)
        return child, made

    def _next(self, stage: Stage, told: Mapping[str, HostArray], made: Mapping[str, TensorSpec]) -> Stage:
        segment = stage.segment
        carried = {v: o for v, o in stage.plan.outputs.items() if v not in told and not o.constant}
        entering = {v: TensorSpec(o.shape, o.dtype) for v, o in carried.items()} | dict(made)
        following = specialize(
            segment.rest,
            specs=entering,
            constants={**segment.constants, **told},
            outputs=stage.missing,
            opsets=self._graph.opsets,
            registry=self._registry,
        )
        return self._plan(following, stage.missing, carried)
