"""A fast implementation of an operator, and what it is bound to. Nothing here imports a device library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.site import Site
from infera_gpu.spec import Array

Call: TypeAlias = tuple[Callable[..., object], tuple[Any, ...]]
"""A step of a bound kernel, everything decided. A plan's hot loop is `for fn, args in calls: fn(*args)`."""


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


def _nothing(site: Site) -> tuple[tuple[int, int], ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Kernel:
    """A fast implementation. `bind` is called once while planning and returns the calls of every run.

    The calls write every element of `io.outs`, and allocate nothing: temporaries come from `io.scratch`, ufuncs get
    `out=`. `inplace` lists the inputs whose memory output 0 may take over (same shape and dtype). `shares(site)` are
    outputs and inputs, by number, that may be one array of the caller's, which the kernel finds out by their addresses:
    what an input keeps is not written then. A kernel that is not `strided` gets contiguous inputs, and one that is not
    `strided_out` contiguous outputs. `border(site)` is what a kernel wants around input 0 to read it without a copy:
    `io.ins[0]` may then be larger than the site says by that much, contiguous all the same, and the kernel sets the
    border before it reads it. Where `rows_out(site)` a kernel that is not `strided_out` writes an output that lies
    within a border, its last two axes contiguous, as fast as any other; where `slices_out(site)` one that is a slice,
    along the last axis, of a contiguous array; where `strided_in(site)` one that is not `strided` reads input 0 at any
    strides as fast. `workspace` gives the bytes of scratch; None measures them by binding once on host dummies. A site
    that it `supports` where it does not `pay` goes to a kernel of a later kind, if one supports it. What is asked for,
    and every answer here, may depend on the attributes, on shapes, strides and types, on small constants and on those
    of integers, but neither on names nor on the elements of a large floating-point constant: of nodes that differ in
    nothing else one is asked (`alike`). Nor does any of it but `workspace` depend on what was measured (`Site.tuned`).
    `allocates` marks a kernel that does allocate, which `inspect` shows.
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
    slices_out: Callable[[Site], bool] = _never
    strided_in: Callable[[Site], bool] = _never
    shares: Callable[[Site], Sequence[tuple[int, int]]] = _nothing
