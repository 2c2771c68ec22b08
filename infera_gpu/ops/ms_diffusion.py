"""com.microsoft: what optimisers make of diffusion models for a GPU. onnxruntime's CPU has none of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._ms import ms_op, wide
from infera_gpu.ops._triton_norm import Rows, grouped, rows
from infera_gpu.ops.conv import compute_conv, conv_spec
from infera_gpu.ops.window import ATTRS, channels_last
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.activation import activation
from infera_kernels.portable.norm import affine, standardized

# ---- group normalisation


def _infer_group(site: Site) -> tuple[TensorSpec]:
    x, groups = site.spec(0), int(site.attrs["groups"])
    last = bool(site.attrs["channels_last"])
    channels = x.dims[-1 if last else 1] if x.ndim > 2 else 0
    if groups < 1 or not channels or channels % groups:
        raise site.fail(f"{groups} groups do not divide the channels of {x}")
    for i in (1, 2):
        if site.spec(i).dims != (channels,):
            raise site.fail(f"input {i} is {site.spec(i)}, expected {channels} values")
    if site.attrs["activation"] not in (0, 1):
        raise site.fail(f"activation is {site.attrs['activation']}, expected 0 or 1")
    return (x,)


def _group(xp: Any, site: Site, x: Array, gamma: Array, beta: Array) -> Array:
    last = bool(site.attrs["channels_last"])
    first = xp.moveaxis(x, -1, 1) if last else x
    split = first.reshape(x.shape[0], int(site.attrs["groups"]), -1)
    made = standardized(xp, split, (2,), site.attrs["epsilon"])[0].reshape(first.shape)
    made = affine(xp.moveaxis(made, 1, -1), gamma, beta, made.dtype)
    made = activation(xp, "swish", made) if site.attrs["activation"] else made
    return xp.ascontiguousarray(made if last else xp.moveaxis(made, -1, 1), x.dtype)


def _group_rows(site: Site) -> Rows:
    how: dict[str, Any] = {
        "last": bool(site.attrs["channels_last"]),
        "activation": "silu" if site.attrs["activation"] else None,
    }
    return grouped(site, int(site.attrs["groups"]), float(site.attrs["epsilon"]), **how)


def _infer_skip(site: Site) -> Sequence[TensorSpec]:
    (x,) = _infer_group(site)
    channels = site.spec(1).dims
    rows = ((x.dims[0], *channels), (x.dims[0], *(1,) * (x.ndim - 2), *channels))
    if site.spec(3).dims not in (x.dims, *(rows if site.attrs["channels_last"] else ())):
        raise site.fail(f"skip is {site.spec(3)}, expected {x}")
    if site.has(4) and site.spec(4).dims != channels:
        raise site.fail(f"bias is {site.spec(4)}, expected {channels[0]} values")
    return (x, x)[: len(site.node.outputs)]


def _skip(
    xp: Any, site: Site, x: Array, gamma: Array, beta: Array, skip: Array, bias: Array | None = None
) -> tuple[Array, ...]:
    axis = x.ndim - 1 if site.attrs["channels_last"] else 1
    skip = skip.reshape(len(x), *(1,) * (x.ndim - 2), -1) if skip.ndim == 2 else skip
    total = wide(x) + wide(skip)
    if bias is not None:
        total = total + wide(bias).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    made = _group(xp, site, total, gamma, beta).astype(x.dtype)
    return (made, total.astype(x.dtype))[: len(site.node.outputs)]


def _skip_rows(site: Site) -> Rows:
    of = _group_rows(site)
    narrow = site.spec(3).dims != site.spec(0).dims  # of channels, which are the last axis then
    skip = (of.shape[0], 1, *of.shape[2:]) if narrow else of.shape
    inputs = {**of.inputs, "skip": (3, skip), "plus": (4, of.inputs["bias"][1])}
    return replace(of, inputs=inputs, outputs={"sums": 1})


# ---- sums and gates


def _infer_bias(site: Site) -> tuple[TensorSpec]:
    x = site.spec(0)
    if x.ndim != 3 or site.spec(1).dims != x.dims[2:]:
        raise site.fail(f"X {x} and bias {site.spec(1)} do not fit each other")
    return (x,)


def _infer_bias_add(site: Site) -> tuple[TensorSpec]:
    (x,) = _infer_bias(site)
    if site.spec(2) != x:
        raise site.fail(f"skip is {site.spec(2)}, expected {x}")
    return (x,)


def _infer_split(site: Site) -> tuple[TensorSpec]:
    (x,) = _infer_bias(site)
    if x.dims[2] % 2:
        raise site.fail(f"X is {x}, expected an even last axis")
    return (TensorSpec((*x.dims[:2], x.dims[2] // 2), x.dtype),)


def _split(xp: Any, site: Site, x: Array, bias: Array) -> Array:
    left, right = xp.split(wide(x) + wide(bias), 2, axis=-1)
    return (left * activation(xp, "gelu", right)).astype(x.dtype)


_GROUPS: dict[str, Any] = {"groups": REQUIRED, "activation": REQUIRED, "channels_last": 1, "epsilon": 1e-5}
_IMAGES, _CHANNELS = f32(2, 5, 4, 6), (f32(6), f32(6))
_CONV_SPEC, _CONV = channels_last(conv_spec, compute_conv, lambda site: True)


def _weights_first(site: Site) -> Site:
    """The site with weights (outputs, inputs a group, spatial...) instead of (outputs, spatial..., inputs a group)."""
    w = site.spec(1)
    dims = (*w.dims[:1], *w.dims[-1:], *w.dims[1:-1])
    return replace(site, ins=(site.ins[0], TensorSpec(dims, w.dtype), *site.ins[2:]))


def _infer_conv(site: Site) -> Sequence[TensorSpec]:
    if site.spec(1).ndim < 3:
        raise site.fail(f"weights are {site.spec(1)}, expected (outputs, spatial..., inputs a group)")
    return _CONV_SPEC(_weights_first(site))


def _conv(xp: Any, site: Site, x: Array, w: Array, bias: Array | None = None) -> Array:
    return _CONV(xp, _weights_first(site), x, xp.moveaxis(w, -1, 1), bias)


OPS: tuple[Op, ...] = (
    ms_op(
        "GroupNorm",
        _infer_group,
        _group,
        (
            Case("last", (_IMAGES, *_CHANNELS), {"groups": 3, "activation": 0}),
            Case("silu", (_IMAGES, *_CHANNELS), {"groups": 2, "activation": 1, "epsilon": 0.1}),
            Case("first", (f32(2, 6, 5, 4), *_CHANNELS), {"groups": 3, "activation": 1, "channels_last": 0}),
            Case("long", (f32(1, 70, 90, 6), *_CHANNELS), {"groups": 2, "activation": 1}),
        ),
        kernels=rows(_group_rows),
        **_GROUPS,
    ),
    ms_op(
        "SkipGroupNorm",
        _infer_skip,
        _skip,
        (
            Case("skip", (_IMAGES, *_CHANNELS, _IMAGES), {"groups": 3, "activation": 0}, n_outs=2),
            Case("bias", (_IMAGES, *_CHANNELS, f32(2, 6), f32(6)), {"groups": 2, "activation": 1}, n_outs=2),
        ),
        kernels=rows(_skip_rows, inplace=()),
        **_GROUPS,
        needs=(0, 1, 2, 3),
    ),
    ms_op(
        "BiasAdd",
        _infer_bias_add,
        lambda xp, site, x, bias, skip: x + bias + skip,
        (Case("rows", (f32(2, 5, 6), f32(6), f32(2, 5, 6))),),
    ),
    ms_op("BiasSplitGelu", _infer_split, _split, (Case("rows", (f32(2, 5, 8), f32(8))),)),
    ms_op(
        "NhwcConv",
        _infer_conv,
        _conv,
        (
            Case("padded", (f32(2, 5, 6, 4), f32(5, 3, 2, 4), f32(5)), {"pads": (1, 1, 1, 1), "strides": (2, 1)}),
            Case("grouped", (f32(1, 5, 6, 6), f32(4, 2, 2, 3)), {"group": 2}),
        ),
        **ATTRS,
        group=1,
        needs=(0, 1),
    ),
)
