"""Graph + concrete input shapes -> every shape known, and the arithmetic on shapes computed away.

A node whose inputs are all known is computed here and now; every other node gets the specs of its outputs. Where
planning must know a value that only a run can tell (the condition of an If, a computed Reshape, the number of boxes
that NonMaxSuppression keeps), the segment ends: what comes before is planned and run, the value is read, and the rest
is specialised with it. Segments form a tree, cached by those values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from infera_gpu.alike import LEFT_OUT, SMALL, AlikeNodes, Sort, are_exact
from infera_gpu.errors import PlanError, planning
from infera_gpu.folding import fold_budget, may_fold
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.op import Op, Site
from infera_gpu.site import Alike
from infera_gpu.spec import TensorSpec, ValueSpec, constant, is_plain, spec_of
from infera_gpu.supported import is_control

if TYPE_CHECKING:
    from infera_kernels.tuning import Tuned


class Placed(NamedTuple):
    """A node with its operator and its site."""

    op: Op
    site: Site

    @property
    def node(self) -> Node:
        return self.site.node


@dataclass(frozen=True)
class Eager:
    """A node that runs on the host once the segment has run: its outputs' shapes depend on data, or they are no arrays
    that an arena can hold."""

    op: Op
    node: Node
    opset: int


@dataclass(frozen=True)
class Segment:
    """What can be planned at once.

    `inputs` are the values that enter (the graph's inputs, or what earlier segments left), `outputs` those that the
    graph's outputs, later segments or `waits` need. `waits` are values to read after the run, `eager` nodes to run
    then, in order; `rest` is what is left to specialise after that. `objects` are the graph's outputs that are known by
    now and that no arena can hold.
    """

    nodes: Sequence[Placed]
    inputs: Mapping[str, TensorSpec]
    outputs: tuple[str, ...]
    specs: Mapping[str, TensorSpec]
    constants: Mapping[str, HostArray]
    waits: tuple[str, ...] = ()
    eager: tuple[Eager, ...] = ()
    rest: tuple[Node, ...] = ()
    objects: tuple[str, ...] = ()

    @property
    def is_last(self) -> bool:
        return not self.rest and not self.eager


@dataclass(frozen=True)
class Known:
    """Values that are known before a segment: arrays, their specs, those that are strings, and how many bytes may be
    computed from them.

    `marks` are those of `alike`, as far as anybody has asked; None where the values are known for one segment alone.
    """

    arrays: Mapping[str, HostArray]
    specs: Mapping[str, TensorSpec]
    strings: frozenset[str]
    budget: int
    marks: dict[str, int] | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, HostArray], *, lasting: bool = False) -> Known:
        return cls(
            arrays,
            {k: spec_of(v) for k, v in arrays.items()},
            frozenset(k for k, v in arrays.items() if v.dtype.kind == "O"),
            fold_budget(arrays),
            {} if lasting else None,
        )


@dataclass
class _Walk:
    """The state of one pass over the nodes."""

    kinds: AlikeNodes
    constants: Known
    specs: dict[str, TensorSpec]
    known: dict[str, HostArray]
    objects: set[str]
    marks: dict[str, int]
    placed: list[Placed] = field(default_factory=list)
    waits: dict[str, None] = field(default_factory=dict)
    eager: list[Eager] = field(default_factory=list)
    rest: list[Node] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    budget: int = 0
    batch_invariant: bool = False
    tuned: Tuned | None = None
    tf32: bool = False
    _specs: dict[tuple[object, ...], TensorSpec] = field(default_factory=dict)
    _tuples: dict[tuple[int, ...], tuple[Any, ...]] = field(default_factory=dict)

    def block(self, node: Node, *, keep: bool = True) -> None:
        self.blocked.update(o for o in node.outputs if o)
        if keep:
            self.rest.append(node)

    def visit(self, nodes: Iterable[Node]) -> None:
        with planning() as at:
            for node in nodes:
                at.what = node
                missing = self.blocked.intersection(node.reads) if self.blocked else None
                control = is_control(node)
                if missing and (control or not (missing <= self.pending and self.kinds.sort(node).op.host)):
                    self.block(node)
                elif control:
                    self.branch(node)
                else:
                    self.place(node)

    def branch(self, node: Node) -> None:
        """An If whose condition is known is its branch; otherwise it waits for the condition."""
        if not node.inputs[0]:
            raise PlanError(f"{node}: its condition is left out")
        condition = self.known.get(node.inputs[0])
        if condition is None:
            self.waits[node.inputs[0]] = None
            self.block(node)
            return
        branch: Graph = node.attrs["then_branch" if bool(np.asarray(condition).reshape(-1)[0]) else "else_branch"]
        taken = branch.prefixed(next(o for o in node.outputs if o))
        self.define(taken.constants)
        self.visit(taken.nodes)
        self.visit(
            Node("Identity", (inner,), (outer,), name=f"{node.name or 'If'}/{outer}")
            for inner, outer in zip(taken.outputs, node.outputs, strict=True)
            if outer
        )

    def define(self, constants: Mapping[str, HostArray]) -> None:
        self.known.update(constants)
        self.specs.update({k: self.interned(spec_of(v)) for k, v in constants.items()})

    def interned(self, spec: TensorSpec) -> TensorSpec:
        """One spec for all that are equal: plans stay, and garbage collection looks through them."""
        return self._specs.setdefault((spec.shape, spec.dtype, spec.ranked), spec)

    def shared(self, specs: Sequence[TensorSpec | None]) -> tuple[Any, ...]:
        """One tuple for all nodes with the same objects."""
        return self._tuples.setdefault(tuple(map(id, specs)), tuple(specs))

    def place(self, node: Node) -> None:
        sort = self.kinds.sort(node)
        if sort.op.host or (self.objects and any(v in self.objects and v not in self.known for v in node.inputs)):
            self.later(sort)
            return
        marks = self.marks
        try:
            key = (sort.number, *[marks[i] for i in node.inputs])
        except KeyError:
            key = (sort.number, *[marks[i] if i in marks else self.mark(i) for i in node.inputs])
        alike = self.kinds.met(key)
        if alike is None or alike.nbytes > self.budget:
            self.meet(sort, key)
            return
        if alike.made is None:
            known = self.known.get
            values = tuple([known(i) for i in node.inputs])
            site = self.site(node, sort, alike.ins, values, alike.outs)
            site.alike = alike
            self.placed.append(Placed(sort.op, site))
        else:
            self.known.update((o, a) for o, a in zip(node.outputs, alike.made, strict=False) if o)
            self.budget -= alike.nbytes
        for name, spec, mark in zip(node.outputs, alike.outs, alike.marks, strict=False):
            if name:
                self.specs[name], marks[name] = spec, mark

    def site(self, node: Node, sort: Sort, ins: Any, values: tuple[HostArray | None, ...], outs: Any) -> Site:
        told = self.batch_invariant, self.tuned, self.tf32
        return Site(node, sort.attrs, ins, values, outs, sort.opset, *told)

    def mark(self, name: str) -> int:
        """That of a value which is met for the first time."""
        known, lasting = self.known.get(name), self.constants.marks
        if lasting is None or known is None or known is not self.constants.arrays.get(name):
            made = self.marks[name] = self.kinds.mark(self.specs[name], known)
        else:
            made = self.marks[name] = lasting[name] = self.kinds.mark(self.specs[name], known, lasting=True)
        return made

    def meet(self, sort: Sort, key: tuple[int, ...]) -> None:
        """Place a node that is like none before."""
        node, op, specs, known = sort.node, sort.op, self.specs, self.known
        ins = self.shared([specs[i] if i else None for i in node.inputs])
        values = tuple([known.get(i) for i in node.inputs])
        site = self.site(node, sort, ins, values, ())
        if op.values:
            unknown = [node.inputs[i] for i in op.values if site.has(i) and site.value(i) is None]
            if unknown:
                self.waits.update(dict.fromkeys(unknown))
                self.block(node)
                return
        expansion = op.expand(site) if op.expand else None
        if expansion is not None:
            self.define(expansion.constants)
            self.visit(
                replace(n, opset=node.opset) if n.domain == node.domain and n.opset != node.opset else n
                for n in expansion.nodes
            )
            return
        inferred = tuple(op.infer(site))
        if len(node.outputs) > len(inferred) and any(node.outputs[len(inferred) :]):
            raise site.fail(f"it has {len(node.outputs)} outputs, {op.qualified} gives {len(inferred)}")
        outs = self.shared([self.interned(s) for s in inferred if s is not None and s.dtype.kind != "O"])
        if len(outs) == len(inferred):
            site.outs = outs
        complete = is_known(op, site)
        if complete and may_fold(op, site, inferred, self.budget):
            self.fold(op, site, site.values, key)
        elif len(outs) != len(inferred):
            self.later(sort)
        elif op.shapes_only:
            self.fold(
                op, site, [None if s is None else np.broadcast_to(np.zeros((), s.dtype), s.dims) for s in site.ins], key
            )
        else:
            self.placed.append(Placed(op, site))
            marks = tuple([self.kinds.mark(s) for s in outs])
            for name, spec, mark in zip(node.outputs, outs, marks, strict=False):
                if name:
                    specs[name], self.marks[name] = spec, mark
            if not complete and are_exact([site.value(i) for i in op.values]):
                site.alike = Alike(ins, outs, marks)
                self.kinds.add(key, site.alike)

    def later(self, sort: Sort) -> None:
        """The node runs between two segments."""
        node = sort.node
        self.eager.append(Eager(sort.op, node, sort.opset))
        self.block(node, keep=False)
        self.pending.update(o for o in node.outputs if o)

    def fold(self, op: Op, site: Site, values: Sequence[HostArray | None], key: tuple[int, ...]) -> None:
        made = tuple(map(constant, op.outputs(np, site, values)))
        for name, array in zip(site.node.outputs, made, strict=False):
            if name:
                self.define({name: array})
                if array.dtype == object:
                    self.objects.add(name)
                self.budget -= array.nbytes
        small = all(a.size <= SMALL and a.dtype.kind != "O" for a in made)
        if (
            small
            and op.repeats(site.node)
            and len(made) == len(site.node.outputs)
            and all(site.node.outputs)
            and are_exact(site.values)
        ):
            outs = tuple([self.specs[o] for o in site.node.outputs])
            marks = tuple([self.kinds.mark(s, a) for s, a in zip(outs, made, strict=True)])
            self.marks.update(zip(site.node.outputs, marks, strict=True))
            self.kinds.add(key, Alike(site.ins, outs, marks, made))


def is_known(op: Op, site: Site) -> bool:
    """Whether the outputs can be computed while planning."""
    return op.pure and all(v is not None or s is None for s, v in zip(site.ins, site.values, strict=True))


def specialize(
    nodes: Iterable[Node],
    *,
    specs: Mapping[str, ValueSpec],
    known: Known,
    outputs: Iterable[str],
    alike: AlikeNodes,
    batch_invariant: bool = False,
    tuned: Tuned | None = None,
    tf32: bool = False,
) -> Segment:
    """The next segment.

    `specs` are the specs of the values that enter, static ones of tensors, `known` initialisers and
    values read from earlier segments, `outputs` the graph's outputs that no earlier segment has made. Raises PlanError
    naming the node that does not fit.
    """
    entering = {k: s for k, s in specs.items() if isinstance(s, TensorSpec) and is_plain(s)}
    walk = _Walk(
        alike,
        known,
        {**entering, **known.specs},
        dict(known.arrays),
        {k for k in specs if k not in entering} | known.strings,
        {"": LEFT_OUT, **(known.marks or {})},
        budget=known.budget,
        batch_invariant=batch_invariant,
        tuned=tuned,
        tf32=tf32,
    )
    with np.errstate(all="ignore"):  # of what is folded
        walk.visit(nodes)
    if walk.rest and not walk.waits and not walk.eager:
        raise PlanError(f"{walk.rest[0]}: cannot be planned, yet nothing that a run would tell is missing")

    later = {v for n in (*walk.rest, *(e.node for e in walk.eager)) for v in n.reads}
    wanted = {*outputs, *walk.waits, *later} - walk.blocked
    live = prune(walk.placed, wanted)
    made = {o for p in live for o in p.site.node.outputs}
    reads = {i for p in live for i in p.site.node.inputs} | wanted
    return Segment(
        nodes=tuple(live),
        inputs={k: s for k, s in entering.items() if k in reads and k not in walk.known},
        outputs=tuple(sorted(v for v in wanted - walk.objects if v in made or v in entering or v in walk.known)),
        specs=walk.specs,
        constants={k: v for k, v in walk.known.items() if k in reads},
        waits=tuple(walk.waits),
        eager=tuple(walk.eager),
        rest=tuple(walk.rest),
        objects=tuple(o for o in outputs if o in walk.objects and o not in walk.blocked),
    )


def prune(placed: Sequence[Placed], wanted: Iterable[str]) -> list[Placed]:
    """The nodes that `wanted` values need, in order."""
    needed, live = set(wanted), []
    needed.discard("")
    for p in reversed(placed):
        node = p.site.node
        if not needed.isdisjoint(node.outputs):
            live.append(p)
            needed.update(node.inputs)
            needed.discard("")
    return live[::-1]
