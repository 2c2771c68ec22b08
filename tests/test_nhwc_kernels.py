"""Channels-last convolution and pooling on NumPy against the plain definitions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from infera_gpu.devices.base import quiet_numpy
from infera_kernels.calls import SERIAL, Array, Call, Pack, Split, one_after_the_other
from infera_kernels.cpu import caches, nhwc_conv, nhwc_depthwise, nhwc_product, nhwc_windows, nhwc_winograd, packed
from infera_kernels.cpu.conv_epilogue import ACTIVATIONS
from infera_kernels.cpu.nhwc_conv import border_of, conv2d, reads_strided
from infera_kernels.cpu.nhwc_pool import average_pool2d, global_average_pool, global_max_pool, max_pool2d
from infera_kernels.cpu.nhwc_windows import windows
from infera_kernels.cpu.packed import added
from infera_kernels.portable.activation import activation as plain_activation
from infera_kernels.portable.conv import convolution
from infera_kernels.portable.pool import average_pool, max_pool
from tests.allocations import transient

DIRECT, WINOGRAD = 2e-6, 5e-6
"""Largest error of float32, relative to the largest magnitude of the result."""

TRANSIENT_BYTES = 4096
"""What NumPy may use and give back in a call: its iterators, and buffers of `UFUNC_BUFFER` elements."""


def backwards(parts: Sequence[Iterable[Call]]) -> list[Call]:
    return one_after_the_other(parts[::-1])


SPLITS = {"serial": SERIAL, "three": Split(3, backwards), "many": Split(11, backwards)}


@pytest.fixture(autouse=True)
def blocks_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever cache the machine has: there are several then."""
    monkeypatch.setattr(caches, "_times", lambda: 1)


def scratch(shape: Sequence[int], dtype: Any = np.float32) -> Array:
    """Poisoned."""
    return np.full(shape, np.nan, dtype)


def packer(w: Array) -> Pack:
    made: dict[str, Array] = {}

    def pack(tag: str, build: Callable[[Any], Any]) -> Array:
        if tag not in made:
            made[tag] = build(w)
        return made[tag]

    return pack


def sliced(a: Array, left: int = 3, right: int = 2) -> Array:
    """A copy of `a` as a channel slice of a wider array."""
    wide = np.full((*a.shape[:-1], left + a.shape[-1] + right), np.nan, a.dtype)
    view = wide[..., left : left + a.shape[-1]]
    view[...] = a
    return view


def meaningless(a: Array) -> Array:
    """A view of `a` in which the strides of axes of one element say nothing, as after NumPy has moved axes."""
    return as_strided(a, strides=[3 * a.itemsize if n == 1 else s for n, s in zip(a.shape, a.strides, strict=True)])


LAYOUTS = {"dense": lambda a: a, "slices": sliced, "strides": meaningless}


def first(a: Array) -> Array:
    return np.moveaxis(a, -1, 1)


def last(a: Array) -> Array:
    return np.moveaxis(a, 1, -1)


