"""Layer, RMS, group, instance, mean-variance, Lp and local response normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Call, Case, Kernel, Op, Site, f32, same_as
from infera_gpu.ops import _jit, _triton_norm
from infera_gpu.ops._families import element_type, split_of
from infera_gpu.spec import Array, TensorSpec, broadcast_shape
from infera_kernels.cpu import norm as cpu
from infera_kernels.portable import norm as portable


def _floating(site: Site) -> bool:
    """Whether every input has one dtype that the kernels compute in, and there is something to compute."""
    dtype = site.spec(0).dtype
    return (
        site.spec(0).size > 0
        and dtype in (np.float32, np.float64)
        and all(spec is None or spec.dtype == dtype for spec in site.ins)
    )


# ---- over trailing axes: LayerNormalization, RMSNormalization


def layer_spec(site: Site) -> TensorSpec:
    """What is normalised. Raises PlanError where scale or bias do not broadcast to it."""
    x = site.spec(0)
    for i in (1, 2):
        if site.has(i):
            try:
                fits = broadcast_shape(site.spec(i).dims, x.dims) == x.dims
            except ValueError:
                fits = False
            if not fits:
                raise site.fail(f"input {i} is {site.spec(i)}, which does not broadcast to {x}")
    return x


def _infer_layer(site: Site) -> Sequence[TensorSpec]:
    x, axis = layer_spec(site), site.axis()
    if site.node.op == "RMSNormalization":
        return (x,)
    statistic = TensorSpec((*x.dims[:axis], *(1,) * (x.ndim - axis)), element_type(site, "stash_type"))
    return (x, statistic, statistic)[: max(1, len(site.node.outputs))]


def _compute_layer(xp: Any, site: Site, x: Array, scale: Array | None = None, bias: Array | None = None) -> Any:
    axes = tuple(range(site.axis(), x.ndim))
    center = site.node.op == "LayerNormalization"
    y, mean, inverse = portable.standardized(xp, x, axes, site.attrs["epsilon"], center=center)
    y = portable.affine(y, scale, bias, x.dtype)
    return (y, *(s.astype(spec.dtype) for s, spec in zip((mean, inverse), site.outs[1:], strict=False)))


def _rows(site: Site) -> tuple[int, int]:
    """The input as rows to normalise, and their length."""
    dims, axis = site.spec(0).dims, site.axis()
    return math.prod(dims[:axis]), math.prod(dims[axis:])


def _bind_layer(site: Site, io: Buffers) -> Sequence[Call]:
    x, y = io.ins[0], io.outs[0]
    rows, length = _rows(site)
    scale, bias = (None if a is None else a.reshape(-1) for a in (*io.ins[1:3], None, None)[:2])
    flat = y.reshape(rows, length)
    statistics = [io.outs[i].reshape(rows) if len(io.outs) > i else None for i in (1, 2)]
    return cpu.standardize(
        x.reshape(rows, length),
        flat,
        io.scratch,
        split_of(io),
        epsilon=site.attrs["epsilon"],
        center=site.node.op == "LayerNormalization",
        mean=statistics[0],
        inverse=statistics[1],
        finish=lambda part: cpu.scaled(flat[part], scale, bias),
    )


def _supports_layer(site: Site) -> bool:
    """Scale and bias over exactly the normalised axes, statistics in the input's dtype."""
    shape = site.spec(0).dims[site.axis() :]
    whole = all(not site.has(i) or site.spec(i).dims == shape for i in (1, 2))
    return _floating(site) and whole and all(o.dtype == site.spec(0).dtype for o in site.outs)


# ---- over channels' planes: InstanceNormalization, GroupNormalization


def _groups(site: Site) -> int:
    """Groups of channels that share statistics; each channel is one where there is no such attribute."""
    channels = site.spec(0).dims[1]
    return int(site.attrs.get("num_groups", channels))


def _infer_group(site: Site) -> Sequence[TensorSpec]:
    x = site.spec(0)
    if x.ndim < 2:
        raise site.fail(f"input 0 is {x}, expected (batch, channels, ...)")
    groups, channels = _groups(site), x.dims[1]
    if groups < 1 or channels % groups:
        raise site.fail(f"{channels} channels do not divide into num_groups = {groups}")
    expected = groups if _per_group(site) else channels
    for i in (1, 2):
        if site.spec(i).dims != (expected,):
            raise site.fail(f"input {i} is {site.spec(i)}, expected [{expected}] for an input {x}")
    return (x,)


