"""Normalisations over any axes of arrays of any strides.

A row, all that shares statistics, that fits in the registers of a block is read once. The statistics of longer ones are
reductions, shared by several programs where rows are few, and a last launch applies them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infera_kernels.calls import Call, Scratch
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.elementwise import binary
from infera_kernels.triton.invariance import of_batch, rows_seen
from infera_kernels.triton.layout import (
    FLOATS,
    INT32_MAX,
    Dims,
    broadcast_strides,
    coalesce,
    element_strides,
    fold,
    name_of,
    next_power_of_two,
    span,
)
from infera_kernels.triton.normalizations import NORMALIZATIONS, Normalization, normalize_kernel
from infera_kernels.triton.quantise import bounds
from infera_kernels.triton.reduce import passes
from infera_kernels.triton.reduce_walk import TILE, Operand, Walk, dense, lies_apart, most_parts, pick_walks, source
from infera_kernels.triton.reductions import REDUCTIONS, accumulator, identity
from infera_kernels.triton.rows import LONGEST_ROW

_LONGEST_COLUMN = 2048
"""Of rows whose elements lie apart, eight neighbours share a block at least."""


def _ordered(axes: Sequence[int], strides: Dims) -> list[int]:
    """Axes with the smallest stride last."""
    return sorted(axes, key=lambda a: -abs(strides[a]))


def _of(values: Dims, axes: Sequence[int]) -> Dims:
    return tuple(values[a] for a in axes)


def fits(shape: Dims, axes: Sequence[int]) -> bool:
    """Whether a row of a contiguous array of this shape fits in a block, several where its elements lie apart."""
    length = math.prod(_of(shape, axes))
    last = max((a for a, d in enumerate(shape) if d > 1), default=0)
    return length <= (LONGEST_ROW if last in axes else _LONGEST_COLUMN)


def whole_rows(
    kept: Dims, kept_strides: Dims, reduced: Dims, reduced_strides: Dims, *, invariant: bool
) -> tuple[Walk, Walk]:
    """Tiles that hold whole rows: lanes lie along what is contiguous."""
    length = next_power_of_two(math.prod(reduced))
    rows = rows_seen(math.prod(kept), invariant=invariant)
    apart = lies_apart(kept, kept_strides, reduced_strides, invariant=invariant)
    split = apart and len(kept) > 1 and kept[0] >= 32
    line = next_power_of_two(kept[0] if split else rows)
    block = max(1, min(line, TILE // 4 // length))
    if apart:
        block = min(line, max(8, min(128, 2 * TILE // length)))
    return Walk(kept, split, block), Walk(reduced, False, length)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What one launch walks: arrays by name, those of x's size and those that repeat, axes in order.

    Where it is `invariant`, the dimensions that remain do not depend on how many rows there are.
    """

    shape: Dims
    kept: list[int]
    reduced: list[int]
    arrays: Mapping[str, Any]
    invariant: bool

    def merged(self, names: Sequence[str], axes: list[int]) -> tuple[Dims, dict[str, Dims]]:
        """Their dimensions along some axes, and each one's strides."""
        there = [n for n in names if self.arrays.get(n) is not None]
        strides = [_of(self.strides(n), axes) for n in there]
        dims, walked = coalesce(_of(self.shape, axes), strides or [(0,) * len(axes)], ones=self.invariant)
        return dims, dict(zip(there, walked, strict=False))

    def strides(self, name: str) -> Dims:
        """An array's strides over the shape. Along an axis of one element a factor repeats, as it does in a batch."""
        array = self.arrays[name]
        strides = broadcast_strides(array, self.shape)
        if not self.invariant or name not in _FACTORS:
            return strides
        narrow = (1,) * (len(self.shape) - len(array.shape)) + tuple(array.shape)
        return tuple(0 if d == 1 else s for d, s in zip(narrow, strides, strict=True))


_FULL, _FACTORS, _STATISTICS = ("x", "skip", "out", "sums", "codes"), ("plus", "weight", "bias"), ("center", "scale")


