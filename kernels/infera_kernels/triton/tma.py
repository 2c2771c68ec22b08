"""Matrix products whose factors TMA reads: which ones, and their launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infera_kernels.calls import Call
from infera_kernels.launch import Descriptor, Launcher, describes, target_of
from infera_kernels.launch.cublaslt import lying
from infera_kernels.launch.descriptors import described
from infera_kernels.launch.types import address_of
from infera_kernels.triton.layout import INT32_MAX, ceil_div, name_of
from infera_kernels.triton.products import GROUP
from infera_kernels.triton.tiles import STRIP, TMA_TILES, TmaTile
from infera_kernels.triton.tma_kernel import tma_kernel

_MOST = INT32_MAX - 2**16
"""Tiles, which are counted in int32, and past the last by as many as are programs; rows and columns are so few, too."""

_LEAST = min(t.m for t in TMA_TILES), min(t.n for t in TMA_TILES)


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor as TMA reads it: rows in one piece, or columns where it is `turned`; matrices follow each other where
    there are three dimensions."""

    array: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    turned: bool

    def blocks(self, rows: int, columns: int) -> Descriptor:
        block = (columns, rows) if self.turned else (rows, columns)
        return Descriptor(self.array, self.shape, self.strides, (1,) * (len(self.shape) - 2) + block)


Factors = tuple[Factor, Factor]


def factors_of(
    args: Mapping[str, Any],
    strides: Sequence[tuple[int, ...]],
    walked: Sequence[tuple[int, ...]],
    launcher: Launcher,
) -> Factors | None:
    """The factors of a product, of the matrices' own strides and those over the batch, of a and b; None where TMA does
    not read them: of another type than float16 and bfloat16, lying apart, not on 16 bytes, or in a batch with several
    strides; or where the launcher has no descriptors."""
    m, n, k, batch = args["M"], args["N"], args["K"], args["batch"] or ()
    if not describes(launcher) or name_of(args["a"]) not in ("float16", "bfloat16") or m == 1 or len(batch) > 1:
        return None
    if max(m, n) > _MOST or math.prod(batch) * ceil_div(m, _LEAST[0]) * ceil_div(n, _LEAST[1]) > _MOST:
        return None
    found = [
        _factor(args[name], size, (own[0], own[1]), batch, over)
        for name, size, own, over in zip("ab", ((m, k), (k, n)), strides, walked, strict=False)
    ]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _factor(
    array: Any, size: tuple[int, int], own: tuple[int, int], batch: Sequence[int], over: Sequence[int]
) -> Factor | None:
    lies = lying(*size, own)
    if lies is None:
        return None
    line, turned = lies
    many = batch and over[0]  # one matrix for all of a batch has no stride
    shape = (*([batch[0]] if many else []), *(size[::-1] if turned else size))
    strides = (*([over[0]] if many else []), line, 1)
    if not described(address_of(array), array.dtype.itemsize, shape, strides):
        return None
    return Factor(array, shape, strides, turned)


def multiply(args: Mapping[str, Any], factors: Factors, tile: TmaTile, act: Any, launcher: Launcher) -> Call:
    """One launch, of as many programs as run at a time."""
    target, (m, n, batch) = target_of(launcher), (args[name] for name in ("M", "N", "batch"))
    tiles = math.prod(batch or (1,)) * ceil_div(m, tile.m) * ceil_div(n, tile.n)
    a, b = factors
    given = {**args, "a": a.blocks(tile.m, tile.k), "b": b.blocks(tile.k, tile.n)}
    known = {
        "ACT": act,
        "PRECISION": "ieee",
        "GROUP": GROUP,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "STRIP": STRIP,
        "A_TURNED": a.turned,
        "B_TURNED": b.turned,
        "JOINED": tile.joined,
        "SPECIALISED": tile.specialised,
    }
    return launcher.launch(
        tma_kernel,
        (min(tiles, target.multiprocessors * tile.beside(target)),),
        {name: given[name] for name in tma_kernel.arg_names if name in given},
        known,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
