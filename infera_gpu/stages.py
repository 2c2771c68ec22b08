"""The trees of segments: what follows depends on values that only a run can tell, and is planned once for each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from infera_gpu.alike import AlikeNodes
from infera_gpu.bind import Bound
from infera_gpu.bodies import Body, Inside, Nest, value_of
from infera_gpu.constants import MAX_FOLDED, Constants
from infera_gpu.devices.base import Device, usual_buffers
from infera_gpu.errors import PlanError, planning
from infera_gpu.garbage import settle, uncollected
from infera_gpu.graph import Graph, HostArray
from infera_gpu.layout import Operand
from infera_gpu.lower import lower
from infera_gpu.measure import Measurer
from infera_gpu.op import Registry, Site
from infera_gpu.plan import Plan
from infera_gpu.spec import DType, TensorSpec, ValueSpec, is_plain, spec_of, value_spec
from infera_gpu.specialize import Eager, Known, Segment, specialize

MAX_STAGES = 256
"""Planned segments that a session keeps, over all shapes and values; the least recently used is dropped beyond that."""

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
Told: TypeAlias = tuple[tuple[object, ...], ...]
"""What a continuation depends on: the values waited for, and the shapes of what eager nodes made."""

Read: TypeAlias = Callable[[str], HostArray]
"""Fetches a value that a run left."""


class Shelf(Protocol):
    """Where plans are kept from one process to the next."""

    def take(self, shapes: Shapes, constants: Constants) -> Plan | None:
        """The plan of the first segment for inputs of these shapes, if it is there."""
        ...

    def keep(self, shapes: Shapes, bound: Bound, constants: Constants) -> None:
        """Keep one that has been made and bound, if it can be."""
        ...

    def distrust(self) -> None:
        """What is there has turned out to be wrong."""
        ...


@dataclass(eq=False)
class Stage:
    """A planned segment. `final` are the graph's outputs that it makes, `missing` those that later stages make.

    `objects` are the types of the values at hand that no arena holds.
    """

    plan: Plan
    final: tuple[str, ...]
    missing: tuple[str, ...]
    objects: Mapping[str, ValueSpec]
    next: dict[Told, Stage] = field(default_factory=dict)
    bodies: dict[int, Body] = field(default_factory=dict)
    folded: int = 0
    """Bytes of constants that planning computed."""
    taken: bool = False
    """Whether its plan was kept from another process."""

    @property
    def segment(self) -> Segment:
        return self.plan.segment

    @cached_property  # each run asks, as for `made`
    def is_last(self) -> bool:
        return self.segment.is_last

    @cached_property
    def made(self) -> tuple[tuple[str, tuple[int, ...], DType, int], ...]:
        """Name, shape, type and bytes of each of the `final` outputs."""
        outputs = [(name, self.plan.outputs[name]) for name in self.final]
        return tuple([(name, o.shape, o.dtype, o.nbytes) for name, o in outputs])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a stage hangs: in a map, under a key."""

    map: dict[Shapes, Stage] | dict[Told, Stage]
    key: Shapes | Told

    def cut(self) -> None:
        self.map.pop(self.key, None)  # type: ignore[arg-type]