def _launch(
    family: Normalization, layout: _Layout, launcher: Launcher, eps: float, activation: Any, *, given: bool
) -> Call:
    """One launch over x; `given` are the statistics, else rows must fit."""
    arrays = layout.arrays
    kept, along_kept = layout.merged((*_FULL, *_STATISTICS), layout.kept)
    reduced, along_reduced = layout.merged(_FULL, layout.reduced)
    rows, row_strides = layout.merged(_FACTORS, layout.kept)
    cols, col_strides = layout.merged(_FACTORS, layout.reduced)
    walks = kept, along_kept["x"], reduced, along_reduced["x"]
    invariant = layout.invariant
    results, along = pick_walks(*walks, 1, invariant=invariant) if given else whole_rows(*walks, invariant=invariant)
    spans = [span(dims, v) for dims, of in ((kept, along_kept), (reduced, along_reduced)) for v in of.values()]
    args: dict[str, Any] = {
        "kept": kept,
        "kept_count": results.count,
        "reduced": reduced,
        "length": along.count,
        "rows": rows,
        "cols": cols,
        "tiles_a_row": along.tiles,
        "eps": eps,
    }
    for name in (*_FULL, *_FACTORS, *_STATISTICS, "codes_scale", "codes_zero"):
        args[name] = arrays.get(name)
    for suffix, names, found in (
        ("kept", (*_FULL, *_STATISTICS), along_kept),
        ("reduced", _FULL, along_reduced),
        ("rows", _FACTORS, row_strides),
        ("cols", _FACTORS, col_strides),
    ):
        for name in names:
            strides = found.get(name)
            repeats = suffix in ("rows", "cols") and not any(strides or ())
            args[f"{name}_{suffix}"] = None if strides is None or repeats else fold(strides)
    low, high = (None, None) if arrays.get("codes") is None else bounds(arrays["codes"].dtype)
    center = None if family.center is None else REDUCTIONS[family.center]
    scale = None if family.scale is None else REDUCTIONS[family.scale]
    constexprs = {
        "CENTER_FOLD": None if center is None else center.fold,
        "CENTER_FINISH": None if center is None else center.finish,
        "CENTER_START": None if center is None else identity(center.start, "float32"),
        "SCALE_MAP": None if scale is None else scale.map,
        "SCALE_FOLD": None if scale is None else scale.fold,
        "SCALE_FINISH": None if scale is None else scale.finish,
        "APPLY": family.apply,
        "ACTIVATION": activation,
        "LOW": low,
        "HIGH": high,
        "GIVEN": given,
        "KEPT": results.block,
        "KEPT_SPLIT": results.split,
        "REDUCED": along.block,
        "REDUCED_SPLIT": along.split,
        "WIDE": max(results.count, along.count, *spans) > INT32_MAX - LONGEST_ROW,
    }
    warps = max(1, min(16, results.block * along.block // 256))
    grid = (results.tiles * along.tiles,)
    args = of_batch(args, "kept", "kept_count", "rows", invariant=invariant)
    return launcher.launch(normalize_kernel, grid, args, constexprs, num_warps=warps)


def _narrow(statistics: Mapping[str, Any], shape: Dims, axes: Sequence[int]) -> dict[str, Any]:
    """The arrays with one element along each of the axes."""
    narrow = tuple(1 if a in axes else d for a, d in enumerate(shape))
    return {name: a.reshape(narrow) for name, a in statistics.items()}


def scratch_of(
    kind: str, x: Typed, axes: Sequence[int], given: Sequence[str] = (), *, invariant: bool = False
) -> list[tuple[Dims, str]]:
    """Shape and type of each scratch array that `normalize` asks for, in order; `given` names the statistics, "center"
    and "scale", for which it is given arrays."""
    family, shape = NORMALIZATIONS[kind], tuple(x.shape)
    if not math.prod(shape) or not family.statistics() or (family.at_once and fits(shape, axes)):
        return []
    rows = math.prod(d for a, d in enumerate(shape) if a not in axes)
    parts = most_parts(rows, math.prod(_of(shape, axes)), invariant=invariant)
    types = {name: accumulator(kind, x.dtype) for name, kind in family.statistics().items()}
    pieces = [((rows,), type) for name, type in types.items() if name not in given]
    return [*pieces, ((parts, rows), next(iter(types.values())))]


def supports_normalization(kind: str, x: Typed, out: Typed, *others: Typed | None) -> bool:
    """A name in NORMALIZATIONS; float32, float16 or bfloat16 all of them, `out` of x's type and shape."""
    there = [o for o in others if o is not None]
    same = name_of(out) == name_of(x) and tuple(out.shape) == tuple(x.shape)
    return kind in NORMALIZATIONS and same and all(name_of(o) in FLOATS for o in (x, *there))


def normalize(
    kind: str,
    x: Any,
    axes: Sequence[int],
    out: Any,
    launcher: Launcher,
    scratch: Scratch,
    *,
    eps: float = 0.0,
    skip: Any = None,
    plus: Any = None,
    weight: Any = None,
    bias: Any = None,
    sums: Any = None,
    center: Any = None,
    scale: Any = None,
    codes: Any = None,
    codes_scale: Any = None,
    codes_zero: Any = None,
    activation: Any = None,
    invariant: bool = False,
) -> list[Call]:
    """out = activation(kind(x + skip + plus) * weight + bias), its rows along the non-negative `axes`.

    skip, plus, weight and bias, where given, broadcast to x's shape; the first two have x's type where rows do not fit
    in a block. `sums` receives x + skip + plus; `center` and `scale`, contiguous float32 arrays, the statistics, one
    for each row; `codes`, of int8 or uint8, what `out` is before it is rounded, by a scale and a zero point. `out` may
    be x. `invariant` rows are the same bits however many there are.
    """
    others = (skip, plus, weight, bias)
    if not supports_normalization(kind, x, out, *others):
        raise ValueError(f"{kind}: no kernel for {name_of(x)}{list(x.shape)} -> {name_of(out)}{list(out.shape)}")
    shape = tuple(x.shape)
    if 0 in shape:
        return []
    family, of = NORMALIZATIONS[kind], element_strides(x)
    kept = [a for a in range(len(shape)) if a not in axes]
    statistics = {name: a for name, a in (("center", center), ("scale", scale)) if a is not None}
    arrays = {"x": x, "skip": skip, "plus": plus, "weight": weight, "bias": bias, "out": out, "sums": sums}
    arrays |= {"codes": codes, "codes_scale": codes_scale, "codes_zero": codes_zero}
    orders = _ordered(kept, of), _ordered(axes, of)
    if family.at_once and fits(shape, axes):
        narrow = _narrow(statistics, shape, axes)
        layout = _Layout(shape, *orders, {**arrays, **narrow}, invariant)
        return [_launch(family, layout, launcher, eps, activation, given=False)]
    calls: list[Call] = []
    for term in (skip, plus):
        if term is not None:
            target = out if sums is None else sums
            calls += binary("add", arrays["x"], term, target, launcher)
            arrays["x"] = target
    pieces = [scratch(*piece) for piece in scratch_of(kind, x, axes, tuple(statistics), invariant=invariant)]
    parts = pieces.pop() if pieces else None
    rows = source(arrays["x"], axes)
    shift: list[Operand] = []
    for name, reduction in family.statistics().items():
        made = statistics[name] = statistics[name] if name in statistics else pieces.pop(0)
        target = dense(made, rows.kept)
        calls += passes(reduction, rows, [target, *shift], parts, launcher, eps, invariant=invariant)
        shift = [target]
    arrays |= {"skip": None, "plus": None, "sums": None, **_narrow(statistics, shape, axes)}
    return [*calls, _launch(family, _Layout(shape, *orders, arrays, invariant), launcher, eps, activation, given=True)]
