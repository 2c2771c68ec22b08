"""One node at concrete shapes: what rules for shapes, choices and kernels look at."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from infera_gpu.errors import PlanError
from infera_gpu.graph import Attrs, HostArray, Node
from infera_gpu.spec import TensorSpec, ValueSpec

if TYPE_CHECKING:
    from infera_kernels.tuning import Tuned

T = TypeVar("T")


class Alike:
    """What nodes have in common that planning need not tell apart: operator, attributes, specs, small constants.

    Their names differ, and the elements of large floating-point constants. `made` are the outputs of a node that is
    computed while planning, of `nbytes`; None of others. `marks` are those of its outputs, see `alike`.
    """

    __slots__ = ("ins", "made", "marks", "nbytes", "outs", "told")

    def __init__(
        self,
        ins: tuple[TensorSpec | None, ...],
        outs: tuple[TensorSpec, ...],
        marks: tuple[int, ...],
        made: tuple[HostArray, ...] | None = None,
    ) -> None:
        self.ins, self.outs, self.marks, self.made = ins, outs, marks, made
        self.nbytes = 0 if made is None else sum([a.nbytes for a in made])
        self.told: dict[Hashable, Any] = {}
        """What sites were told, see Site.told."""


TOLD = 64
"""Answers that are remembered of alike nodes: memory may lie in many ways."""

_UNTOLD: Any = object()


@dataclass(slots=True, eq=False)
class Site:
    """One node at concrete shapes: everything a kernel may know while planning. Nobody changes one whose `outs` are
    known.

    `attrs` has the operator's defaults filled in. `ins[i]` is None where an optional input is left out or is no tensor,
    and `values[i]` is input i's value where it is known before the run (an initialiser, or folded), else None. When a
    node runs on the host between two plans all its values are known, and its subgraphs are callables: see `Subgraph`.
    `batch_invariant` says that a kernel must not add in an order that depends on the size of the batch;
    `tuned` is what tiles were measured best on the device, where there is a GPU; `tf32` says that products of float32
    may round their operands there.
    """

    node: Node
    attrs: Attrs
    ins: tuple[TensorSpec | None, ...]
    values: tuple[HostArray | None, ...]
    outs: tuple[TensorSpec, ...] = ()
    opset: int = 0
    batch_invariant: bool = False
    tuned: Tuned | None = None
    tf32: bool = False
    alike: Alike | None = field(default=None, init=False, repr=False)
    """What it has in common with others, where that is known."""
    _found: dict[Hashable, Any] | None = field(default=None, init=False, repr=False)

    def giving(self, outs: tuple[TensorSpec, ...]) -> Site:
        """The same site with these outputs, and with what was found `once`."""
        if self._found is None:
            self._found = {}
        told = self.batch_invariant, self.tuned, self.tf32
        made = Site(self.node, self.attrs, self.ins, self.values, outs, self.opset, *told)
        made._found = self._found
        return made

    def once(self, key: Hashable, build: Callable[[], T]) -> T:
        """`build()`, which may look at everything but `outs`, remembered under `key`.

        Rules for shapes, expansions, choices of kernels and kernels ask the same questions, and a plan is made while a
        user waits.
        """
        found = self._found
        if found is None:
            found = self._found = {}
        if key not in found:
            found[key] = build()
        made: T = found[key]
        return made

    def told(self, key: Hashable, ask: Callable[[Site], T]) -> T:
        """`ask(site)`, asked once for all sites that are alike, and remembered under `key`.

        Plain data, which depends on nothing in which alike nodes differ.
        """
        if self.alike is None:
            return ask(self)
        told = self.alike.told
        found = told.get(key, _UNTOLD)
        if found is _UNTOLD:
            if len(told) >= TOLD:
                told.clear()
            found = told[key] = ask(self)
        made: T = found
        return made

    def forget(self) -> None:
        """Drop what was found `once`: when a plan is bound nobody asks any more."""
        self._found = None

    def has(self, i: int) -> bool:
        """Whether input i is present."""
        return i < len(self.ins) and self.ins[i] is not None

    def spec(self, i: int) -> TensorSpec:
        """Input i's spec. Raises PlanError where it is left out."""
        ins = self.ins
        spec = ins[i] if i < len(ins) else None
        if spec is None:
            raise PlanError(f"{self.node}: input {i} is required")
        return spec

    def value(self, i: int) -> HostArray | None:
        """Input i's value where it is known before the run."""
        return self.values[i] if i < len(self.values) else None

    def ints(self, i: int) -> tuple[int, ...] | None:
        """Input i's value as a tuple of integers, None where it is left out. Raises PlanError where it is unknown."""
        if not self.has(i):
            return None
        value = self.value(i)
        if value is None:
            raise PlanError(f"{self.node}: input {i} ('{self.node.inputs[i]}') must be known while planning")
        if value.dtype.kind not in "iu":
            raise PlanError(f"{self.node}: input {i} is {self.ins[i]}, expected integers")
        return tuple(int(v) for v in np.asarray(value).reshape(-1))

    def axis(self, name: str = "axis", rank: int | None = None) -> int:
        """Attribute `name` as a non-negative axis. Raises PlanError where it is out of range."""
        n = self.spec(0).ndim if rank is None else rank
        axis = int(self.attrs[name])
        if not -n <= axis < max(n, 1):
            raise PlanError(f"{self.node}: axis {axis} out of range for {self.spec(0)}")
        return axis % n if n else 0

    def fail(self, problem: str) -> PlanError:
        """An error that names this node."""
        return PlanError(f"{self.node}: {problem}")


class Subgraph(Protocol):
    """What a host operator finds in place of an attribute that is a graph: calling it runs the graph once.

    Values that the graph captures are supplied. `inputs` and `outputs` are the specs that the graph declares.
    """

    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]

    def __call__(self, *values: Any) -> list[Any]: ...
