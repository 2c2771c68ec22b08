"""Two-dimensional convolution, channels last, straight from the image: no columns are built.

A line of output pixels is a matrix product whose left-hand rows are windows of the (padded) image, one a pixel, a fixed
distance apart. So a convolution is the product of `gemm` with a run of values for each kernel row in place of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infera_kernels.calls import Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.nhwc_border import joined, whole_tiles
from infera_kernels.cpu.parts import spans, worth
from infera_kernels.jit import windows, winograd
from infera_kernels.jit.epilogue import finish
from infera_kernels.jit.gemm import multiply, pack_bias, pack_each
from infera_kernels.jit.windows import Pair

SLAB_BYTES = 1 << 19
"""Of padded input at a time: it is read once for every panel, from the second-level cache."""

PRODUCT_NS, DEPTHWISE = 0.02, 3
"""What a multiply-add takes in a product, about, and how many times that in a depthwise convolution."""


def conv2d(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split,
    *,
    strides: Pair,
    pads: tuple[Pair, Pair],
    dilations: Pair,
    group: int,
    activation: Activation | None = None,
    residual: Array | None = None,
    pack: Pack,
    pack_b: Pack,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual).

    x (N, H, W, C), y and residual (N, OH, OW, O), contiguous float32; w (O, C / group, KH, KW) and b (O,) are constant:
    `pack` and `pack_b` keep what is made of them. Where `writes_rows` y may lie within a border. `pads` are (before,
    after) of each axis and at least 0: where there are none, x may be larger than the windows reach.
    """
    if (x.shape[2], y.shape[2], w.shape[3], pads[1]) == (1, 1, 1, (0, 0)):  # a column is a line
        x, y = x.transpose(0, 2, 1, 3), y.transpose(0, 2, 1, 3)
        residual = None if residual is None else residual.transpose(0, 2, 1, 3)
        w, strides, pads, dilations = w.transpose(0, 1, 3, 2), strides[::-1], pads[::-1], dilations[::-1]
    name, *given = activation or ("",)
    values = tuple(map(float, given))
    if _is_depthwise(w.shape, group):
        taps = pack("taps", lambda weights: np.ascontiguousarray(weights[:, 0].transpose(1, 2, 0)))
        taps = taps.reshape(*w.shape[2:], -1)  # packed as the weights are stored: a column where the image is one
        bias = None if b is None else pack_b("vector", lambda row: np.array(row))
        parts = windows.depthwise(
            x, taps, bias, y, scratch, strides=strides, pads=pads, dilations=dilations, activation=str(name),
            given=values, residual=residual, parts=_parts(DEPTHWISE * y.size * w[0].size, split),
        )  # fmt: skip
        return split.parallel(parts)
    bounds = {"relu": (0.0, np.inf), "clip": values}.get(str(name)) if residual is None else None
    low, high = bounds or (-np.inf, np.inf)
    work = _Convolution(x, w, y, strides, pads, dilations, group)
    packed = pack("tiles", winograd.pack) if work.tiled else pack(f"panels{group}", work.pack)
    bias = None if b is None else pack_b(f"panels{group}", work.pack_bias)
    if work.tiled and bias is None:
        bias = np.zeros((1, y.shape[3]), np.float32)
    done: list[list[Call]] = []
    for first, last in spans(y.shape[0] * y.shape[1], _parts(y[..., 0].size * w.size, split)):
        calls = work.calls(packed, bias, first, last, scratch, low, high)
        if not bounds and (name or residual is not None):
            rows = y.reshape(-1, *y.shape[2:])[first:last].reshape(-1, y.shape[3])
            before = None if residual is None else residual.reshape(-1, *y.shape[2:])[first:last].reshape(rows.shape)
            calls += finish(rows, before=before, activation=str(name), given=values)
        done.append(calls)
    return split.parallel(done)


def border_of(
    size: Pair, w: Sequence[int], images: int, out: Pair, *, strides: Pair, pads: tuple[Pair, Pair], dilations: Pair,
    group: int,
) -> tuple[Pair, Pair] | None:  # fmt: skip
    """The border, (before, after) of each axis, within which `conv2d` reads images of `size` (H, W) without a copy;
    None where it reads them without."""
    if not any(map(any, pads)) or _is_depthwise(w, group):
        return None
    return whole_tiles(size, out, pads, winograd.OUT) if _is_tiled(w, out, strides, dilations, group) else pads


def writes_rows(w: Sequence[int], group: int, activation: str, *, residual: bool) -> bool:
    """Whether `conv2d` writes to a y within a border: all that follows the sums is done in the product's tiles."""
    return activation in ("", "relu", "clip") and not residual and not _is_depthwise(w, group)


def _is_depthwise(w: Sequence[int], group: int) -> bool:
    return group > 1 and tuple(w[:2]) == (group, 1) and group >= windows.LEAST_CHANNELS


def _is_tiled(w: Sequence[int], out: Pair, strides: Pair, dilations: Pair, group: int) -> bool:
    once = (tuple(w[2:]), strides, dilations, group) == ((3, 3), (1, 1), (1, 1), 1)
    return once and winograd.pays(out, w[1], w[0])


def _parts(operations: int, split: Split) -> int:
    return worth(PRODUCT_NS * operations, split).threads


