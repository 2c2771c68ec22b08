"""The "triton" kernels of operators that go by where an element stands: expressions over it and its coordinates.

Coordinates are small constants, a row and a column that broadcast. Declares no operators itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.spec import Array, TensorSpec, spec_of
from infera_kernels.triton.terms import CAST, WHERE, Term


def _along(values: HostArray, axis: int, rank: int) -> HostArray:
    """A vector as an array of this rank that lies along an axis."""
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


# ---- triangles


def triangle(diagonal: Callable[[Site], int]) -> Kernels:
    """The kernels of Trilu where its diagonal is known while planning: elements before it, or beyond it, are 0."""

    def terms(site: Site) -> Sequence[Term]:
        return Term("less" if site.attrs["upper"] else "greater", (1, 2)), Term(WHERE, (4, 3, 0))

    def constants(site: Site) -> list[HostArray]:
        """The columns, the rows' first or last columns that are kept, and 0."""
        rows, cols = site.outs[0].dims[-2:]
        first = np.arange(rows, dtype=np.int64)[:, None] + diagonal(site)
        return [np.arange(cols, dtype=np.int64), first, np.zeros((), site.outs[0].dtype)]

    def supports(site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports

        if site.spec(0).dtype.kind == "O" or (site.has(1) and site.value(1) is None):
            return False
        return supports(terms(site), [site.spec(0), *map(spec_of, constants(site))], site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.elementwise import expression

        operands = [io.ins[0], *map(io.constant, constants(site))]
        return expression(terms(site), operands, io.outs[0], io.launcher)

    return kernels(bind, supports, inplace=(0,), strided=True, strided_out=True)


# ---- one-hot vectors

_HOT = (
    Term(CAST, (0,), dtype="int64"),
    Term("equal", (5, 1)),
    Term("equal", (5, 2)),
    Term("or", (6, 7)),
    Term(WHERE, (8, 4, 3)),
)
"""Over indices, positions from the start and from the end, and the values off and on."""


def one_hot(dims: Callable[[Site], tuple[int, int]]) -> Kernels:
    """The kernels of OneHot; `dims(site)` gives the axis among the output's, and the depth."""

    def constants(site: Site) -> list[HostArray]:
        axis, depth = dims(site)
        places = np.arange(depth, dtype=np.int64)
        return [_along(v, axis, site.outs[0].ndim) for v in (places, places - depth)]

    def supports(site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports

        axis, values = dims(site)[0], TensorSpec((1,), site.spec(2).dtype)
        given = site.spec(0)
        indices = TensorSpec((*given.dims[:axis], 1, *given.dims[axis:]), given.dtype)
        return supports(_HOT, [indices, *map(spec_of, constants(site)), values, values], site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.elementwise import expression

        indices = io.ins[0][(*(slice(None),) * dims(site)[0], None)]
        values = io.ins[2]
        operands = [indices, *map(io.constant, constants(site)), values[:1], values[1:]]
        return expression(_HOT, operands, io.outs[0], io.launcher)

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True)


# ---- reversed sequences

_MIRRORED = (
    Term("less", (0, 1)),
    Term("sub", (1, 0)),
    Term("sub", (4, 2)),
    Term(WHERE, (3, 5, 0)),
)
"""length - 1 - time where that is within the sequence, else time: over time, length and 1."""


def _reversed_axes(site: Site) -> tuple[int, int]:
    return site.axis("time_axis"), site.axis("batch_axis")


def _steps(site: Site) -> int:
    time, batch = _reversed_axes(site)
    return site.spec(0).dims[time] * site.spec(0).dims[batch]


def _supports_reverse(site: Site) -> bool:
    from infera_kernels.triton.gather import supports_gather

    x, lengths = site.spec(0), site.spec(1)
    return lengths.dtype == np.int64 and supports_gather(x, lengths, site.outs[0])


def _bind_reverse(site: Site, io: Buffers) -> list[Call]:
    """Where each step comes from, once for all that lies inside of it, and then one gather."""
    from infera_kernels.triton.elementwise import expression
    from infera_kernels.triton.gather import gather_elements

    x, lengths = io.ins
    time, batch = _reversed_axes(site)
    shape = tuple(d if i in (time, batch) else 1 for i, d in enumerate(x.shape))
    steps = io.constant(_along(np.arange(x.shape[time], dtype=np.int64), time, x.ndim))
    source = io.scratch(shape, np.int64)
    operands: list[Array] = [steps, _length_view(lengths, batch, x.ndim), io.constant(np.ones((), np.int64))]
    calls = expression(_MIRRORED, operands, source, io.launcher)
    return calls + gather_elements(x, io.xp.broadcast_to(source, x.shape), io.outs[0], io.launcher, axis=time)


def _length_view(lengths: Array, batch: int, rank: int) -> Array:
    return lengths[tuple(slice(None) if i == batch else None for i in range(rank))]


REVERSE = kernels(
    _bind_reverse,
    _supports_reverse,
    inplace=(),
    strided=True,
    strided_out=True,
    workspace=lambda site: aligned(8 * _steps(site)),
)
"""ReverseSequence."""

OPS: tuple[Op, ...] = ()
