"""Segment -> Plan: choose kernels, turn views into strides, reuse memory in place, add the copies, place everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from infera_gpu.devices.base import Device
from infera_gpu.errors import PlanError, planning
from infera_gpu.graph import HostArray, Node
from infera_gpu.layout import Operand, Space, dense, view_of
from infera_gpu.memory import Request, aligned, plan_arena
from infera_gpu.op import Kernel
from infera_gpu.plan import Block, Plan, Step
from infera_gpu.spec import TensorSpec
from infera_gpu.specialize import Placed, Segment

Measure = Callable[[Kernel, Placed, tuple[Operand | None, ...], tuple[Operand, ...]], int]
"""Bytes of scratch that a kernel asks for when it is bound to these operands."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a node will run: a kernel of some kind, or the operator's own function through an array library."""

    via: str
    space: Space
    kernel: Kernel | None


def choose(placed: Placed, device: Device) -> Choice:
    """The first kernel that the device prefers and that supports the site, else the operator's `compute`."""
    for kind in device.kinds:
        kernel = placed.op.kernels.get(kind)
        if kernel is not None and kernel.supports(placed.site):
            return Choice(kind, device.space, kernel)
    if device.space == "device" and placed.op.portable and device.runs_portable:
        return Choice("portable", "device", None)
    if device.space == "device":
        kernel = placed.op.kernels.get("cpu")
        if kernel is not None and kernel.supports(placed.site):
            return Choice("cpu", "host", kernel)
    return Choice("numpy", "host", None)


@dataclass(slots=True)
class _Root:
    space: Space
    nbytes: int
    begin: int
    end: int
    fixed: int | None = None
    last_read: int = -1
    rank: int = 0