class Stages:
    """Plans a graph, stage by stage, each once. Finding a planned stage takes no lock; planning takes one."""

    def __init__(self, graph: Graph, device: Device, registry: Registry, constants: Constants, nest: Nest) -> None:
        self._graph, self._device, self._nest = graph, device, nest
        self._alike = AlikeNodes(registry, graph.opsets, graph.nodes)
        self._measure = Measurer(device, constants)
        self._known = Known.of(graph.constants, lasting=True)
        self._first: dict[Shapes, Stage] = {}
        self._recent: OrderedDict[Stage, _Place] = OrderedDict()
        self._constants = constants
        self._folded = 0
        self._planning = threading.Lock()
        self.shelf: Shelf | None = None
        self._trusting = True
        self._unkept: WeakKeyDictionary[Plan, Shapes] = WeakKeyDictionary()
        """Plans that are to be kept once they have been bound, and for which inputs."""

    def __len__(self) -> int:
        """Stages that are kept."""
        return len(self._recent)

    def known(self, shapes: Shapes) -> bool:
        """Whether inputs of these shapes have been planned."""
        return shapes in self._first

    def kept(self, shapes: Shapes) -> Stage | None:
        """The first stage for these inputs, if it has been planned."""
        return self.first(shapes) if shapes in self._first else None

    def first(self, shapes: Shapes) -> Stage:
        """The stage that starts with the graph's inputs, in their order. Raises PlanError."""
        stage = self._first.get(shapes)
        if stage is None:
            with self._planning, uncollected():
                stage = self._first.get(shapes)
                if stage is None:
                    stage = self._first[shapes] = self._start(shapes)
                    self._keep(stage, _Place(self._first, shapes))
                    settle("plan")
        self._touch(stage)
        return stage

    def bound(self, bound: Bound) -> None:
        """A plan has been bound and has not run yet: it may be kept for other processes."""
        shapes = self._unkept.pop(bound.plan, None)
        if shapes is not None and self.shelf is not None:
            self.shelf.keep(shapes, bound, self._constants)

    def distrust(self) -> bool:
        """Forget the stages whose plans were kept from another process, and take no more; whether there were any.

        Those that are made in their place are kept instead of them.
        """
        with self._planning:
            self._constants.distrust()
            if self.shelf is not None:
                self.shelf.distrust()
            self._trusting, taken = False, [stage for stage in self._recent if stage.taken]
            for stage in taken:
                self._recent.pop(stage).cut()
                self._folded -= stage.folded
            return bool(taken)

    def advance(
        self, stage: Stage, read: Read, objects: MutableMapping[str, Any]
    ) -> tuple[Stage, Mapping[str, HostArray]]:
        """The stage after `stage`, with the arrays that its eager nodes made.

        `objects` are the run's values that no arena holds; what eager nodes make of that kind is added.
        """
        segment = stage.segment
        made: dict[str, Any] = {}

        def value(name: str) -> Any:
            for values in (made, objects, segment.constants):
                if name in values:
                    return values[name]
            return read(name)

        told = {name: value(name) for name in segment.waits}
        for name, known in told.items():
            if not isinstance(known, np.ndarray):
                raise PlanError(f"'{name}' is {value_spec(known)}, expected a tensor: its value decides what follows")
        for eager in segment.eager:
            with planning(eager.node):
                made.update(self._run(stage, eager, value))
        types = {k: value_spec(v) for k, v in made.items()}
        key: Told = (
            *((a.shape, a.tobytes()) for a in told.values()),
            *((s.shape, s.dtype) if isinstance(s, TensorSpec) and is_plain(s) else (type(s),) for s in types.values()),
        )
        following = stage.next.get(key)
        if following is None:
            with self._planning, uncollected():
                following = stage.next.get(key)
                if following is None:
                    following = self._follow(stage, told, types)
                    stage.next[key] = following
                    self._keep(following, _Place(stage.next, key))
        self._touch(following)
        arrays = {k: v for k, v in made.items() if is_plain(types[k])}
        objects.update((k, v) for k, v in made.items() if k not in arrays)
        return following, arrays

    def _run(self, stage: Stage, eager: Eager, value: Callable[[str], Any]) -> dict[str, Any]:
        """What a node makes of actual values."""
        op, node = eager.op, eager.node
        ins = [value(i) if i else None for i in node.inputs]
        tensors = tuple(v if isinstance(v, np.ndarray) else None for v in ins)
        attrs = dict(op.fill(node))
        for name, graph in node.subgraphs:
            body = stage.bodies.get(id(graph))
            if body is None:
                body = stage.bodies[id(graph)] = Body(graph, stage.segment.constants, self._graph.opsets, self._nest)
            attrs[name] = body.bound(tuple(map(value, body.fed)))
        site = Site(node, attrs, tuple(None if v is None else spec_of(v) for v in tensors), tensors, opset=eager.opset)
        if not op.host and not any(v is None and i for v, i in zip(tensors, node.inputs, strict=True)):
            site = replace(site, outs=tuple(s for s in op.infer(site) if s is not None))
        made = op.outputs(np, site, ins)
        return {n: value_of(v) for n, v in zip(node.outputs, made, strict=False) if n}

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Those of the stages that are kept."""
        with self._planning:
            return tuple([stage.plan for stage in self._recent])

    def inside(self) -> list[Inside]:
        """The plans by which subgraphs have been run, of the nodes of the stages that are kept."""
        with self._planning:
            kept = list(self._recent)
        called = [(stage.bodies, eager.node) for stage in kept for eager in stage.segment.eager]
        return [
            found
            for bodies, node in called
            for name, graph in node.subgraphs
            if id(graph) in bodies
            for found in bodies[id(graph)].inside(node, name)
        ]

    def clear(self) -> None:
        """Forget every stage, and what planning found out."""
        with self._planning:
            self._alike.clear()
            self._first.clear()
            self._recent.clear()
            self._folded = 0

    def _touch(self, stage: Stage) -> None:
        try:
            self._recent.move_to_end(stage)
        except KeyError:  # another thread has dropped it just now
            return

    def _keep(self, stage: Stage, place: _Place) -> None:
        self._recent[stage] = place
        self._folded += stage.folded
        while len(self._recent) > MAX_STAGES or (self._folded > MAX_FOLDED and len(self._recent) > 1):
            dropped = next(iter(self._recent))
            self._recent[dropped].cut()
            todo = [dropped]
            while todo:  # nothing leads to these any more
                below = todo.pop()
                if self._recent.pop(below, None) is not None:
                    self._folded -= below.folded
                todo += below.next.values()

    def _start(self, shapes: Shapes) -> Stage:
        inputs = self._graph.inputs
        specs: dict[str, ValueSpec] = {
            n: TensorSpec(shape, s.dtype) if isinstance(s, TensorSpec) and is_plain(s) else s
            for (n, s), shape in zip(inputs.items(), shapes, strict=True)
        }
        wanted = tuple(self._graph.outputs)
        plan = self.shelf.take(shapes, self._constants) if self.shelf is not None and self._trusting else None
        if plan is not None:
            return self._stage(plan, wanted, specs, taken=True)
        segment = specialize(
            self._graph.nodes,
            specs=specs,
            known=self._known,
            outputs=self._graph.outputs,
            alike=self._alike,
            batch_invariant=self._device.batch_invariant,
            tuned=self._device.tuned,
            tf32=self._device.tf32,
        )
        stage = self._plan(segment, wanted, {}, specs)
        if self.shelf is not None:
            self._unkept[stage.plan] = shapes
        return stage

    def _follow(self, stage: Stage, told: Mapping[str, HostArray], made: Mapping[str, ValueSpec]) -> Stage:
        segment = stage.segment
        carried = {v: o for v, o in stage.plan.outputs.items() if v not in told and not o.constant}
        following = specialize(
            segment.rest,
            specs={v: TensorSpec(o.shape, o.dtype) for v, o in carried.items()} | dict(stage.objects) | dict(made),
            known=Known.of({**segment.constants, **told}),
            outputs=stage.missing,
            alike=self._alike,
            batch_invariant=self._device.batch_invariant,
            tuned=self._device.tuned,
            tf32=self._device.tf32,
        )
        return self._plan(following, stage.missing, carried, {**stage.objects, **made})

    def _plan(
        self,
        segment: Segment,
        wanted: tuple[str, ...],
        carried: Mapping[str, Operand],
        entering: Mapping[str, ValueSpec],
    ) -> Stage:
        try:
            with usual_buffers():
                plan = lower(segment, self._device, self._measure, carried)
        finally:
            self._measure.rest()
        return self._stage(plan, wanted, entering)

    def _stage(
        self, plan: Plan, wanted: tuple[str, ...], entering: Mapping[str, ValueSpec], *, taken: bool = False
    ) -> Stage:
        segment = plan.segment
        final = tuple(o for o in wanted if o in plan.outputs)
        missing = tuple(o for o in wanted if o not in plan.outputs and o not in segment.objects)
        if segment.is_last and missing:
            raise PlanError(f"output '{missing[0]}' is made by no node")
        for name in final:
            declared, made = self._graph.outputs[name], plan.outputs[name].dtype
            if isinstance(declared, TensorSpec) and is_declared(declared) and declared.dtype != made:
                raise PlanError(f"output '{name}' is {made.name}, the model declares it as {declared.dtype.name}")
        objects = {k: s for k, s in entering.items() if not is_plain(s)}
        return Stage(plan, final, missing, objects, folded=self._constants.folded(plan), taken=taken)


def is_declared(spec: TensorSpec) -> bool:
    """Whether a file says so: one that leaves out the type of an output is read as float32 of unknown rank."""
    return spec.ranked or spec.dtype != np.float32
