"""MaxPool, AveragePool, LpPool and their global forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import Attrs
from infera_gpu.op import REQUIRED, Buffers, Call, Case, Compute, Kernel, Op, Site, f32
from infera_gpu.ops._families import reads_floats
from infera_gpu.ops._triton_pool import global_pooling, pooling
from infera_gpu.ops.conv import as_2d, window_2d
from infera_gpu.ops.window import ATTRS, window
from infera_gpu.spec import Array, DType, TensorSpec
from infera_kernels.cpu.pool import average_pool2d, global_average_pool, global_max_pool, max_pool2d
from infera_kernels.portable.pool import average_pool, lp_pool, max_pool

_INT64: DType = np.dtype(np.int64)


def pool_spec(site: Site) -> Sequence[TensorSpec]:
    """The output of a pool, and the indices where a second output is wanted."""
    x = site.spec(0)
    y = TensorSpec((*x.dims[:2], *window(site).out), x.dtype)
    return (y, TensorSpec(y.shape, _INT64)) if len(site.node.outputs) > 1 else (y,)


def _infer_global(site: Site) -> Sequence[TensorSpec]:
    x = site.spec(0)
    if x.ndim < 3 or 0 in x.dims[2:]:
        raise site.fail(f"input 0 is {x}, expected (batch, channels, spatial...) with no empty axis")
    return (TensorSpec((*x.dims[:2], *(1,) * (x.ndim - 2)), x.dtype),)


def compute_max(xp: Any, site: Site, x: Array) -> Sequence[Array]:
    """MaxPool."""
    found = window(site)
    columns = bool(site.attrs.get("storage_order", 0))
    made = max_pool(xp, x, found.out, kernel=found.kernel, column_major=columns, **found.params)
    return made[: len(site.node.outputs)]


def compute_average(xp: Any, site: Site, x: Array, *, in_order: bool = False) -> Array:
    """AveragePool."""
    found = window(site)
    padded = bool(site.attrs["count_include_pad"])
    return average_pool(xp, x, found.out, kernel=found.kernel, include_pad=padded, in_order=in_order, **found.params)


def _norm_order(site: Site) -> int:
    p = int(site.attrs["p"])
    if p < 1:
        raise site.fail(f"p is {p}, expected at least 1")
    return p


def _infer_lp(site: Site) -> Sequence[TensorSpec]:
    _norm_order(site)
    return pool_spec(site)


def _infer_global_lp(site: Site) -> Sequence[TensorSpec]:
    _norm_order(site)
    return _infer_global(site)


def _compute_lp(xp: Any, site: Site, x: Array) -> Array:
    found = window(site)
    return lp_pool(xp, x, found.out, p=_norm_order(site), kernel=found.kernel, **found.params)


def _over_planes(reduce: Callable[[Any, Site, Array], Array]) -> Compute:
    """A global pool from a reduction of (N, C, elements) over its last axis, in at least float32."""

    def compute(xp: Any, site: Site, x: Array) -> Array:
        wide = x.reshape(*x.shape[:2], -1).astype(xp.promote_types(x.dtype, xp.float32), copy=False)
        return reduce(xp, site, wide).reshape(*x.shape[:2], *(1,) * (x.ndim - 2)).astype(x.dtype, copy=False)

    return compute


def _lp(xp: Any, site: Site, x: Array) -> Array:
    p = _norm_order(site)
    return (xp.abs(x) ** p).sum(axis=-1) ** (1 / p)


def _planar(site: Site) -> bool:
    return reads_floats(site) and site.spec(0).ndim in (3, 4) and len(site.node.outputs) == 1


def _bind_max(site: Site, io: Buffers) -> Sequence[Call]:
    found = window_2d(window(site))
    return max_pool2d(as_2d(io.ins[0]), as_2d(io.outs[0]), io.scratch, kernel=found.kernel, **found.params)


def _bind_average(site: Site, io: Buffers) -> Sequence[Call]:
    found = window_2d(window(site))
    padded = bool(site.attrs["count_include_pad"])
    return average_pool2d(
        as_2d(io.ins[0]), as_2d(io.outs[0]), io.scratch, kernel=found.kernel, include_pad=padded, **found.params
    )


def _bind_global_average(site: Site, io: Buffers) -> Sequence[Call]:
    return global_average_pool(io.ins[0], io.outs[0], io.scratch)


def _bind_global_max(site: Site, io: Buffers) -> Sequence[Call]:
    return global_max_pool(io.ins[0], io.outs[0])


def pool_attrs(*without: str, **more: Any) -> Attrs:
    """The attributes of a pool: the window's less some, the kernel required, and more."""
    kept = {k: v for k, v in ATTRS.items() if k not in without}
    return {**kept, "kernel_shape": REQUIRED, **more}


