"""The "triton" kernels of reductions and of positions of extrema. Declares no operators itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels


def reduction(kind: Callable[[Site], str], axes: Callable[[Site], tuple[int, ...]]) -> Kernels:
    """The kernels of a reduction by its name in Triton, over `axes(site)`."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.reduce import supports_reduction

        return supports_reduction(kind(site), site.spec(0), site.outs[0], axes(site))

    def workspace(site: Site) -> int:
        from infera_kernels.triton.reduce import scratch_of

        pieces = scratch_of(kind(site), site.spec(0), axes(site))
        return sum(aligned(math.prod(shape) * np.dtype(name).itemsize) for shape, name in pieces)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.reduce import reduce

        return reduce(kind(site), io.ins[0], axes(site), io.outs[0], io.launcher, io.scratch)

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True, workspace=workspace)


OPS: tuple[Op, ...] = ()
