"""Convolutions with channels last as their definition has them, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def convolved(
    x: Any,
    w: Any,
    strides: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilations: Sequence[int] | None = None,
) -> Any:
    """x (N, spatial..., C), w (O, kernel..., C / groups) -> (N, spatial..., O)."""
    axes = len(strides)
    dilations = dilations or (1,) * axes
    x, w = np.pad(x.astype(np.float64), [(0, 0), *pads, (0, 0)]), w.astype(np.float64)
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, w.shape[1:-1], strict=True)]
    views: Any = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(range(1, 1 + axes)))
    steps = [slice(None, None, n) for n in strides], [slice(None, None, n) for n in dilations]
    views = views[(slice(None), *steps[0], slice(None), *steps[1])]  # (N, spatial..., C, kernel...)
    groups, taps = x.shape[-1] // w.shape[-1], tuple(range(2 + axes, 2 + 2 * axes))
    parts = [
        np.tensordot(part, weights, ((1 + axes, *taps), (1 + axes, *range(1, 1 + axes))))
        for part, weights in zip(np.split(views, groups, 1 + axes), np.split(w, groups, 0), strict=True)
    ]
    return np.concatenate(parts, -1)
