"""What an operator is: one declaration from which planning, tests, the support table and benchmarks derive.

An `Op` says what goes in and out (`infer`), how to compute it plainly (`compute`, the reference), how to compute it
fast (`kernels`, by kind) and on what examples that must hold (`cases`). What a declaration needs beside `Op` (`Site`,
`Kernel`, `Buffers`) is imported from here as well. Nothing here imports a device library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, overload

import numpy as np

from infera_gpu.errors import PlanError
from infera_gpu.graph import Attrs, HostArray, Node, T, lazy
from infera_gpu.kernel import Bind as Bind
from infera_gpu.kernel import Border as Border
from infera_gpu.kernel import Buffers as Buffers
from infera_gpu.kernel import Call as Call
from infera_gpu.kernel import Kernel as Kernel
from infera_gpu.kernel import Launcher as Launcher
from infera_gpu.site import Site as Site
from infera_gpu.site import Subgraph as Subgraph
from infera_gpu.spec import Array, DType, TensorSpec, broadcast_shape

_F32 = np.dtype(np.float32)


class Required:
    """Marks an attribute without a default."""


REQUIRED = Required()


@dataclass(frozen=True, slots=True)
class Case:
    """One example of an operator: a spec (random values), an array, a sequence of arrays, a map, or None an input.

    Attributes that are graphs are `GraphText`.

    `tol` bounds |got - want| relative to the largest |want|. `low` and `high` bound random values.
    """

    id: str
    ins: tuple[TensorSpec | HostArray | list[HostArray] | dict[Any, Any] | None, ...]
    attrs: Attrs = field(default_factory=dict)
    n_outs: int = 1
    tol: float = 1e-5
    low: float = -2.0
    high: float = 2.0
    opset: int | None = None


class Later(Sequence[T]):
    """What `make` gives, made when somebody looks at it."""

    def __init__(self, make: Callable[[], Iterable[T]]) -> None:
        self._make = make

    @lazy
    def _made(self) -> tuple[T, ...]:
        return tuple(self._make())

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[T, ...]: ...

    def __getitem__(self, at: int | slice) -> T | tuple[T, ...]:
        return self._made[at]

    def __len__(self) -> int:
        return len(self._made)


class Cases(Later[Case]):
    """Cases that are made when somebody looks at them: loading a model does not."""


@dataclass(frozen=True, slots=True)
class GraphText:
    """A graph in ONNX's text syntax: an attribute of a case."""

    text: str


def f32(*shape: int) -> TensorSpec:
    """A float32 spec, for cases."""
    return TensorSpec(shape, _F32)


@dataclass(frozen=True, slots=True)
class Expansion:
    """Nodes that stand for one node, and the constants that they use."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, HostArray] = field(default_factory=dict)


Infer: TypeAlias = Callable[[Site], Sequence[TensorSpec | None]]
Compute: TypeAlias = Callable[..., Array | Sequence[Array]]


@dataclass(frozen=True)
class Op:
    """An operator from opset `since` on.

    `infer(site)` gives the output specs; None for a spec means that its shape depends on data, and the node then ends a
    plan segment. `compute(xp, site, *ins)` returns the output array, or a sequence of them: plain, correct, free to
    allocate; it folds constants, runs on NumPy (and on CuPy where `portable`) when no kernel supports a site, and is
    what kernels are tested against. `values` lists the inputs whose values `infer` needs. Neither `infer`
    nor whether `expand` gives something depends on names or on the elements of other large floating-point constants:
    of nodes that differ in nothing else one is asked. `view(x, site)` makes output
    0 a view of input 0 wherever strides allow; a tuple of views where there are more outputs. `windows(y, site)` says,
    of an operator that only joins its inputs, where each lies in output 0. `attrs` maps every attribute to its default
    or REQUIRED. `expand(site)` gives the nodes that do the same where the operator does not cover a site: a fused
    operator whose residual turns out to broadcast becomes its parts again. A `pure` operator gives the same outputs for
    the same inputs, except where `draws(node)` says that the node may become one that does not; `shapes_only` says that
    its outputs depend on the specs of its inputs alone (Shape, Size), so that planning computes it without data. A
    `host` operator works on what no arena holds (sequences, maps, strings, subgraphs): it runs on the host between two
    plans, `compute(numpy, site, *values)` gets and returns values of any kind, a sequence of outputs as a tuple, and
    `infer` is not asked for what a run will tell.
    """

    name: str
    since: int
    infer: Infer
    compute: Compute
    cases: Sequence[Case]
    attrs: Attrs = field(default_factory=dict)
    domain: str = ""
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    values: tuple[int, ...] = ()
    view: Callable[[Array, Site], Array | tuple[Array, ...]] | None = None
    windows: Callable[[Array, Site], Sequence[Array]] | None = None
    expand: Callable[[Site], Expansion | None] | None = None
    portable: bool = True
    pure: bool = True
    draws: Callable[[Node], bool] | None = None
    shapes_only: bool = False
    host: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.cases, Cases) and not self.cases:
            raise ValueError(f"{self.qualified}: an operator needs at least one Case")

    @property
    def qualified(self) -> str:
        return f"{self.domain + '.' if self.domain else ''}{self.name}-{self.since}"

    def repeats(self, node: Node) -> bool:
        """Whether the node gives the same outputs for the same inputs in every run."""
        return self.pure and not (self.draws is not None and self.draws(node))

    def fill(self, node: Node) -> Attrs:
        """The node's attributes with defaults, remembered with it. Raises PlanError for an unknown or a missing one."""
        filled: tuple[Op, Attrs] | None = node.__dict__.get("_filled")
        if filled is None or filled[0] is not self:
            filled = node.__dict__["_filled"] = (self, self._fill(node))
        return filled[1]

    def _fill(self, node: Node) -> Attrs:
        given = node.attrs.keys()
        if not given <= self.attrs.keys():
            unknown = next(k for k in given if k not in self.attrs)
            raise PlanError(
                f"{node}: unknown attribute '{unknown}'; {self.qualified} has {', '.join(self.attrs) or 'none'}"
            )
        if not given >= self._required:
            missing = next(k for k in self.attrs if k in self._required - given)
            raise PlanError(f"{node}: attribute '{missing}' is required")
        return {**self.attrs, **node.attrs}

    @cached_property
    def _required(self) -> frozenset[str]:
        return frozenset(k for k, v in self.attrs.items() if v is REQUIRED)

    def outputs(self, xp: Any, site: Site, ins: Sequence[Array]) -> tuple[Array, ...]:
        """`compute`, as a tuple; where all outputs are known to be empty there is nothing to compute."""
        if site.outs and not any(s.size for s in site.outs):
            return tuple(xp.empty(s.dims, s.dtype) for s in site.outs)
        made = self.compute(xp, site, *ins)
        return tuple(made) if isinstance(made, tuple if self.host else (tuple, list)) else (made,)


