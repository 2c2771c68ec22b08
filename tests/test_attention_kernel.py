"""Attention on NumPy, whose scores lie key by key where there are many queries, against the definition in float64."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from infera_kernels.cpu import attention as cpu

HEADS, DEPTH = 3, 8
Array = np.ndarray[Any, np.dtype[Any]]


def poisoned(shape: Any, dtype: Any = np.float32) -> Array:
    return np.full(shape, np.nan, dtype)


def reference(q: Array, k: Array, v: Array, mask: Array, cap: float) -> Array:
    scores = 0.3 * (q.astype(np.float64) @ k.swapaxes(-1, -2))
    scores = (cap * np.tanh(scores / cap) if cap else scores) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    made: Array = (weights / weights.sum(-1, keepdims=True)) @ v
    return made


def lies_by_keys(calls: list[Any], queries: int, keys: int) -> bool:
    """Whether the first product is that of all keys with the queries."""
    a, b, _ = next(args for fn, args in calls if fn is np.matmul)
    return bool(a.shape[-2:] == (keys, DEPTH) and b.shape[-2:] == (DEPTH, queries))


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("mask", ["none", "keys", "heads", "full"])
@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (17, 33), (40, 21), (16, 65), (15, 14), (300, 500)])
def test_scores_by_keys(queries: int, keys: int, mask: str, cap: float) -> None:
    rng = np.random.default_rng(queries)
    q, k, v = (rng.normal(size=(2, HEADS, n, DEPTH)).astype(np.float32) for n in (queries, keys, keys))
    shapes = {"none": (), "keys": (2, 1, 1, keys), "heads": (HEADS, 1, 1), "full": (queries, keys)}
    masks = [] if mask == "none" else [rng.normal(size=shapes[mask]).astype(np.float32)]
    out = poisoned((2, queries, HEADS, DEPTH)).swapaxes(1, 2)
    options = cpu.Options(scale=0.3, cap=cap)
    first, parts = cpu.attention(q, k.swapaxes(-1, -2), v, out, poisoned, options, masks=masks)
    calls = [*first, *(call for part in parts for call in part)]
    for fn, args in calls:
        fn(*args)
    np.testing.assert_allclose(out, reference(q, k, v, sum(masks, np.zeros(())), cap), rtol=1e-5, atol=2e-6)
    if queries < 300:
        assert lies_by_keys(calls, queries, keys) is (mask != "full" and queries > 15 and keys <= 4 * queries)


@pytest.mark.parametrize("zero", ["nan", "unseen"])
def test_rows_that_see_no_key_are_zero(zero: Literal["nan", "unseen"]) -> None:
    """All keys of the second of two images are masked out."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, HEADS, n, DEPTH)).astype(np.float32) for n in (20, 30, 30))
    mask = np.zeros((2, 1, 1, 30), np.float32)
    mask[1] = -np.inf
    mask[0, ..., 7:] = -np.inf
    out = poisoned((2, HEADS, 20, DEPTH))
    first, parts = cpu.attention(
        q, k.swapaxes(-1, -2), v, out, poisoned, cpu.Options(scale=0.3, zero=zero), masks=[mask]
    )
    calls = [*first, *(call for part in parts for call in part)]
    with np.errstate(invalid="ignore"):
        for fn, args in calls:
            fn(*args)
    assert lies_by_keys(calls, 20, 30)
    np.testing.assert_allclose(out[0], reference(q[:1], k[:1], v[:1], mask[:1], 0)[0], rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(out[1], 0)


def test_a_causal_mask_may_be_a_scalar() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, HEADS, 70, DEPTH)).astype(np.float32) for _ in range(3))
    out = poisoned(q.shape)
    mask = np.array(0.5, np.float32)
    first, parts = cpu.causal(q, k.swapaxes(-1, -2), v, out, poisoned, cpu.Options(scale=0.3), before=0, masks=[mask])
    for fn, args in [*first, *(call for part in parts for call in part)]:
        fn(*args)
    unseen = np.where(np.tri(70, dtype=bool), 0, -np.inf)
    np.testing.assert_allclose(out, reference(q, k, v, unseen, 0), rtol=1e-5, atol=2e-6)
