"""Gathers, and vectors that indices stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.op import Buffers, Call, Case, Cases, Kernel, Op, Site, f32
from infera_gpu.ops._families import i64, movable, plain
from infera_gpu.ops._later import Kinds
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import indexing as cpu
from infera_kernels.portable import indexing as portable


def check_known(site: Site, sizes: Sequence[int]) -> None:
    """Raises PlanError where indices known while planning are out of range.

    With several `sizes` the indices' last axis has an index for each.
    """
    if site.spec(1).dtype not in (np.int32, np.int64):
        raise site.fail(f"indices are {site.spec(1)}, expected int32 or int64")
    known = site.value(1)
    if known is None or not known.size:
        return
    for size, indices in zip(sizes, [known] if len(sizes) == 1 else np.moveaxis(known, -1, 0), strict=True):
        low, high = int(indices.min()), int(indices.max())
        if low < -size or high >= size:
            raise site.fail(f"index {low if low < -size else high} is out of range for an axis of {size}")


def _gather_spec(site: Site) -> tuple[TensorSpec]:
    spec, axis = site.spec(0), site.axis()
    if not spec.ndim:
        raise site.fail(f"input 0 is {spec}, which has no axis to gather along")
    check_known(site, (spec.dims[axis],))
    return (TensorSpec((*spec.dims[:axis], *site.spec(1).dims, *spec.dims[axis + 1 :]), spec.dtype),)


def _bind_gather(site: Site, io: Buffers) -> list[Call]:
    x, indices = io.ins
    axis = site.axis()
    known = site.value(1)
    if known is not None and known.ndim == 0 and -x.shape[axis] <= known < x.shape[axis]:
        return [(np.copyto, (io.outs[0], x[(*(slice(None),) * axis, int(known), ...)]))]
    if known is not None:
        indices = io.pack(1, "int64", lambda v: v.astype(np.int64))
    return cpu.take(x, indices, axis, io.outs[0], io.scratch)


def filled(site: Site) -> bool:
    """Whether input 0 has elements, of a kind that lies in memory as it is."""
    return movable(site) and site.spec(0).size > 0


_GATHER = Op(
    "Gather",
    1,
    infer=_gather_spec,
    compute=plain(lambda xp, site, x, indices: portable.gather(xp, x, indices, site.axis())),
    kernels=Kinds({"cpu": Kernel(bind=_bind_gather, supports=filled)}, "_triton_move", lambda gpu: gpu.GATHER),
    attrs={"axis": 0},
    cases=Cases(
        lambda: (
            Case("rows", (f32(5, 3), i64(0, 4, 4, 1))),
            Case("embedding", (f32(50, 33), np.array([[3, 49, 0], [7, 7, 12]], np.int32))),
            Case("negative", (f32(5, 3), np.array([-1, 2])), opset=11),
            Case("last", (f32(2, 3, 4), np.array([[0, 3]])), {"axis": -1}),
            Case("scalar", (f32(2, 3, 4), np.array(1)), {"axis": 1}),
            Case("vector", (np.array([2, 3, 5, 7]), np.array(2))),
            Case("none", (f32(5, 3), np.zeros((0,), np.int64))),
        )
    ),
)


def check_elements(site: Site) -> None:
    x, indices, axis = site.spec(0), site.spec(1), site.axis()
    pairs = enumerate(zip(x.dims, indices.dims, strict=False))
    if x.ndim != indices.ndim or any(n > d for i, (d, n) in pairs if i != axis):
        raise site.fail(f"indices {indices} do not fit {x} along axis {axis}")
    if not x.ndim:
        raise site.fail(f"input 0 is {x}, which has no axis to index")
    check_known(site, (x.dims[axis],))


def _elements_spec(site: Site) -> tuple[TensorSpec]:
    check_elements(site)
    return (TensorSpec(site.spec(1).dims, site.spec(0).dtype),)


def _bind_elements(site: Site, io: Buffers) -> list[Call]:
    x, indices = io.ins
    return cpu.gather_elements(x, indices, site.axis(), io.outs[0], io.scratch)


_GATHER_ELEMENTS = Op(
    "GatherElements",
    11,
    infer=_elements_spec,
    compute=plain(lambda xp, site, x, indices: portable.gather_elements(xp, x, indices, site.axis())),
    kernels=Kinds(
        {"cpu": Kernel(bind=_bind_elements, supports=filled)}, "_triton_move", lambda gpu: gpu.GATHER_ELEMENTS
    ),
    attrs={"axis": 0},
    cases=Cases(
        lambda: (
            Case("rows", (f32(3, 2), np.array([[0, 2], [1, -1]]))),
            Case("columns", (f32(2, 3), np.array([[2, 0], [1, 1]], np.int32)), {"axis": 1}),
            Case("middle", (f32(2, 4, 3), np.array([[[0, 3, -4]], [[1, 1, 2]]])), {"axis": -2}),
            Case("none", (f32(2, 3), np.zeros((0, 3), np.int64))),
        )
    ),
)


def _batch_dims(site: Site) -> int:
    return int(site.attrs.get("batch_dims", 0))


def _gather_nd_spec(site: Site) -> tuple[TensorSpec]:
    x, indices, batch = site.spec(0), site.spec(1), _batch_dims(site)
    depth = indices.dims[-1] if indices.ndim else 0
    free = indices.ndim - 1 - batch
    if not depth or batch < 0 or free < 0 or depth + batch > x.ndim or x.dims[:batch] != indices.dims[:batch]:
        raise site.fail(f"indices {indices} do not fit {x} with {batch} batch dimensions")
    check_known(site, x.dims[batch : batch + depth])
    return (TensorSpec((*indices.dims[:-1], *x.dims[batch + depth :]), x.dtype),)


def _bind_gather_nd(site: Site, io: Buffers) -> list[Call]:
    x, indices = io.ins
    return cpu.gather_nd(x, indices, io.outs[0], io.scratch, batch_dims=_batch_dims(site))


def _gather_nd(since: int, attrs: dict[str, Any], extra: Sequence[Case] = ()) -> Op:
    return Op(
        "GatherND",
        since,
        infer=_gather_nd_spec,
        compute=plain(lambda xp, site, x, indices: portable.gather_nd(xp, x, indices, _batch_dims(site))),
        kernels=Kinds(
            {"cpu": Kernel(bind=_bind_gather_nd, supports=filled)}, "_triton_move", lambda gpu: gpu.GATHER_ND
        ),
        attrs=attrs,
        cases=Cases(
            lambda: (
                Case("elements", (f32(2, 3), np.array([[0, 2], [1, -1]]))),
                Case("rows", (f32(4, 3, 2), np.array([[[1], [3]], [[0], [0]]]))),
                Case("none", (f32(2, 3), np.zeros((0, 2), np.int64))),
                *extra,
            )
        ),
    )


_GATHER_ND = (
    _gather_nd(11, {}),
    _gather_nd(
        12,
        {"batch_dims": 0},
        (
            Case("batch", (f32(2, 4, 3), np.array([[[1]], [[3]]])), {"batch_dims": 1}),
            Case("two_batches", (f32(2, 2, 3), np.array([[[1], [0]], [[2], [-1]]])), {"batch_dims": 2}),
        ),
    ),
)


def _one_hot_dims(site: Site) -> tuple[int, int]:
    """The axis among the output's, and the depth."""
    rank = site.spec(0).ndim + 1
    given = site.value(1)
    if given is None or given.dtype.kind not in "iuf":
        raise site.fail(f"depth is {site.ins[1]}, expected a number that is known while planning")
    if given.size != 1:
        raise site.fail(f"depth (input 1) has {given.size} values {given.reshape(-1)[:9].tolist()}, expected one")
    depth = int(given.reshape(-1)[0]) if np.isfinite(given).all() else -1
    if depth < 0:
        raise site.fail(f"depth is {given.reshape(-1)[0]}, expected at least 0")
    return site.axis(rank=rank), depth


