"""Elements in another order, or some of them blanked: DepthToSpace, SpaceToDepth, Trilu, ReverseSequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Call, Case, Cases, Kernel, Op, Site, f32
from infera_gpu.ops import _triton_move, _triton_place
from infera_gpu.ops._families import copies, i64, movable, plain, shaped, single
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import shape as cpu
from infera_kernels.portable import shape as portable


def _blocked(site: Site) -> tuple[int, int, int, int, int]:
    spec, block = site.spec(0), int(site.attrs["blocksize"])
    if spec.ndim != 4:
        raise site.fail(f"expected N, C, H, W, got {spec}")
    if block < 1:
        raise site.fail(f"blocksize is {block}, expected at least 1")
    if site.attrs.get("mode", "DCR") not in ("DCR", "CRD"):
        raise site.fail(f"mode is '{site.attrs['mode']}', expected 'DCR' or 'CRD'")
    n, c, h, w = spec.dims
    return n, c, h, w, block


def _space_dims(site: Site) -> tuple[int, ...]:
    n, c, h, w, block = _blocked(site)
    if c % (block * block):
        raise site.fail(f"{c} channels are not a multiple of blocksize² = {block * block}")
    return n, c // (block * block), h * block, w * block


def _depth_dims(site: Site) -> tuple[int, ...]:
    n, c, h, w, block = _blocked(site)
    if h % block or w % block:
        raise site.fail(f"{h} x {w} is not a multiple of blocksize {block}")
    return n, c * block * block, h // block, w // block


def _blocks(name: str, since: int, attrs: dict[str, Any], cases: tuple[Case, ...]) -> Op:
    dims, fn = (
        (_space_dims, portable.depth_to_space) if name == "DepthToSpace" else (_depth_dims, portable.space_to_depth)
    )

    def rearranged(site: Site, x: Array) -> Array:
        return fn(x, int(site.attrs["blocksize"]), str(site.attrs.get("mode", "DCR")))

    def pairs(site: Site, io: Buffers) -> list[tuple[Array, Array]]:
        made = rearranged(site, io.ins[0])
        return [(io.outs[0].reshape(made.shape), made)]

    return Op(
        name,
        since,
        infer=shaped(dims),
        compute=plain(lambda xp, site, x: rearranged(site, x).reshape(dims(site))),
        kernels={"cpu": copies(pairs)} | _triton_move.copies(pairs),
        attrs={"blocksize": REQUIRED, **attrs},
        cases=cases,
    )


_BLOCKS = (
    _blocks("DepthToSpace", 1, {}, (Case("dcr", (f32(2, 8, 3, 5),), {"blocksize": 2}),)),
    _blocks(
        "DepthToSpace",
        11,
        {"mode": "DCR"},
        tuple(Case(m.lower(), (f32(2, 18, 2, 5),), {"blocksize": 3, "mode": m}) for m in ("DCR", "CRD")),
    ),
    _blocks("SpaceToDepth", 1, {}, (Case("blocks", (f32(2, 3, 4, 6),), {"blocksize": 2}),)),
    _blocks(
        "SpaceToDepth",
        28,
        {"mode": "DCR"},
        tuple(Case(m.lower(), (f32(2, 3, 4, 6),), {"blocksize": 2, "mode": m}) for m in ("DCR", "CRD")),
    ),
)


def _triangle_spec(site: Site) -> tuple[TensorSpec]:
    if site.spec(0).ndim < 2:
        raise site.fail(f"input 0 is {site.spec(0)}, expected matrices")
    if site.has(1) and site.spec(1).size != 1:
        raise site.fail(f"k is {site.spec(1)}, expected one number")
    return (site.spec(0),)


def _diagonal(site: Site) -> int:
    return single(site, 1, "k") or 0


def _triangle(xp: Any, site: Site, x: Array, k: Array | None = None) -> Array:
    return portable.triangle(xp, x, 0 if k is None else int(k.reshape(())), upper=bool(site.attrs["upper"]))


def _bind_triangle(site: Site, io: Buffers) -> list[Call]:
    return cpu.triangle(io.ins[0], _diagonal(site), io.outs[0], io.scratch, upper=bool(site.attrs["upper"]))


_TRILU = Op(
    "Trilu",
    14,
    infer=_triangle_spec,
    compute=plain(_triangle),
    kernels={
        "cpu": Kernel(
            bind=_bind_triangle,
            supports=lambda site: movable(site) and (not site.has(1) or site.value(1) is not None),
            strided=True,
            inplace=(0,),
        )
    }
    | _triton_place.triangle(_diagonal),
    attrs={"upper": 1},
    cases=Cases(
        lambda: (
            Case("upper", (f32(3, 4),)),
            Case("lower", (f32(2, 4, 3),), {"upper": 0}),
            Case("above", (f32(4, 4), np.array(2))),
            Case("below", (f32(4, 5), np.array(-1)), {"upper": 0}),
            Case("far", (f32(2, 2), np.array(-9))),
            Case("int64", (np.arange(9).reshape(3, 3),)),
        )
    ),
)


def _reversed(xp: Any, site: Site, x: Array, lengths: Array) -> Array:
    axes = {name: site.axis(name) for name in ("time_axis", "batch_axis")}
    return portable.reverse_sequence(xp, x, lengths, **axes)


def _reversed_spec(site: Site) -> tuple[TensorSpec]:
    x, lengths = site.spec(0), site.spec(1)
    time, batch = (site.axis(name) for name in ("time_axis", "batch_axis"))
    if x.ndim < 2 or time == batch:
        raise site.fail(f"time_axis {time} and batch_axis {batch} are no two axes of {x}")
    if lengths.dims != (x.dims[batch],):
        raise site.fail(f"lengths are {lengths}, expected {x.dims[batch]} for axis {batch} of {x}")
    return (x,)


_REVERSE = Op(
    "ReverseSequence",
    10,
    infer=_reversed_spec,
    compute=plain(_reversed),
    kernels=_triton_place.REVERSE,
    attrs={"time_axis": 0, "batch_axis": 1},
    cases=Cases(
        lambda: (
            Case("time_first", (f32(5, 3), i64(1, 5, 3))),
            Case("batch_first", (f32(3, 5, 2), i64(2, 0, 4)), {"time_axis": 1, "batch_axis": 0}),
        )
    ),
)

OPS: tuple[Op, ...] = (*_BLOCKS, _TRILU, _REVERSE)
