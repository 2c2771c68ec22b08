"""Elements at computed positions: gathers along an axis, by element and by tuple.

They are one kernel: an output element is the input's at the position that its own coordinates give, plus a step for
each index. A negative index counts from the end. One that is out of range reads nothing and gives 0, as in onnxruntime
on CUDA: a launch cannot raise.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import offset_in, tile_of
from infera_kernels.triton.layout import INDICES, STORED, Dims, element_strides, few, fold, fold_one, name_of
from infera_kernels.triton.pointwise import pick_tiling


@triton.jit
def gather_kernel(
    x,
    indices,
    out,
    dims,
    strides,
    rows,
    sizes,
    steps,
    part,
    LAST_OUTSIDE: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = x at its own offset plus, for each of `sizes`, an index times its step; indices of one lie `part` apart.

    `strides` has those of x, of the indices and of out. With LAST_OUTSIDE whatever is no index is the last one.
    """
    tile, row, col, inside = tile_of(dims, rows, ROWS, COLS, WIDE)
    at = offset_in(tile, row, col, dims, strides, ROW_DIMS).to(tl.int64)
    first = indices + offset_in(tile, row, col, dims, strides, ROW_DIMS, len(dims))
    found = inside
    for k in tl.static_range(len(sizes)):
        index = tl.load(first + k * part, mask=inside, other=0).to(tl.int64)
        if LAST_OUTSIDE:
            index = tl.where((index < 0) | (index >= sizes[k]), sizes[k] - 1, index)
        else:
            index = tl.where(index < 0, index + sizes[k], index)
            found = found & (index >= 0) & (index < sizes[k])
        at += index * steps[k]
    value = tl.load(x + at, mask=found, other=0)
    tl.store(out + offset_in(tile, row, col, dims, strides, ROW_DIMS, 2 * len(dims)), value, mask=inside)


def supports_gather(x: Typed, indices: Typed, out: Typed) -> bool:
    """Anything that can be stored, with elements, by int32 or int64; few enough dimensions."""
    movable = name_of(x) in STORED and name_of(out) == name_of(x) and name_of(indices) in INDICES
    return movable and 0 not in x.shape and few(out.shape)


def _gather(
    x: Any,
    indices: Any,
    out: Any,
    launcher: Launcher,
    along: tuple[Dims, Dims],
    sizes: Dims,
    steps: Dims,
    *,
    part: int = 0,
    last_outside: bool = False,
) -> list[Call]:
    """`along` are the strides of x and of the indices as seen from the output."""
    if not supports_gather(x, indices, out):
        given = ", ".join(f"{name_of(a)}{list(a.shape)}" for a in (x, indices))
        raise ValueError(f"gather: no kernel for {given} -> {name_of(out)}{list(out.shape)}")
    if 0 in out.shape:
        return []
    tiling = pick_tiling(tuple(out.shape), [*along, element_strides(out)])
    args = {
        "x": x,
        "indices": indices,
        "out": out,
        **tiling.arguments,
        "sizes": sizes,
        "steps": fold(steps),
        "part": fold_one(part),
    }
    constexprs = {"LAST_OUTSIDE": last_outside, **tiling.constexprs}
    return [launcher.launch(gather_kernel, (tiling.programs,), args, constexprs, num_warps=4)]


def _none(count: int) -> Dims:
    return (0,) * count


def gather(x: Any, indices: Any, out: Any, launcher: Launcher, *, axis: int, last_outside: bool = False) -> list[Call]:
    """out = x's entries along `axis` (not negative) at `indices`; any strides.

    With `last_outside` whatever is no index, negative ones too, is the last one.
    """
    strides, chosen = element_strides(x), element_strides(indices)
    inner = len(strides) - axis - 1
    along = (*strides[:axis], *_none(len(chosen)), *strides[axis + 1 :]), (*_none(axis), *chosen, *_none(inner))
    sizes, steps = (x.shape[axis],), (strides[axis],)
    return _gather(x, indices, out, launcher, along, sizes, steps, last_outside=last_outside)


def gather_elements(x: Any, indices: Any, out: Any, launcher: Launcher, *, axis: int) -> list[Call]:
    """out[i][j] = x[indices[i][j]][j] for axis 0, and so for any axis and rank; any strides."""
    strides = element_strides(x)
    along = (*strides[:axis], 0, *strides[axis + 1 :]), element_strides(indices)
    return _gather(x, indices, out, launcher, along, (x.shape[axis],), (strides[axis],))


def gather_nd(x: Any, indices: Any, out: Any, launcher: Launcher, *, batch_dims: int) -> list[Call]:
    """out[i] = x[indices[i]] for tuples in the last axis, within each of the leading `batch_dims` axes; any strides."""
    strides, chosen = element_strides(x), element_strides(indices)
    end = batch_dims + indices.shape[-1]
    own = strides[:batch_dims], _none(len(chosen) - 1 - batch_dims), strides[end:]
    along = tuple(s for part in own for s in part), (*chosen[:-1], *_none(len(strides) - end))
    sizes, steps = tuple(x.shape[batch_dims:end]), strides[batch_dims:end]
    return _gather(x, indices, out, launcher, along, sizes, steps, part=chosen[-1])
