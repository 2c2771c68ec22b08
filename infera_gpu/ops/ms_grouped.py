"""com.microsoft: GroupQueryAttention, which keeps its cache right-padded, one length a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._families import single
from infera_gpu.ops._ms import ms_op
from infera_gpu.ops._triton_grouped import GROUPED as TRITON
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import attention as portable
from infera_kernels.portable.norm import standardized

_ONLY = {"sliding_window_cache": 0, "kv_cache_bit_width": 0, "k_quant_type": "NONE", "v_quant_type": "NONE"}


def _sizes(site: Site) -> tuple[int, int, int]:
    """Query heads, key and value heads, head size."""
    heads, groups, q = int(site.attrs["num_heads"]), int(site.attrs["kv_num_heads"]), site.spec(0)
    packed = not site.has(1)
    parts = heads + 2 * groups if packed else heads
    if heads < 1 or groups < 1 or heads % groups or q.ndim != 3 or q.dims[2] % parts or packed == site.has(2):
        raise site.fail(f"query is {q}, expected (batch, sequence, {parts} heads), {groups} of them for keys")
    size = q.dims[2] // parts
    for i in () if packed else (1, 2):
        if site.spec(i).dims != (*q.dims[:2], groups * size):
            raise site.fail(f"input {i} is {site.spec(i)}, expected {[*q.dims[:2], groups * size]}")
    return heads, groups, size


def _lengths(site: Site) -> tuple[int, int]:
    """Keys of the longest row, and of the caches that come out."""
    total = single(site, 6, "total_sequence_length")
    past = site.spec(3).dims[2] if site.has(3) else 0
    if total is None or total < site.spec(0).dims[1]:
        raise site.fail(f"total_sequence_length is {total}, expected at least {site.spec(0).dims[1]}, the new tokens")
    return total, max(total, past)


def _infer(site: Site) -> tuple[TensorSpec, ...]:
    heads, groups, size = _sizes(site)
    for name, supported in _ONLY.items():
        if site.attrs[name] != supported:
            raise site.fail(f"{name} {site.attrs[name]!r} is not supported, only {supported!r} is")
    if any(site.has(i) for i in (12, 13, 16)):
        raise site.fail("k_scale, v_scale and query_seqlens are not supported")
    q = site.spec(0)
    batch, length, _ = q.dims
    if site.has(3) != site.has(4):
        raise site.fail("past_key and past_value come together")
    for i in (3, 4) if site.has(3) else ():
        if site.spec(i).ndim != 4 or site.spec(i).dims != (batch, groups, site.spec(3).dims[2], size):
            raise site.fail(f"input {i} is {site.spec(i)}, expected [{batch}, {groups}, past, {size}]")
    if site.spec(5).size != batch:
        raise site.fail(f"seqlens_k is {site.spec(5)}, expected one number for each of {batch} rows")
    total, present = _lengths(site)
    if site.attrs["do_rotary"]:
        cos, sin = site.spec(7), site.spec(8)
        if cos.ndim != 2 or cos.dims != sin.dims or not 0 < 2 * cos.dims[1] <= size or cos.dims[0] < total:
            raise site.fail(f"cos_cache {cos} and sin_cache {sin} do not fit heads of {size}, {total} keys long")
    if site.has(14) != site.has(15) or any(site.has(i) and site.spec(i).dims != (size,) for i in (14, 15)):
        raise site.fail(f"q_norm_weight and k_norm_weight come together, each with {size} elements")
    if site.has(11) and site.spec(11).dims != (heads,):
        raise site.fail(f"head_sink is {site.spec(11)}, expected one number for each of {heads} heads")
    if not site.attrs["causal"] and site.attrs["local_window_size"] > 0:
        raise site.fail("local_window_size needs causal attention")
    cache = TensorSpec((batch, groups, present, size), q.dtype)
    return (
        TensorSpec((batch, length, heads * size), q.dtype),
        cache,
        cache,
        TensorSpec((batch, heads, length, total), q.dtype),
    )


def _normalized(xp: Any, x: Array, weight: Array | None, epsilon: float) -> Array:
    """RMS normalisation of each head."""
    if weight is None:
        return x
    made, _, _ = standardized(xp, x, (-1,), epsilon, center=False)
    return (made * weight).astype(x.dtype)


def _grouped(xp: Any, site: Site, *ins: Array | None) -> tuple[Array, ...]:
    (query, key, value, past_k, past_v, last, _, cos, sin, at, bias, sink, _, _, q_weight, k_weight) = (
        *ins,
        *[None] * (16 - len(ins)),
    )[:16]
    assert query is not None
    assert last is not None
    attrs = site.attrs
    heads, groups, _ = _sizes(site)
    total, present = _lengths(site)
    length = query.shape[1]
    if key is None:
        split = portable.split_heads(query, heads + 2 * groups)
        q, k, v = split[:, :heads], split[:, heads : heads + groups], split[:, heads + groups :]
    else:
        q, k, v = (portable.split_heads(x, n) for x, n in ((query, heads), (key, groups), (value, groups)))
    lengths = last.reshape(-1).astype(np.int64) + 1
    if xp is np and lengths.size and not (lengths.min() >= 1 and lengths.max() <= present):
        raise IndexError(f"seqlens_k is out of range for {present} keys")
    before = xp.zeros_like(lengths) if length == total else xp.maximum(lengths - length, 0)
    epsilon = {n: attrs[f"{n}_norm_epsilon"] or attrs["qk_norm_epsilon"] for n in "qk"}
    q, k = _normalized(xp, q, q_weight, epsilon["q"]), _normalized(xp, k, k_weight, epsilon["k"])
    if attrs["do_rotary"]:
        assert cos is not None
        assert sin is not None
        place = before[:, None] + xp.arange(length) if at is None else at
        place = xp.clip(place, 0, len(cos) - 1)
        how = {"width": 2 * cos.shape[1], "interleaved": bool(attrs["rotary_interleaved"])}
        q, k = (
            portable.rotary(xp, x.transpose(0, 2, 1, 3), cos[place], sin[place], **how).transpose(0, 2, 1, 3)
            for x in (q, k)
        )
    k, v = (portable.continued(xp, past, x, before, present) for past, x in ((past_k, k), (past_v, v)))
    window = int(attrs["local_window_size"])
    seen = portable.within(
        xp, length, total, before, left=window - 1 if window > 0 else -1, right=0 if attrs["causal"] else -1
    )
    seen = seen & (xp.arange(total) < xp.maximum(lengths, 1).reshape(-1, 1, 1, 1))
    y, shown = portable.attention(
        xp,
        q,
        k[:, :, :total],
        v[:, :, :total],
        xp.where(seen, 0 if bias is None else bias[..., :total], -np.inf).astype(q.dtype),
        scale=attrs["scale"] or None,
        softcap=attrs["softcap"] or 0.0,
        shown=3 if attrs["qk_output"] == 2 else 2,
        sink=sink if sink is not None or attrs["smooth_softmax"] != 1 else xp.zeros(heads, q.dtype),
    )
    return portable.merge_heads(y), k, v, shown


def _total(value: int) -> np.ndarray[Any, Any]:
    return np.array([value], np.int32)


def _last(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32)


_HEADS = {"num_heads": 4, "kv_num_heads": 2}
_NEW = (f32(2, 3, 32), f32(2, 3, 16), f32(2, 3, 16))
_STEP = (f32(2, 1, 32), f32(2, 1, 16), f32(2, 1, 16))
_CACHE = (f32(2, 2, 6, 8), f32(2, 2, 6, 8))
_WIDE = ((f32(2, 1, 64), f32(2, 1, 32), f32(2, 1, 32)), (f32(2, 2, 6, 16), f32(2, 2, 6, 16)))
_TURN = (f32(9, 8), f32(9, 8))
_PROMPT = (*_NEW, None, None, _last(2, 2), _total(3))
GROUPED = replace(
    ms_op(
        "GroupQueryAttention",
        _infer,
        _grouped,
        (
            Case("prompt", _PROMPT, _HEADS, n_outs=3),
            Case("scaled", _PROMPT, {**_HEADS, "scale": 0.2, "softcap": 1.5}, n_outs=3),
            Case("step", (*_STEP, *_CACHE, _last(6, 6), _total(7)), _HEADS, n_outs=3),
            Case("uneven", (*_STEP, *_CACHE, _last(6, 3), _total(7)), _HEADS, n_outs=3),
            Case("buffer", (*_STEP, *_CACHE, _last(4, 2), _total(5)), _HEADS, n_outs=3),
            Case("window", (*_STEP, *_CACHE, _last(6, 4), _total(7)), {**_HEADS, "local_window_size": 3}, n_outs=3),
            Case("packed", (f32(2, 3, 64), None, None, None, None, _last(2, 2), _total(3)), _HEADS, n_outs=3),
            Case(
                "chunk",
                (f32(1, 3, 32), f32(1, 3, 16), f32(1, 3, 16), *(f32(1, 2, 4, 8),) * 2, _last(6), _total(7)),
                _HEADS,
                n_outs=3,
            ),
            Case(
                "rotary", (*_WIDE[0], *_WIDE[1], _last(6, 3), _total(7), *_TURN), {**_HEADS, "do_rotary": 1}, n_outs=3
            ),
            Case(
                "interleaved",
                (*_WIDE[0], *_WIDE[1], _last(6, 3), _total(7), *_TURN),
                {**_HEADS, "do_rotary": 1, "rotary_interleaved": 1},
                n_outs=3,
            ),
            Case("bias", (*_PROMPT, None, None, None, f32(2, 1, 3, 3)), _HEADS),
            Case("capped_bias", (*_PROMPT, None, None, None, f32(1, 4, 3, 3)), {**_HEADS, "softcap": 0.7}),
            Case("sink", (*_PROMPT, None, None, None, None, f32(4)), _HEADS),
            Case("smooth", _PROMPT, {**_HEADS, "smooth_softmax": 1}),
            Case("scores", (*_STEP, *_CACHE, _last(6, 3), _total(7)), {**_HEADS, "qk_output": 2}, n_outs=4),
            Case("everything_seen", _PROMPT, {**_HEADS, "causal": 0}, n_outs=3),
        ),
        kernels=TRITON,
        causal=1,
        do_rotary=0,
        k_norm_epsilon=None,
        k_quant_type="NONE",
        kv_cache_bit_width=0,
        kv_num_heads=REQUIRED,
        local_window_size=-1,
        num_heads=REQUIRED,
        q_norm_epsilon=None,
        qk_norm_epsilon=1e-6,
        qk_output=0,
        rotary_interleaved=0,
        scale=None,
        sliding_window_cache=0,
        smooth_softmax=-1,
        softcap=0.0,
        v_quant_type="NONE",
        needs=(0, 5, 6),
    ),
    values=(6,),
)

OPS: tuple[Op, ...] = (GROUPED,)
