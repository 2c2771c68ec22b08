"""The "triton" kernel of products of normalised rows. Declares no operators itself.

One row is normalised by the kernel that multiplies it. Others are before, into scratch: to normalise them in each
program would read them once more there, and tensor cores want factors that are rounded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import kernels
from infera_gpu.ops._triton_matmul import is_row, matrices, multiplied, parts_of_sums, product_workspace
from infera_gpu.spec import Array, TensorSpec

KIND = "rms"


def of_one_row(site: Site) -> bool:
    """Whether the product's kernel can normalise."""
    from infera_kernels.triton.matmul import normalizes

    out = TensorSpec(matrices(site)[2], site.outs[0].dtype)
    return normalizes(out, invariant=site.batch_invariant)


def normalizes_first(site: Site, i: int) -> bool:
    """Whether there is a kernel that normalises with input i."""
    from infera_kernels.triton.norm import supports_rows

    x = site.spec(0)
    return x.ndim > 0 and supports_rows(KIND, x, x, site.spec(i), axes=(x.ndim - 1,))


def scratch_first(site: Site, *, within: bool) -> int:
    """Bytes of scratch for normalised rows, none where the product normalises `within`."""
    from infera_kernels.triton.normalize import scratch_of

    if within:
        return 0
    x = site.spec(0)
    pieces = scratch_of(KIND, x, (x.ndim - 1,), invariant=site.batch_invariant)
    statistics = sum(aligned(math.prod(shape) * np.dtype(name).itemsize) for shape, name in pieces)
    return aligned(x.size * x.dtype.itemsize) + statistics


def first(site: Site, io: Buffers, i: int, *, within: bool) -> tuple[Array, dict[str, Any], list[Call]]:
    """What is multiplied, what the product is told of normalising it with input i, and what is called before."""
    from infera_kernels.triton.normalize import normalize

    x, scale, epsilon = io.ins[0], io.ins[i], float(site.attrs["epsilon"])
    if within:
        return x, {"gain": scale, "epsilon": epsilon}, []
    made, axes = io.scratch(x.shape, x.dtype), (x.ndim - 1,)
    how: dict[str, Any] = {"eps": epsilon, "weight": scale, "invariant": site.batch_invariant}
    return made, {}, list(normalize(KIND, x, axes, made, io.launcher, io.scratch, **how))


def _supports(site: Site) -> bool:
    from infera_kernels.triton.matmul import supports_matmul

    dtypes = site.spec(0).dtype, site.spec(1).dtype, site.outs[0].dtype
    x, weight, out = (TensorSpec(s, d) for s, d in zip(matrices(site), dtypes, strict=True))
    return supports_matmul(x, weight, out, site.spec(3) if site.has(3) else None) and normalizes_first(site, 2)


def _within(site: Site) -> bool:
    return of_one_row(site) and parts_of_sums(site) == 1


def _workspace(site: Site) -> int:
    return scratch_first(site, within=_within(site)) + product_workspace(site)


def _bind(site: Site, io: Buffers) -> list[Call]:
    x, how, calls = first(site, io, 2, within=_within(site))
    bias = io.ins[3] if len(io.ins) > 3 else None
    row = bias is not None and is_row(bias, matrices(site)[2][-1])
    return [*calls, *multiplied(site, io, x, bias=bias if row else None, residual=None if row else bias, **how)]


NORMALIZED = kernels(_bind, _supports, inplace=(), strided=True, workspace=_workspace)
"""NormalizedMatMul: one launch for one row, two for several, three where sums are cut."""

OPS: tuple[Op, ...] = ()
