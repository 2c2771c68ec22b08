"""Parts of tensors: Slice, Split, Concat, Tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Case, Cases, Op, Site, f32
from infera_gpu.ops._families import copies, i64, normalized, plain, shaped
from infera_gpu.ops._later import Kinds
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import shape as cpu


def _slices(site: Site) -> tuple[slice, ...]:
    """One slice for each axis. Raises PlanError where starts, ends, axes and steps do not go together."""
    names = ("starts", "ends", "axes")
    if names[0] in site.attrs:
        starts, ends, axes, steps = (*(site.attrs[n] for n in names), None)
    else:
        starts, ends, axes, steps = (site.ints(i) for i in range(1, 5))
    axes = range(len(starts)) if axes is None else axes
    steps = (1,) * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise site.fail(f"{len(starts)} starts, {len(ends)} ends, {len(axes)} axes, {len(steps)} steps")
    if 0 in steps:
        raise site.fail("a step is 0")
    found = [slice(None)] * site.spec(0).ndim
    for axis, start, end, step in zip(normalized(site, axes, len(found)), starts, ends, steps, strict=True):
        found[axis] = _clamped(site.spec(0).dims[axis], start, end, step)
    return tuple(found)


def _clamped(size: int, start: int, end: int, step: int) -> slice:
    """ONNX's slice of an axis as one of Python's.

    They differ in one point: with a negative step, ONNX moves a start before the first element to that element, where
    Python finds nothing left.
    """
    if step < 0 and size and start < -size:
        start = 0
    return slice(start, end, step)


def _sliced(x: Array, site: Site) -> Array:
    return x[_slices(site)] if x.ndim else x


def _slice(since: int, cases: tuple[Case, ...], attrs: dict[str, Any], values: tuple[int, ...]) -> Op:
    def dims(site: Site) -> Sequence[int]:
        return [len(range(d)[s]) for d, s in zip(site.spec(0).dims, _slices(site), strict=True)]

    return Op(
        "Slice",
        since,
        infer=shaped(dims),
        compute=plain(lambda xp, site, x, *_: _sliced(x, site)),
        view=_sliced,
        attrs=attrs,
        values=values,
        cases=cases,
    )


_FAR = np.iinfo(np.int64)
_SLICE = (
    _slice(
        1,
        (
            Case("rows", (f32(5, 4),), {"starts": (1,), "ends": (-1,)}),
            Case("axes", (f32(5, 4, 3),), {"starts": (0, 1), "ends": (2, 99), "axes": (2, 0)}),
        ),
        {"starts": REQUIRED, "ends": REQUIRED, "axes": None},
        (),
    ),
    _slice(
        10,
        (
            Case("rows", (f32(5, 4), i64(1), i64(-1))),
            Case("axes", (f32(5, 4, 3), i64(0, 1), i64(2, 99), i64(-1, 0))),
            Case("steps", (f32(9, 4), i64(1), i64(_FAR.max), i64(0), i64(3))),
            Case("reverse", (f32(5, 4), i64(-1, 2), i64(_FAR.min, 0), i64(0, 1), i64(-1, -2))),
            Case("none", (f32(5, 4), i64(3), i64(1))),
            Case("int32", (f32(5, 4), np.array([1], np.int32), np.array([3], np.int32), np.array([1], np.int32))),
        ),
        {},
        (1, 2, 3, 4),
    ),
)


def _concat_spec(site: Site) -> tuple[TensorSpec]:
    first, axis = site.spec(0), site.axis()
    present = [s for s in site.ins if s is not None]
    for s in present:
        if s.ndim != first.ndim or any(
            a != b for i, (a, b) in enumerate(zip(s.dims, first.dims, strict=True)) if i != axis
        ):
            raise site.fail(f"cannot join {first} and {s} along axis {axis}")
    dims = list(first.dims)
    dims[axis] = sum(s.dims[axis] for s in present)
    return (TensorSpec(tuple(dims), first.dtype),)


def _joined(y: Array, site: Site) -> list[Array]:
    axis = site.axis()
    return cpu.parts(y, axis, [site.spec(i).dims[axis] for i in range(len(site.ins))])


def _concat_pairs(site: Site, io: Buffers) -> list[tuple[Array, Array]]:
    return list(zip(_joined(io.outs[0], site), io.ins, strict=True))


_CONCAT = Op(
    "Concat",
    4,
    infer=_concat_spec,
    compute=plain(lambda xp, site, *ins: xp.concatenate(ins, axis=site.axis())),
    kernels=Kinds({"cpu": copies(_concat_pairs)}, "_triton_move", lambda gpu: gpu.copies(_concat_pairs)),
    windows=_joined,
    attrs={"axis": REQUIRED},
    cases=Cases(
        lambda: (
            Case("rows", (f32(2, 3), f32(1, 3)), {"axis": 0}),
            Case("last", (f32(2, 3, 4), f32(2, 3, 1), f32(2, 3, 2)), {"axis": -1}, opset=11),
            Case("one", (f32(2, 3),), {"axis": 1}),
            Case("empty_part", (f32(2, 0), f32(2, 3)), {"axis": 1}),
            Case("int64", (np.arange(3), np.arange(2)), {"axis": 0}),
        )
    ),
)


def _sizes(site: Site) -> tuple[int, ...]:
    """The sizes of the parts: given, or equal but for a smaller last one."""
    axis, count = site.axis(), len(site.node.outputs)
    total = site.spec(0).dims[axis]
    given = site.attrs["split"] if "split" in site.attrs else site.ints(1)
    if given is None:
        count = site.attrs.get("num_outputs") or count
        size = -(-total // count)
        given = (*(size,) * (count - 1), total - size * (count - 1))
    if sum(given) != total or min(given) < 0 or len(given) != len(site.node.outputs):
        raise site.fail(f"cannot split axis {axis} of {site.spec(0)} into {len(site.node.outputs)}: {list(given)}")
    return tuple(given)


def _split_specs(site: Site) -> tuple[TensorSpec, ...]:
    spec, axis = site.spec(0), site.axis()
    return tuple(TensorSpec((*spec.dims[:axis], n, *spec.dims[axis + 1 :]), spec.dtype) for n in _sizes(site))


def _parts(x: Array, site: Site) -> tuple[Array, ...]:
    return tuple(cpu.parts(x, site.axis(), _sizes(site)))


def _split_pairs(site: Site, io: Buffers) -> list[tuple[Array, Array]]:
    return list(zip(io.outs, _parts(io.ins[0], site), strict=True))


def _split(since: int, attrs: dict[str, Any], cases: tuple[Case, ...]) -> Op:
    return Op(
        "Split",
        since,
        infer=_split_specs,
        compute=plain(lambda xp, site, x, *_: _parts(x, site)),
        kernels=Kinds(
            {"cpu": copies(_split_pairs)},
            "_triton_move",
            lambda gpu: gpu.copies(_split_pairs, axes=lambda site: site.spec(0).dims),
        ),
        view=_parts,
        attrs={"axis": 0, **attrs},
        values=() if "split" in attrs else (1,),
        cases=cases,
    )


_SPLIT = (
    _split(
        2,
        {"split": None},
        (
            Case("equal", (f32(6, 4),), n_outs=3),
            Case("sizes", (f32(2, 6),), {"axis": 1, "split": (1, 3, 2)}, n_outs=3),
        ),
    ),
    _split(
        13,
        {},
        (
            Case("equal", (f32(6, 4),), n_outs=3),
            Case("sizes", (f32(2, 6, 3), i64(1, 3, 2)), {"axis": -2}, n_outs=3),
            Case("empty_part", (f32(2, 6), i64(6, 0)), {"axis": 1}, n_outs=2),
        ),
    ),
    _split(
        18,
        {"num_outputs": None},
        (
            Case("uneven", (f32(7, 4),), {"num_outputs": 3}, n_outs=3),
            Case("sizes", (f32(2, 6), i64(4, 2)), {"axis": 1}, n_outs=2),
        ),
    ),
)


def _tiled(site: Site) -> Sequence[int]:
    repeats = site.ints(1) or ()
    if len(repeats) != site.spec(0).ndim or any(r < 0 for r in repeats):
        raise site.fail(f"repeats {list(repeats)} do not fit {site.spec(0)}")
    return [d * r for d, r in zip(site.spec(0).dims, repeats, strict=True)]


def _tile_axes(site: Site) -> list[int]:
    """Each axis as two: how often it is there, and its size."""
    return [n for r, d in zip(site.ints(1) or (), site.spec(0).dims, strict=True) for n in (r, d)]


def _tile_pairs(site: Site, io: Buffers) -> list[tuple[Array, Array]]:
    """One broadcast copy."""
    (x,), axes = io.ins[:1], _tile_axes(site)
    return [(io.outs[0].reshape(axes), x.reshape([n for d in x.shape for n in (1, d)]))]


_TILE = Op(
    "Tile",
    6,
    infer=shaped(_tiled),
    compute=plain(lambda xp, site, x, _: xp.tile(x, site.ints(1))),
    kernels=Kinds({"cpu": copies(_tile_pairs)}, "_triton_move", lambda gpu: gpu.copies(_tile_pairs, axes=_tile_axes)),
    values=(1,),
    cases=Cases(
        lambda: (
            Case("both", (f32(2, 3), i64(2, 3))),
            Case("one", (f32(2, 1, 3), i64(1, 4, 1))),
            Case("none", (f32(2, 3), i64(0, 1))),
        )
    ),
)


OPS: tuple[Op, ...] = (*_SLICE, _CONCAT, *_SPLIT, _TILE)