_CASES = (
    Case("3x3s2", (f32(2, 3, 9, 10),), {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
    Case("2x2", (f32(1, 5, 7, 6),), {"kernel_shape": (2, 2), "strides": (2, 2)}),
    Case("overlapping", (f32(1, 2, 7, 6),), {"kernel_shape": (3, 4)}),
    Case("one", (f32(2, 3, 1, 1),), {"kernel_shape": (1, 1)}),
    Case("uneven-pads", (f32(1, 2, 5, 6),), {"kernel_shape": (3, 3), "pads": (0, 2, 1, 0), "strides": (1, 2)}),
    Case("same-upper", (f32(1, 2, 8, 7),), {"kernel_shape": (3, 2), "auto_pad": "SAME_UPPER", "strides": (2, 2)}),
    Case("same-lower", (f32(1, 2, 8, 7),), {"kernel_shape": (3, 2), "auto_pad": "SAME_LOWER", "strides": (2, 2)}),
    Case("valid", (f32(1, 2, 8, 7),), {"kernel_shape": (3, 2), "auto_pad": "VALID", "strides": (2, 2)}),
    Case("1d", (f32(2, 3, 11),), {"kernel_shape": (3,), "strides": (2,), "pads": (1, 0)}),
    Case("3d", (f32(1, 2, 5, 4, 6),), {"kernel_shape": (2, 3, 2), "strides": (1, 1, 2)}),
    Case("blocks", (f32(2, 9, 61, 60),), {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
    Case("whole", (f32(2, 3, 7, 7),), {"kernel_shape": (7, 7)}),
)  # fmt: skip

_CEIL = tuple(
    Case(name, (f32(1, 2, 8, 9),), {"ceil_mode": 1, **attrs})
    for name, attrs in (
        ("ceil", {"kernel_shape": (3, 3), "strides": (2, 2)}),
        ("ceil-padded", {"kernel_shape": (3, 3), "strides": (2, 3), "pads": (1, 1, 1, 1)}),
        ("ceil-starts-in-padding", {"kernel_shape": (2, 2), "strides": (8, 9), "pads": (0, 0, 1, 1)}),
    )
)

_DILATED = (Case("dilated", (f32(1, 2, 9, 8),), {"kernel_shape": (3, 2), "dilations": (2, 3), "strides": (1, 2)}),)

_COUNTED = (
    Case("counted", (f32(1, 2, 6, 7),), {"kernel_shape": (3, 3), "pads": (1, 0, 2, 1), "count_include_pad": 1}),
    Case("counted-uniform", (f32(1, 2, 6, 7),), {"kernel_shape": (2, 2), "count_include_pad": 1}),
)  # fmt: skip

_COUNTED_CEIL = (
    Case(
        "counted-ceil",
        (f32(1, 2, 8, 8),),
        {"kernel_shape": (3, 3), "pads": (1, 1, 0, 0), "strides": (2, 2), "count_include_pad": 1, "ceil_mode": 1},
    ),
)

_INDEXED = tuple(
    Case(f"indices-{c.id}", c.ins, c.attrs, n_outs=2) for c in (*_CASES, *_CEIL, *_DILATED) if c.id != "blocks"
)
_COLUMNS = (
    Case("indices-by-columns", (f32(2, 2, 5, 4),), {"kernel_shape": (2, 3), "storage_order": 1}, n_outs=2),
)  # fmt: skip
_BYTES = tuple(
    Case(
        dtype,
        (TensorSpec((1, 2, 6, 5), np.dtype(dtype)),),
        {"kernel_shape": (3, 2), "pads": (1, 0, 1, 0)},
        low=low,
        high=high,
    )
    for dtype, low, high in (("uint8", 0, 255), ("int8", -128, -1))
)
_NORMS = tuple(
    Case(f"norm-{p}", (f32(1, 2, 6, 7),), {"kernel_shape": (3, 2), "pads": (1, 0, 1, 1), "p": p}) for p in (1, 3)
)
_GLOBAL_NORMS = tuple(Case(f"norm-{p}", (f32(2, 3, 7, 5),), {"p": p}) for p in (1, 3))
_GLOBAL = (
    Case("2d", (f32(2, 3, 7, 5),)),
    Case("one", (f32(1, 1, 1, 1),)),
    Case("1d", (f32(3, 2, 11),)),
    Case("3d", (f32(1, 2, 3, 4, 5),)),
    Case("large", (f32(2, 65, 33, 35),)),
)

_MAX = {"cpu": Kernel(_bind_max, _planar), **pooling("max")}
_AVERAGE = {"cpu": Kernel(_bind_average, _planar), **pooling("average")}
_LP = pooling("lp")

OPS: tuple[Op, ...] = (
    Op("MaxPool", 1, pool_spec, compute_max, _CASES, pool_attrs("dilations"), kernels=_MAX),
    Op(
        "MaxPool", 8, pool_spec, compute_max, (*_CASES, *_COLUMNS), pool_attrs("dilations", storage_order=0),
        kernels=_MAX,
    ),
    Op(
        "MaxPool", 10, pool_spec, compute_max, (*_CASES, *_CEIL, *_DILATED, *_INDEXED, *_COLUMNS),
        pool_attrs(storage_order=0, ceil_mode=0), kernels=_MAX,
    ),
    Op("MaxPool", 12, pool_spec, compute_max, _BYTES + _CEIL, pool_attrs(storage_order=0, ceil_mode=0), kernels=_MAX),
    Op(
        "AveragePool", 1, pool_spec, compute_average, _CASES + _COUNTED, pool_attrs("dilations", count_include_pad=0),
        kernels=_AVERAGE,
    ),
    Op(
        "AveragePool", 10, pool_spec, compute_average, _CASES + _COUNTED + _CEIL,
        pool_attrs("dilations", count_include_pad=0, ceil_mode=0), kernels=_AVERAGE,
    ),
    Op(
        "AveragePool", 19, pool_spec, compute_average, _CASES + _COUNTED + _CEIL + _DILATED + _COUNTED_CEIL,
        pool_attrs(count_include_pad=0, ceil_mode=0), kernels=_AVERAGE,
    ),
    Op("LpPool", 1, _infer_lp, _compute_lp, _CASES, pool_attrs("dilations", p=2), kernels=_LP),
    Op(
        "LpPool", 18, _infer_lp, _compute_lp, _CASES + _CEIL + _DILATED + _NORMS, pool_attrs(p=2, ceil_mode=0),
        kernels=_LP,
    ),
    Op(
        "GlobalAveragePool", 1, _infer_global, _over_planes(lambda xp, site, x: x.mean(axis=-1)), _GLOBAL,
        kernels={"cpu": Kernel(_bind_global_average, reads_floats), **global_pooling("average")},
    ),
    Op(
        "GlobalMaxPool", 1, _infer_global, _over_planes(lambda xp, site, x: x.max(axis=-1)), _GLOBAL,
        kernels={"cpu": Kernel(_bind_global_max, reads_floats), **global_pooling("max")},
    ),
    Op(
        "GlobalLpPool", 1, _infer_global_lp, _over_planes(_lp), (*_GLOBAL, *_GLOBAL_NORMS), {"p": 2},
        kernels=global_pooling("lp"),
    ),
)  # fmt: skip
