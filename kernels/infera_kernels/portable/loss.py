"""Losses of a classifier, for NumPy and CuPy. Classes lie on axis 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_kernels.calls import Array


def negative_log_likelihood(
    xp: Any, x: Array, target: Array, weight: Array | None, *, reduction: str, ignored: int | None
) -> Array:
    """-weight[t] · x[n, t, ...] of each target t, as it is or reduced; "mean" divides by the sum of the weights.

    Targets equal to `ignored` count nothing. x: (batch, classes, ...), target: (batch, ...). Computed in x's type,
    halves in float32.
    """
    wide = np.float32 if x.dtype.itemsize < 4 else x.dtype
    counted = xp.ones(target.shape, np.bool_) if ignored is None else target != ignored
    safe = xp.where(counted, target, 0)
    picked = -xp.take_along_axis(x.astype(wide), xp.expand_dims(safe, 1), axis=1)[:, 0]
    w = counted.astype(wide) if weight is None else xp.where(counted, weight[safe], 0).astype(wide)
    loss = xp.where(counted, picked, 0) * w
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / w.sum()
    return xp.asarray(loss).astype(x.dtype)
