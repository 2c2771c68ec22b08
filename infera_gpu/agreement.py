"""Whether two kernels for the same thing give the same, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from infera_gpu.spec import Array

TOLERANCE: Mapping[str, float] = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-4, "float64": 1e-9}
"""How far candidates may differ, of the peak, by the type of the output: sums are rounded in other orders. Integers,
which sums of integers give, may differ by one where they were quantised."""

CHUNK = 1 << 22
"""Elements that are compared at a time: what that takes must find room beside a model."""


def agree(got: Sequence[Array], want: Sequence[Array]) -> bool:
    """Whether arrays of the same shapes hold the same, but for rounding: see TOLERANCE."""
    with np.errstate(invalid="ignore"):
        return all(_agrees(g, w) for g, w in zip(got, want, strict=True))


def _agrees(got: Array, want: Array) -> bool:
    pairs = [(g, w) for g, w in zip(_chunks(got), _chunks(want), strict=True) if w.size]
    if np.dtype(want.dtype).kind in "iub":
        return all(bool((abs(g.astype("int64") - w.astype("int64")) <= 1).all()) for g, w in pairs)
    peak = max((_peak(_wide(w)) for _, w in pairs), default=0.0)
    slack = TOLERANCE.get(np.dtype(want.dtype).name, 1e-2) * peak
    return all(_near(_wide(g), _wide(w), slack) for g, w in pairs)


def _chunks(a: Array) -> list[Array]:
    rows = max(1, CHUNK * len(a) // max(a.size, 1)) if a.ndim else 1
    return [a[i : i + rows] for i in range(0, len(a), rows)] if a.ndim else [a.reshape(1)]


def _wide(a: Array) -> Array:
    return a if np.dtype(a.dtype).itemsize >= 4 else a.astype("float32")


def _peak(want: Array) -> float:
    finite = abs(want) < np.inf
    return float(abs(want[finite]).max()) if bool(finite.any()) else 0.0


def _near(got: Array, want: Array, slack: float) -> bool:
    same = (got == want) | ((got != got) & (want != want))
    return bool((same | ((abs(want) < np.inf) & (abs(got - want) <= slack))).all())
