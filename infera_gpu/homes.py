"""Where the values of a segment lie while it is lowered, and the copies that bring them where they are needed."""

from __future__ import annotations

from infera_gpu.devices.base import Device
from infera_gpu.errors import PlanError
from infera_gpu.layout import Operand, Space, constant, dense
from infera_gpu.place import Root
from infera_gpu.plan import Step
from infera_gpu.reuse import Lying
from infera_gpu.spec import TensorSpec
from infera_gpu.specialize import Segment


class Homes:
    """A segment's steps so far, the blocks of memory (`roots`) that they need, and the place of each value.

    `lying` is told what lies where, if parts of values may lie where others lay.
    """

    def __init__(self, segment: Segment, device: Device, lying: Lying | None) -> None:
        self.segment, self.device, self.lying = segment, device, lying
        self.steps: list[Step] = []
        self.roots: dict[str, Root] = {}
        self.homes: dict[str, Operand] = {}
        self.copies: dict[tuple[str, Space], Operand] = {}
        self.last_read: dict[str, int] = {}
        for i, p in enumerate(segment.nodes):
            for v in p.site.node.inputs:
                self.last_read[v] = i
        self.last_read.update(dict.fromkeys(segment.outputs, len(segment.nodes)))

    # ---- memory

    def new_root(self, name: str, space: Space, nbytes: int) -> str:
        unique = name
        while unique in self.roots:
            unique += "'"
        begin = len(self.steps)
        self.roots[unique] = Root(space, nbytes, begin, begin + 1)
        return unique

    def new(self, name: str, space: Space, spec: TensorSpec) -> Operand:
        if spec.dtype == object:
            raise PlanError(f"'{name}' is a string tensor computed at run time, which is not supported")
        return dense(self.new_root(name, space, spec.nbytes), space, spec)

    def touch(self, operand: Operand | None) -> None:
        """The operand is needed by the step that comes next."""
        if operand is not None and not operand.constant:
            root, end = self.roots[operand.root], len(self.steps) + 1
            if root.end < end:
                root.end = end

    def own(self, value: str, operand: Operand) -> None:
        self.homes[value] = operand
        if not operand.constant:
            self.read_as(value, operand)

    def read_as(self, value: str, operand: Operand) -> None:
        """The memory holds this value too."""
        root, last = self.roots[operand.root], self.last_read.get(value, -1)
        if last > root.last_read:
            root.last_read = last
        if self.lying is not None:
            self.lying.add(operand, last)

    def emit(self, step: Step) -> None:
        for operand in (*step.ins, *step.outs, step.workspace):
            self.touch(operand)
        self.steps.append(step)

    # ---- operands

    def home(self, value: str) -> Operand:
        """Where the value lies. A constant lies wherever it is asked for."""
        found = self.homes.get(value)
        if found is None:
            found = constant(value, self.device.space, self.segment.specs[value])
            self.homes[value] = found
        return found

    def fetch(self, value: str, space: Space, *, strided: bool) -> Operand:
        """The value in `space`, contiguous unless `strided`; adds the copies this takes."""
        operand = self.home(value)
        if operand.constant:
            return operand if operand.space == space else operand._replace(space=space)
        if operand.space != space:
            operand = self.copy(value, operand, space)
        if not strided and not operand.is_contiguous:
            operand = self.copy(value, operand, space)
        return operand

    def copy(self, value: str, source: Operand, space: Space) -> Operand:
        """A contiguous copy of `source` in `space`, made once."""
        key = (value, space)
        if key in self.copies:
            return self.copies[key]
        if source.space != space and not source.is_contiguous:
            source = self.copy(value, source, source.space)
        target = self.new(f"{value}@{space}", space, TensorSpec(source.shape, source.dtype))
        self.move(value, source, target)
        self.copies[key] = target
        self.read_as(value, target)
        return target

    def move(self, value: str, source: Operand, target: Operand) -> None:
        kind = "copy" if source.space == target.space else ("upload" if target.space == "device" else "download")
        self.emit(Step(kind, f"{kind} {value}", self.device.name, (source,), (target,), target.space))  # type: ignore[arg-type]
