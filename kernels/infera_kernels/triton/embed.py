"""Layer normalisation of sums of embeddings: rows of tables, looked up, added and normalised in one launch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.invariance import of_batch, rows_seen
from infera_kernels.triton.layout import FLOATS, INT32_MAX, ceil_div, name_of
from infera_kernels.triton.reductions import inverse_deviation, mean
from infera_kernels.triton.rows import row_tile


@triton.jit
def _looked_up(table, index, entries, col, cols, inside, WRAPS: tl.constexpr):
    """A table's rows as float32; 0 for an index that it has not. Where it WRAPS, a negative one counts from the end."""
    if WRAPS:
        index = tl.where(index < 0, index + entries, index)
    there = inside & (index >= 0) & (index < entries)
    return tl.load(table + index.to(tl.int64) * cols + col, mask=there, other=0).to(tl.float32)


@triton.jit
def embed_kernel(
    ids,
    positions,
    segments,
    words,
    places,
    kinds,
    weight,
    bias,
    out,
    sums,
    counts,
    rows,
    cols,
    length,
    ids_period,
    positions_period,
    segments_period,
    word_count,
    place_count,
    kind_count,
    eps,
    WRAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A tile of whole rows: one for each id. The position is the place in a sequence of `length` where `positions` are
    not given. Indices repeat after their periods, where they have one. `counts`, one for each sequence, become 0 where
    given."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    valid = row < rows
    inside = valid & (col < cols)
    id_at, segment_at = row, row
    if ids_period is not None:
        id_at = row % ids_period
    if segments_period is not None:
        segment_at = row % segments_period
    v = _looked_up(words, tl.load(ids + id_at, mask=valid, other=0), word_count, col, cols, inside, WRAPS)
    position = row % length
    if positions is not None:
        position = tl.load(positions + row % positions_period, mask=valid, other=0)
    v += _looked_up(places, position, place_count, col, cols, inside, WRAPS)
    if segments is not None:
        segment = tl.load(segments + segment_at, mask=valid, other=0)
        v += _looked_up(kinds, segment, kind_count, col, cols, inside, WRAPS)
    here = row.to(tl.int64) * cols + col
    if sums is not None:
        tl.store(sums + here, store_type(v, sums), mask=inside)
    if counts is not None:
        tl.store(counts + row // length, tl.zeros([ROWS, 1], tl.int32), mask=valid & (row % length == 0))
    centred = tl.where(inside, v - mean(tl.sum(v, axis=1)[:, None], None, cols, eps), 0.0)
    y = centred * inverse_deviation(tl.sum(centred * centred, axis=1)[:, None], None, cols, eps)
    if weight is not None:
        y *= tl.load(weight + col, mask=col < cols, other=0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + col, mask=col < cols, other=0).to(tl.float32)
    tl.store(out + here, store_type(y, out), mask=inside)


def supports_embed(ids: Typed, words: Typed, out: Typed, *floats: Typed | None) -> bool:
    """int32 or int64 ids; tables, scale and shift of the three floating types, `out` of that of `words`; rows that fit
    in a block, fewer than 2**31 of them."""
    cols = words.shape[1]
    return (
        name_of(ids) in ("int32", "int64")
        and name_of(words) == name_of(out)
        and all(name_of(f) in FLOATS for f in (words, *floats) if f is not None)
        and cols > 0
        and row_tile(1, cols) is not None
        and math.prod(out.shape[:-1]) <= INT32_MAX - 1024
    )


def embed(
    ids: Any,
    words: Any,
    places: Any,
    out: Any,
    launcher: Launcher,
    *,
    eps: float,
    positions: Any = None,
    segments: Any = None,
    kinds: Any = None,
    weight: Any = None,
    bias: Any = None,
    sums: Any = None,
    counts: Any = None,
    gathered: bool = False,
    invariant: bool = False,
) -> list[Call]:
    """sums = words[ids] + places[positions] + kinds[segments], `out` = their layer normalisation, * weight + bias.

    All contiguous: ids and segments (batch, length); positions (batch or 1, length), 0, 1, ... where left out; tables
    (entries, columns). An index that a table has not gives zeros. `counts`, (batch,) of int32, becomes 0. `invariant`
    rows are the same bits however many there are. Where indices are `gathered`, a negative one counts from the end, and
    all may have other axes: those of `out` but for the columns, or the last of them.
    """
    if not supports_embed(ids, words, out, places, kinds, weight, bias):
        raise ValueError(f"embed: no kernel for {name_of(ids)}{list(ids.shape)}, {name_of(words)}{list(words.shape)}")
    rows, cols = math.prod(out.shape[:-1]), words.shape[1]
    tile = row_tile(rows_seen(rows, invariant=invariant), cols)
    if not rows or tile is None:
        return []
    args = {
        "ids": ids,
        "positions": positions,
        "segments": segments if kinds is not None else None,
        "words": words,
        "places": places,
        "kinds": kinds if segments is not None else None,
        "weight": weight,
        "bias": bias,
        "out": out,
        "sums": sums,
        "counts": counts,
        "rows": rows,
        "cols": cols,
        "length": out.shape[-2] if len(out.shape) > 1 else 1,
        "ids_period": math.prod(ids.shape) if gathered else None,
        "positions_period": 1 if positions is None else int(np.prod(positions.shape)),
        "segments_period": math.prod(segments.shape) if gathered and segments is not None else None,
        "word_count": words.shape[0],
        "place_count": places.shape[0],
        "kind_count": 0 if kinds is None else kinds.shape[0],
        "eps": eps,
    }
    periods = ("ids_period", "positions_period", "segments_period")
    args = of_batch(args, "rows", *periods, invariant=invariant)
    constexprs = {"WRAPS": gathered, "ROWS": tile.rows, "COLS": tile.cols}
    return [launcher.launch(embed_kernel, (ceil_div(rows, tile.rows),), args, constexprs, num_warps=tile.warps)]
