"""The executable: steps over operands whose places are fixed. Printable, and free of any decision at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from infera_gpu import between
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand, Space, operand_of
from infera_gpu.op import Kernel
from infera_gpu.printable import printable
from infera_gpu.recipe import Written
from infera_gpu.specialize import Placed, Segment

StepKind: TypeAlias = Literal["kernel", "compute", "copy", "upload", "download"]


class Step(NamedTuple):
    """One thing to do. Its operands are absolute; `workspace` is scratch of its own in the same space.

    `kind` is "kernel" (a bound fast kernel), "compute" (the operator's plain function, which allocates), "copy" (to
    make a strided value contiguous), or a transfer between host and device. `parts` of it run at the same time.
    """

    kind: StepKind
    label: str
    via: str
    ins: tuple[Operand | None, ...]
    outs: tuple[Operand, ...]
    space: Space
    placed: Placed | None = None
    kernel: Kernel | None = None
    workspace: Operand | None = None
    parts: int = 1

    def __repr__(self) -> str:
        return f"<{self.label} via {self.how}>"

    @property
    def how(self) -> str:
        """`via`, and into how many parts it is split."""
        return f"{self.via} x{self.parts}" if self.parts > 1 else self.via

    @property
    def uncapturable(self) -> str:
        """Why no CUDA graph can hold the step; empty where one can."""
        if self.kind in ("upload", "download"):
            return "copies to the host" if self.kind == "download" else "copies to the device"
        if self.space == "host":
            return "runs on the host"
        return "allocates" if self.allocates else ""

    @property
    def allocates(self) -> bool:
        return self.kind == "compute" or (self.kernel is not None and self.kernel.allocates)


Packed: TypeAlias = tuple[Any, ...]
"""The fields of a Step as exact tuples, strings and numbers: its operands as plain tuples, `placed` as a number among
the segment's nodes; what names the kernel, the operator's of the kind `via`, is left out."""


def packed(step: Step, number: int | None, operand: Callable[[Operand], Packed]) -> Packed:
    """The step, `number` being that of its node and `operand` what packs its operands."""
    return (
        step.kind,
        step.label,
        step.via,
        tuple([o and operand(o) for o in step.ins]),
        tuple([operand(o) for o in step.outs]),
        step.space,
        number,
        step.workspace and operand(step.workspace),
        step.parts,
    )


def unpacked(fields: Packed, nodes: Sequence[Placed]) -> Step:
    """The step that was `packed`."""
    kind, label, via, ins, outs, space, number, workspace, parts = fields
    placed = None if number is None else nodes[number]
    kernel = placed.op.kernels[via] if placed is not None and kind == "kernel" else None
    return Step(
        kind,
        label,
        via,
        tuple([o and operand_of(o) for o in ins]),
        tuple([operand_of(o) for o in outs]),
        space,
        placed,
        kernel,
        workspace and operand_of(workspace),
        parts,
    )


def capturable(steps: Sequence[Step]) -> tuple[range, ...]:
    """The steps that CUDA graphs can hold: ranges, as long as possible, of two or more."""
    edges = [-1, *(i for i, s in enumerate(steps) if s.uncapturable), len(steps)]
    return tuple([range(a + 1, b) for a, b in pairwise(edges) if b - a > 2])


ALONE = "alone: a graph of one step saves little"


def uncaptured(steps: Sequence[Step], graphs: Sequence[range]) -> list[str]:
    """For each step why it is in none of the graphs; empty where it is in one."""
    held = {i for span in graphs for i in span}
    return ["" if i in held else step.uncapturable or ALONE for i, step in enumerate(steps)]


Where: TypeAlias = Space | Literal["staging"]
"""A memory space, or the page-locked memory of the host through which inputs and outputs travel."""


class Block(NamedTuple):
    """A piece of an arena and the steps [begin, end) on which what lies in it is needed."""

    name: str
    space: Space
    offset: int
    nbytes: int
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A segment made executable on one device.

    `inputs` are uploaded before the steps and `outputs` are where results lie after them; `direct` are inputs that
    steps only copy, and that have no place of their own. `arenas` gives the bytes of each memory space, `lower_bounds`
    the most bytes alive at one step: no plan can need less. `packed` are the fields of `steps`, and `placed` those of
    `blocks`, which say what lies where and when: Python's garbage collection passes by plain tuples, and there are many
    plans. `saved` are bytes of values that need no memory of their own: "as views" of others, computed "in place" of an
    input, or written "into slots" of the value that joins them; `bordered` values lie within the border that their
    readers want, which saves these a copy. `concurrency` is how many threads there are for the steps' parts, and why.
    `graphs` are the steps that CUDA graphs hold, each captured once and replayed from then on; None where nothing is
    captured. `staging` is how much page-locked host memory inputs and outputs take on their way to and from a GPU.
    `recipe` is how steps are bound without their kernels, where the plan was kept with it.
    """

    device: str
    concurrency: str
    segment: Segment
    packed: Sequence[Packed]
    inputs: Mapping[str, Operand]
    carried: Mapping[str, Operand]
    outputs: Mapping[str, Operand]
    constants: Mapping[str, HostArray]
    arenas: Mapping[Space, int]
    lower_bounds: Mapping[Space, int]
    placed: Sequence[tuple[str, Space, int, int, int, int]]
    saved: Mapping[str, int]
    direct: frozenset[str] = frozenset()
    bordered: int = 0
    graphs: tuple[range, ...] | None = None
    staging: int = 0
    recipe: Written | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple([unpacked(fields, self.segment.nodes) for fields in self.packed])

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(map(Block._make, self.placed))

    @property
    def arena_bytes(self) -> int:
        return sum(self.arenas.values())

    @cached_property
    def memory(self) -> Mapping[Where, int]:
        """Bytes of all that the plan needs an arena of: each memory space, and page-locked memory for what travels."""
        sizes = cast(Mapping[Where, int], self.arenas)
        return {**sizes, "staging": self.staging} if self.staging else sizes

    @cached_property  # each run asks
    def nbytes(self) -> int:
        """Of all arenas, and of what travels."""
        return self.arena_bytes + self.staging

    @cached_property  # runs ask
    def only_launches(self) -> bool:
        """Whether no step allocates, or touches the host, nor reading an output does: each is in one piece."""
        dense = all(o.is_contiguous for o in self.outputs.values())
        return dense and not any(step.uncapturable for step in self.steps)

    @property
    def lower_bound(self) -> int:
        return sum(self.lower_bounds.values())

    @property
    def transfers(self) -> tuple[Step, ...]:
        """The copies between host and device inside the plan."""
        return tuple(s for s in self.steps if s.kind in ("upload", "download"))

    def __str__(self) -> str:
        return "\n".join([self.headline, *table(rows(self))])

    def __repr__(self) -> str:
        """The same: what a notebook shows of a plan. Its fields would be megabytes of text."""
        return str(self)

    @property
    def headline(self) -> str:
        ins = ", ".join(f"{printable(k)} {_spec(o)}" for k, o in {**self.inputs, **self.carried}.items())
        after = between.summary(self.segment, self.outputs)
        text = (
            f"plan on {self.device}{self._threads}: {ins or 'no inputs'}\n"
            f"{len(self.packed)} steps, {len(self.transfers)} transfers{', then ' if after else ''}{after}, "
            f"arena {self.arena_bytes:,} bytes"
        )
        if self.lower_bound:
            text += f" (lower bound {self.lower_bound:,}, {self.arena_bytes / self.lower_bound:.3f} of it)"
        if any(self.saved.values()):
            text += "\nbytes without memory of their own: " + ", ".join(
                f"{nbytes:,} {how}" for how, nbytes in self.saved.items() if nbytes
            )
        if self.bordered:
            text += f"\nvalues within the border that their readers want: {self.bordered}"
        if self.graphs is not None:
            held = sum(map(len, self.graphs))
            text += f"\n{held} of {len(self.packed)} steps in {len(self.graphs)} CUDA graphs"
        if not self.segment.is_last:
            why = ", ".join([f"'{w}'" for w in self.segment.waits] + [str(e.node) for e in self.segment.eager])
            text += f"\nthe rest is planned when known: {printable(why)}"
        return text

    @property
    def _threads(self) -> str:
        split = sum(s.parts > 1 for s in self.steps)
        return f", {self.concurrency}, {split or 'no'} steps in parts" if self.concurrency else ""


