"""What an operator is: one declaration from which planning, tests, the support table and benchmarks derive.

An `Op` says what goes in and out (`infer`), how to compute it plainly (`compute`, the reference), how to compute it
fast (`kernels`, by kind) and on what examples that must hold (`cases`). Nothing here imports a device library.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, overload

import numpy as np

from infera_gpu.errors import PlanError
from infera_gpu.graph import Attrs, HostArray, Node, lazy
from infera_gpu.spec import Array, DType, TensorSpec, ValueSpec, broadcast_shape

if TYPE_CHECKING:
    from infera_kernels.tuning import Tuned

Call: TypeAlias = tuple[Callable[..., object], tuple[Any, ...]]
"""A step of a bound kernel, everything decided. A plan's hot loop is `for fn, args in calls: fn(*args)`."""


_F32 = np.dtype(np.float32)
T = TypeVar("T")


class Required:
    """Marks an attribute without a default."""


REQUIRED = Required()


@dataclass(slots=True, eq=False)
class Site:
    """One node at concrete shapes: everything a kernel may know while planning. Nobody changes one whose `outs` are
    known.

    `attrs` has the operator's defaults filled in. `ins[i]` is None where an optional input is left out or is no tensor,
    and `values[i]` is input i's value where it is known before the run (an initialiser, or folded), else None. When a
    node runs on the host between two plans all its values are known, and its subgraphs are callables: see `Subgraph`.
    `batch_invariant` says that a kernel must not add in an order that depends on the size of the batch;
    `tuned` is what tiles were measured best on the device, where there is a GPU.
    """

    node: Node
    attrs: Attrs
    ins: tuple[TensorSpec | None, ...]
    values: tuple[HostArray | None, ...]
    outs: tuple[TensorSpec, ...] = ()
    opset: int = 0
    batch_invariant: bool = False
    tuned: Tuned | None = None
    _found: dict[Hashable, Any] | None = field(default=None, init=False, repr=False)

    def giving(self, outs: tuple[TensorSpec, ...]) -> Site:
        """The same site with these outputs, and with what was found `once`."""
        if self._found is None:
            self._found = {}
        made = Site(self.node, self.attrs, self.ins, self.values, outs, self.opset, self.batch_invariant, self.tuned)
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


class Launcher(Protocol):
    """Turns a Triton kernel and its arguments into a Call; see infera_kernels.launch."""

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        **options: Any,
    ) -> Call: ...


class Buffers(Protocol):
    """The arrays that a kernel is bound to, and what it may ask for while binding."""

    outs: tuple[Array, ...]
    """Uninitialised; contiguous unless the kernel says `strided_out`."""
    xp: Any
    """numpy or cupy"""

    threads: int
    """Into how many parts a kernel on the CPU may split its work; 1 elsewhere."""
    least_ns: float
    """Nanoseconds of work below which such a part is not worth what it costs to hand it over."""
    strict: bool
    """Whether to keep to the order of operations that the model writes, as far as BLAS does: no Winograd."""
    tf32: bool
    """Whether products of float32 on a GPU may round their operands to 10 bits, for its tensor cores."""

    @property
    def ins(self) -> Sequence[Array]:
        """None where an input is left out; contiguous unless the kernel says `strided`.

        A constant is brought to the device when it is asked for: who packs one leaves it alone.
        """
        ...

    @property
    def launcher(self) -> Launcher: ...

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        """The calls that make those of every part, at most `threads` of them at the same time, and then go on.

        Parts must not touch each other's outputs or scratch. Their scratch has been asked for by now: while planning
        nobody looks at their calls, which may be made one by one.
        """
        ...

    def scratch(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        """A workspace array, alive only while this node runs. What is asked for here is planned into the arena."""
        ...

    def pack(self, i: int, tag: str, build: Callable[[HostArray], HostArray]) -> Array:
        """`build(value of input i)`, made once a session and shared by all its plans. Input i must be constant."""
        ...

    def constant(self, value: HostArray) -> Array:
        """`value`, small and made while binding, where the calls find it; it lives as long as they do."""
        ...


Bind: TypeAlias = Callable[[Site, Buffers], Sequence[Call]]

Border: TypeAlias = tuple[tuple[int, int], ...]
"""Elements before and after a value, along each of its axes."""


def _always(site: Site) -> bool:
    return True


def _never(site: Site) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Kernel:
    """A fast implementation. `bind` is called once while planning and returns the calls of every run.

    The calls write every element of `io.outs`, and allocate nothing: temporaries come from `io.scratch`, ufuncs get
    `out=`. `inplace` lists the inputs whose memory output 0 may take over (same shape and dtype). A kernel that is not
    `strided` gets contiguous inputs, and one that is not `strided_out` contiguous outputs. `border(site)` is what a
    kernel wants around input 0 to read it without a copy: `io.ins[0]` may then be larger than the site says by that
    much, contiguous all the same, and the kernel sets the border before it reads it. Where `rows_out(site)` a kernel
    that is not `strided_out` writes an output that lies within a border, its last two axes contiguous, as fast as any
    other; where `strided_in(site)` one that is not `strided` reads input 0 at any strides as fast. `workspace` gives
    the bytes of scratch; None measures them by binding once on host dummies. A site that it `supports` where it does
    not `pay` goes to a kernel of a later kind, if one supports it. What is asked for may depend on the attributes, on
    shapes, strides and types, on small constants and on those of integers, but not on the elements of a large
    floating-point constant: nodes that differ in nothing else are measured once. `allocates` marks a kernel that does
    allocate, which `inspect` shows.
    """

    bind: Bind
    supports: Callable[[Site], bool] = _always
    workspace: Callable[[Site], int] | None = None
    inplace: tuple[int, ...] = ()
    strided: bool = False
    strided_out: bool = False
    allocates: bool = False
    pays: Callable[[Site], bool] = _always
    border: Callable[[Site], Border | None] | None = None
    rows_out: Callable[[Site], bool] = _never
    strided_in: Callable[[Site], bool] = _never


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


class Cases(Sequence[Case]):
    """The cases that `make` gives, made when somebody looks at them: loading a model does not."""

    def __init__(self, make: Callable[[], Iterable[Case]]) -> None:
        self._make = make

    @lazy
    def _made(self) -> tuple[Case, ...]:
        return tuple(self._make())

    @overload
    def __getitem__(self, at: int) -> Case: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[Case, ...]: ...

    def __getitem__(self, at: int | slice) -> Case | tuple[Case, ...]:
        return self._made[at]

    def __len__(self) -> int:
        return len(self._made)


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
    what kernels are tested against. `values` lists the inputs whose values `infer` needs. `view(x, site)` makes output
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
