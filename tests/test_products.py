"""Products of few rows: in blocks of weights that stay in the cache, and in ranges of depth for threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from infera_kernels.calls import Call, Split, one_after_the_other
from infera_kernels.cpu import matmul


def _operands(rows: int, depth: int, columns: int) -> tuple[np.ndarray[Any, Any], ...]:
    rng = np.random.default_rng(rows)
    a, b = rng.normal(size=(rows, depth)).astype(np.float32), rng.normal(size=(depth, columns)).astype(np.float32)
    return a, b, np.full((rows, columns), np.nan, np.float32)


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("columns", [1, 63, 500])
@pytest.mark.parametrize("transposed", [False, True])
def test_few_rows_read_large_weights_once(
    rows: int, columns: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 64 * 40 * 4
    for name, value in {"CACHED": 0, "_BLOCK_BYTES": block, "_BLOCK_COLUMNS": 200, "_FEWEST_COLUMNS": 90}.items():
        monkeypatch.setattr(matmul, name, value)
    a, b, out = _operands(rows, 130, columns)
    b = np.asfortranarray(b) if transposed else b
    calls = matmul.matmul(a, b, out, np.empty)
    for fn, args in calls:
        fn(*args)
    np.testing.assert_allclose(out, a.astype(np.float64) @ b, atol=1e-5)
    blocks = [args[1] for fn, args in calls if fn is np.matmul]
    assert all(x.nbytes <= block and np.shares_memory(x, b) for x in blocks)
    assert sum(x.size for x in blocks) == b.size


@pytest.mark.parametrize("columns", [1, 3, 4, 90])
def test_a_row_reads_long_columns_from_end_to_end(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_LONG", 500)
    a, b, _ = _operands(1, 501, columns)
    b, whole = np.asfortranarray(b), np.full((1, columns + 2), np.nan, np.float32)
    out = whole[:, 1:-1]
    calls = matmul.matmul(a, b, out, np.empty)
    for fn, args in calls:
        fn(*args)
    np.testing.assert_allclose(out, a.astype(np.float64) @ b, atol=1e-5)
    assert np.isnan(whole[:, [0, -1]]).all()
    read = [args[1] for _, args in calls]
    assert {x.shape[2] for x in read} <= {1, 4}
    assert all(np.shares_memory(x, b) for x in read)
    assert sum(x.size for x in read) == b.size


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("threads", [2, 3])
def test_few_rows_are_split_along_the_depth(rows: int, threads: int) -> None:
    a, b, out = _operands(rows, 2000, 900)
    parts: list[int] = []

    def parallel(lists: Sequence[Iterable[Call]]) -> list[Call]:
        parts.append(len(lists))
        return one_after_the_other(lists)

    for fn, args in matmul.fused(a, b, out, np.empty, Split(threads, parallel), activation="relu"):
        fn(*args)
    np.testing.assert_allclose(out, np.maximum(a.astype(np.float64) @ b, 0), atol=2e-4)
    assert parts == [threads]
