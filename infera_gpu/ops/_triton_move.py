"""The "triton" kernels of what moves elements: gathers and copies of views. Declares no operators itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.triton.terms import AxisMap, Term


def _gathering(name: str, options: Callable[[Site], dict[str, int]]) -> Kernels:
    """The kernels of a gather of input 0 at the indices in input 1, by a function of that name."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.gather import supports_gather

        return supports_gather(site.spec(0), site.spec(1), site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton import gather

        gathers = {g.__name__: g for g in (gather.gather, gather.gather_elements, gather.gather_nd)}
        return gathers[name](io.ins[0], io.ins[1], io.outs[0], io.launcher, **options(site))

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True)


GATHER = _gathering("gather", lambda site: {"axis": site.axis()})
GATHER_ELEMENTS = _gathering("gather_elements", lambda site: {"axis": site.axis()})
GATHER_ND = _gathering("gather_nd", lambda site: {"batch_dims": int(site.attrs.get("batch_dims", 0))})


def _supports_lookup(site: Site) -> bool:
    from infera_kernels.triton.gather import supports_gather

    return supports_gather(site.spec(1), site.spec(0), site.outs[0])


def _bind_lookup(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton.gather import gather

    ids, table = io.ins[:2]
    return gather(table, ids[..., 0], io.outs[0], io.launcher, axis=0, last_outside=True)


LOOKUP = kernels(_bind_lookup, _supports_lookup, inplace=(), strided=True, strided_out=True)
"""Rows of the table in input 1, the last one for whatever is no index."""


def copies(
    pairs: Callable[[Site, Buffers], Sequence[tuple[Array, Array]]],
    *,
    axes: Callable[[Site], Sequence[int]] = lambda site: site.outs[0].dims,
) -> Kernels:
    """The kernels of copies of views of inputs onto views of outputs: `pairs(site, io)` gives (destination, source).

    `axes` gives the sizes of the axes of these views.
    """

    def supports(site: Site) -> bool:
        from infera_kernels.triton.layout import STORED, few

        return site.outs[0].dtype.name in STORED and few(axes(site))

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.elementwise import copy

        return [call for target, source in pairs(site, io) for call in copy(source, target, io.launcher)]

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True)


def _distinct(site: Site, *, tuples: bool) -> bool:
    """Whether the indices are known while planning, and no two updates have one position."""
    known, shape = site.value(1), site.spec(0).dims
    if known is None:
        return False
    if tuples:
        places = [known[..., k] % n for k, n in enumerate(shape[: known.shape[-1]])]
    else:
        places = list(np.indices(known.shape, sparse=True))
        places[site.axis()] = known % shape[site.axis()]
    flat = np.ravel_multi_index(tuple(np.broadcast_arrays(*places)), shape[: len(places)])
    return bool(np.unique(flat).size == flat.size)


def scattering(*, tuples: bool) -> Kernels:
    """The kernels of updates written over input 0, or combined with it: by tuples of indices, or along an axis."""

    def reduction(site: Site) -> str:
        return str(site.attrs.get("reduction", "none"))

    def count(site: Site) -> int:
        """Of int32, to tell updates of one position apart."""
        if reduction(site) != "none" or site.once("distinct", lambda: _distinct(site, tuples=tuples)):
            return 0
        dims = site.spec(0).dims
        return math.prod(dims[: site.spec(1).dims[-1]] if tuples else dims)

    def workspace(site: Site) -> int:
        return aligned(4 * count(site))

    def supports(site: Site) -> bool:
        from infera_kernels.triton.scatter import supports_scatter
        from infera_kernels.triton.scatter_fold import supports_fold

        given = site.spec(0), site.spec(1), site.spec(2), site.outs[0]
        if reduction(site) == "none":
            return supports_scatter(*given)
        return supports_fold(reduction(site), *given, axis=None if tuples else site.axis())

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.scatter import Numbers, scatter
        from infera_kernels.triton.scatter_fold import scatter_fold

        x, indices, updates = io.ins
        axis, numbers = None if tuples else site.axis(), None
        if reduction(site) != "none":
            return scatter_fold(reduction(site), x, indices, updates, io.outs[0], io.launcher, axis=axis)
        if workspace(site):
            numbers = Numbers(io.scratch((count(site),), np.int32), io.constant(np.array(-1, np.int32)))
        return scatter(x, indices, updates, io.outs[0], io.launcher, axis=axis, numbers=numbers)

    return kernels(bind, supports, inplace=(0,), strided=True, strided_out=True, workspace=workspace)


# ---- caches


_PLACES = Term("add", (0, 1)), Term("mod", (3, 2))
"""Where a row's updates go: their numbers after its position, around the size of a cache that is circular."""


def appending(axis: Callable[[Site], int]) -> Kernels:
    """The kernels of updates written along an axis of a cache, each row's from its own position on (input 2)."""

    def spread(site: Site, rows: bool) -> tuple[int, ...]:
        """The shape of the places of updates, which broadcasts to theirs."""
        along = axis(site)
        return tuple(d if i == along or (rows and i == 0) else 1 for i, d in enumerate(site.spec(1).dims))

    def workspace(site: Site) -> int:
        return aligned(8 * math.prod(spread(site, rows=True))) if site.has(2) else 0

    def supports(site: Site) -> bool:
        from infera_kernels.triton.scatter import supports_scatter

        if site.has(2) and site.spec(2) != TensorSpec(site.spec(0).dims[:1], np.dtype(np.int64)):
            return False
        places = TensorSpec(site.spec(1).dims, np.dtype(np.int64))
        return supports_scatter(site.spec(0), places, site.spec(1), site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.elementwise import expression
        from infera_kernels.triton.scatter import scatter

        cache, updates = io.ins[:2]
        calls: list[Call] = []
        places = io.constant(np.arange(updates.shape[axis(site)], dtype=np.int64).reshape(spread(site, rows=False)))
        if site.has(2):
            size, first = np.array(cache.shape[axis(site)], np.int64), places
            starts = io.ins[2].reshape(-1, *(1,) * (updates.ndim - 1))
            places = io.scratch(spread(site, rows=True), np.int64)
            terms = _PLACES[: 2 if site.attrs["mode"] == "circular" else 1]
            operands = [first, starts, io.constant(size)][: len(terms) + 1]
            calls = expression(terms, operands, places, io.launcher)
        wide = io.xp.broadcast_to(places, updates.shape)
        return calls + scatter(cache, wide, updates, io.outs[0], io.launcher, axis=axis(site), numbers=None)

    return kernels(bind, supports, inplace=(0,), strided=True, strided_out=True, workspace=workspace)


# ---- tables


def mapping(
    maps: Callable[[Site], Sequence[AxisMap] | None], fill: Callable[[Site, Buffers], Array | float]
) -> Kernels:
    """The kernels of input 0 mapped along some axes by tables; a copy where there are none, and none where None."""

    def found(site: Site) -> Sequence[AxisMap] | None:
        return site.once("maps", lambda: maps(site))

    def supports(site: Site) -> bool:
        from infera_kernels.triton.mapped import supports_mapped

        tables = found(site)
        if tables is None:
            return False
        weighted = any(m.weights is not None for m in tables)
        return supports_mapped(site.spec(0), site.outs[0], [m.taps for m in tables], weighted=weighted)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.elementwise import copy
        from infera_kernels.triton.mapped import mapped

        tables = found(site)
        if not tables:
            return copy(io.ins[0], io.outs[0], io.launcher)
        return mapped(io.ins[0], io.outs[0], io.launcher, tables, io.constant, fill=fill(site, io))

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True)


OPS: tuple[Op, ...] = ()