def _per_group(site: Site) -> bool:
    """Opset 18's GroupNormalization scales groups, not channels."""
    return site.node.op == "GroupNormalization" and site.opset < 21


def _compute_group(xp: Any, site: Site, x: Array, scale: Array, bias: Array) -> Array:
    groups = _groups(site)
    split = x.reshape(x.shape[0], groups, -1)
    y = portable.standardized(xp, split, (2,), site.attrs["epsilon"])[0]
    if _per_group(site):
        return portable.affine(y, scale[:, None], bias[:, None], x.dtype).reshape(x.shape)
    columns = [portable.channel_column(a, x.ndim) for a in (scale, bias)]
    return portable.affine(y.reshape(x.shape), columns[0], columns[1], x.dtype)


def _bind_group(site: Site, io: Buffers) -> Sequence[Call]:
    x, scale, bias = io.ins
    batch, groups = x.shape[0], _groups(site)
    y = io.outs[0]
    parts = y.reshape(batch, len(scale), -1)
    return cpu.standardize(
        x.reshape(batch * groups, -1),
        y.reshape(batch * groups, -1),
        io.scratch,
        split_of(io),
        epsilon=site.attrs["epsilon"],
        every=groups,
        finish=lambda rows: cpu.scaled(
            parts[rows.start // groups : rows.stop // groups], scale[:, None], bias[:, None]
        ),
    )


# ---- the others


def _compute_mvn(xp: Any, site: Site, x: Array) -> Array:
    """(x - mean) / (standard deviation + 1e-9), the deviation as sqrt(mean(x^2) - mean(x)^2)."""
    axes = tuple(site.attrs["axes"])
    wide = x.astype(xp.float64)
    wide = wide - wide.mean(axis=axes, keepdims=True)
    return (wide / (xp.sqrt((wide * wide).mean(axis=axes, keepdims=True)) + 1e-9)).astype(x.dtype)


def _mean_variance(site: Site) -> _triton_norm.Rows | None:
    x, axes = site.spec(0), site.attrs["axes"]
    if not all(-x.ndim <= axis < x.ndim for axis in axes):
        return None
    return _triton_norm.Rows("mean_variance", x.dims, tuple(sorted({axis % x.ndim for axis in axes})), 1e-9)


def _infer_lp(site: Site) -> Sequence[TensorSpec | None]:
    site.axis()
    if site.attrs["p"] not in (1, 2):
        raise site.fail(f"p is {site.attrs['p']}, expected 1 or 2")
    return same_as()(site)


def _compute_lp(xp: Any, site: Site, x: Array) -> Array:
    return portable.lp_normalized(xp, x, site.axis(), int(site.attrs["p"]))


def _infer_lrn(site: Site) -> Sequence[TensorSpec]:
    x = site.spec(0)
    if x.ndim < 2 or site.attrs["size"] < 1:
        raise site.fail(f"size is {site.attrs['size']} for {x}, expected at least 1, and (batch, channels, ...)")
    return (x,)


def lrn_params(site: Site) -> dict[str, Any]:
    """What the kernels of LRN are told."""
    return {name: site.attrs[name] for name in ("size", "alpha", "beta", "bias")}


def _bind_lrn(site: Site, io: Buffers) -> Sequence[Call]:
    return cpu.local_response(io.ins[0], io.outs[0], io.scratch, **lrn_params(site))


_HALF = np.dtype(np.float16)

_LAYER_CASES = (
    Case("last-axis", (f32(3, 5, 7), f32(7), f32(7))),
    Case("trailing-axes", (f32(2, 3, 4, 5), f32(4, 5), f32(4, 5)), {"axis": 2}),
    Case("whole", (f32(2, 3), f32(2, 3)), {"axis": 0}),
    Case("no-bias", (f32(4, 6), f32(6)), {"epsilon": 0.01}),
    Case("one", (f32(1, 1), f32(1), f32(1))),
    Case("blocks", (f32(130, 521), f32(521), f32(521))),
    Case("far-from-zero", (f32(5, 300), f32(300)), low=9, high=11),
    Case("half", (TensorSpec((3, 8), _HALF), TensorSpec((8,), _HALF)), tol=1e-3),
)
_STATISTICS = (
    Case("statistics", (f32(3, 5, 7), f32(7), f32(7)), n_outs=3),
    Case("statistics-blocks", (f32(130, 521), f32(521)), n_outs=3),
    Case("statistics-axes", (f32(2, 3, 4, 5), f32(4, 5)), {"axis": 2}, n_outs=3),
)
_OLD_LAYER = (
    Case("before-the-standard", (f32(3, 5), f32(5), f32(5)), opset=14),  # as onnxruntime exports what it optimised
    *(replace(c, opset=17) for c in _LAYER_CASES + _STATISTICS),
)
_RMS_CASES = tuple(Case(c.id, c.ins[:2], c.attrs, tol=c.tol, low=c.low, high=c.high) for c in _LAYER_CASES)
_INSTANCE_CASES = (
    Case("images", (f32(2, 3, 5, 7), f32(3), f32(3))),
    Case("sequence", (f32(1, 4, 9), f32(4), f32(4)), {"epsilon": 0.1}),
    Case("blocks", (f32(3, 17, 33, 35), f32(17), f32(17))),
)


def _group_cases(per_group: bool) -> tuple[Case, ...]:
    return tuple(
        Case(name, (f32(*shape), f32(size), f32(size)), {"num_groups": groups})
        for name, shape, groups in (
            ("images", (2, 6, 5, 7), 3),
            ("one-group", (2, 4, 3), 1),
            ("blocks", (3, 32, 33, 20), 4),
        )
        for size in (groups if per_group else shape[1],)
    )


_LAYER_KERNELS = (
    {"cpu": Kernel(_bind_layer, _supports_layer, inplace=(0,))}
    | _triton_norm.NORM
    | _jit.standardize(_rows, _supports_layer)
)
_GROUP_KERNELS = {"cpu": Kernel(_bind_group, _floating, inplace=(0,))} | _triton_norm.rows(
    lambda site: _triton_norm.grouped(site, _groups(site), float(site.attrs["epsilon"]), of_groups=_per_group(site))
)
_IMAGES = (Case("images", (f32(2, 3, 5, 7),)), Case("large", (f32(2, 9, 33, 35),)))

OPS: tuple[Op, ...] = (
    Op(
        "LayerNormalization", 1, _infer_layer, _compute_layer, _OLD_LAYER,
        {"axis": -1, "epsilon": 1e-5, "stash_type": 1}, kernels=_LAYER_KERNELS,
    ),
    Op(
        "RMSNormalization", 23, _infer_layer, _compute_layer, _RMS_CASES,
        {"axis": -1, "epsilon": 1e-5, "stash_type": 1}, kernels=_LAYER_KERNELS,
    ),
    Op(
        "InstanceNormalization", 1, _infer_group, _compute_group, _INSTANCE_CASES, {"epsilon": 1e-5},
        kernels=_GROUP_KERNELS,
    ),
    Op(
        "GroupNormalization", 18, _infer_group, _compute_group, _group_cases(per_group=True),
        {"num_groups": REQUIRED, "epsilon": 1e-5}, kernels=_GROUP_KERNELS,
    ),
    Op(
        "GroupNormalization", 21, _infer_group, _compute_group, _group_cases(per_group=False),
        {"num_groups": REQUIRED, "epsilon": 1e-5, "stash_type": 1}, kernels=_GROUP_KERNELS,
    ),
    Op(
        "MeanVarianceNormalization", 9, same_as(), _compute_mvn,
        (*_IMAGES, Case("axes", (f32(2, 3, 5),), {"axes": (0, 2)})), {"axes": (0, 2, 3)},
        kernels=_triton_norm.rows(_mean_variance),
    ),
    Op(
        "LpNormalization", 1, _infer_lp, _compute_lp,
        (
            *_IMAGES,
            Case("sum", (f32(3, 4, 5),), {"p": 1, "axis": 1}),
            Case("zeros", (np.zeros((2, 3), np.float32),)),
        ),
        {"axis": -1, "p": 2},
        kernels=_triton_norm.rows(
            lambda site: _triton_norm.along(site, site.axis(), f"length_{site.attrs['p']}", 0.0)
        ),
    ),
    Op(
        "LRN", 1, _infer_lrn, lambda xp, site, x: portable.local_response(xp, x, **lrn_params(site)),
        (
            *(Case(c.id, c.ins, {"size": 3}) for c in _IMAGES),
            Case("parameters", (f32(1, 7, 3, 3),), {"size": 5, "alpha": 0.5, "beta": 0.6, "bias": 2.0}),
            Case("past-the-channels", (f32(1, 2, 3, 3),), {"size": 9, "alpha": 0.5}),
        ),
        {"alpha": 1e-4, "beta": 0.75, "bias": 1.0, "size": REQUIRED},
        kernels={"cpu": Kernel(_bind_lrn, _floating)} | _triton_norm.local_response(lrn_params, axis=1),
    ),
)  # fmt: skip
