"""com.microsoft: attention and rotary embedding."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32, same_as
from infera_gpu.ops import _triton_ms_attention as triton
from infera_gpu.ops._attention import MERGED, MULTI_HEAD
from infera_gpu.ops._ms import ms_op
from infera_gpu.ops._rotary import MS_ROTARY
from infera_gpu.ops._triton_rotary import MS_ROTARY as TRITON_ROTARY
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import attention as portable
from infera_kernels.portable.matmul import gemm


def _infer_mha(site: Site) -> tuple[TensorSpec, ...]:
    q, heads = site.spec(0), int(site.attrs["num_heads"])
    if any(site.has(i) for i in (8, 9)):
        raise site.fail("past_sequence_length and cache_indirection are not supported")
    if q.ndim == 5 and not site.has(1) and not site.has(2) and q.dims[2:4] == (heads, 3):
        size, keys, out = q.dims[4], q.dims[1], heads * q.dims[4]
        return _outputs(site, q.dims[:2], heads, keys, size, out)
    if q.ndim != 3 or not site.has(1) or heads < 1 or q.dims[2] % heads:
        raise site.fail(
            f"query is {q}, expected (batch, sequence, {heads} heads), or {heads} x 3 x size with q, k and v"
        )
    k, size = site.spec(1), q.dims[2] // heads
    if k.ndim == 5 and not site.has(2) and (k.dims[0], *k.dims[2:]) == (q.dims[0], heads, 2, size):
        return _outputs(site, q.dims[:2], heads, k.dims[1], size, q.dims[2])
    v = site.spec(2)
    if k.ndim == 4:
        keys, out = k.dims[2], v.dims[3] * heads
    else:
        if k.ndim != 3 or v.ndim != 3 or k.dims[:2] != v.dims[:2] or k.dims[2] != q.dims[2] or v.dims[2] % heads:
            raise site.fail(f"key {k} and value {v} do not fit query {q}")
        keys, out = k.dims[1], v.dims[2]
    return _outputs(site, q.dims[:2], heads, keys, size, out)


def _outputs(site: Site, rows: tuple[int, ...], heads: int, keys: int, size: int, out: int) -> tuple[TensorSpec, ...]:
    """The result, both caches, and the scores before softmax, as onnxruntime gives them."""
    dtype = site.spec(0).dtype
    total = keys + (site.spec(6).dims[2] if site.has(6) else 0)
    made = (
        TensorSpec((*rows, out), dtype),
        TensorSpec((rows[0], heads, total, size), dtype),
        TensorSpec((rows[0], heads, total, out // heads), dtype),
        TensorSpec((rows[0], heads, rows[1], total), dtype),
    )
    return made[: max(1, len(site.node.outputs))]


def _filter_value(site: Site) -> float:
    given = site.attrs["mask_filter_value"]
    return -10000.0 if given is None else float(given)


def _key_bias(xp: Any, site: Site, mask: Array, batch: int, keys: int, dtype: Any) -> Array:
    """A padding mask as a bias: ends (batch,), ends and beginnings (2 batch,), lengths and sums of lengths (3 batch +
    2,), or ones where keys count: (batch, keys) or (batch, queries, keys)."""
    if mask.ndim == 1 and mask.shape[0] in (batch, 2 * batch, 3 * batch + 2):
        seen = xp.arange(keys) < mask[:batch].reshape(-1, 1, 1, 1)
        if mask.shape[0] == 2 * batch:
            seen = seen & (xp.arange(keys) >= mask[batch:].reshape(-1, 1, 1, 1))
    elif mask.ndim == 2 and mask.shape == (batch, keys):
        seen = mask[:, None, None, :] != 0
    elif mask.ndim == 3 and mask.shape[0] == batch and mask.shape[2] == keys:
        seen = mask[:, None] != 0
    else:
        raise site.fail(f"a mask of {list(mask.shape)} is not supported for {batch} rows of {keys} keys")
    return xp.where(seen, 0, _filter_value(site)).astype(dtype)


def _mha(
    xp: Any,
    site: Site,
    q: Array,
    k: Array | None = None,
    v: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    extra: Array | None = None,
    past_k: Array | None = None,
    past_v: Array | None = None,
    *_: Array | None,
) -> tuple[Array, ...]:
    heads = int(site.attrs["num_heads"])
    if q.ndim == 5:
        q, k, v = (q[:, :, :, i].reshape(*q.shape[:2], -1) for i in range(3))
    elif k is not None and k.ndim == 5:
        k, v = (k[:, :, :, i].reshape(*k.shape[:2], -1) for i in range(2))
    assert k is not None
    assert v is not None
    if bias is not None:
        n = q.shape[2]
        q = q + bias[:n]
        if k.ndim == 3:
            k, v = k + bias[n : 2 * n], v + bias[2 * n :]
    q = portable.split_heads(q, heads)
    if k.ndim == 3:
        k, v = portable.split_heads(k, heads), portable.split_heads(v, heads)
    if past_k is not None:
        k, v = xp.concatenate((past_k, k), axis=2), xp.concatenate((past_v, v), axis=2)
    total = None if mask is None else _key_bias(xp, site, mask, q.shape[0], k.shape[2], q.dtype)
    if extra is not None:
        total = extra if total is None else total + extra
    if site.attrs["unidirectional"]:
        seen = portable.within(xp, q.shape[2], k.shape[2], k.shape[2] - q.shape[2], left=-1, right=0)
        ahead = xp.where(seen, 0, _filter_value(site)).astype(q.dtype)
        total = ahead if total is None else total + ahead
    y, weights = portable.attention(xp, q, k, v, total, scale=site.attrs["scale"] or None, shown=2)
    return portable.merge_heads(y), k, v, weights


def _infer_attention(site: Site) -> tuple[TensorSpec, ...]:
    x, w, heads = site.spec(0), site.spec(1), int(site.attrs["num_heads"])
    widths = _widths(site)
    if x.ndim != 3 or w.ndim != 2 or w.dims[0] != x.dims[2] or sum(widths) != w.dims[1]:
        raise site.fail(f"input {x} and weights {w} do not fit q, k and v of {list(widths)}")
    if heads < 1 or any(n % heads for n in widths) or widths[0] != widths[1]:
        raise site.fail(f"q, k and v of {list(widths)} are not {heads} heads, or q and k differ")
    if site.has(6) or site.attrs["do_rotary"] or site.attrs["past_present_share_buffer"]:
        raise site.fail("past_sequence_length, past_present_share_buffer and do_rotary are not supported")
    size, past = widths[0] // heads, 0
    if site.has(4):
        given = site.spec(4)
        past = given.dims[3] if given.ndim == 5 else 0
        if given.dims != (2, x.dims[0], heads, past, size) or widths[2] != widths[0]:
            raise site.fail(f"past is {given}, expected [2, {x.dims[0]}, {heads}, past, {size}], and v as wide as k")
    made = (
        TensorSpec((*x.dims[:2], widths[2]), x.dtype),
        TensorSpec((2, x.dims[0], heads, past + x.dims[1], size), x.dtype),
    )
    return made[: max(1, len(site.node.outputs))]


def _widths(site: Site) -> tuple[int, ...]:
    """Elements of q, k and v."""
    given = site.attrs["qkv_hidden_sizes"]
    widths = tuple(map(int, given)) if given else (site.spec(1).dims[-1] // 3,) * 3
    if len(widths) != 3 or min(widths) < 1:
        raise site.fail(f"qkv_hidden_sizes is {list(widths)}, expected three numbers")
    return widths


def _attention(
    xp: Any,
    site: Site,
    x: Array,
    w: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    past: Array | None = None,
    extra: Array | None = None,
    *_: Array | None,
) -> tuple[Array, ...]:
    qkv = gemm(xp, x, w, bias, alpha=1.0, beta=1.0)
    a, b, _c = _widths(site)
    q, k, v = qkv[..., :a], qkv[..., a : a + b], qkv[..., a + b :]
    before = (None, None) if past is None else (past[0], past[1])
    y, k, v, _weights = _mha(xp, site, q, k, v, None, mask, extra, *before)
    return (y, xp.stack((k, v))) if k.shape == v.shape else (y,)


def _rotary(xp: Any, site: Site, x: Array, at: Array, cos: Array, sin: Array) -> Array:
    width = int(site.attrs["rotary_embedding_dim"]) or 2 * cos.shape[1]
    heads = int(site.attrs["num_heads"])
    if site.attrs["is_packed_batching"] or site.attrs["scale"] != 1.0:
        raise site.fail("is_packed_batching and scale are not supported")
    flat = x.ndim == 3
    if flat:
        size = x.shape[2] // heads if heads else width
        split = x.reshape(*x.shape[:2], -1, size)
    else:
        split = x.transpose(0, 2, 1, 3)
    place = at.reshape(-1, 1) + xp.arange(split.shape[1]) if at.size == 1 else at
    if xp is np and place.size and not 0 <= place.min() <= place.max() < len(cos):
        raise IndexError(f"a position is out of range for {len(cos)} in the caches")
    place = xp.broadcast_to(place, split.shape[:2])
    made = portable.rotary(xp, split, cos[place], sin[place], width=width, interleaved=bool(site.attrs["interleaved"]))
    return made.reshape(x.shape) if flat else made.transpose(0, 2, 1, 3)


_SEEN = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
_ROWS = np.array([[[1, 0], [1, 1]], [[0, 1], [1, 1]]], np.int32)
_QKV = (f32(2, 3, 16), f32(2, 5, 16), f32(2, 5, 16))
_PARTIAL = {"rotary_embedding_dim": 4, "num_heads": 4}
OPS: tuple[Op, ...] = (
    ms_op(
        "MultiHeadAttention",
        _infer_mha,
        _mha,
        (
            Case("plain", _QKV, {"num_heads": 4}),
            Case("bias", (*_QKV, f32(48)), {"num_heads": 2, "scale": 0.3}),
            Case("mask", (*_QKV, None, np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)), {"num_heads": 4}),
            Case("added", (*_QKV, None, None, f32(1, 4, 3, 5)), {"num_heads": 4}),
            Case("past", (*_QKV, None, None, None, f32(2, 4, 6, 4), f32(2, 4, 6, 4)), {"num_heads": 4}, n_outs=3),
            Case("cross", (f32(2, 3, 16), f32(2, 4, 5, 4), f32(2, 4, 5, 4)), {"num_heads": 4}),
            Case("lengths", (*_QKV, None, np.array([3, 5], np.int32)), {"num_heads": 4}),
            Case("causal", (*(f32(2, 4, 16),) * 3,), {"num_heads": 4, "unidirectional": 1}),
            Case("weights", (*_QKV, None, None, f32(2, 1, 3, 5)), {"num_heads": 4}, n_outs=4),
        ),
        kernels={**MULTI_HEAD, **triton.MULTI_HEAD},
        mask_filter_value=None,
        num_heads=REQUIRED,
        scale=None,
        unidirectional=0,
    ),
    ms_op(
        "Attention",
        _infer_attention,
        _attention,
        (
            Case("plain", (f32(2, 3, 8), f32(8, 24), f32(24)), {"num_heads": 2}),
            Case("causal", (f32(2, 4, 8), f32(8, 24), f32(24)), {"num_heads": 4, "unidirectional": 1}),
            Case("mask", (f32(2, 3, 8), f32(8, 24), f32(24), _SEEN), {"num_heads": 2}),
            Case("wide", (f32(2, 3, 8), f32(8, 28), f32(28)), {"num_heads": 2, "qkv_hidden_sizes": (8, 8, 12)}),
            Case("past", (f32(2, 3, 8), f32(8, 24), f32(24), None, f32(2, 2, 2, 5, 4)), {"num_heads": 2}, n_outs=2),
            Case("ends", (f32(2, 3, 8), f32(8, 24), f32(24), np.array([2, 3], np.int32)), {"num_heads": 2}),
            Case("begins", (f32(2, 3, 8), f32(8, 24), f32(24), np.array([3, 2, 1, 0], np.int32)), {"num_heads": 2}),
            Case("rows", (f32(2, 2, 8), f32(8, 24), f32(24), _ROWS), {"num_heads": 2}),
            Case("added", (f32(2, 3, 8), f32(8, 24), f32(24), None, None, f32(2, 2, 3, 3)), {"num_heads": 2}),
        ),
        kernels={**MERGED, **triton.MERGED},
        do_rotary=0,
        mask_filter_value=None,
        num_heads=REQUIRED,
        past_present_share_buffer=0,
        qkv_hidden_sizes=None,
        rotary_embedding_dim=0,
        scale=None,
        unidirectional=0,
    ),
    ms_op(
        "RotaryEmbedding",
        same_as(),
        _rotary,
        (
            Case("flat", (f32(2, 3, 16), np.array([[0, 1, 2], [4, 5, 6]]), f32(9, 4), f32(9, 4))),
            Case("offset", (f32(2, 4, 3, 8), np.array([2]), f32(9, 4), f32(9, 4)), {"interleaved": 1}),
            Case("partial", (f32(2, 3, 32), np.array([3]), f32(9, 2), f32(9, 2)), _PARTIAL),
            Case("long", (f32(1, 40, 128), np.arange(40)[None], f32(64, 16), f32(64, 16))),
        ),
        kernels={**MS_ROTARY, **TRITON_ROTARY},
        interleaved=0,
        is_packed_batching=0,
        num_heads=0,
        rotary_embedding_dim=0,
        scale=1.0,
        needs=(0, 1, 2, 3),
    ),
)
