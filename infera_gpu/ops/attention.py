"""Attention, rotary embedding, and caches written in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Case, GraphText, Op, Site, f32
from infera_gpu.ops._attention import ATTENTION
from infera_gpu.ops._families import NARROW, element_type, narrow, normalized, plain, requiring, shaped, uniform
from infera_gpu.ops._later import Kinds
from infera_gpu.ops._rotary import ROTARY
from infera_gpu.ops._triton_attention import ATTENTION as TRITON_ATTENTION
from infera_gpu.ops._triton_rotary import ROTARY as TRITON_ROTARY
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import attention as portable
from infera_kernels.portable.matmul import matmul

_ATTENTION_23: dict[str, Any] = {
    "is_causal": 0,
    "kv_num_heads": None,
    "q_num_heads": None,
    "qk_matmul_output_mode": 0,
    "scale": None,
    "softcap": 0.0,
    "softmax_precision": None,
}


def _heads(site: Site) -> tuple[int, int]:
    """Query heads and key/value heads."""
    q, k = site.spec(0), site.spec(1)
    if q.ndim == 4:
        found = int(q.dims[1]), int(k.dims[1])
    else:
        if site.attrs["q_num_heads"] is None or site.attrs["kv_num_heads"] is None:
            raise site.fail(f"q_num_heads and kv_num_heads are required for {q}")
        found = int(site.attrs["q_num_heads"]), int(site.attrs["kv_num_heads"])
    if min(found) <= 0 or found[0] % found[1]:
        raise site.fail(f"{found[0]} query heads do not share {found[1]} key heads evenly")
    return found


def _as_4d(site: Site, i: int, heads: int) -> tuple[int, ...]:
    """Input i's shape as (batch, heads, sequence, size)."""
    spec = site.spec(i)
    if spec.ndim == 4:
        return spec.dims
    if spec.ndim != 3 or spec.dims[2] % heads:
        raise site.fail(f"input {i} is {spec}, expected four axes, or three of which the last holds {heads} heads")
    return spec.dims[0], heads, spec.dims[1], spec.dims[2] // heads


def _infer_attention(site: Site) -> tuple[TensorSpec, ...]:
    heads, kv_heads = _heads(site)
    q, k, v = _as_4d(site, 0, heads), _as_4d(site, 1, kv_heads), _as_4d(site, 2, kv_heads)
    if len({s.ndim for s in (site.spec(0), site.spec(1), site.spec(2))}) > 1:
        raise site.fail(f"Q, K and V are {site.spec(0)}, {site.spec(1)} and {site.spec(2)}, expected one rank")
    if q[0] != k[0] or k[:3] != v[:3] or q[3] != k[3]:
        raise site.fail(f"Q {list(q)}, K {list(k)} and V {list(v)} do not fit (batch, heads, sequence, size)")
    if site.has(4) != site.has(5) or (site.has(6) and site.has(4)):
        raise site.fail("past_key and past_value come together, and not with nonpad_kv_seqlen")
    total = k[2]
    if site.has(4):
        pk, pv = site.spec(4).dims, site.spec(5).dims
        if len(pk) != 4 or (pk[:2], pk[3]) != (k[:2], k[3]) or pv != (*v[:2], pk[2], v[3]):
            raise site.fail(f"past_key {list(pk)} and past_value {list(pv)} do not continue K {list(k)}, V {list(v)}")
        total += pk[2]
    if site.has(6) and site.spec(6).dims != (q[0],):
        raise site.fail(f"nonpad_kv_seqlen is {site.spec(6)}, expected one length for each of {q[0]} rows")
    dtype = site.spec(0).dtype
    four = site.spec(0).ndim == 4
    y = (q[0], heads, q[2], v[3]) if four else (q[0], q[2], heads * v[3])
    made = (
        TensorSpec(y, dtype),
        TensorSpec((*k[:2], total, k[3]), site.spec(1).dtype),
        TensorSpec((*v[:2], total, v[3]), site.spec(2).dtype),
        TensorSpec((q[0], heads, q[2], total), dtype),
    )
    return made[: max(1, len(site.node.outputs))]


