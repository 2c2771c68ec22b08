"""Convolutions and transposed convolutions of images with channels last, with what usually follows one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from infera_kernels.calls import Call
from infera_kernels.launch import Const, Launcher, Target, Typed, nominal_target, target_of
from infera_kernels.triton import tiles
from infera_kernels.triton.ahead import ahead
from infera_kernels.triton.conv_kernel import conv_kernel, join_kernel
from infera_kernels.triton.elementwise import UNARY
from infera_kernels.triton.images import SPATIAL, Image, Pads, constants, image_of, three, unit_of
from infera_kernels.triton.invariance import entries_seen, of_batch
from infera_kernels.triton.layout import FLOATS, INT32_MAX, Dims, ceil_div, coalesce, element_strides, fold_one, name_of
from infera_kernels.triton.parts import Parts, cheapest, room_for_parts
from infera_kernels.triton.products import GROUP
from infera_kernels.triton.tiles import (
    EITHER,
    HALF,
    IEEE,
    SIZES,
    TF32,
    TF32X3,
    Tile,
    cycles,
    ending,
    fitting,
    kind_of,
    least,
)
from infera_kernels.tuning import Family, Problem, Tuned, choose
from infera_kernels.tuning.choice import REMEMBERED
from infera_kernels.tuning.cost import joining_cycles

_NARROW = frozenset((Tile(128, 64, 64, 4, 4),))

SPILLING: Mapping[str, frozenset[Tile]] = MappingProxyType({"3.6": _NARROW, "3.7": _NARROW})
"""Release of Triton -> tiles of halves which, on sm_80 to sm_89, addresses of a window's pixels leave no registers."""


def keeps(tile: Tile, layout: str, target: Target) -> bool:
    """Whether all values of the kernel are known to stay in registers."""
    release = ".".join(target.triton.split(".")[:2])
    return not (target.arch < 90 and tile in SPILLING.get(release, ())) and tiles.keeps(tile, layout, target)


@lru_cache(maxsize=REMEMBERED)
def _predicted(problem: Problem, target: Target) -> Tile:
    return least(problem, target, [t for t in fitting(problem, target) if keeps(t, problem.layout, target)])


CONV = Family("conv", (*SIZES, "taps"), 2, Tile, fitting, _predicted, (conv_kernel,), cycles)
"""`k` is the depth, all channels of all taps; `batch` counts groups, phases and splits; `layout` is which axis of the
image and of the weights is contiguous, channels "c" or none, and the `ending`."""

FEW_PIXELS = 4096
"""Up to so many, those of an image or a few small ones, weights count as much as what is made of them."""

