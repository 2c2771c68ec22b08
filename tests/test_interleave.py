"""Copies to few channels last, and those that are left alone."""

from __future__ import annotations

import numpy as np
import pytest

from infera_kernels.cpu.interleave import BLOCK_BYTES, interleaved

SHAPES = [(1, 224, 224, 3), (2, 300, 250, 4), (3, 33, 17, 2), (5, 9, 7, 6), (2, 1, 100_000, 3), (2, 9, 8, 50, 3)]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.float64], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_that_come_first(shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    rng = np.random.default_rng(0)
    source = np.moveaxis(rng.integers(0, 255, (shape[0], shape[-1], *shape[1:-1])).astype(dtype), 1, -1)
    whole = np.zeros([n + 2 * (0 < i < len(shape) - 1) for i, n in enumerate(shape)], dtype)
    target = whole[(slice(None), *[slice(1, -1)] * (len(shape) - 2))]
    pieces = list(interleaved(source, target))
    assert len(pieces) >= shape[-1]
    assert all(t.shape == s.shape and t.nbytes * shape[-1] <= BLOCK_BYTES for s, t in pieces)
    for piece, to in pieces:
        np.copyto(to, piece)
    np.testing.assert_array_equal(target, source)
    assert whole.astype(np.float64).sum() == source.astype(np.float64).sum()


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((1, 20, 20, 3)),
        np.zeros((1, 8, 20, 20)).transpose(0, 2, 3, 1),
        np.zeros((1, 1, 20, 20)).transpose(0, 2, 3, 1),
        np.zeros((1, 3, 4, 4)).transpose(0, 2, 3, 1),
        np.broadcast_to(np.zeros((1, 1, 1, 3)), (1, 20, 20, 3)),
        np.zeros(3),
        np.zeros(()),
    ],
    ids=["last already", "many", "one", "small", "repeated", "a vector", "a number"],
)
def test_others_are_copied_at_once(source: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    target = np.empty(source.shape)
    ((piece, to),) = interleaved(source, target)
    assert piece is source
    assert to is target
