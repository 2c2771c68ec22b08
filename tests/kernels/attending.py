"""Attention as its definition has it, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np


def attended(q: Any, k: Any, v: Any, scale: float, before: int | None) -> Any:
    """q (..., heads, M, size), k and v (..., groups, N, size), whose heads go for as many of q. Where it is causal,
    query i sees `before` + i + 1 keys."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    if before is not None:
        rows, keys = np.indices(scores.shape[-2:])
        scores = np.where(rows + before >= keys, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v
