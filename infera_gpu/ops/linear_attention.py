"""Attention whose keys and values are summed up in a state, and the convolution that keeps its last inputs."""

from __future__ import annotations

from typing import Any

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._families import plain
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import attention as portable
from infera_kernels.portable.activation import activation

_RULES = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}


def _infer_linear(site: Site) -> tuple[TensorSpec, ...]:
    heads, kv_heads = int(site.attrs["q_num_heads"]), int(site.attrs["kv_num_heads"])
    rule = site.attrs["update_rule"]
    if rule not in _RULES:
        raise site.fail(f"update_rule is '{rule}', expected one of {', '.join(_RULES)}")
    if (site.has(4), site.has(5)) != _RULES[rule]:
        raise site.fail(f"update_rule '{rule}' takes decay: {_RULES[rule][0]}, beta: {_RULES[rule][1]}")
    if kv_heads <= 0 or heads <= 0 or heads % kv_heads:
        raise site.fail(f"{heads} query heads do not share {kv_heads} key heads evenly")
    q, k, v = site.spec(0), site.spec(1), site.spec(2)
    if any(s.ndim != 3 for s in (q, k, v)) or q.dims[2] % heads or k.dims[2] % kv_heads or v.dims[2] % kv_heads:
        raise site.fail(f"query {q}, key {k} and value {v} do not hold {heads} and {kv_heads} heads")
    if q.dims[:2] != k.dims[:2] or q.dims[:2] != v.dims[:2] or q.dims[2] // heads != k.dims[2] // kv_heads:
        raise site.fail(f"query {q}, key {k} and value {v} do not fit each other")
    size, out = q.dims[2] // heads, v.dims[2] // kv_heads
    state = (q.dims[0], kv_heads, size, out)
    if site.has(3) and site.spec(3).dims != state:
        raise site.fail(f"past_state is {site.spec(3)}, expected {list(state)}")
    if site.has(4) and site.spec(4).dims not in ((*q.dims[:2], kv_heads), (*q.dims[:2], kv_heads * size)):
        raise site.fail(f"decay is {site.spec(4)}, expected {kv_heads} or {kv_heads * size} elements last")
    if site.has(5) and site.spec(5).dims not in ((*q.dims[:2], kv_heads), (*q.dims[:2], 1)):
        raise site.fail(f"beta is {site.spec(5)}, expected {kv_heads} elements last, or 1")
    kept = site.spec(3).dtype if site.has(3) else q.dtype
    return TensorSpec((*q.dims[:2], heads * out), q.dtype), TensorSpec(state, kept)


def _linear(
    xp: Any,
    site: Site,
    q: Array,
    k: Array,
    v: Array,
    state: Array | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
) -> tuple[Array, Array]:
    _infer_linear(site)
    heads, kv_heads = int(site.attrs["q_num_heads"]), int(site.attrs["kv_num_heads"])
    return portable.linear_attention(
        xp, q, k, v, state, decay, beta, heads=heads, kv_heads=kv_heads, scale=site.attrs["scale"]
    )


_SHARED = {"q_num_heads": 4, "kv_num_heads": 2}
_QKV = (f32(2, 5, 32), f32(2, 5, 16), f32(2, 5, 12))
_LINEAR = Op(
    "LinearAttention",
    27,
    infer=_infer_linear,
    compute=plain(_linear),
    attrs={
        "chunk_size": 64,
        "kv_num_heads": REQUIRED,
        "q_num_heads": REQUIRED,
        "scale": 0.0,
        "update_rule": "gated_delta",
    },
    cases=(
        Case("linear", _QKV, {**_SHARED, "update_rule": "linear", "scale": 0.5}, n_outs=2),
        Case("gated", (*_QKV, None, f32(2, 5, 16)), {**_SHARED, "update_rule": "gated"}, n_outs=2, high=0.0),
        Case(
            "delta",
            (*_QKV, f32(2, 2, 8, 6), None, f32(2, 5, 1)),
            {**_SHARED, "update_rule": "delta"},
            n_outs=2,
            low=0,
            high=0.5,
        ),
        Case("both", (*_QKV, f32(2, 2, 8, 6), f32(2, 5, 2), f32(2, 5, 2)), _SHARED, n_outs=2, low=-0.5, high=0.0),
    ),
)


def _infer_causal_conv(site: Site) -> tuple[TensorSpec, ...]:
    x, w = site.spec(0), site.spec(1)
    if x.ndim != 3 or w.ndim != 3 or w.dims[0] != x.dims[1] or w.dims[1] != 1 or not w.dims[2]:
        raise site.fail(f"input {x} and weight {w} do not fit (batch, channels, length) and (channels, 1, k)")
    state = (*x.dims[:2], w.dims[2] - 1)
    if site.has(3) and site.spec(3).dims != state:
        raise site.fail(f"past_state is {site.spec(3)}, expected {list(state)}")
    if site.has(2) and site.spec(2).dims != (x.dims[1],):
        raise site.fail(f"bias is {site.spec(2)}, expected {x.dims[1]} elements")
    if site.attrs["activation"] not in ("none", "silu", "swish"):
        raise site.fail(f"activation is '{site.attrs['activation']}', expected none, silu or swish")
    return x, TensorSpec(state, x.dtype)


def _causal_conv(
    xp: Any, site: Site, x: Array, w: Array, bias: Array | None = None, state: Array | None = None
) -> tuple[Array, Array]:
    silu = None if site.attrs["activation"] == "none" else lambda y: activation(xp, "swish", y)
    return portable.causal_conv(xp, x, w, bias, state, activation=silu)


_CAUSAL_CONV = Op(
    "CausalConvWithState",
    27,
    infer=_infer_causal_conv,
    compute=plain(_causal_conv),
    attrs={"activation": "none"},
    cases=(
        Case("plain", (f32(2, 3, 7), f32(3, 1, 4)), n_outs=2),
        Case("all", (f32(2, 3, 1), f32(3, 1, 4), f32(3), f32(2, 3, 3)), {"activation": "silu"}, n_outs=2),
        Case("one", (f32(1, 1, 1), f32(1, 1, 1)), n_outs=2),
    ),
)

OPS = (_LINEAR, _CAUSAL_CONV)