class _Lowering:
    def __init__(self, segment: Segment, device: Device, measure: Measure) -> None:
        self.segment, self.device, self.measure = segment, device, measure
        self.steps: list[Step] = []
        self.roots: dict[str, _Root] = {}
        self.homes: dict[str, Operand] = {}
        self.copies: dict[tuple[str, Space, bool], Operand] = {}
        self.last_read: dict[str, int] = {}
        for i, p in enumerate(segment.nodes):
            self.last_read.update({v: i for v in p.node.inputs if v})
        self.last_read.update(dict.fromkeys(segment.outputs, len(segment.nodes)))
        self.staged: set[str] = set()

    # ---- memory

    def new_root(self, name: str, space: Space, nbytes: int) -> str:
        unique = name
        while unique in self.roots:
            unique += "'"
        self.roots[unique] = _Root(space, nbytes, len(self.steps), len(self.steps) + 1)
        return unique

    def new(self, name: str, space: Space, spec: TensorSpec) -> Operand:
        if spec.dtype == object:
            raise PlanError(f"'{name}' is a string tensor computed at run time, which is not supported")
        return dense(self.new_root(name, space, spec.nbytes), space, spec)

    def touch(self, operand: Operand | None, until: int | None = None) -> None:
        if operand is not None and not operand.constant:
            root = self.roots[operand.root]
            root.end = max(root.end, (len(self.steps) if until is None else until) + 1)

    def own(self, value: str, operand: Operand) -> None:
        self.homes[value] = operand
        if not operand.constant:
            self.read_as(value, self.roots[operand.root])

    def read_as(self, value: str, root: _Root) -> None:
        """The memory holds this value too."""
        root.last_read = max(root.last_read, self.last_read.get(value, -1))

    def emit(self, step: Step) -> None:
        for operand in (*step.ins, *step.outs, step.workspace):
            self.touch(operand)
        self.steps.append(step)

    # ---- operands

    def home(self, value: str) -> Operand:
        """Where the value lies. A constant lies wherever it is asked for."""
        found = self.homes.get(value)
        if found is None:
            array = self.segment.constants[value]
            found = dense(value, self.device.space, TensorSpec(array.shape, array.dtype), constant=True)
            self.homes[value] = found
        return found

    def fetch(self, value: str, space: Space, *, strided: bool) -> Operand:
        """The value in `space`, contiguous unless `strided`; adds the copies this takes."""
        operand = self.home(value)
        if operand.constant:
            return replace(operand, space=space)
        if operand.space != space:
            operand = self.copy(value, operand, space)
        if not strided and not operand.is_contiguous:
            operand = self.copy(value, operand, space)
        return operand

    def copy(self, value: str, source: Operand, space: Space) -> Operand:
        """A contiguous copy of `source` in `space`, made once."""
        key = (value, space, True)
        if key in self.copies:
            return self.copies[key]
        if source.space != space and not source.is_contiguous:
            source = self.copy(value, source, source.space)
        target = self.new(f"{value}@{space}", space, TensorSpec(source.shape, source.dtype))
        kind = "copy" if source.space == space else ("upload" if space == "device" else "download")
        self.emit(Step(kind, f"{kind} {value}", self.device.name, (source,), (target,), space))  # type: ignore[arg-type]
        self.copies[key] = target
        self.read_as(value, self.roots[target.root])
        return target

    # ---- nodes

    def node(self, index: int, placed: Placed) -> None:
        if placed.op.view is not None and self.view(placed):
            return
        choice = choose(placed, self.device)
        kernel = choice.kernel
        strided = kernel.strided if kernel else True
        ins = tuple(self.fetch(v, choice.space, strided=strided) if v else None for v in placed.node.inputs)
        outs = self.outputs(index, placed, choice, ins)
        workspace = None
        if kernel is not None:
            nbytes = kernel.workspace(placed.site) if kernel.workspace else self.measure(kernel, placed, ins, outs)
            if nbytes:
                workspace = self.new(f"scratch {index}", choice.space, TensorSpec((nbytes,), np.dtype(np.uint8)))
        self.emit(
            Step(
                "kernel" if kernel else "compute",
                str(placed.node),
                choice.via,
                ins,
                outs,
                choice.space,
                placed,
                kernel,
                workspace,
            )
        )
        for name, operand in zip(placed.node.outputs, outs, strict=False):
            if name:
                self.own(name, operand)

    def view(self, placed: Placed) -> bool:
        """Make output 0 a window into input 0; True unless the input is a constant or the node has more outputs."""
        value, name = placed.node.inputs[0], placed.node.outputs[0]
        source = self.home(value)
        if source.constant or any(placed.node.outputs[1:]):
            return False
        apply, site = placed.op.view, placed.site
        assert apply is not None
        made = view_of(source, lambda x: apply(x, site))
        if made is None:
            made = view_of(self.fetch(value, source.space, strided=False), lambda x: apply(x, site))
        if made is None or made.shape != site.outs[0].shape:
            raise PlanError(f"{placed.node}: its view does not give {site.outs[0]}")
        self.own(name, made)
        return True

    def outputs(
        self, index: int, placed: Placed, choice: Choice, ins: tuple[Operand | None, ...]
    ) -> tuple[Operand, ...]:
        specs = placed.site.outs[: len(placed.node.outputs)]
        names = placed.node.outputs
        made = [
            self.taken_over(index, choice, ins, specs[0])
            or self.new(names[0] or f"unused {index}", choice.space, specs[0])
        ]
        made += [self.new(names[i] or f"unused {index}.{i}", choice.space, spec) for i, spec in enumerate(specs[1:], 1)]
        return tuple(made)

    def taken_over(
        self, index: int, choice: Choice, ins: tuple[Operand | None, ...], spec: TensorSpec
    ) -> Operand | None:
        """An input whose memory the kernel may write output 0 to: it dies here, and no other operand looks at it."""
        for i in choice.kernel.inplace if choice.kernel else ():
            operand = ins[i] if i < len(ins) else None
            if operand is None or operand.constant or operand.root in self.staged:
                continue
            root = self.roots[operand.root]
            if (
                (operand.shape, operand.dtype) == (spec.shape, spec.dtype)
                and operand.is_contiguous
                and operand.offset == 0
                and operand.nbytes == root.nbytes
                and root.fixed is None
                and root.last_read <= index
                and sum(o is not None and o.root == operand.root for o in ins) == 1
            ):
                return operand
        return None

    # ---- the whole

    def run(self, carried: Mapping[str, Operand]) -> Plan:
        for value, spec in self.segment.inputs.items():
            operand = carried.get(value)
            if operand is None:
                operand = self.new(value, self.device.space, spec)
                self.staged.add(operand.root)
            else:
                low, high = operand.bounds()
                start = low // aligned(1) * aligned(1)
                self.roots[value] = _Root(operand.space, high - start, 0, 1, fixed=start)
                operand = replace(operand, root=value, offset=operand.offset - start)
            self.own(value, operand)
        for i, placed in enumerate(self.segment.nodes):
            with planning(placed.node):
                self.node(i, placed)
        outputs = {v: self.home(v) for v in self.segment.outputs}
        for operand in outputs.values():
            self.touch(operand, until=len(self.steps))
        for rank, value in enumerate(_reads(self.segment.rest), 1):
            if value in outputs and not outputs[value].constant:
                self.roots[outputs[value].root].rank = rank
        return self.place(outputs, carried)

    def place(self, outputs: Mapping[str, Operand], carried: Mapping[str, Operand]) -> Plan:
        arenas: dict[Space, int] = {}
        bounds: dict[Space, int] = {}
        offsets: dict[str, int] = {}
        spaces: tuple[Space, ...] = ("host", "device")
        for space in spaces:
            roots = {k: r for k, r in self.roots.items() if r.space == space}
            if roots:
                arena = plan_arena(
                    [Request(k, r.nbytes, r.begin, r.end, r.rank) for k, r in roots.items()],
                    {k: r.fixed for k, r in roots.items() if r.fixed is not None},
                )
                arenas[space], bounds[space] = arena.nbytes, arena.lower_bound
                offsets.update(arena.offsets)

        def absolute(o: Operand) -> Operand:
            return o if o.constant else o.moved(offsets.get(o.root, 0))

        steps = tuple(
            replace(
                s,
                ins=tuple(o and absolute(o) for o in s.ins),
                outs=tuple(map(absolute, s.outs)),
                workspace=s.workspace and absolute(s.workspace),
            )
            for s in self.steps
        )
        entering = {v: absolute(self.homes[v]) for v in self.segment.inputs}
        return Plan(
            device=self.device.name,
            segment=self.segment,
            steps=steps,
            inputs={v: o for v, o in entering.items() if v not in carried},
            carried={v: o for v, o in entering.items() if v in carried},
            outputs={v: absolute(o) for v, o in outputs.items()},
            constants={k: _dense(a) for k, a in self.segment.constants.items()},
            arenas=arenas,
            lower_bounds=bounds,
            blocks=tuple(
                Block(k, r.space, offsets[k], aligned(r.nbytes), r.begin, r.end)
                for k, r in self.roots.items()
                if k in offsets
            ),
        )


def _reads(nodes: Iterable[Node]) -> Iterator[str]:
    """What the nodes and their subgraphs read, in the order of execution."""
    for node in nodes:
        yield from node.inputs
        for _, sub in node.subgraphs:
            yield from _reads(sub.nodes)


def _dense(array: HostArray) -> HostArray:
    """A constant as kernels expect it; folding may have left a broadcast view."""
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def lower(segment: Segment, device: Device, measure: Measure, carried: Mapping[str, Operand] | None = None) -> Plan:
    """The plan of a segment. `carried` are the operands that earlier segments left in the arena."""
    return _Lowering(segment, device, measure).run(carried or {})