class Registry:
    """Operators by domain and name; the newest `since` not above the model's opset wins."""

    def __init__(self, ops: Iterable[Op] = ()) -> None:
        self._ops: dict[tuple[str, str], list[Op]] = {}
        self._found: dict[tuple[str, str, int], Op] = {}
        self.add(ops)

    def add(self, ops: Iterable[Op]) -> None:
        """More operators, of names that nobody has looked up yet. Raises ValueError where one is there already."""
        for op in ops:
            versions = self._ops.setdefault((op.domain, op.name), [])
            if any(o.since == op.since for o in versions):
                raise ValueError(f"{op.qualified} is declared twice")
            versions.append(op)
            versions.sort(key=lambda o: o.since)

    def find(self, domain: str, name: str, opset: int) -> Op | None:
        """The declaration for this opset, or None."""
        key = (domain, name, opset)
        found = self._found.get(key)
        if found is None:  # names come from files: those of no operator are not remembered
            found = next((o for o in reversed(self._versions(domain, name)) if o.since <= opset), None)
            if found is not None:
                self._found[key] = found
        return found

    def _versions(self, domain: str, name: str) -> list[Op]:
        """Declarations of a name, the oldest first."""
        return self._ops.get((domain, name), [])

    def __iter__(self) -> Iterator[Op]:
        return (o for versions in self._ops.values() for o in versions)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({o.qualified.rsplit("-", 1)[0] for o in self}))


# Shape rules that many operators share.


def same_as(i: int = 0, dtype: DType | None = None) -> Infer:
    """Output 0 has input i's shape, and its dtype unless another is given."""

    def infer(site: Site) -> Sequence[TensorSpec]:
        spec = site.spec(i)
        return (TensorSpec(spec.shape, spec.dtype if dtype is None else dtype),)

    return infer


def broadcast(dtype: DType | None = None, *, mixed: bool = False) -> Infer:
    """Output 0 has the broadcast shape of all present inputs and the last one's dtype unless another is given.

    Raises PlanError where there is no such shape or, unless `mixed`, where the inputs' dtypes differ.
    """

    def infer(site: Site) -> Sequence[TensorSpec]:
        present = [s for s in site.ins if s is not None]
        if not present:
            raise site.fail("at least one input is required")
        if not mixed and len({s.dtype for s in present}) > 1:
            raise site.fail(f"inputs {', '.join(map(str, present))} differ in type; expected one type, Cast the others")
        shape = present[0].dims
        if any(s.dims != shape for s in present):
            try:
                shape = broadcast_shape(*[s.dims for s in present])
            except ValueError:
                raise site.fail(f"shapes {', '.join(map(str, present))} do not broadcast") from None
        return (TensorSpec(shape, present[-1].dtype if dtype is None else dtype),)

    return infer