def _spec(o: Operand) -> str:
    return f"{o.dtype.name}[{', '.join(map(str, o.shape))}]"


HEADER = ("#", "step", "via", "output", "at", "bytes", "scratch")


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """The plan as rows of text under HEADER, with what runs behind its steps; that has no number. Control characters in
    names are shown."""
    found: list[tuple[str, ...]] = []
    steps = plan.steps
    if plan.graphs is None:
        notes = ["allocates" if s.allocates else "" for s in steps]
    else:
        notes = uncaptured(steps, plan.graphs)
    for i, (s, note) in enumerate(zip(steps, notes, strict=True)):
        out = s.outs[0]
        in_place = any(o is not None and not o.constant and o.offset == out.offset for o in s.ins)
        found.append(
            (
                str(i),
                printable(s.label),
                s.how + (f" ({note})" if note else ""),
                _spec(out),
                f"{out.offset:,}" + (" in place" if in_place and out.nbytes else ""),
                f"{out.nbytes:,}",
                f"{s.workspace.nbytes:,}" if s.workspace else "",
            )
        )
    after = between.places(plan.segment, plan.outputs, copies="device" in plan.arenas)
    return found + [("", printable(name), where, "", "", "", "") for name, where in after]


def table(body: list[tuple[str, ...]]) -> list[str]:
    """Aligned lines with a header."""
    lines = [HEADER, *body]
    widths = [max(len(line[c]) for line in lines) for c in range(len(HEADER))]
    right = {0, 4, 5, 6}
    return [
        "  ".join(
            cell.rjust(w) if c in right else cell.ljust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
