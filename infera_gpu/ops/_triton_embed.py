"""The "triton" kernel of com.microsoft's EmbedLayerNormalization. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
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

OPS: tuple[Op, ...] = ()
