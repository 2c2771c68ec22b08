"""Channels-last convolution to and from images that lie within a border: the same bits as without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from infera_kernels.calls import Array
from infera_kernels.cpu.nhwc_border import border
from infera_kernels.cpu.nhwc_conv import border_of, conv2d, writes_rows
from tests.test_nhwc_kernels import CONVS, SPLITS, Conv, packer, random, run, same, scratch


def within(a: Array, around: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
    """An array of NaN that is larger by a border on both spatial axes, and the copy of `a` in it."""
    (top, bottom), (left, right) = around
    whole = scratch((a.shape[0], a.shape[1] + top + bottom, a.shape[2] + left + right, a.shape[3]), a.dtype)
    inner = whole[:, top : top + a.shape[1], left : left + a.shape[2]]
    inner[...] = a
    return whole, inner


@pytest.mark.parametrize("activation", [None, ("relu",), ("tanh",)], ids=str)
@pytest.mark.parametrize("conv", [c for c in CONVS if writes_rows(c.w, c.group)], ids=lambda c: c.name)
def test_convolution_to_rows_with_gaps(conv: Conv, activation: tuple[str, ...] | None) -> None:
    """The same bits as without gaps, which stay as they are."""
    x, w, b, residual = (random(i, *s) for i, s in enumerate((conv.x, conv.w, conv.w[:1], conv.y)))
    whole, inner = within(scratch(conv.y), ((1, 0), (2, 3)))
    dense = scratch(conv.y)
    for bias, rest in ((b, residual), (b, None), (None, None)):
        for y in (inner, dense):
            y[...] = np.nan
            run(
                conv2d(
                    x,
                    w,
                    bias,
                    y,
                    scratch,
                    SPLITS["three"],
                    residual=rest,
                    activation=activation,
                    pack=packer(w),
                    **conv.window,
                )
            )
        np.testing.assert_array_equal(inner, dense)
        assert np.isfinite(dense).all()
        assert np.isnan(whole).sum() == whole.size - inner.size


@pytest.mark.parametrize("conv", CONVS, ids=lambda c: c.name)
def test_convolution_of_what_has_a_border(conv: Conv) -> None:
    """The same bits as with padding, and where a border is wanted no scratch to copy x to."""
    x, w, b = (random(i, *s) for i, s in enumerate((conv.x, conv.w, conv.w[:1])))
    size = (conv.x[1], conv.x[2])
    around = border_of(size, conv.w, conv.x[0], conv.out, **conv.window)
    if around is None:
        return
    assert all(a >= p for a, p in zip(around, conv.window["pads"], strict=True))
    whole, _ = within(x, around)
    y, want = scratch(conv.y), scratch(conv.y)
    run(border(whole, (around[0][0], around[1][0]), size, 0))
    none = {**conv.window, "pads": same(0)}
    run(conv2d(whole, w, b, y, scratch, SPLITS["three"], pack=packer(w), **none))
    run(conv2d(x, w, b, want, scratch, SPLITS["three"], pack=packer(w), **conv.window))
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("around", [((1, 1), (1, 1)), ((0, 2), (3, 0)), ((2, 0), (0, 0)), ((0, 0), (0, 1))], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 4, 3), (3, 1, 6, 2), (2, 4, 1, 1)], ids=str)
def test_a_border_is_set_and_nothing_else(shape: tuple[int, ...], around: tuple[tuple[int, int], ...]) -> None:
    x = random(0, *shape)
    whole, _ = within(x, around)
    run(border(whole, (around[0][0], around[1][0]), (shape[1], shape[2]), 7))
    np.testing.assert_array_equal(whole, np.pad(x, ((0, 0), *around, (0, 0)), constant_values=7))
