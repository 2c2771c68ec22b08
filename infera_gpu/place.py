"""Steps whose operands lie in blocks of memory -> Plan: every block gets its offset in an arena."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space
from infera_gpu.memory import Request, aligned, plan_arena
from infera_gpu.plan import Packed, Plan, Step, capturable, packed
from infera_gpu.specialize import Segment


@dataclass(slots=True)
class Root:
    """A block of memory that is needed on steps [begin, end).

    `fixed` is where it lies already. `last_read` is the last node that reads any value in it, `rank` that of the last
    later segment's reading: see memory.Request.
    """

    space: Space
    nbytes: int
    begin: int
    end: int
    fixed: int | None = None
    last_read: int = -1
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Lowered:
    """A segment's steps over operands that count from the start of their root."""

    device: str
    concurrency: str
    captures: bool
    stages: bool
    segment: Segment
    steps: Sequence[Step]
    roots: Mapping[str, Root]
    direct: frozenset[str]
    entering: Mapping[str, Operand]
    outputs: Mapping[str, Operand]
    saved: Mapping[str, int]
    bordered: int


def requests(roots: Mapping[str, Root], space: Space) -> list[Request]:
    """What the planner is asked to place in `space`."""
    return [Request(k, r.nbytes, r.begin, r.end, r.rank) for k, r in roots.items() if r.space == space]


def place(lowered: Lowered, carried: Collection[str]) -> Plan:
    """The plan. `carried` are the entering values that earlier segments left in the arena."""
    roots = lowered.roots
    arenas: dict[Space, int] = {}
    bounds: dict[Space, int] = {}
    offsets: dict[str, int] = {}
    fixed = {k: r.fixed for k, r in roots.items() if r.fixed is not None}
    spaces: tuple[Space, ...] = ("host", "device")
    for space in spaces:
        wanted = requests(roots, space)
        if wanted:
            arena = plan_arena(wanted, {r.value: fixed[r.value] for r in wanted if r.value in fixed})
            arenas[space], bounds[space] = arena.nbytes, arena.lower_bound
            offsets.update(arena.offsets)

    def absolute(o: Operand) -> Operand:
        return o if o.constant else o.moved(offsets.get(o.root, 0))

    def fields(o: Operand) -> Packed:
        return tuple(o) if o.constant else (*o[:5], o.offset + offsets.get(o.root, 0), False)

    numbers = {id(p): i for i, p in enumerate(lowered.segment.nodes)}
    steps = [packed(s, numbers.get(id(s.placed)), fields) for s in lowered.steps]
    entering = {v: absolute(o) for v, o in lowered.entering.items()}
    inputs = {v: o for v, o in entering.items() if v not in carried}
    outputs = {v: absolute(o) for v, o in lowered.outputs.items()}
    travelling = (*inputs.values(), *outputs.values()) if lowered.stages else ()
    return Plan(
        device=lowered.device,
        concurrency=lowered.concurrency,
        segment=lowered.segment,
        packed=tuple(steps),
        inputs=inputs,
        carried={v: o for v, o in entering.items() if v in carried},
        outputs=outputs,
        constants={k: _dense(a) for k, a in lowered.segment.constants.items()},
        arenas=arenas,
        lower_bounds=bounds,
        placed=tuple(
            [(k, r.space, offsets[k], aligned(r.nbytes), r.begin, r.end) for k, r in roots.items() if k in offsets]
        ),
        saved=lowered.saved,
        direct=lowered.direct,
        bordered=lowered.bordered,
        graphs=capturable(lowered.steps) if lowered.captures else None,
        staging=sum(aligned(o.nbytes) for o in travelling),
    )


def _dense(array: HostArray) -> HostArray:
    """A constant as kernels expect it; folding may have left a broadcast view."""
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)