def _attention(
    xp: Any,
    site: Site,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    past_k: Array | None = None,
    past_v: Array | None = None,
    lengths: Array | None = None,
) -> tuple[Array, ...]:
    heads, kv_heads = _heads(site)
    three = q.ndim == 3
    if three:
        q, k, v = (portable.split_heads(x, n) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if past_k is not None:
        k, v = xp.concatenate((past_k, k), axis=2), xp.concatenate((past_v, v), axis=2)
    queries, keys = q.shape[2], k.shape[2]
    offset: Any = 0 if past_k is None else past_k.shape[2]
    if lengths is not None:
        offset = lengths - queries
    left, right = site.attrs.get("left_window_size", -1), site.attrs.get("right_window_size", -1)
    if site.attrs["is_causal"]:
        right = 0
    minus = xp.full((), -np.inf, q.dtype)
    zero = xp.zeros((), q.dtype)
    bias = None if mask is None else portable.additive(xp, mask, keys, q.dtype)
    if left >= 0 or right >= 0:
        seen = portable.within(xp, queries, keys, offset, left=left, right=right)
        near = xp.where(seen, zero, minus)
        bias = near if bias is None else bias + near
    if lengths is not None:
        there = xp.where(xp.arange(keys) < lengths.reshape(-1, 1, 1, 1), zero, minus)
        bias = there if bias is None else bias + there
    precision = site.attrs["softmax_precision"] and element_type(site, "softmax_precision")
    y, scores = portable.attention(
        xp,
        q,
        k,
        v,
        bias,
        scale=site.attrs["scale"],
        softcap=site.attrs["softcap"],
        precision=precision or None,
        shown=site.attrs["qk_matmul_output_mode"],
    )
    return (portable.merge_heads(y) if three else y), k, v, scores


_MASK = uniform(0, 0, 1, 3, 5) < 0.7
_THREE = {"q_num_heads": 4, "kv_num_heads": 2}
ATTENTION_CASES = (
    Case("plain", (f32(2, 3, 4, 8), f32(2, 3, 6, 8), f32(2, 3, 6, 5))),
    Case("one", (f32(1, 1, 1, 1), f32(1, 1, 1, 1), f32(1, 1, 1, 1))),
    Case("grouped", (f32(2, 4, 3, 8), f32(2, 2, 5, 8), f32(2, 2, 5, 8)), {"is_causal": 1}),
    Case("flat", (f32(2, 3, 32), f32(2, 5, 16), f32(2, 5, 16)), {**_THREE, "scale": 0.3}),
    Case("mask", (f32(2, 3, 3, 8), f32(2, 3, 5, 8), f32(2, 3, 5, 8), f32(3, 5))),
    Case("rows", (f32(2, 3, 3, 8), f32(2, 3, 5, 8), f32(2, 3, 5, 8), f32(2, 1, 3, 5))),
    Case("causal", (f32(1, 2, 150, 8), f32(1, 2, 140, 8), f32(1, 2, 140, 6), f32(150, 140)), {"is_causal": 1}),
    Case("bool_mask", (f32(2, 3, 3, 8), f32(2, 3, 5, 8), f32(2, 3, 5, 8), _MASK)),
    Case("softcap", (f32(2, 3, 3, 8), f32(2, 3, 5, 8), f32(2, 3, 5, 8)), {"softcap": 1.5}),
    Case(
        "past",
        (f32(2, 3, 3, 8), f32(2, 3, 5, 8), f32(2, 3, 5, 8), None, f32(2, 3, 7, 8), f32(2, 3, 7, 8)),
        {"is_causal": 1},
        n_outs=3,
    ),
    Case(
        "scores", (f32(2, 3, 3, 8), f32(2, 3, 5, 8), f32(2, 3, 5, 8), f32(3, 5)), {"qk_matmul_output_mode": 2}, n_outs=4
    ),
    Case("weights", (f32(2, 3, 3, 8), f32(2, 3, 5, 8), f32(2, 3, 5, 8)), {"qk_matmul_output_mode": 3}, n_outs=4),
)


def _attention_op(since: int, attrs: dict[str, Any], cases: tuple[Case, ...]) -> Op:
    return Op(
        "Attention",
        since,
        infer=_infer_attention,
        compute=plain(_attention),
        kernels={**ATTENTION, **TRITON_ATTENTION},
        cases=cases,
        attrs=attrs,
    )


_WINDOW = {"left_window_size": -1, "right_window_size": -1}
_LENGTHS = Case(
    "lengths", (f32(2, 3, 3, 8), f32(2, 3, 5, 8), f32(2, 3, 5, 8), None, None, None, np.array([4, 3])), {"is_causal": 1}
)
_ATTENTION = (
    _attention_op(23, _ATTENTION_23, ATTENTION_CASES),
    _attention_op(24, _ATTENTION_23, (*ATTENTION_CASES[:4], _LENGTHS)),
    _attention_op(
        25,
        {**_ATTENTION_23, **_WINDOW},
        (
            *ATTENTION_CASES[:3],
            Case(
                "window",
                (f32(1, 2, 6, 4), f32(1, 2, 6, 4), f32(1, 2, 6, 4)),
                {"left_window_size": 2, "right_window_size": 1},
            ),
        ),
    ),
)


def _rotary(xp: Any, site: Site, x: Array, cos: Array, sin: Array, at: Array | None = None) -> Array:
    flat = x.ndim == 3
    heads = int(site.attrs["num_heads"] or 0)
    if flat and (heads <= 0 or x.shape[2] % heads):
        raise site.fail(f"num_heads is {heads}, expected a divisor of {x.shape[2]}")
    split = x.reshape(*x.shape[:2], heads, -1) if flat else x.transpose(0, 2, 1, 3)
    width = int(site.attrs["rotary_embedding_dim"]) or split.shape[3]
    if at is not None:
        cos, sin = cos[at], sin[at]
    if cos.shape[-1] != width // 2 or cos.shape != sin.shape:
        raise site.fail(f"the caches are {list(cos.shape)} and {list(sin.shape)}, expected {width // 2} elements last")
    made = portable.rotary(xp, split, cos, sin, width=width, interleaved=bool(site.attrs["interleaved"]))
    return made.reshape(x.shape) if flat else made.transpose(0, 2, 1, 3)


_AT = np.array([[3, 4, 5], [0, 1, 2]])
_ROTARY = Op(
    "RotaryEmbedding",
    23,
    infer=requiring(shaped(lambda site: site.spec(0).dims), 1, 2),
    compute=plain(_rotary),
    kernels={**ROTARY, **TRITON_ROTARY},
    attrs={"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0},
    cases=(
        Case("heads", (f32(2, 4, 3, 8), f32(2, 3, 4), f32(2, 3, 4))),
        Case("positions", (f32(2, 4, 3, 8), f32(50, 4), f32(50, 4), _AT)),
        Case("flat", (f32(2, 3, 32), f32(50, 4), f32(50, 4), _AT), {"num_heads": 4}),
        Case("interleaved", (f32(2, 4, 3, 8), f32(50, 4), f32(50, 4), _AT), {"interleaved": 1}),
        Case("partial", (f32(2, 4, 3, 8), f32(50, 2), f32(50, 2), _AT), {"rotary_embedding_dim": 4}),
        Case("long", (f32(1, 4, 40, 32), f32(64, 16), f32(64, 16), np.arange(40)[None])),
    ),
)


def _cache_axis(site: Site) -> int:
    cache, update = site.spec(0), site.spec(1)
    (axis,) = normalized(site, [int(site.attrs["axis"])], cache.ndim)
    same = [d for i, d in enumerate(cache.dims) if i != axis] == [d for i, d in enumerate(update.dims) if i != axis]
    if axis == 0 or cache.ndim != update.ndim or not same or update.dims[axis] > cache.dims[axis]:
        raise site.fail(f"an update of {update} does not fit {cache} along axis {axis}")
    if site.attrs["mode"] not in ("linear", "circular"):
        raise site.fail(f"mode is '{site.attrs['mode']}', expected linear or circular")
    return axis


def _tensor_scatter(xp: Any, site: Site, cache: Array, update: Array, at: Array | None = None) -> Array:
    circular = site.attrs["mode"] == "circular"
    return portable.tensor_scatter(xp, cache, update, at, axis=_cache_axis(site), circular=circular)


def _infer_tensor_scatter(site: Site) -> tuple[TensorSpec]:
    _cache_axis(site)
    return (site.spec(0),)


_TENSOR_SCATTER = Op(
    "TensorScatter",
    24,
    infer=_infer_tensor_scatter,
    compute=plain(_tensor_scatter),
    kernels=Kinds({}, "_triton_move", lambda gpu: gpu.appending(_cache_axis)),
    attrs={"axis": -2, "mode": "linear"},
    cases=(
        Case("start", (f32(2, 3, 6, 4), f32(2, 3, 2, 4))),
        Case("rows", (f32(2, 3, 6, 4), f32(2, 3, 2, 4), np.array([3, 4]))),
        Case("few", (f32(3, 5, 2, 7), f32(3, 1, 2, 7), np.array([4, 0, 2])), {"axis": 1}),
        Case("whole", (f32(1, 4, 3), f32(1, 4, 3), np.array([3])), {"mode": "circular"}),
        Case("circular", (f32(2, 6, 4), f32(2, 4, 4), np.array([5, 1])), {"mode": "circular", "axis": 1}),
        *(
            Case(dtype.name, (narrow(dtype, 2, 6, 4), narrow(dtype, 2, 3, 4), np.array([2, 1])))
            for dtype, since in NARROW.items()
            if since < 25
        ),
    ),
)


def _flex(xp: Any, site: Site, q: Array, k: Array, v: Array) -> tuple[Array]:
    """softmax(score_mod(q kᵀ scale)) v, the weights through prob_mod; the modifiers are subgraphs."""
    if q.ndim != 4 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise site.fail(
            f"Q {list(q.shape)} and K {list(k.shape)} are not (batch, heads, sequence, size) with shared heads"
        )
    wide = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    precision = element_type(site, "softmax_precision", wide)
    scale = site.attrs["scale"]
    k, v = (portable.repeat_heads(xp, x, q.shape[1]) for x in (k, v))
    scores = matmul(xp, q.astype(precision), k.astype(precision).swapaxes(-1, -2))
    scores = scores * precision.type(1 / np.sqrt(q.shape[-1]) if scale is None else scale)
    score_mod, prob_mod = site.attrs["score_mod"], site.attrs["prob_mod"]
    if score_mod is not None:
        (scores,) = score_mod(scores)
    weights = portable.softmax(xp, scores)
    if prob_mod is not None:
        (weights,) = prob_mod(weights)
    return (matmul(xp, weights.astype(v.dtype), v),)


_TANH = GraphText("mod (float[B, H, L, S] s) => (float[B, H, L, S] t) { t = Tanh(s) }")
_FLEX = Op(
    "FlexAttention",
    1,
    domain="ai.onnx.preview",
    infer=lambda site: (None,),
    compute=_flex,
    attrs={"prob_mod": None, "scale": None, "score_mod": None, "softmax_precision": None},
    cases=(
        Case("plain", (f32(2, 3, 4, 8), f32(2, 3, 6, 8), f32(2, 3, 6, 5))),
        Case("grouped", (f32(1, 4, 3, 8), f32(1, 2, 5, 8), f32(1, 2, 5, 8)), {"score_mod": _TANH, "scale": 0.7}),
        Case("weights", (f32(1, 2, 3, 8), f32(1, 2, 5, 8), f32(1, 2, 5, 8)), {"prob_mod": _TANH}),
    ),
    host=True,
)

OPS = (*_ATTENTION, _FLEX, _ROTARY, _TENSOR_SCATTER)
