"""A decoder's step over few new tokens as its definition has it, and steps to try. Imports kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_kernels.triton import decode_attention as a
from tests.kernels.references import F32
from tests.kernels.support import Array, Guarded, random

BATCH, GROUPS = 2, 2


def turned(x: Array, step: a.Step, starts: Array, dtype: Any) -> Array:
    """x (batch, ..., L, D) after rotation at an entry's positions, in a type; one more rounding is the caller's."""
    if step.cos is None:
        return x.astype(dtype)
    length, half = x.shape[-2], step.cos.shape[1]
    at = starts[:, None] + np.arange(length) if step.places is None else np.broadcast_to(step.places, (len(x), length))
    at = np.clip(at, 0, len(step.cos) - 1)
    lead = (len(x), *(1,) * (x.ndim - 3), length, half)
    c, s = (table.astype(dtype)[at].reshape(lead) for table in (step.cos, step.sin))
    made, pairs = x.astype(dtype), slice(0, 2 * half, 2) if step.interleaved else slice(0, half)
    others = slice(1, 2 * half, 2) if step.interleaved else slice(half, 2 * half)
    first, second = made[..., pairs].copy(), made[..., others].copy()
    made[..., pairs], made[..., others] = first * c - second * s, second * c + first * s
    return made


def starts_of(step: a.Step) -> Array:
    """How many keys are before an entry's first new one."""
    new = step.q.shape[3]
    if step.before is None:
        starts: Array = np.maximum(step.lengths.astype(np.int64) + 1 - new, 0)
        return starts
    return np.full(len(step.q), step.before)


def caches_of(step: a.Step, dtype: Any) -> tuple[Array, Array]:
    """Keys and values that come out."""
    new, starts = step.q.shape[3], starts_of(step)
    made = []
    for past, out, fresh in zip(
        step.past or (None, None),
        step.present,
        (turned(step.k, step, starts, dtype), step.v.astype(dtype)),
        strict=True,
    ):
        cache = np.zeros(out.shape, dtype)
        for b, start in enumerate(starts.tolist()):
            if past is not None:
                kept = min(start, past.shape[2])
                cache[b, :, :kept] = past[b, :, :kept]
            cache[b, :, start : start + new] = fresh[b]
        made.append(cache)
    return made[0], made[1]


def attended(step: a.Step, keys: Array, values: Array) -> Array:
    """The result, in float64, of keys and values as they are stored."""
    new, starts, n = step.q.shape[3], starts_of(step), step.keys
    q = turned(step.q, step, starts, np.float32).astype(step.q.dtype).astype(np.float64)
    k, v = (x[:, :, None, :n].astype(np.float64) for x in (keys, values))
    s = step.scale * (q @ k.swapaxes(-1, -2))
    at = np.arange(n)
    seen = np.ones((len(q), new, n), np.bool_)
    if step.causal:
        seen &= at <= (starts[:, None] + np.arange(new))[:, :, None]
    if step.lengths is not None:
        seen &= at < (step.lengths.astype(np.int64) + 1)[:, None, None]
    s = np.where(seen[:, None, None], s, -np.inf)
    top = s.max(-1, keepdims=True)
    w = np.exp(s - np.where(np.isneginf(top), 0, top))
    total = w.sum(-1, keepdims=True)
    y: Array = w @ v / np.where(total == 0, 1, total)
    return y


def step_of(
    past: int,
    dtype: Any = F32,
    *,
    size: int = 16,
    values: int = 0,
    members: int = 2,
    new: int = 1,
    lengths: tuple[int, ...] | None = None,
    rows: int = 0,
    batch: int = BATCH,
    width: int = 0,
    **how: Any,
) -> tuple[a.Step, list[Guarded]]:
    """A step after `past` keys, whose new tokens lie side by side as a product leaves them, and what it writes."""
    rows, values = rows or past + new, values or size
    joined = random((batch, new, GROUPS * (members * size + size + values)), dtype)
    q, k, v = np.split(joined, np.cumsum((GROUPS * members * size, GROUPS * size)), axis=2)
    q = q.reshape(batch, new, GROUPS, members, size).transpose(0, 2, 3, 1, 4)
    k, v = (x.reshape(batch, new, GROUPS, -1).swapaxes(1, 2) for x in (k, v))
    pasts = [random((batch, GROUPS, past, d), dtype, seed=i) for i, d in ((1, size), (2, values))]
    outs = [Guarded((batch, new, GROUPS, members, values), dtype)]
    outs += [Guarded((batch, GROUPS, rows, d), dtype) for d in (size, values)]
    tables = {}
    if width:
        tables = {name: random((rows, width // 2), dtype, seed=i) for i, name in ((3, "cos"), (4, "sin"))}
    step = a.Step(
        *(q, k, v, outs[0].array.transpose(0, 2, 3, 1, 4)),
        (pasts[0], pasts[1]) if past else None,
        (outs[1].array, outs[2].array),
        **{
            "keys": past + new,
            "before": past if lengths is None else None,
            "lengths": None if lengths is None else np.array(lengths, np.int32),
            "scale": size**-0.5,
            **tables,
            **how,
        },
    )
    return step, outs