_WALKED = 4
"""Blocks of channels from which on taps are walked one by one, though the last block of each be partly empty."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a window does along each of three spatial axes; `pads` are those before."""

    kernel: Dims
    strides: Dims
    dilations: Dims
    pads: Dims

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def turn(self) -> Dims:
        """What `conv_kernel` is told of the phases of a transposed convolution, four numbers an axis."""
        told: list[int] = []
        for stride, dilation in zip(self.strides, self.dilations, strict=True):
            common = math.gcd(stride, dilation)
            step = stride // common
            told += [stride, common, step, pow(dilation // common, -1, step) if step > 1 else 0]
        return tuple(told)


def geometry(kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Pads) -> Geometry:
    """The geometry of one to three spatial axes."""
    before = [pair[0] for pair in pads]
    return Geometry(three(kernel, 1), three(strides, 1), three(dilations, 1), three(before, 0))


def supports_conv(
    x: Typed,
    w: Typed,
    out: Typed,
    bias: Typed | None = None,
    residual: Typed | None = None,
    activation: str | None = None,
) -> bool:
    """x (N, spatial..., C), w (O, kernel..., C / groups), out and residual (N, spatial..., O), bias (O,).

    All of one type out of float32, float16 and bfloat16, with one to three spatial axes; an activation of UNARY on it.
    """
    given = [v for v in (x, w, out, bias, residual) if v is not None]
    if len({name_of(v) for v in given}) != 1 or name_of(x) not in FLOATS:
        return False
    rank, channels = len(x.shape), out.shape[-1]
    fits = 3 <= rank <= SPATIAL + 2 and len(w.shape) == len(out.shape) == rank and w.shape[0] == channels
    terms = (bias is None or tuple(bias.shape) == (channels,)) and (
        residual is None or tuple(residual.shape) == tuple(out.shape)
    )
    small = max(math.prod(out.shape[:-1]), math.prod(w.shape)) <= INT32_MAX - 256
    known = activation is None or (activation in UNARY and name_of(x) in UNARY[activation].dtypes)
    return fits and terms and small and known


def _splits(problem: Problem, target: Target) -> tuple[Parts, ...]:
    """Whole sums, and powers of two that may pay."""
    m, batch, n, k, _ = problem.sizes
    most = room_for_parts(m, n, batch, k, target)
    return tuple(Parts(c) for c in sorted({*(1 << i for i in range(most.bit_length())), most}))


def _split_cycles(problem: Problem, parts: Parts, target: Target) -> float:
    m, batch, n, k, taps = problem.sizes
    part = Problem(CONV.name, problem.kind, (m, batch * parts.count, n, ceil_div(k, parts.count), taps))
    return cycles(part, _predicted(part, target), target) + joining_cycles(parts.count, batch * m * n, target)


@lru_cache(maxsize=REMEMBERED)
def _split_count(problem: Problem, target: Target) -> Parts:
    return cheapest(problem, target, _splits, _split_cycles)


SPLITS = Family(
    *("conv_splits", (*SIZES, "taps"), 2, Parts, _splits, _split_count, (conv_kernel, join_kernel), _split_cycles)
)
"""Into how many parts the sums of a convolution are split."""


def splits_of(
    out: Typed,
    w: Typed,
    groups: int,
    *,
    invariant: bool = False,
    library: bool = False,
    tf32: bool = False,
    tuned: Tuned | None = None,
) -> int:
    """Into how many parts a convolution's sums are split, each a program's: more than 1 where the outputs are few. The
    `library` may compute whole sums, as one product."""
    images = entries_seen(out.shape[0], invariant=invariant)
    sizes = {
        "m": images * math.prod(out.shape[1:-1]),
        "batch": groups,
        "n": out.shape[-1] // groups,
        "k": math.prod(w.shape[1:]),
        "taps": math.prod(w.shape[1:-1]),
    }
    problem = SPLITS.problem(kind_of(w, tf32=tf32), sizes, EITHER * library)
    target = nominal_target(90) if tuned is None else tuned.target
    return choose(SPLITS, problem, target, None if invariant else tuned).count


def parts_shape(out: Typed, w: Typed, groups: int, **how: Any) -> Dims | None:
    """The scratch, in float32, that a convolution takes; None where it takes none. `how` is for `splits_of`."""
    splits = splits_of(out, w, groups, **how)
    return (splits, math.prod(out.shape[:-1]), out.shape[-1]) if splits > 1 and math.prod(out.shape) else None


@dataclass(frozen=True, slots=True)
class Finish:
    """What follows the sums: activation(sums + bias + residual)."""

    bias: Any = None
    residual: Any = None
    activation: str | None = None
    alpha: float | None = None
    beta: float | None = None

    def arguments(self) -> dict[str, Any]:
        entry = UNARY[self.activation] if self.activation else None
        given = {"residual_strides": (Const(0),) * 4, "residual_c": Const(0)}
        if self.residual is not None:
            given = image_of(self.residual).arguments("residual")
        return {
            "bias": self.bias,
            "residual": self.residual,
            "bias_f": Const(0) if self.bias is None else fold_one(element_strides(self.bias)[0]),
            **given,
            "act_alpha": entry and (entry.alpha if self.alpha is None else float(self.alpha)),
            "act_beta": entry and (entry.beta if self.beta is None else float(self.beta)),
        }

    def constexprs(self) -> dict[str, Any]:
        return {
            "ACT": UNARY[self.activation].fn if self.activation else None,
            "RESIDUAL_UNIT": 1 if self.residual is None else image_of(self.residual).unit,
        }


NOTHING = Finish()


def conv(
    x: Any,
    w: Any,
    out: Any,
    launcher: Launcher,
    where: Geometry,
    *,
    groups: int = 1,
    finish: Finish = NOTHING,
    parts: Any = None,
    transposed: bool = False,
    precision: str = IEEE,
    tile: Tile | None = None,
    invariant: bool = False,
    tuned: Tuned | None = None,
) -> list[Call]:
    """out = activation(conv(x, w) + bias + residual), summed in float32; `transposed`: the gradient of one, cropped.

    Strides are arbitrary. Weights are fastest (O, kernel..., C / groups) contiguous. `parts` is the scratch of
    `parts_shape`, where the sums are split: then a second launch joins them, in the same order in every run.
    `precision` is for float32, as in `matmul`; `tile` overrides what is `tuned`, or predicted. `invariant` images are
    the same bits however many there are; nothing is tuned for them.
    """
    if not supports_conv(x, w, out, finish.bias, finish.residual, finish.activation):
        given = ", ".join(f"{name_of(v)}{list(v.shape)}" for v in (x, w, out))
        raise ValueError(f"conv: no kernel for {given} with activation {finish.activation}")
    if precision not in (IEEE, TF32, TF32X3):
        raise ValueError(f"conv: precision '{precision}' is none of {IEEE}, {TF32}, {TF32X3}")
    if 0 in tuple(out.shape):
        return []
    source, weight, target = image_of(x), image_of(w), image_of(out)
    turn = where.turn() if transposed else None
    steps = where.strides if transposed else (1, 1, 1)
    rows = tuple(ceil_div(n, s) for n, s in zip(target.size, steps, strict=True))
    phases = math.prod(steps)
    m, f, c = target.dims[0] * math.prod(rows), target.channels // groups, weight.channels
    splits = 1 if parts is None else int(parts.shape[0])
    kind = precision if name_of(x) == "float32" else HALF
    if tile is None:
        seen = entries_seen(target.dims[0], invariant=invariant) * math.prod(rows)
        taps = max(where.taps // phases, 1)
        work = {"m": seen, "batch": groups * phases * splits, "n": f, "k": max(c * taps // splits, 1), "taps": taps}
        layout = "".join("c" if image.strides[4] == 1 else "-" for image in (source, weight))
        end = ending(finish.residual, finish.activation) if parts is None else ""
        problem = CONV.problem(kind, work, layout + end)
        tile = choose(CONV, problem, target_of(launcher), None if invariant else tuned)
    flat = c % tile.k != 0 and c < _WALKED * tile.k
    args = {
        "x": x,
        "w": w,
        "out": out,
        "parts": parts,
        "M": m,
        "F": f // unit_of(f, x),
        "C": Const(c) if flat else c // unit_of(c, x),
        "groups": fold_one(groups),
        "splits": fold_one(splits),
        "size": tuple(map(fold_one, source.size)),
        "out_size": tuple(map(fold_one, target.size)),
        "rows": tuple(map(fold_one, rows)),
        "kernel": constants(where.kernel),
        "strides": constants(where.strides),
        "dilations": constants(where.dilations),
        "pads": constants(where.pads),
        "turn": turn and constants(turn),
        **source.arguments("x"),
        **weight.arguments("w"),
        **target.arguments("out"),
        **finish.arguments(),
    }
    constexprs = {
        **finish.constexprs(),
        "PRECISION": precision,
        "FLAT": flat,
        "F_UNIT": unit_of(f, x),
        "C_UNIT": 1 if flat else unit_of(c, x),
        "X_UNIT": source.unit,
        "W_UNIT": weight.unit,
        "OUT_UNIT": target.unit,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "GROUP": GROUP,
        "WHOLE": (c * where.taps if flat and not transposed else c) % tile.k == 0,
    }
    grid = (splits * phases * groups * ceil_div(m, tile.m) * ceil_div(f, tile.n),)
    _, (deep,) = coalesce(tuple(w.shape[1:]), [element_strides(w)[1:]])
    axis = "k" if deep == (1,) and m <= FEW_PIXELS and not transposed else "-"
    constexprs["AHEAD"] = ahead(launcher, grid[0], tile.n, w.dtype.itemsize, axis, invariant=invariant)
    args = of_batch(args, "M", invariant=invariant)
    call = launcher.launch(conv_kernel, grid, args, constexprs, num_warps=tile.warps, num_stages=tile.stages)
    return [call] if parts is None else [call, _join(parts, target, out, finish, launcher, invariant=invariant)]


def _join(parts: Any, target: Image, out: Any, finish: Finish, launcher: Launcher, *, invariant: bool) -> Call:
    splits, m, f = parts.shape
    bn = 32
    bm = 16
    args = {
        "parts": parts,
        "out": out,
        "M": m,
        "F": f // unit_of(f, out),
        "splits": splits,
        "size": tuple(map(fold_one, target.size)),
        **target.arguments("out"),
        **finish.arguments(),
    }
    constexprs = {**finish.constexprs(), "F_UNIT": unit_of(f, out), "OUT_UNIT": target.unit, "BM": bm, "BN": bn}
    args = of_batch(args, "M", invariant=invariant)
    return launcher.launch(join_kernel, (ceil_div(m, bm) * ceil_div(f, bn),), args, constexprs, num_warps=4)
