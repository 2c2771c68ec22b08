"""The CPU kernels of ONNX's and onnxruntime's RotaryEmbedding. Declares no operators itself."""

from __future__ import annotations

import numpy as np

from infera_gpu.op import Buffers, Call, Kernel, Site
from infera_gpu.spec import Array
from infera_kernels.cpu.elementwise import call, contiguous, copy
from infera_kernels.cpu.indexing import take
from infera_kernels.cpu.rotary import rotate


def _size(site: Site, width: int) -> int:
    """Elements of a head; 0 where heads are not told apart."""
    x, heads = site.spec(0), int(site.attrs["num_heads"])
    if x.ndim == 4:
        return x.dims[3]
    size = x.dims[2] // heads if heads > 0 else width if site.node.domain else 0
    return size if size and x.dims[2] % size == 0 else 0


def _fits(site: Site, width: int, *tables: int) -> bool:
    """Whether everything is of one type that is computed with, and tables hold half of what is turned."""
    x = site.spec(0)
    if x.dtype not in (np.float32, np.float64) or x.ndim not in (3, 4) or x.size == 0 or width < 2 or width % 2:
        return False
    alike = all(site.spec(i).dtype == x.dtype and site.spec(i).dims[-1] == width // 2 for i in tables)
    return alike and width <= _size(site, width)


def _turn(site: Site, io: Buffers, width: int, cos: Array, sin: Array) -> list[Call]:
    """The first `width` elements of each head turned by tables (batch or 1, sequence, width / 2)."""
    x, out = io.ins[0], io.outs[0]
    if x.ndim == 3:
        x, out = (a.reshape(*a.shape[:2], -1, _size(site, width)).swapaxes(1, 2) for a in (x, out))
    how = {"interleaved": bool(site.attrs["interleaved"]), "per_pair": True, "strict": io.strict}
    calls = rotate(x[..., :width], cos[:, None], sin[:, None], out[..., :width], io.scratch, **how)
    return calls if width == x.shape[3] else [*calls, copy(out[..., width:], x[..., width:])]


def _at(tables: tuple[Array, ...], places: Array, io: Buffers) -> tuple[list[Array], list[Call]]:
    """The tables' rows at these places."""
    places, calls = contiguous(places, io.scratch)
    rows = []
    for table in tables:
        dense, copied = contiguous(table, io.scratch)
        rows.append(io.scratch((*places.shape, table.shape[1]), table.dtype))
        calls += [*copied, *take(dense, places, 0, rows[-1], io.scratch)]
    return rows, calls


# ---- ONNX: x, cos, sin, places


def _width(site: Site) -> int:
    return int(site.attrs["rotary_embedding_dim"]) or 2 * site.spec(1).dims[-1]


def _bind(site: Site, io: Buffers) -> list[Call]:
    tables, calls = list(io.ins[1:3]), list[Call]()
    if site.has(3):
        tables, calls = _at((io.ins[1], io.ins[2]), io.ins[3], io)
    return [*calls, *_turn(site, io, _width(site), tables[0], tables[1])]


def _takes(site: Site) -> bool:
    tables, x = [site.spec(i).dims for i in (1, 2)], site.spec(0).dims
    rows = (x[0], x[2] if len(x) == 4 else x[1])
    if tables[0] != tables[1] or len(tables[0]) != (2 if site.has(3) else 3):
        return False
    whole = site.spec(3).dims == rows if site.has(3) else tables[0][:2] == rows
    return whole and _fits(site, _width(site), 1, 2) and (len(x) == 4 or int(site.attrs["num_heads"]) > 0)


ROTARY = {"cpu": Kernel(_bind, _takes, strided=True)}


# ---- com.microsoft: x, places, or the first of them, cos, sin


def _ms_width(site: Site) -> int:
    return int(site.attrs["rotary_embedding_dim"]) or 2 * site.spec(2).dims[-1]


def _bind_ms(site: Site, io: Buffers) -> list[Call]:
    places, cos, sin = io.ins[1:]
    steps, calls = site.spec(0).dims[-2 if site.spec(0).ndim == 4 else 1], list[Call]()
    if places.size == 1:
        first, places = places.reshape(()), io.scratch((1, steps), np.int64)
        calls.append(call(np.add, first, np.arange(steps)[None], places))
    rows, more = _at((cos, sin), places, io)
    return [*calls, *more, *_turn(site, io, _ms_width(site), rows[0], rows[1])]


def _takes_ms(site: Site) -> bool:
    x, at, cos, sin = (site.spec(i) for i in range(4))
    if site.attrs["is_packed_batching"] or site.attrs["scale"] != 1.0 or cos.ndim != 2 or cos != sin:
        return False
    rows = x.dims[0], x.dims[2 if x.ndim == 4 else 1]
    return (at.size == 1 or at.dims == rows) and _fits(site, _ms_width(site), 2, 3)


MS_ROTARY = {"cpu": Kernel(_bind_ms, _takes_ms, strided=True)}
