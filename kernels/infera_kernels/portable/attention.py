"""Attention and what goes with it, for NumPy and CuPy. Heads come second: (batch, heads, sequence, head size)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array
from infera_kernels.portable.matmul import matmul
from infera_kernels.portable.softmax import softmax as rows_softmax


def split_heads(x: Array, heads: int) -> Array:
    """(batch, sequence, heads x size) -> (batch, heads, sequence, size)"""
    batch, length, hidden = x.shape
    return x.reshape(batch, length, heads, hidden // heads).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    """(batch, heads, sequence, size) -> (batch, sequence, heads x size)"""
    batch, heads, length, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)


def repeat_heads(xp: Any, x: Array, heads: int) -> Array:
    """Each key or value head as often as there are query heads to it, one after the other."""
    return x if x.shape[1] == heads else xp.repeat(x, heads // x.shape[1], axis=1)


def additive(xp: Any, mask: Array, length: int, dtype: Any) -> Array:
    """A mask as a bias: booleans become 0 and -inf; keys that a short mask does not reach are -inf."""
    if mask.dtype == np.bool_:
        mask = xp.where(mask, xp.zeros((), dtype), xp.full((), -np.inf, dtype))
    missing = length - mask.shape[-1]
    if missing > 0:
        rest = xp.full((*mask.shape[:-1], missing), -np.inf, dtype)
        mask = xp.concatenate((mask.astype(dtype), rest), axis=-1)
    return mask


def within(xp: Any, queries: int, keys: int, offset: Array | int, *, left: int, right: int) -> Array:
    """Whether query i may see key j: `i + offset - left <= j <= i + offset + right`; a bound of -1 is none.

    `offset` counts the keys before the first query: a number, or one a row, which gives (batch, 1, queries, keys).
    """
    at = xp.arange(queries).reshape(-1, 1)
    at = at + (xp.asarray(offset).reshape(-1, 1, 1, 1) if np.ndim(offset) else offset)
    ahead = xp.arange(keys) - at
    seen = xp.ones(ahead.shape, np.bool_)
    if right >= 0:
        seen = seen & (ahead <= right)
    if left >= 0:
        seen = seen & (-ahead <= left)
    return seen


def softmax(xp: Any, x: Array, sink: Array | None = None) -> Array:
    """Softmax over the last axis; a row of -inf alone gives zeros. `sink` is a score more, whose weight is dropped."""
    top = x.max(axis=-1, keepdims=True)
    if sink is not None:
        top = xp.maximum(top, sink)
    top = xp.where(xp.isneginf(top), xp.zeros((), x.dtype), top)
    e = xp.exp(x - top)
    total = e.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + xp.exp(sink - top)
    return e / xp.where(total == 0, xp.ones((), x.dtype), total)


def attention(
    xp: Any,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    *,
    scale: float | None,
    softcap: float = 0.0,
    precision: Any = None,
    shown: int = 0,
    sink: Array | None = None,
) -> tuple[Array, Array]:
    """softmax(q kᵀ scale + bias) v, and the scores: as they are (`shown` 0), capped (1), biased (2) or the weights (3).

    `scale` defaults to 1/√(head size). A query whose every key has a bias of -inf gives zeros. ONNX's Attention-23 to
    25, whose half-precision roundings are kept: the scale is split between both operands, each result is rounded.
    `sink` adds a score for each head, of a key whose value is zero.
    """
    dtype = q.dtype
    factor = scale if scale is not None else 1 / math.sqrt(q.shape[-1] or 1)
    root = dtype.type(math.sqrt(abs(factor)))
    k, v = repeat_heads(xp, k, q.shape[1]), repeat_heads(xp, v, q.shape[1])
    scores = matmul(xp, q * (-root if factor < 0 else root), k.swapaxes(-1, -2) * root)
    given = scores
    if softcap:
        cap = dtype.type(softcap)
        scores = xp.tanh(scores / cap) * cap
        if shown == 1:
            given = scores
    if bias is not None:
        scores = scores + bias
    if shown == 2:
        given = scores
    weights = softmax(
        xp, scores if precision is None else scores.astype(precision), None if sink is None else sink.reshape(-1, 1, 1)
    )
    if bias is not None:
        blind = xp.isneginf(bias.max(axis=-1, keepdims=True)) if bias.shape[-1] else xp.zeros((), np.bool_)
        weights = xp.where(blind, xp.zeros((), weights.dtype), weights)
    if shown == 3:
        given = weights
    return matmul(xp, weights.astype(dtype), v), given.astype(dtype)


def rotary(xp: Any, x: Array, cos: Array, sin: Array, *, width: int, interleaved: bool) -> Array:
    """Rotate the first `width` elements of each head. x: (batch, sequence, heads, size); cos, sin: (batch, sequence,
    width / 2). The pairs are neighbours where `interleaved`, else the two halves. RoFormer, arXiv 2104.09864.
    """
    turned, kept = x[..., :width], x[..., width:]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
    real, imag = cos * a - sin * b, sin * a + cos * b
    if interleaved:
        made = xp.stack((real, imag), axis=-1).reshape(turned.shape)
    else:
        made = xp.concatenate((real, imag), axis=-1)
    return xp.concatenate((made, kept), axis=-1).astype(x.dtype)


def tensor_scatter(xp: Any, cache: Array, update: Array, at: Array | None, *, axis: int, circular: bool) -> Array:
    """The cache with each row's `update` written along `axis`, from the row's own position on."""
    made = xp.moveaxis(cache.copy(), axis, 1)
    new = xp.moveaxis(update, axis, 1)
    rows = xp.arange(cache.shape[0])[:, None]
    start = xp.zeros((cache.shape[0],), np.int64) if at is None else at
    places = start[:, None] + xp.arange(new.shape[1])
    made[rows, places % made.shape[1] if circular else places] = new
    return xp.moveaxis(made, 1, axis)


def continued(xp: Any, past: Array | None, new: Array, at: Array, length: int) -> Array:
    """A right-padded cache (batch, heads, length, size): of each row `at` elements of `past`, `new`, then zeros."""
    batch, heads, _, size = new.shape
    made = xp.zeros((batch, heads, length, size), new.dtype)
    if past is not None:
        kept = xp.arange(past.shape[2]) < at.reshape(-1, 1)
        made[:, :, : past.shape[2]] = xp.where(kept[:, None, :, None], past, xp.zeros((), past.dtype))
    return tensor_scatter(xp, made, new, at, axis=2, circular=False)


def linear_attention(
    xp: Any,
    q: Array,
    k: Array,
    v: Array,
    state: Array | None,
    decay: Array | None,
    beta: Array | None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Array, Array]:
    """Attention whose memory is one matrix a head: (batch, kv heads, key size, value size), in float32.

    Before each step the state fades by exp(decay); with `beta` the step writes what the state does not say yet (the
    delta rule). ONNX's LinearAttention-27; Gated DeltaNet, arXiv 2412.06464.
    """
    dtype, kept = q.dtype, (q if state is None else state).dtype
    f32 = np.float32
    batch, length = q.shape[:2]
    size = q.shape[-1] // heads
    q4, k4, v4 = (split_heads(x, n).astype(f32) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if decay is not None:
        decay = xp.exp(split_heads(decay, kv_heads).astype(f32))
    if beta is not None:
        beta = split_heads(beta, beta.shape[-1]).astype(f32)
    s = xp.zeros((batch, kv_heads, size, v4.shape[-1]), f32) if state is None else state.astype(f32)
    out = xp.zeros((batch, heads, length, v4.shape[-1]), f32)
    factor = f32(scale or 1 / math.sqrt(size or 1))
    for i in range(length):
        key, value = k4[:, :, i], v4[:, :, i]
        if decay is not None:
            s = s * decay[:, :, i][..., None]
        if beta is not None:
            value = beta[:, :, i] * (value - (key[..., None, :] @ s)[..., 0, :])
        s = s + key[..., None] * value[..., None, :]
        out[:, :, i] = factor * (q4[:, :, i][..., None, :] @ repeat_heads(xp, s, heads))[..., 0, :]
    return merge_heads(out).astype(dtype), s.astype(kept)


def causal_conv(
    xp: Any,
    x: Array,
    weight: Array,
    bias: Array | None,
    state: Array | None,
    *,
    activation: Callable[[Array], Array] | None,
) -> tuple[Array, Array]:
    """Depthwise convolution of (batch, channels, length) that looks back only. The state is the last k - 1 columns."""
    k = weight.shape[2]
    before = xp.zeros((*x.shape[:2], k - 1), x.dtype) if state is None else state
    padded = xp.concatenate((before, x), axis=2)
    wide = np.float64 if x.dtype == np.float64 else np.float32
    total = xp.zeros(x.shape, wide)
    for i in range(k):
        total = total + padded[:, :, i : i + x.shape[2]].astype(wide) * weight[:, 0, i].astype(wide)[:, None]
    if bias is not None:
        total = total + bias.astype(wide)[:, None]
    made = total.astype(x.dtype)
    if activation is not None:
        made = activation(made.astype(wide)).astype(x.dtype)
    return made, padded[:, :, padded.shape[2] - (k - 1) :]


def fused(
    xp: Any,
    q: Array,
    kt: Array,
    v: Array,
    masks: Sequence[Array],
    keep: Array | None,
    *,
    scale: float,
    fill: float,
    guarded: bool,
    cap: float = 0.0,
) -> Array:
    """softmax(scale q @ kt + masks) @ v in steps that each round to q's dtype; scores are `fill` where `keep` is not.

    With a `cap` scaled scores s become cap tanh(s / cap) first. With `guarded` weights that are NaN become 0.
    """
    dtype = q.dtype
    scores = matmul(xp, q, kt)
    if scale != 1:
        scores = (scores * dtype.type(scale)).astype(dtype)
    if cap:
        scores = (xp.tanh((scores / dtype.type(cap)).astype(dtype)) * dtype.type(cap)).astype(dtype)
    if keep is not None:
        scores = xp.where(keep, scores, xp.asarray(fill, dtype))
    for mask in masks:
        scores = scores + mask
    weights = scores
    if scores.size:
        flat = scores.astype(xp.float64).reshape(-1, scores.shape[-1])
        weights = rows_softmax(xp, flat).reshape(scores.shape).astype(dtype)
    if guarded:
        weights = xp.where(xp.isnan(weights), xp.zeros((), dtype), weights)
    return matmul(xp, weights, v)