def _one_hot_spec(site: Site) -> tuple[TensorSpec]:
    axis, depth = _one_hot_dims(site)
    dims = site.spec(0).dims
    if site.spec(2).dims != (2,):
        raise site.fail(f"values are {site.spec(2)}, expected two: off and on")
    return (TensorSpec((*dims[:axis], depth, *dims[axis:]), site.spec(2).dtype),)


def _bind_one_hot(site: Site, io: Buffers) -> list[Call]:
    return cpu.one_hot(io.ins[0], io.ins[2], _one_hot_dims(site)[0], io.outs[0], io.scratch)


def _one_hot(xp: Any, site: Site, indices: Array, depth: Array, values: Array) -> Array:
    axis, count = _one_hot_dims(site)
    return portable.one_hot(xp, indices, count, values, axis)


_ONE_HOT = Op(
    "OneHot",
    9,
    infer=_one_hot_spec,
    compute=plain(_one_hot),
    kernels=Kinds(
        {"cpu": Kernel(bind=_bind_one_hot, supports=movable, strided=True)},
        "_triton_place",
        lambda gpu: gpu.one_hot(_one_hot_dims),
    ),
    attrs={"axis": -1},
    values=(1,),
    cases=Cases(
        lambda: (
            Case("last", (np.array([[1, 9], [2, 4]]), i64(10), np.array([0, 1], np.float32))),
            Case("first", (np.array([1, 0, 2]), np.array(4), np.array([-1, 3], np.int64)), {"axis": 0}),
            Case("outside", (np.array([-1, 7, -9]), i64(5), np.array([2, 5], np.float32)), opset=11),
        )
    ),
)

OPS: tuple[Op, ...] = (_GATHER, _GATHER_ELEMENTS, *_GATHER_ND, _ONE_HOT)
