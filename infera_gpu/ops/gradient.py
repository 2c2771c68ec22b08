"""What derivatives are made of, beside the operators themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32, same_as
from infera_gpu.ops import _triton_reduce
from infera_gpu.ops._families import plain
from infera_gpu.spec import Array, TensorSpec


def _infer_sum_to(site: Site) -> tuple[TensorSpec]:
    g, like = site.spec(0), site.spec(1)
    try:
        fits = np.broadcast_shapes(g.dims, like.dims) == g.dims
    except ValueError:
        fits = False
    if not fits:
        raise site.fail(f"{like} does not broadcast to {g}")
    return (TensorSpec(like.dims, g.dtype),)


def _sum_to(xp: Any, site: Site, g: Array, like: Array) -> Array:
    """Summed over the axes along which `like` was broadcast."""
    g = g.sum(axis=tuple(range(g.ndim - like.ndim)))
    axes = tuple(i for i, (a, b) in enumerate(zip(g.shape, like.shape, strict=True)) if a != b)
    return g.sum(axis=axes, keepdims=True).astype(g.dtype) if axes else g


def _summed(site: Site) -> tuple[int, ...]:
    """The axes of input 0 along which input 1 was broadcast."""
    g, like = site.spec(0).dims, site.spec(1).dims
    missing = len(g) - len(like)
    return (*range(missing), *(missing + i for i, d in enumerate(like) if d != g[missing + i]))


OPS = (
    Op(
        "OnesLike",
        1,
        domain="infera",
        infer=same_as(),
        compute=plain(lambda xp, site, x: xp.ones(site.spec(0).dims, site.spec(0).dtype)),
        cases=(Case("matrix", (f32(2, 3),)), Case("scalar", (f32(),))),
        shapes_only=True,
    ),
    Op(
        "SumTo",
        1,
        domain="infera",
        infer=_infer_sum_to,
        compute=plain(_sum_to),
        kernels=_triton_reduce.reduction(lambda site: "sum", _summed),
        cases=(
            Case("same", (f32(2, 3), f32(2, 3))),
            Case("row", (f32(4, 2, 3), f32(3))),
            Case("column", (f32(2, 3), f32(2, 1))),
            Case("scalar", (f32(2, 3), f32())),
            Case("both", (f32(2, 3, 4), f32(3, 1))),
        ),
    ),
)