def random(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def run(calls: Sequence[Call]) -> None:
    with quiet_numpy():
        for fn, args in calls:
            fn(*args)


def assert_near(y: Array, want: Array, bound: float) -> None:
    assert np.isfinite(y).all()
    assert np.abs(y - want).max() <= bound * max(1.0, np.abs(want).max())


def allocated(calls: Sequence[Call]) -> int:
    return transient(lambda: run(calls))


@dataclass(frozen=True)
class Conv:
    """x (N, H, W, C), w (O, C / group, KH, KW)"""

    name: str
    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilations: tuple[int, int] = (1, 1)
    group: int = 1
    bound: float = DIRECT
    window: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        window = {"strides": self.strides, "pads": self.pads, "dilations": self.dilations, "group": self.group}
        object.__setattr__(self, "window", window)

    @property
    def out(self) -> tuple[int, int]:
        return tuple(
            (n + sum(pad) - (k - 1) * d - 1) // s + 1
            for n, k, s, d, pad in zip(self.x[1:3], self.w[2:], self.strides, self.dilations, self.pads, strict=True)
        )  # type: ignore[return-value]

    @property
    def y(self) -> tuple[int, int, int, int]:
        return (self.x[0], *self.out, self.w[0])


def same(n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return ((n, n), (n, n))


CONVS = (
    Conv("pointwise", (1, 9, 7, 20), (24, 20, 1, 1)),
    Conv("pointwise-blocks", (1, 130, 131, 8), (33, 8, 1, 1)),
    Conv("pointwise-batch", (3, 5, 3, 16), (70, 16, 1, 1)),
    Conv("pointwise-slices", (1, 10, 11, 200), (192, 200, 1, 1)),
    Conv("pointwise-strided", (2, 7, 10, 12), (16, 12, 1, 1), strides=(2, 3)),
    Conv("pointwise-laid-out", (3, 17, 9, 150), (200, 150, 1, 1)),
    Conv("pointwise-laid-out-strided", (2, 21, 40, 300), (70, 300, 1, 1), strides=(1, 2)),
    Conv("pointwise-padded", (2, 4, 5, 6), (8, 6, 1, 1), pads=((1, 0), (0, 2))),
    Conv("pointwise-groups", (2, 4, 5, 12), (24, 4, 1, 1), group=3),
    Conv("one-pixel", (1, 1, 1, 40), (50, 40, 1, 1)),
    Conv("one-pixel-3x3", (2, 1, 1, 16), (17, 16, 3, 3), pads=same(1)),
    Conv("few-rows", (1, 2, 5, 16), (200, 16, 3, 3), pads=same(1)),
    Conv("few-channels", (1, 20, 21, 3), (16, 3, 3, 3), strides=(2, 2), pads=same(1)),
    Conv("stem", (1, 33, 30, 3), (24, 3, 7, 7), strides=(2, 2), pads=same(3)),
    Conv("few-channels-unpadded", (2, 90, 70, 4), (20, 4, 2, 3), strides=(1, 2), dilations=(2, 1)),
    Conv("few-channels-long-rows", (2, 9, 40, 3), (8, 3, 2, 9), pads=same(1)),
    Conv("columns-batch", (3, 6, 5, 8), (12, 8, 3, 2), pads=((0, 1), (1, 0))),
    Conv("columns-dilated", (2, 11, 12, 5), (7, 5, 3, 3), dilations=(2, 3), pads=same(3)),
    Conv("columns-slices", (1, 6, 7, 64), (64, 64, 3, 3), strides=(2, 1)),
    Conv("columns-groups", (2, 8, 7, 12), (18, 4, 3, 3), group=3, pads=same(1)),
    Conv("multiplier", (2, 8, 7, 5), (10, 1, 3, 3), group=5, pads=same(1)),
    Conv("strides-past-padding", (2, 3, 3, 4), (6, 4, 2, 2), strides=(5, 4), pads=same(2)),
    Conv("rows-of-padding", (1, 2, 2, 4), (6, 4, 3, 3), pads=same(5)),
    Conv("kernel-past-input", (1, 4, 5, 6), (8, 6, 7, 7), pads=((5, 2), (2, 5))),
    Conv("long-blocks", (1, 90, 70, 40), (8, 40, 5, 5), pads=same(2)),
    Conv("windows", (2, 7, 9, 72), (96, 72, 3, 3), pads=same(1), bound=WINOGRAD),
    Conv("pointwise-padded", (2, 7, 9, 72), (96, 72, 1, 1), pads=((1, 0), (2, 1))),
    Conv("windows-unpadded", (2, 11, 13, 80), (67, 80, 2, 4)),
    Conv("windows-one-line", (2, 1, 50, 30), (70, 30, 1, 5), pads=((0, 0), (2, 2))),
    Conv("windows-one-channel", (1, 1, 3000, 1), (70, 1, 1, 400), strides=(1, 150)),
    Conv("windows-one-channel-dense", (2, 1, 700, 1), (210, 1, 1, 300)),
    Conv("windows-one-channel-lines", (1, 9, 700, 1), (66, 1, 3, 300), pads=((1, 1), (7, 8))),
    Conv("one-column", (2, 40, 1, 70), (66, 70, 9, 1)),
    Conv("windows-strided", (2, 13, 16, 40), (80, 40, 3, 3), strides=(2, 2), pads=same(1)),
    Conv("windows-far-apart", (1, 9, 21, 30), (66, 30, 2, 3), strides=(3, 4), pads=((0, 1), (1, 0))),
    Conv("windows-lines-apart", (2, 9, 6, 70), (65, 70, 3, 1), strides=(2, 1), pads=((1, 1), (0, 0))),
    Conv("windows-dilated", (1, 12, 11, 24), (72, 24, 3, 3), dilations=(3, 1), pads=((3, 3), (1, 1))),
    Conv("windows-blocks", (1, 50, 45, 100), (68, 100, 3, 3), strides=(1, 2), pads=same(1)),
    Conv("windows-narrow", (1, 30, 4, 33), (66, 33, 5, 5), pads=same(2)),
    Conv("few-outputs", (2, 15, 14, 20), (3, 20, 3, 3), pads=((1, 1), (1, 2))),
    Conv("few-outputs-dilated", (1, 9, 8, 20), (1, 20, 3, 5), dilations=(3, 2), pads=((4, 3), (5, 4))),
    Conv("few-outputs-blocks", (1, 90, 300, 8), (2, 8, 3, 3), pads=same(1)),
    Conv("few-outputs-of-padding", (1, 2, 2, 8), (2, 8, 2, 2), pads=same(4)),
    Conv("one-channel", (1, 20, 21, 1), (1, 1, 3, 3), pads=same(1)),
    Conv("winograd-2", (1, 10, 11, 160), (224, 160, 3, 3), pads=same(1), bound=WINOGRAD),
    Conv("winograd-2-batch", (2, 9, 7, 200), (192, 200, 3, 3), pads=same(1), bound=WINOGRAD),
    Conv("winograd-slices", (1, 14, 17, 260), (192, 260, 3, 3), pads=same(1), bound=WINOGRAD),
    Conv("winograd-small", (3, 7, 8, 8), (9, 8, 3, 3), pads=same(1), bound=WINOGRAD),
    Conv("winograd-4", (1, 30, 29, 64), (48, 64, 3, 3), pads=same(1), bound=WINOGRAD),
    Conv("winograd-4-blocks", (2, 57, 70, 33), (40, 33, 3, 3), pads=((0, 1), (2, 0)), bound=WINOGRAD),
    Conv("winograd-unpadded", (1, 32, 34, 16), (16, 16, 3, 3), bound=WINOGRAD),
    Conv("winograd-dilated", (2, 29, 33, 16), (18, 16, 3, 3), dilations=(2, 2), pads=same(2), bound=WINOGRAD),
    Conv("winograd-uneven", (1, 61, 60, 16), (16, 16, 3, 3), dilations=(1, 2), pads=((0, 1), (1, 3)), bound=WINOGRAD),
    Conv("winograd-phases", (1, 56, 121, 16), (16, 16, 3, 3), dilations=(4, 8), pads=((4, 4), (8, 8)), bound=WINOGRAD),
    Conv("depthwise", (1, 9, 10, 24), (24, 1, 3, 3), group=24, pads=same(1)),
    Conv("depthwise-blocks", (2, 60, 50, 64), (64, 1, 3, 3), group=64, pads=same(1)),
    Conv("depthwise-strided", (3, 9, 10, 8), (8, 1, 3, 3), group=8, pads=((0, 1), (0, 1)), strides=(2, 2)),
    Conv("depthwise-5x5", (1, 9, 7, 7), (7, 1, 5, 5), group=7, pads=same(2), strides=(2, 1)),
    Conv("depthwise-phases", (1, 12, 23, 6), (6, 1, 2, 4), (1, 2), ((0, 0), (2, 0)), (1, 3), 6),
    Conv("depthwise-far-apart", (2, 7, 20, 5), (5, 1, 2, 3), (3, 4), ((1, 0), (0, 5)), (1, 6), 5),
    Conv("depthwise-folded", (2, 9, 13, 20), (20, 1, 3, 5), group=20, pads=((1, 1), (2, 1)), strides=(1, 2)),
    Conv("depthwise-folded-after", (1, 6, 8, 32), (32, 1, 3, 3), group=32, pads=((0, 1), (0, 1)), strides=(2, 2)),
    Conv("depthwise-long", (2, 9, 11, 100), (100, 1, 3, 3), group=100, pads=same(1), strides=(2, 2)),
    Conv("depthwise-together", (1, 6, 36, 96), (96, 1, 3, 3), group=96, pads=same(1)),
    Conv("depthwise-rest", (1, 6, 31, 96), (96, 1, 3, 3), group=96, pads=same(1)),
    Conv("depthwise-folded-rest", (1, 5, 123, 90), (90, 1, 3, 3), group=90, pads=same(1), strides=(1, 2)),
    Conv("depthwise-in-padding", (2, 4, 5, 6), (6, 1, 3, 3), group=6, pads=((4, 4), (5, 4))),
    Conv("depthwise-steps", (1, 9, 9, 5), (5, 1, 2, 2), group=5, strides=(4, 5), pads=same(2)),
    Conv("depthwise-dilated", (1, 9, 8, 16), (16, 1, 3, 3), group=16, dilations=(2, 3), pads=same(2)),
    Conv("depthwise-unpadded", (2, 9, 8, 6), (6, 1, 3, 3), group=6),
    Conv("depthwise-1x1", (2, 3, 4, 6), (6, 1, 1, 1), group=6),
)  # fmt: skip


def reference(conv: Conv, x: Array, w: Array, b: Array | None) -> Array:
    wide = (None if a is None else a.astype(np.float64) for a in (x, w, b))
    x64, w64, b64 = wide
    return last(convolution(np, first(x64), w64, b64, conv.out, **conv.window))


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("constant", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("conv", CONVS, ids=lambda c: c.name)
def test_convolution(conv: Conv, constant: bool, layout: Callable[[Array], Array], split: Split) -> None:
    x, w, b, residual = (random(i, *s) for i, s in enumerate((conv.x, conv.w, conv.w[:1], conv.y)))
    want = reference(conv, x, w, b) + residual
    y = layout(scratch(conv.y))
    pack = packer(w) if constant else None
    calls = conv2d(layout(x), w, b, y, scratch, split, residual=layout(residual), pack=pack, **conv.window)
    for _ in range(2):
        y[...] = np.nan
        run(calls)
        assert_near(y, want, conv.bound if constant else DIRECT)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("constant", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("conv", CONVS, ids=lambda c: c.name)
def test_the_result_may_lie_where_the_residual_does(conv: Conv, constant: bool, split: Split) -> None:
    x, w, b, residual = (random(i, *s) for i, s in enumerate((conv.x, conv.w, conv.w[:1], conv.y)))
    want = np.maximum(reference(conv, x, w, b) + residual, 0)
    y = residual.copy()
    pack = packer(w) if constant else None
    calls = conv2d(x, w, b, y, scratch, split, residual=y, pack=pack, activation=("relu",), **conv.window)
    for _ in range(2):
        y[...] = residual
        run(calls)
        assert np.isfinite(y).all()
        assert np.abs(y - want).max() <= (conv.bound if constant else DIRECT) * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", [None, ("relu",), ("sigmoid",)], ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=lambda c: c.name)
def test_what_lies_beside_a_slice_stays(conv: Conv, activation: Any, dtype: Any, split: Split) -> None:
    x, w, b = (random(i, *s, dtype=dtype) for i, s in enumerate((conv.x, conv.w, conv.w[:1])))
    made = []
    for layout in (LAYOUTS["dense"], sliced):
        made.append(layout(scratch(conv.y, dtype)))
        run(conv2d(x, w, b, made[-1], scratch, split, activation=activation, pack=packer(w), **conv.window))
    assert_near(made[1], made[0], 1e-6)
    assert np.isnan(made[1].base).sum() == made[1].base.size - made[1].size


@pytest.mark.parametrize(("channels", "group"), [(24, 1), (128, 2)])
def test_a_residual_keeps_nothing_of_one_row_together(channels: int, group: int) -> None:
    """Images of one row are cut into parts and blocks of pixels all the same."""
    parts: list[int] = []

    def parallel(given: Sequence[Iterable[Call]]) -> list[Call]:
        parts.append(len(given))
        return one_after_the_other(given)

    asked: list[int] = []

    def recorded(shape: Sequence[int], dtype: Any = np.float32) -> Array:
        asked.append(math.prod(shape))
        return scratch(shape, dtype)

    conv = Conv("", (1, 1, 40000, channels), (channels, channels // group, 1, 1), group=group)
    x, w, y = random(0, *conv.x), random(1, *conv.w), scratch(conv.y)
    conv2d(x, w, None, y, recorded, Split(2, parallel), residual=random(2, *conv.y), pack=packer(w), **conv.window)
    assert parts == [2]
    assert max(asked) < y.size / 4


STRIDED = {"few-channels", "stem", "few-channels-unpadded"}


def planes(a: Array) -> Array:
    """A copy of `a` whose channels come first."""
    return last(np.ascontiguousarray(first(a)))


def backwards_channels(a: Array) -> Array:
    """A copy of `a` that lies with its channels in reverse."""
    return np.ascontiguousarray(a[..., ::-1])[..., ::-1]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("lying", [planes, backwards_channels])
@pytest.mark.parametrize("conv", [c for c in CONVS if c.name in STRIDED], ids=lambda c: c.name)
def test_few_channels_may_lie_in_any_way(conv: Conv, lying: Callable[[Array], Array], split: Split) -> None:
    assert reads_strided(conv.w, conv.out, strides=conv.strides, dilations=conv.dilations, group=conv.group)
    x, w = random(0, *conv.x), random(1, *conv.w)
    y = scratch(conv.y)
    calls = conv2d(lying(x), w, None, y, scratch, split, pack=packer(w), **conv.window)
    run(calls)
    assert_near(y, reference(conv, x, w, None), DIRECT)
    assert allocated(calls) < TRANSIENT_BYTES


LAID_OUT = {"winograd-2-batch", "winograd-slices", "winograd-4-blocks", "winograd-dilated"}


@pytest.mark.skipif(packed.inner() is None, reason="NumPy calls a BLAS whose inner loops are not known")
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("conv", [c for c in CONVS if c.name in LAID_OUT], ids=lambda c: c.name)
def test_filters_of_winograd_are_laid_out_once(conv: Conv, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nhwc_winograd, "LAID_OUT", 0)
    x, w, b = (random(i, *s) for i, s in enumerate((conv.x, conv.w, conv.w[:1])))
    y = scratch(conv.y)
    calls = conv2d(x, w, b, y, scratch, split, pack=packer(w), **conv.window)
    for _ in range(2):
        y[...] = np.nan
        run(calls)
        assert_near(y, reference(conv, x, w, b), conv.bound)
    products = [fn for fn, _ in calls if getattr(fn, "sendable", False)]
    assert products
    assert any(len(products) % (tile + 2) ** 2 == 0 for tile in (2, 4))


@pytest.mark.skipif(packed.inner() is None, reason="NumPy calls a BLAS whose inner loops are not known")
@pytest.mark.parametrize("conv", [c for c in CONVS if c.name.startswith("windows")], ids=lambda c: c.name)
def test_windows_are_read_where_they_lie(conv: Conv, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside them, and between lines that are one behind the other, there may be anything."""
    asked: list[Any] = []

    def recorded(*args: Any, **named: Any) -> list[Call]:
        asked.append(args)
        return windows(*args, **named)

    monkeypatch.setattr(nhwc_conv, "windows", recorded)
    rows, columns = (n + sum(pad) for n, pad in zip(conv.x[1:3], conv.window["pads"], strict=True))
    x, w = random(0, conv.x[0], rows, columns, conv.x[3]), random(1, *conv.w)
    seen = np.full((conv.x[0], rows + 1, columns + 2, conv.x[3]), np.nan, np.float32)
    seen[:, :rows, :columns] = x
    y, window = scratch(conv.y), {**conv.window, "pads": same(0)}
    run(conv2d(seen[:, :rows], w, None, y, scratch, SPLITS["three"], pack=packer(w), **window))
    want = last(convolution(np, first(x).astype(np.float64), w.astype(np.float64), None, conv.out, **window))
    assert asked
    assert_near(y, want, DIRECT)


def test_depthwise_weights_are_repeated_in_few_forms_whatever_widths_come() -> None:
    made: dict[str, Array] = {}
    w = random(1, 192, 1, 3, 3)

    def pack(tag: str, build: Callable[[Any], Any]) -> Array:
        return made.setdefault(tag, build(w))

    for width in range(1, 260, 3):
        conv = Conv("", (1, 2, width, 192), (192, 1, 3, 3), group=192, pads=same(1))
        conv2d(random(0, *conv.x), w, None, scratch(conv.y), scratch, SERIAL, pack=pack, **conv.window)
    assert len(made) <= 3
    assert sum(a.nbytes for a in made.values()) <= 1.5 * nhwc_depthwise.WEIGHT_BYTES


@pytest.mark.skipif(packed.inner() is None, reason="NumPy calls a BLAS whose inner loops are not known")
@pytest.mark.parametrize("bordered", [False, True])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_lines_are_whole_panels_where_there_is_room(
    strides: tuple[int, int], bordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = Conv("", (1, 6, 7 * strides[1], 512), (256, 512, 3, 3), strides, same(1))
    rows: set[int] = set()

    def recorded(ranges: Sequence[Sequence[Array]], *args: Any, **named: Any) -> Call:
        rows.update(sum(map(len, pieces)) for pieces in ranges)
        return added(ranges, *args, **named)

    monkeypatch.setattr(nhwc_windows, "added", recorded)
    x, w, y = random(0, *conv.x), random(1, *conv.w), scratch(conv.y)
    source, window = x, conv.window
    if bordered:
        border = border_of(conv.x[1:3], conv.w, 1, conv.out, **window)
        assert border is not None
        source, window = np.pad(x, ((0, 0), *border, (0, 0))), {**window, "pads": same(0)}
    run(conv2d(source, w, None, y, scratch, SERIAL, pack=packer(w), **window))
    assert_near(y, reference(conv, x, w, None), DIRECT)
    assert rows == {conv.out[0] * 8}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("conv", [c for c in CONVS if c.name.startswith("depthwise")], ids=lambda c: c.name)
@pytest.mark.parametrize("block", [nhwc_depthwise.BLOCK_BYTES, 1], ids=["usual", "a-row"])
def test_what_reaches_into_padding_is_summed_apart(
    block: int, conv: Conv, layout: Callable[[Array], Array], split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a padded copy, bit by bit, in blocks of any size."""
    monkeypatch.setattr(nhwc_depthwise, "BLOCK_BYTES", block)
    x, w, b = (random(i, *s) for i, s in enumerate((conv.x, conv.w, conv.w[:1])))
    made = []
    for large in (math.inf, 0):
        monkeypatch.setattr(nhwc_depthwise, "LARGE_BYTES", large)
        made.append(layout(scratch(conv.y)))
        run(conv2d(layout(x), w, b, made[-1], scratch, split, pack=packer(w), **conv.window))
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("conv", CONVS, ids=lambda c: c.name)
def test_convolution_in_float64_without_bias(conv: Conv) -> None:
    x, w = random(0, *conv.x, dtype=np.float64), random(1, *conv.w, dtype=np.float64)
    y = scratch(conv.y, np.float64)
    run(conv2d(x, w, None, y, scratch, SERIAL, pack=packer(w), **conv.window))
    assert_near(y, reference(conv, x, w, None), 1e-13)


@pytest.mark.parametrize("conv", CONVS, ids=lambda c: c.name)
def test_convolution_where_no_product_is_small(conv: Conv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nhwc_product, "small_product", lambda: 0)
    x, w, b = (random(i, *s) for i, s in enumerate((conv.x, conv.w, conv.w[:1])))
    y = scratch(conv.y)
    run(conv2d(x, w, b, y, scratch, SPLITS["three"], pack=packer(w), **conv.window))
    assert_near(y, reference(conv, x, w, b), conv.bound)


@pytest.mark.parametrize("conv", CONVS, ids=lambda c: c.name)
def test_convolution_allocates_nothing(conv: Conv) -> None:
    x, w, b, residual = (random(i, *s) for i, s in enumerate((conv.x, conv.w, conv.w[:1], conv.y)))
    y = scratch(conv.y)
    calls = conv2d(
        x, w, b, y, scratch, SPLITS["three"], activation=("relu",), residual=residual, pack=packer(w), **conv.window
    )
    assert allocated(calls) < TRANSIENT_BYTES


def test_allocations_are_seen() -> None:
    a = np.zeros(TRANSIENT_BYTES)
    assert allocated([(np.add, (a, a))]) >= a.nbytes


ACTIVATED = {"pointwise-batch", "columns-groups", "winograd-4", "winograd-dilated", "depthwise-blocks"}
PARAMETERS = {"low": -0.5, "high": 0.75, "alpha": 0.2, "beta": 0.5}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("conv", [c for c in CONVS if c.name in ACTIVATED], ids=lambda c: c.name)
def test_activations(conv: Conv, name: str, layout: Callable[[Array], Array]) -> None:
    x, w, b = (random(i, *s) for i, s in enumerate((conv.x, conv.w, conv.w[:1])))
    params = {k: PARAMETERS[k] for k in ACTIVATIONS[name]}
    sums = reference(conv, x, w, b)
    want = (
        np.clip(sums, params["low"], params["high"]) if name == "clip" else plain_activation(np, name, sums, **params)
    )
    y = layout(scratch(conv.y))
    calls = conv2d(
        x, w, b, y, scratch, SPLITS["three"], activation=(name, *params.values()), pack=packer(w), **conv.window
    )
    run(calls)
    assert np.isfinite(y).all()
    assert np.abs(y - want).max() <= conv.bound * max(1.0, np.abs(sums).max())


@dataclass(frozen=True)
class Pool:
    """x (N, H, W, C)"""

    name: str
    x: tuple[int, int, int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilations: tuple[int, int] = (1, 1)
    ceil: tuple[int, int] = (0, 0)

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(
            (n + sum(pad) - (k - 1) * d - 1) // s + 1 + more
            for n, k, s, d, pad, more in zip(
                self.x[1:3], self.kernel, self.strides, self.dilations, self.pads, self.ceil, strict=True
            )
        )

    @property
    def window(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "strides": self.strides, "pads": self.pads, "dilations": self.dilations}


POOLS = (
    Pool("3x3s2", (2, 9, 10, 5), (3, 3), (2, 2), same(1)),
    Pool("2x2s2", (1, 7, 6, 16), (2, 2), (2, 2)),
    Pool("3x3", (3, 6, 7, 4), (3, 3), pads=same(1)),
    Pool("blocks", (2, 64, 60, 40), (3, 3), (2, 2), ((0, 1), (0, 1))),
    Pool("uneven", (1, 5, 6, 2), (3, 4), (1, 2), ((0, 2), (1, 0))),
    Pool("one-pixel", (2, 1, 1, 3), (1, 1)),
    Pool("padded-pixel", (1, 1, 1, 3), (3, 3), pads=same(1)),
    Pool("dilated", (1, 9, 8, 3), (2, 3), (1, 2), ((1, 0), (2, 2)), (3, 2)),
    Pool("whole", (2, 4, 5, 6), (4, 5)),
    Pool("hanging-over", (1, 6, 6, 3), (3, 3), (2, 2), ceil=(1, 1)),
    Pool("large", (1, 13, 13, 6), (13, 13), pads=same(6)),
)  # fmt: skip


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("pool", POOLS, ids=lambda p: p.name)
def test_pooling(pool: Pool, layout: Callable[[Array], Array], split: Split) -> None:
    x = random(0, *pool.x)
    shape = (pool.x[0], *pool.out, pool.x[3])
    wide = first(x).astype(np.float64)
    y = layout(scratch(shape))
    run(max_pool2d(layout(x), y, scratch, split, **pool.window))
    np.testing.assert_array_equal(y, last(max_pool(np, wide, pool.out, **pool.window)[0]))
    for include_pad in (False, True):
        y[...] = np.nan
        run(average_pool2d(layout(x), y, scratch, split, include_pad=include_pad, **pool.window))
        assert_near(y, last(average_pool(np, wide, pool.out, include_pad=include_pad, **pool.window)), 1e-6)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 7, 7, 64), (3, 1, 1, 5), (2, 6, 5, 4), (2, 5, 4, 41)], ids=str)
def test_global_pooling(shape: tuple[int, ...], layout: Callable[[Array], Array], split: Split) -> None:
    x = random(0, *shape)
    y = layout(scratch((shape[0], 1, 1, shape[3])))
    run(global_max_pool(layout(x), y, scratch, split))
    np.testing.assert_array_equal(y, x.max(axis=(1, 2), keepdims=True))
    run(global_average_pool(layout(x), y, scratch, split))
    assert_near(y, x.astype(np.float64).mean(axis=(1, 2), keepdims=True), 1e-6)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("channels", [16, 41, 1000])
def test_channels_that_are_alike_have_one_mean(channels: int, split: Split) -> None:
    """A softmax of large logits tells a difference of one rounding."""
    x = np.repeat(random(0, 2, 7, 7, 1), channels, axis=3)
    y = scratch((2, 1, 1, channels))
    run(global_average_pool(x, y, scratch, split))
    np.testing.assert_array_equal(y, np.repeat(y[..., :1], channels, axis=3))


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: p.name)
def test_pooling_allocates_nothing(pool: Pool) -> None:
    x = random(0, *pool.x)
    y = scratch((pool.x[0], *pool.out, pool.x[3]))
    one = scratch((pool.x[0], 1, 1, pool.x[3]))
    split = SPLITS["three"]
    calls = [
        *max_pool2d(x, y, scratch, split, **pool.window),
        *average_pool2d(x, y, scratch, split, include_pad=False, **pool.window),
        *global_average_pool(x, one, scratch, split),
        *global_max_pool(x, one, scratch, split),
    ]
    assert allocated(calls) < TRANSIENT_BYTES
