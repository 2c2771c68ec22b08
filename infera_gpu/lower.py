"""Segment -> Plan: choose kernels, turn views into strides, reuse memory in place, add the copies, place everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from infera_gpu.choice import Choice, choose
from infera_gpu.devices.base import Device
from infera_gpu.errors import PlanError, planning
from infera_gpu.graph import Node
from infera_gpu.homes import Homes
from infera_gpu.layout import Operand, Space, dense, operand_of, views_of
from infera_gpu.memory import aligned, crowded
from infera_gpu.op import Kernel, Site
from infera_gpu.place import Lowered, Root, place, requests
from infera_gpu.plan import Plan, Step
from infera_gpu.reuse import Lying
from infera_gpu.slots import same_place, slots_of, windows_of, writes_strided
from infera_gpu.spec import TensorSpec
from infera_gpu.specialize import Placed, Segment

Measure = Callable[[Kernel, Placed, tuple[Operand | None, ...], tuple[Operand, ...]], tuple[int, int]]
"""Bytes of scratch that a kernel asks for when it is bound to these operands, and into how many parts it splits."""

ATTEMPTS = 3
"""How often a segment is lowered, at most, with fewer slots each time, to bring down the most bytes alive at once."""

SMALL = 1 << 16
"""Bytes. What fits in that keeps its slots: copies would cost more than memory."""


class _Lowering(Homes):
    """A segment's nodes made steps, with the memory that they need, not yet placed.

    `without` are joined values without slots, and values that do not lie where parts of others lay.
    """

    def __init__(
        self,
        segment: Segment,
        device: Device,
        measure: Measure,
        choices: Sequence[Choice],
        without: Collection[str],
    ) -> None:
        super().__init__(segment, device, Lying(segment, choices) if device.space == "device" else None)
        self.measure, self.choices, self.without = measure, choices, without
        self.places, self.around, self.padded = slots_of(segment, choices, device.space, without)
        self.slabs: dict[str, str] = {}
        """The root of each joined value that values were written into before it was joined, or that has a border."""
        self.joined: dict[str, int] = {}
        """The step at which a slab was full: at once where no other value was written into it."""
        self.guests: dict[str, tuple[str, int]] = {}
        """A value that lies where a part of another lay: the root, and the step that made it."""
        self.staged: set[str] = set()
        self.bordered: set[str] = set()
        self.saved: Counter[str] = Counter()

    # ---- nodes

    def node(self, index: int, placed: Placed) -> None:
        op, site, choice = placed.op, placed.site, self.choices[index]
        if (op.view is not None and self.view(placed)) or (op.windows is not None and self.join(placed, choice.space)):
            return
        kernel = choice.kernel
        strided = kernel.strided if kernel else True
        first = strided or (kernel is not None and site.told("strided_in", kernel.strided_in))
        within = self.within(index, placed)
        ins = tuple(
            [
                within
                if within and not i
                else self.fetch(v, choice.space, strided=strided if i else first)
                if v
                else None
                for i, v in enumerate(site.node.inputs)
            ]
        )
        outs = self.outputs(index, placed, choice, ins)
        workspace, parts = None, 1
        if kernel is not None:
            nbytes, parts = (kernel.workspace(site), 1) if kernel.workspace else self.measure(kernel, placed, ins, outs)
            if nbytes:
                workspace = self.new(f"scratch {index}", choice.space, TensorSpec((nbytes,), np.dtype(np.uint8)))
        kind = "kernel" if kernel else "compute"
        self.emit(Step(kind, site.node.label, choice.via, ins, outs, choice.space, placed, kernel, workspace, parts))  # type: ignore[arg-type]
        for name, operand in zip(site.node.outputs, outs, strict=False):
            if name:
                self.own(name, operand)

    def within(self, index: int, placed: Placed) -> Operand | None:
        """Input 0 with the border around it, for which a copy that is needed anyway leaves room; None without one."""
        if index not in self.around:
            return None
        whole, inner = self.around[index]
        value = placed.site.node.inputs[0]
        source, root = self.home(value), self.slabs.get(whole.root)
        if root is None or not same_place(source, inner._replace(root=root)):
            if source.constant or source.is_contiguous:
                return None
            root = self.new_root(f"{value}@{whole.space}", whole.space, whole.nbytes)
            self.move(value, source, inner._replace(root=root))
        self.bordered.add(value)
        return whole._replace(root=root)

    def view(self, placed: Placed) -> bool:
        """Make the outputs windows into input 0; False where that is a constant or an output is no window."""
        site = placed.site
        value, names = site.node.inputs[0], site.node.outputs
        source = self.home(value)
        if source.constant:
            return False
        made = _views(source, placed)
        if made is None:
            made = _views(self.fetch(value, source.space, strided=False), placed)
        if made is None:
            return False
        for name, operand, spec in zip(names, made, site.outs, strict=False):
            if operand.shape != spec.shape:
                raise PlanError(f"{site.node}: its view does not give {spec}")
            if name:
                self.own(name, operand)
                self.saved["as views"] += operand.nbytes
        return True

    def join(self, placed: Placed, space: Space) -> bool:
        """Copy the inputs that do not lie in their windows; False where none does, and the node runs as any other.

        What the caller gives is copied in any case, from where he has it: see `direct`.
        """
        site = placed.site
        name = site.node.outputs[0]
        place = self.places.get(name) or dense(name, space, site.outs[0])
        given = space == "host" and any(self.home(v).root in self.staged for v in site.node.inputs)
        if place.root not in self.slabs:
            if not given:
                return False
            self.slab(place)
        whole = place._replace(root=self.slabs[place.root])
        inputs = site.node.inputs
        away = [
            (v, w) for v, w in zip(inputs, windows_of(whole, placed), strict=True) if not same_place(self.home(v), w)
        ]
        if len(away) == len(inputs) and not given:
            return False
        for value, target in away:
            self.move(value, self.fetch(value, space, strided=True), target)
        self.own(name, whole)
        self.joined[self.slabs[place.root]] = len(self.steps)
        return True

    def outputs(
        self, index: int, placed: Placed, choice: Choice, ins: tuple[Operand | None, ...]
    ) -> tuple[Operand, ...]:
        names, specs = placed.site.node.outputs, placed.site.outs
        made: list[Operand] = []
        for i, (name, spec) in enumerate(zip(names, specs, strict=False)):
            operand = self.slot(name) or (self.taken_over(index, choice, ins, spec) if i == 0 else None)
            if operand is None and len(specs) == 1:
                operand = self.part(index, choice, ins, name, spec)
            made.append(operand or self.new(name or f"unused {index}.{i}", choice.space, spec))
        return tuple(made)

    def slot(self, name: str) -> Operand | None:
        """Where the value lies in a joined one, which gets its memory now if it is the first."""
        place = self.places.get(name)
        if place is None:
            return None
        if place.root not in self.slabs:
            self.slab(place)
        if name != place.root:
            self.saved["into slots"] += place.nbytes
        else:
            self.joined[self.slabs[place.root]] = len(self.steps)
        return place._replace(root=self.slabs[place.root])

    def slab(self, place: Operand) -> None:
        """Memory for the root of a place."""
        nbytes = self.padded.get(place.root) or self.segment.specs[place.root].nbytes
        self.slabs[place.root] = self.new_root(place.root, place.space, nbytes)

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
                operand.may_become(spec)
                and operand.offset == 0
                and operand.nbytes == root.nbytes
                and root.fixed is None
                and root.last_read <= index
                and sum(o is not None and o.root == operand.root for o in ins) == 1
            ):
                self.saved["in place"] += operand.nbytes
                return operand
        return None

    def part(
        self, index: int, choice: Choice, ins: tuple[Operand | None, ...], name: str, spec: TensorSpec
    ) -> Operand | None:
        """Where a part of a value lay of which this node reads another part, or that part itself: see `reuse`.

        For a node's only output, and on the device alone: what NumPy computes with is best contiguous.
        """
        kernel = choice.kernel
        if self.lying is None or choice.space != "device" or not writes_strided(kernel) or name in self.without:
            return None
        inplace = kernel.inplace if kernel else ()
        read = [o for o in ins if o is not None and not o.constant]
        for operand in read:
            root = self.roots[operand.root]
            if operand.root in self.staged or root.fixed is not None or operand.root in self.slabs.values():
                continue
            over = operand if ins.index(operand) in inplace and read.count(operand) == 1 else None
            found = self.lying.free(index, operand.root, name, spec, over)
            if found is not None:
                self.guests[name] = operand.root, len(self.steps)
                self.saved["where others lay"] += found.nbytes
                return found
        return None

    # ---- the whole

    def run(self, carried: Mapping[str, Operand]) -> None:
        for value, spec in self.segment.inputs.items():
            operand = carried.get(value)
            if operand is None:
                operand = self.new(value, self.device.space, spec)
                self.staged.add(value)  # the first of its name: the root is called so
            else:
                low, high = operand.bounds()
                start = low // aligned(1) * aligned(1)
                self.roots[value] = Root(operand.space, high - start, 0, 1, fixed=start)
                operand = operand._replace(root=value, offset=operand.offset - start)
            self.own(value, operand)
        with planning() as at:
            for i, placed in enumerate(self.segment.nodes):
                at.what = placed.site.node
                self.node(i, placed)
        outputs = {v: self.home(v) for v in self.segment.outputs}
        if self.device.space == "device":  # what leaves a GPU leaves in one piece
            for v, operand in outputs.items():
                outputs[v] = self.homes[v] = self.fetch(v, operand.space, strided=False)
        for operand in outputs.values():
            self.touch(operand)
        for rank, value in enumerate(_reads(self.segment.rest), 1):
            if value in outputs and not outputs[value].constant:
                self.roots[outputs[value].root].rank = rank

    @property
    def waits(self) -> bool:
        """Whether some joined value is there before it is complete."""
        return any(self.joined.get(root) != self.roots[root].begin for root in self.slabs.values())

    def crowded(self) -> tuple[int, set[str]]:
        """The most bytes alive at one step, and what keeps memory alive then that would not be needed without it:
        joined values that are not complete, values that lie where parts of others lay."""
        nbytes, step = crowded(requests(self.roots, self.device.space))
        waiting = {
            name
            for name, root in self.slabs.items()
            if self.roots[root].begin <= step < self.joined.get(root, self.roots[root].end)
        }
        waiting |= {name for name, (root, made) in self.guests.items() if made < step < self.roots[root].end}
        return nbytes, waiting

    def direct(self) -> frozenset[str]:
        """Inputs in host memory that steps only copy, a cache that grows: they are read where the caller has them."""
        if self.device.space != "host":
            return frozenset()
        found = self.staged - {self.home(v).root for v in self.segment.outputs}
        for step in self.steps:
            if step.kind != "copy":
                found -= {o.root for o in step.ins if o is not None}
            elif step.ins[0] is not None and step.ins[0].root in found and step.ins[0] != self.homes[step.ins[0].root]:
                found.discard(step.ins[0].root)
        return frozenset(found)

    def plan(self, carried: Collection[str]) -> Plan:
        direct = self.direct()
        return place(
            Lowered(
                self.device.name,
                self.device.concurrency,
                self.device.captures,
                self.device.space == "device",
                self.segment,
                self.steps,
                {k: r for k, r in self.roots.items() if k not in direct},
                direct=direct,
                entering={v: self.homes[v] for v in self.segment.inputs},
                outputs={v: self.home(v) for v in self.segment.outputs},
                saved=self.saved,
                bordered=len(self.bordered),
            ),
            carried,
        )


def _views(source: Operand, placed: Placed) -> tuple[Operand, ...] | None:
    """The outputs as windows into input 0, which lies at `source`; None where one of them is none."""
    apply = placed.op.view
    assert apply is not None

    def asked(site: Site) -> tuple[Operand, ...] | None:
        made = views_of(source._replace(offset=0), lambda x: apply(x, site))
        return None if made is None or any(site.node.outputs[len(made) :]) else made

    made = placed.site.told((source.shape, source.strides), asked)
    return made and tuple(
        [
            operand_of((source.root, source.space, shape, dtype, strides, source.offset + offset, source.constant))
            for _, _, shape, dtype, strides, offset, _ in made
        ]
    )


def _reads(nodes: Iterable[Node]) -> Iterator[str]:
    """What the nodes and their subgraphs read, in the order of execution."""
    for node in nodes:
        yield from node.inputs
        for _, sub in node.subgraphs:
            yield from _reads(sub.nodes)


def _chosen(nodes: Iterable[Placed], device: Device) -> Iterator[Choice]:
    """`choose` for each, whose errors name the node: kernels look at attributes that nothing has checked."""
    with planning() as at:
        for placed in nodes:
            at.what = placed.site.node
            yield placed.site.told("choice", partial(_choice, placed, device))


def _choice(placed: Placed, device: Device, _: Site) -> Choice:
    return choose(placed, device)


def lower(segment: Segment, device: Device, measure: Measure, carried: Mapping[str, Operand] | None = None) -> Plan:
    """The plan of a segment. `carried` are the operands that earlier segments left in the arena.

    A joined value is alive from the first of its parts on. Where that is what needs most memory, its parts are joined
    by copying.
    """
    choices = list(_chosen(segment.nodes, device))
    best, least, without = None, 0, set[str]()
    for _ in range(ATTEMPTS):
        lowering = _Lowering(segment, device, measure, choices, without)
        lowering.run(carried or {})
        if not without and not lowering.waits and not lowering.guests:
            return lowering.plan(carried or {})
        nbytes, waiting = lowering.crowded()
        if best is None or nbytes < least:
            best, least = lowering, nbytes
        if not waiting or nbytes <= SMALL:
            break
        without |= waiting
    assert best is not None
    return best.plan(carried or {})
