"""com.microsoft: attention whose projections are quantised."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.op import REQUIRED, Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops import _jit_quant, ms_attention
from infera_gpu.ops._families import integers
from infera_gpu.ops._ms import F32, ms_op
from infera_gpu.ops.ms_quant_matmul import bind_scaled, integer_to_float
from infera_gpu.ops.quant_matmul import COMPILED, NUMPY, Arithmetic, check_parameters
from infera_gpu.spec import Array, TensorSpec

_MASK, _PAST = 5, 8
_MULTI_HEAD: Op = next(op for op in ms_attention.OPS if op.name == "MultiHeadAttention")
_SHARED = ("mask_filter_value", "num_heads", "scale", "unidirectional")
"""Attributes that both attentions have."""


def _multi_head(site: Site) -> Site:
    """The site of the attention that follows the projections: query, key, value, past key and past value of its own."""
    x, w = site.spec(0), site.spec(1)
    if x.ndim != 3 or w.ndim != 2 or w.dims[0] != x.dims[2] or w.dims[1] % 3 or site.spec(2).dims != w.dims[1:]:
        raise site.fail(f"input {x}, weights {w} and bias {site.spec(2)} do not fit three projections")
    check_parameters(site, (3, 6), (4, 7), w.dims[1])
    if site.attrs["do_rotary"] or site.attrs["past_present_share_buffer"]:
        raise site.fail("do_rotary and past_present_share_buffer are not supported")
    hidden, past = w.dims[1] // 3, None
    projected = TensorSpec((*x.dims[:2], hidden), F32)
    if site.has(_PAST):
        heads = max(int(site.attrs["num_heads"]), 1)
        fixed, given = (2, x.dims[0], heads, hidden // heads), site.spec(_PAST).dims
        if len(given) != 5 or (*given[:3], given[4]) != fixed:
            raise site.fail(f"past is {site.spec(_PAST)}, expected {list(fixed[:3])}, steps and {fixed[3]}")
        past = TensorSpec(site.spec(_PAST).dims[1:], F32)
    ins = (projected,) * 3 + (None, site.spec(_MASK) if site.has(_MASK) else None, None, past, past)
    names = tuple("" if spec is None else made_name(site.node.outputs[0], i) for i, spec in enumerate(ins))
    attrs = {k: site.attrs[k] for k in _SHARED if site.attrs[k] is not None}
    outputs = (site.node.outputs[0], *(made_name(site.node.outputs[0], n) for n in ("key", "value")))
    node = Node(site.node.op, names, outputs, attrs, _MULTI_HEAD.domain, site.node.name)
    return Site(node, _MULTI_HEAD.fill(node), ins, (None,) * len(ins), opset=site.opset)


def _infer(site: Site) -> Sequence[TensorSpec]:
    made, key, *_ = _MULTI_HEAD.infer(_multi_head(site))
    assert made is not None
    assert key is not None
    return (made, TensorSpec((2, *key.dims), key.dtype))[: len(site.node.outputs)]


def _attend(xp: Any, site: Site, projected: Array, mask: Array | None, past: Array | None) -> tuple[Array, ...]:
    """What is made of the three projections, and the keys and values of past and present."""
    q, k, v = xp.split(projected, 3, axis=-1)
    past_k, past_v = (None, None) if past is None else past
    made, key, value, *_ = _MULTI_HEAD.outputs(xp, _multi_head(site), (q, k, v, None, mask, None, past_k, past_v))
    return (made, xp.stack((key, value)))[: len(site.node.outputs)]


def _compute(
    xp: Any,
    site: Site,
    x: Array,
    w: Array,
    bias: Array,
    x_scale: Array,
    w_scale: Array,
    mask: Array | None = None,
    x_zero: Array | None = None,
    w_zero: Array | None = None,
    past: Array | None = None,
) -> tuple[Array, ...]:
    projected = integer_to_float(xp, site, x, w, x_scale, w_scale, x_zero, w_zero, bias)
    return _attend(xp, site, projected, mask, past)


def _bind(site: Site, io: Buffers, arithmetic: Arithmetic) -> list[Call]:
    *_, mask, _, _, past = (*io.ins, *(None,) * 9)[:9]
    shape = (*io.ins[0].shape[:2], io.ins[1].shape[1])
    sums, projected = io.scratch(shape, np.int32), io.scratch(shape, np.float32)

    def attend() -> None:
        for out, made in zip(io.outs, _attend(np, site, projected, mask, past), strict=True):
            np.copyto(out, made)

    return [
        *arithmetic.product(site, io, (0, 6, 1, 7), sums),
        *bind_scaled(sums, (io.ins[3], io.ins[4]), io.ins[2], projected, io),
        (attend, ()),
    ]


def _compiled(site: Site) -> bool:
    return _jit_quant.takes(site, 0, 6) and _jit_quant.packs(site, 1, 7)


_WEIGHT = integers(5, np.int8, 8, 24)


def _number(value: float, dtype: Any = np.float32) -> Array:
    return np.array(value, dtype)


_X = integers(6, np.uint8, 2, 3, 8)
_SCALES = np.linspace(0.01, 0.03, 24, dtype=np.float32)
_TENSOR = (f32(24), _number(0.0213), _number(0.0117))
_ZEROS = (_number(120, np.uint8), _number(3, np.int8))
_COLUMN_ZEROS = (_number(120, np.uint8), np.arange(-12, 12, dtype=np.int8))

OPS: tuple[Op, ...] = (
    ms_op(
        "QAttention",
        _infer,
        _compute,
        (
            Case("plain", (_X, _WEIGHT, *_TENSOR), {"num_heads": 2}),
            Case("zeros", (_X, _WEIGHT, *_TENSOR, None, *_ZEROS), {"num_heads": 4, "scale": 0.3}),
            Case(
                "columns",
                (_X, _WEIGHT.view(np.uint8), f32(24), _number(0.0213), _SCALES, None, _ZEROS[0]),
                {"num_heads": 2},
            ),
            Case(
                "mask",
                (_X, _WEIGHT, *_TENSOR[:2], _SCALES, np.array([[1, 1, 0], [1, 1, 1]], np.int32), *_COLUMN_ZEROS),
                {"num_heads": 2},
            ),
            Case("lengths", (_X, _WEIGHT, *_TENSOR, np.array([2, 3], np.int32), *_ZEROS), {"num_heads": 2}),
            Case(
                "causal",
                (_X, _WEIGHT, *_TENSOR, None, *_ZEROS, f32(2, 2, 2, 5, 4)),
                {"num_heads": 2, "unidirectional": 1},
                n_outs=2,
            ),
            Case(
                "past",
                (integers(6, np.uint8, 2, 1, 8), _WEIGHT, *_TENSOR, None, *_ZEROS, f32(2, 2, 2, 5, 4)),
                {"num_heads": 2, "unidirectional": 1},
                n_outs=2,
            ),
        ),
        kernels={
            "cpu": Kernel(
                partial(_bind, arithmetic=NUMPY), lambda site: site.spec(0).size > 0, strided=True, allocates=True
            ),
            "jit": Kernel(partial(_bind, arithmetic=COMPILED), _compiled, strided=True, allocates=True),
        },
        do_rotary=0,
        mask_filter_value=None,
        num_heads=REQUIRED,
        past_present_share_buffer=0,
        scale=None,
        unidirectional=0,
        needs=(0, 1, 2, 3, 4),
    ),
)
