"""The "triton" kernels of reductions, positions of extrema, scans and the k best. Declares no operators itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels


def _bytes(pieces: Sequence[tuple[tuple[int, ...], str]]) -> int:
    """What scratch arrays of these shapes and types take."""
    return sum(aligned(math.prod(shape) * np.dtype(name).itemsize) for shape, name in pieces)


def reduction(kind: Callable[[Site], str], axes: Callable[[Site], tuple[int, ...]]) -> Kernels:
    """The kernels of a reduction by its name in Triton, over `axes(site)`. The result has lost those axes, or kept them
    with one element; leading ones it may have lost and others kept."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.reduce import supports_reduction

        return supports_reduction(kind(site), site.spec(0), site.outs[0], axes(site))

    def workspace(site: Site) -> int:
        from infera_kernels.triton.reduce import scratch_of

        return _bytes(scratch_of(kind(site), site.spec(0), axes(site), invariant=site.batch_invariant))

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.reduce import reduce

        x, out = io.ins[0], io.outs[0]
        if out.ndim not in (x.ndim, x.ndim - len(axes(site))):
            out = out.reshape((1,) * (x.ndim - out.ndim) + out.shape)
        return reduce(kind(site), x, axes(site), out, io.launcher, io.scratch, invariant=site.batch_invariant)

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True, workspace=workspace)


def scan(kind: str, axis: Callable[[Site], int]) -> Kernels:
    """The kernels of running sums or products along `axis(site)`, with the attributes `exclusive` and `reverse`."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.scan import supports_scan

        return site.spec(0).ndim > 0 and supports_scan(kind, site.spec(0), site.outs[0])

    def workspace(site: Site) -> int:
        from infera_kernels.triton.scan import scratch_of

        return _bytes(scratch_of(site.spec(0), axis(site), invariant=site.batch_invariant))

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.scan import scan

        how = {name: bool(site.attrs[name]) for name in ("exclusive", "reverse")}
        how["invariant"] = site.batch_invariant
        return scan(kind, io.ins[0], axis(site), io.outs[0], io.launcher, io.scratch, **how)

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True, workspace=workspace)


def best(k: Callable[[Site], int]) -> Kernels:
    """The kernels of the `k(site)` largest, or smallest, along the site's axis."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.top_k import supports_top_k

        return supports_top_k(site.spec(0), k(site), site.axis())

    def workspace(site: Site) -> int:
        from infera_kernels.triton.top_k import scratch_of

        return _bytes(scratch_of(site.spec(0), k(site), site.axis()))

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.top_k import top_k

        largest = bool(site.attrs.get("largest", 1))
        values, places = io.outs
        return top_k(io.ins[0], k(site), site.axis(), values, places, io.launcher, io.scratch, largest=largest)

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True, workspace=workspace)


OPS: tuple[Op, ...] = ()