class _Convolution:
    """One convolution's geometry."""

    def __init__(
        self, x: Array, w: Array, y: Array, strides: Pair, pads: tuple[Pair, Pair], dilations: Pair, group: int
    ) -> None:
        self.x, self.y, self.strides, self.dilations, self.group = x, y, strides, dilations, group
        self.kernel = w.shape[2:]
        self.before = (pads[0][0], pads[1][0])
        self.padded = any(map(any, pads))
        self.channels = w.shape[1]
        self.tiled = _is_tiled(w.shape, y.shape[1:3], strides, dilations, group)
        self.merged = group == 1 and (dilations[1] == 1 or self.kernel[1] == 1)
        """Whether the values under a kernel row lie one behind the other."""

    def pack(self, w: Array) -> Array:
        """(O, C / group, KH, KW) -> (group, panels, KH * KW * C / group, COLUMNS)"""
        matrices = w.reshape(self.group, -1, *w.shape[1:]).transpose(0, 3, 4, 2, 1)
        return pack_each([m.reshape(-1, m.shape[-1]) for m in matrices])

    def pack_bias(self, b: Array) -> Array:
        return np.stack([pack_bias(part) for part in b.reshape(self.group, -1)])

    def offsets(self, source: Array) -> tuple[list[int], int]:
        """Bytes from a window's first value to each run, and the values of a run."""
        down, right = source.strides[1] * self.dilations[0], source.strides[2] * self.dilations[1]
        kh, kw = self.kernel
        if self.merged:
            return [u * down for u in range(kh)], kw * self.channels
        return [u * down + v * right for u in range(kh) for v in range(kw)], self.channels

    def calls(
        self, packed: Array, bias: Array | None, first: int, last: int, scratch: Scratch, low: float, high: float
    ) -> list[Call]:  # fmt: skip
        """Lines [first, last) of all images' lines."""
        n, lines = self.y.shape[:2]
        if not self.padded and self.kernel == (1, 1) and self.strides == (1, 1) and joined(self.y):
            pixels = slice(first * self.y.shape[2], last * self.y.shape[2])
            source, target = (a.reshape(1, 1, -1, a.shape[3])[:, :, pixels] for a in (self.x, self.y))
            return self.multiply(source, target, packed, bias, (0, 1), low, high)
        if not self.padded and not self.tiled:
            return self.multiply(self.x, self.y, packed, bias, (first, last), low, high)
        most = min(self.together(packed), lines, last - first)
        blocks = [
            (image, start, min(start + most, end))
            for image in range(n)
            for begin, end in [(max(first - image * lines, 0), min(last - image * lines, lines))]
            for start in range(begin, end, most)
        ]
        width, made, slab = self.extent(1, self.y.shape[2]), list[Call](), None
        left, right = self.before[1], min(width, self.before[1] + self.x.shape[2])
        if not all(self.reaches(start, stop, width) for _, start, stop in blocks):
            slab = scratch((1, self.extent(0, most), width, self.x.shape[3]))
            made += [(np.copyto, (side, 0)) for side in (slab[:, :, :left], slab[:, :, right:]) if side.size]
        room = winograd.rooms(most, self.y.shape[2], self.x.shape[3], self.y.shape[3], scratch) if self.tiled else None
        for image, start, stop in blocks:
            source, target = self.x[image : image + 1, start * self.strides[0] :], self.y[image : image + 1, start:stop]
            if slab is not None:
                source = slab
                made += self.load(slab, image, start, self.extent(0, stop - start), left, right)
            if room is not None:
                made += winograd.tiles_of(source, packed, bias, target, room, low, high)
            else:
                made += self.multiply(source, target, packed, bias, (0, stop - start), low, high)
        return made

    def reaches(self, start: int, stop: int, width: int) -> bool:
        """Whether the input has all that output lines [start, stop) see, without padding."""
        rows = start * self.strides[0] + self.extent(0, stop - start)
        return not self.padded and rows <= self.x.shape[1] and width <= self.x.shape[2]

    def together(self, packed: Array) -> int:
        """Output lines of one slab."""
        if self.tiled:
            return winograd.lines_of(self.y.shape[2], self.x.shape[3] + self.y.shape[3], packed.nbytes)
        row_bytes: int = self.extent(1, self.y.shape[2]) * self.x.shape[3] * 4
        return max(1, (SLAB_BYTES // row_bytes - self.extent(0, 1)) // self.strides[0] + 1)

    def extent(self, axis: int, out: int) -> int:
        """Padded input under `out` outputs."""
        if self.tiled:
            return winograd.extent(out)
        reach: int = (self.kernel[axis] - 1) * self.dilations[axis]
        return (out - 1) * self.strides[axis] + reach + 1

    def load(self, slab: Array, image: int, start: int, rows: int, left: int, right: int) -> list[Call]:
        """The input rows from under output line `start` on, copied into a slab whose sides are clear."""
        top = start * self.strides[0] - self.before[0]
        low, high = min(max(top, 0), self.x.shape[1]), min(max(top + rows, 0), self.x.shape[1])
        inner = slab[0, :rows, left:right]
        outside = (inner[: low - top], inner[high - top :])
        made: list[Call] = [(np.copyto, (part, 0)) for part in outside if part.size]
        if high > low:
            made.append((np.copyto, (inner[low - top : high - top], self.x[image, low:high, : right - left])))
        return made

    def multiply(
        self, source: Array, y: Array, packed: Array, bias: Array | None, part: Pair, low: float, high: float
    ) -> list[Call]:
        """Lines of y, all channels of them, group by group."""
        offsets, run = self.offsets(source)
        steps = (source.strides[0], source.strides[1] * self.strides[0], source.strides[2] * self.strides[1])
        out = y.shape[3] // self.group
        return [
            multiply(
                source[..., g * self.channels :], packed[g], None if bias is None else bias[g],
                y[..., g * out : (g + 1) * out], low=low, high=high, steps=steps, offsets=offsets, run=run, part=part,
            )
            for g in range(self.group)
        ]  # fmt: skip
