"""The "triton" kernels of sums of embeddings and their layer normalisation. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Kernel, Op, Site
from infera_gpu.ops._triton import kernels

_NAMES = {1: "segments", 4: "kinds", 5: "weight", 6: "bias", 8: "positions"}
"""Optional inputs, by what the kernel calls them."""

_MASK = 7


def _counts(site: Site) -> bool:
    """Whether there is a mask whose ones are counted; zeros are what is counted without."""
    return site.has(_MASK) and len(site.outs) > 1


def _supports(site: Site) -> bool:
    from infera_kernels.triton.embed import supports_embed
    from infera_kernels.triton.reduce import supports_reduction

    ids, words = site.spec(0), site.spec(2)
    same = all(not site.has(i) or site.spec(i).dtype == ids.dtype for i in (1, 8))
    counted = not _counts(site) or supports_reduction("sum", site.spec(_MASK), site.outs[1], (1,))
    floats = (site.spec(i) if site.has(i) else None for i in (3, 4, 5, 6))
    return same and counted and supports_embed(ids, words, site.outs[0], *floats)


def _workspace(site: Site) -> int:
    from infera_kernels.triton.reduce import scratch_of

    pieces = scratch_of("sum", site.spec(_MASK), (1,), invariant=site.batch_invariant) if _counts(site) else []
    return sum(aligned(int(np.prod(shape)) * np.dtype(name).itemsize) for shape, name in pieces)


def _bind(site: Site, io: Buffers) -> Sequence[Call]:
    from infera_kernels.triton.embed import embed
    from infera_kernels.triton.reduce import reduce

    out, counts, sums = (*io.outs, None, None)[:3]
    arrays: dict[str, Any] = {name: io.ins[i] for i, name in _NAMES.items() if site.has(i)}
    masked = _counts(site)
    calls = embed(
        io.ins[0],
        io.ins[2],
        io.ins[3],
        out,
        io.launcher,
        eps=float(site.attrs["epsilon"]),
        sums=sums,
        counts=None if masked else counts,
        invariant=site.batch_invariant,
        **arrays,
    )
    if masked:
        calls += reduce("sum", io.ins[_MASK], (1,), counts, io.launcher, io.scratch, invariant=site.batch_invariant)
    return calls


EMBED = kernels(_bind, _supports, inplace=(), strided=False, workspace=_workspace)


def embedded(tables_of: Callable[[Site], Sequence[int] | None]) -> Mapping[str, Kernel]:
    """Of the operator that passes make, whose scale and shift are inputs 6 and 7. `tables_of` says which inputs are
    tables, each after its indices; None where there is no kernel."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.embed import supports_embed

        tables, (out,) = tables_of(site), site.outs
        if tables is None or out is None:
            return False
        indices = all(site.spec(i - 1).dtype.name in ("int32", "int64") for i in tables)
        floats = [site.spec(i) for i in (*tables, 6, 7) if site.has(i)]
        same = all(s.dtype == out.dtype for s in floats)
        return indices and same and supports_embed(site.spec(tables[0] - 1), floats[0], out, *floats)

    def bind(site: Site, io: Buffers) -> Sequence[Call]:
        from infera_kernels.triton.embed import embed

        tables = tables_of(site)
        assert tables is not None
        words, places, *kinds = tables
        arrays: dict[str, Any] = {name: io.ins[i] for name, i in (("weight", 6), ("bias", 7)) if site.has(i)}
        for i in kinds:
            arrays |= {"segments": io.ins[i - 1], "kinds": io.ins[i]}
        return embed(
            io.ins[words - 1],
            io.ins[words],
            io.ins[places],
            io.outs[0],
            io.launcher,
            eps=float(site.attrs["epsilon"]),
            positions=io.ins[places - 1],
            gathered=True,
            invariant=site.batch_invariant,
            **arrays,
        )

    return kernels(bind, supports, inplace=(), strided=False)


OPS: tuple[Op, ...] = ()
