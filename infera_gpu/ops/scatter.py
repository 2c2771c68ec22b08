"""Scatters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import Attrs
from infera_gpu.op import Bind, Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops._families import native, plain
from infera_gpu.ops._later import Kinds
from infera_gpu.ops.indexing import check_elements, check_known, filled
from infera_gpu.spec import TensorSpec
from infera_kernels.cpu import indexing as cpu
from infera_kernels.portable import indexing as portable


def _reduction(site: Site) -> str:
    reduction = str(site.attrs.get("reduction", "none"))
    if reduction not in ("none", "add", "mul", "max", "min"):
        raise site.fail(f"reduction is '{reduction}', expected none, add, mul, max or min")
    return reduction


def _scatter_spec(site: Site) -> tuple[TensorSpec]:
    check_elements(site)
    _reduction(site)
    if site.spec(1).dims != site.spec(2).dims:
        raise site.fail(f"indices {site.spec(1)} and updates {site.spec(2)} differ in shape")
    _check_updates(site)
    return (site.spec(0),)


def _check_updates(site: Site) -> None:
    if site.spec(2).dtype != site.spec(0).dtype:
        raise site.fail(f"updates are {site.spec(2)}, expected the type of {site.spec(0)}")
    if site.spec(0).dtype == object and _reduction(site) in ("add", "mul"):
        raise site.fail(f"reduction '{_reduction(site)}' of {site.spec(0)}: expected none, max or min for strings")


def _scatter_supported(site: Site) -> bool:
    return filled(site) and (_reduction(site) == "none" or native(site))


def _bind_scatter(site: Site, io: Buffers) -> list[Call]:
    x, indices, updates = io.ins
    return cpu.scatter_elements(x, indices, updates, site.axis(), io.outs[0], io.scratch, reduction=_reduction(site))


def _scattering(bind: Bind, attrs: Attrs, *, tuples: bool) -> Kinds:
    """Kernels of a scatter. Reductions go through ufunc.at, which allocates 5 KB of bookkeeping whatever the size."""
    kernel = Kernel(bind=bind, supports=_scatter_supported, inplace=(0,), allocates="reduction" in attrs)
    return Kinds({"cpu": kernel}, "_triton_move", lambda gpu: gpu.scattering(tuples=tuples))


_SCATTER_CASES = (
    Case("rows", (f32(3, 3), np.array([[1, 0, 2], [0, 2, 1]]), f32(2, 3))),
    Case("columns", (f32(1, 5), np.array([[1, 3]], np.int32), f32(1, 2)), {"axis": 1}),
    Case("negative", (f32(1, 5), np.array([[1, -1]]), f32(1, 2)), {"axis": 1}, opset=11),
    Case("none", (f32(2, 3), np.zeros((0, 3), np.int64), f32(0, 3))),
)


def _reductions(names: Sequence[str], id: str, *ins: Any, **attrs: Any) -> tuple[Case, ...]:
    return tuple(Case(f"{id}_{r}", ins, {"reduction": r, **attrs}) for r in names)


def _scatter(name: str, since: int, attrs: dict[str, Any], cases: tuple[Case, ...]) -> Op:
    return Op(
        name,
        since,
        infer=_scatter_spec,
        compute=plain(
            lambda xp, site, x, indices, updates: portable.scatter_elements(
                xp, x, indices, updates, site.axis(), _reduction(site)
            )
        ),
        kernels=_scattering(_bind_scatter, attrs, tuples=False),
        attrs={"axis": 0, **attrs},
        cases=cases,
    )


def _scatter_nd_spec(site: Site) -> tuple[TensorSpec]:
    x, indices, updates = site.spec(0), site.spec(1), site.spec(2)
    depth = indices.dims[-1] if indices.ndim else 0
    _reduction(site)
    if not 0 < depth <= x.ndim or updates.dims != (*indices.dims[:-1], *x.dims[depth:]):
        raise site.fail(f"indices {indices} and updates {updates} do not fit {x}")
    _check_updates(site)
    check_known(site, x.dims[:depth])
    return (x,)


def _bind_scatter_nd(site: Site, io: Buffers) -> list[Call]:
    x, indices, updates = io.ins
    return cpu.scatter_nd(x, indices, updates, io.outs[0], io.scratch, reduction=_reduction(site))


def _scatter_nd(since: int, attrs: dict[str, Any], cases: tuple[Case, ...]) -> Op:
    return Op(
        "ScatterND",
        since,
        infer=_scatter_nd_spec,
        compute=plain(
            lambda xp, site, x, indices, updates: portable.scatter_nd(xp, x, indices, updates, _reduction(site))
        ),
        kernels=_scattering(_bind_scatter_nd, attrs, tuples=True),
        attrs=attrs,
        cases=cases,
    )


_DUPLICATES = f32(2, 3), np.array([[1, 0, 1], [1, 0, 0]]), f32(2, 3)
_SCATTER_ND_CASES = (
    Case("elements", (f32(3, 4), np.array([[0, 1], [2, -1]]), f32(2))),
    Case("rows", (f32(5, 3), np.array([[4], [1]]), f32(2, 3))),
    Case("matrices", (f32(3, 2, 4, 5), np.array([[[2, 1]], [[0, -2]]]), f32(2, 1, 4, 5))),
    Case("none", (f32(2, 3), np.zeros((0, 1), np.int64), f32(0, 3))),
)
_ND_DUPLICATES = f32(4, 3), np.array([[1], [1], [3]]), f32(3, 3)
_16, _18 = ("add", "mul"), ("max", "min")
_MEETING = (
    Case(
        "meeting",
        (f32(3, 4, 5), np.arange(-4, 20).reshape(2, 4, 3) % 8 - 4, f32(2, 4, 3)),
        {"reduction": "add", "axis": 1},
    ),
    Case("long", (f32(7), np.arange(300) % 7, f32(300)), {"reduction": "add"}),
    Case(
        "integers",
        (np.arange(6, dtype=np.int32).reshape(2, 3), np.array([[1, 0, 1], [1, 0, -1]]), np.full((2, 3), 3, np.int32)),
        {"reduction": "mul"},
    ),
)  # fmt: skip
_ND_MEETING = (
    Case(
        "meeting", (f32(3, 2, 4, 5), np.array([[[2, 1]], [[2, -1]], [[0, 0]]]), f32(3, 1, 4, 5)), {"reduction": "add"}
    ),
    Case("elements", (f32(3, 4), np.array([[0, 1], [2, -1], [0, 1], [0, 1]]), f32(4)), {"reduction": "mul"}),
)

OPS: tuple[Op, ...] = (
    _scatter("Scatter", 9, {}, _SCATTER_CASES[:2]),
    _scatter("ScatterElements", 11, {}, _SCATTER_CASES),
    _scatter("ScatterElements", 16, {"reduction": "none"}, _SCATTER_CASES[:1] + _reductions(_16, "dup", *_DUPLICATES)),
    _scatter(
        "ScatterElements", 18, {"reduction": "none"},
        _SCATTER_CASES[:1] + _reductions(_18, "dup", *_DUPLICATES) + _MEETING,
    ),
    _scatter_nd(11, {}, _SCATTER_ND_CASES),
    _scatter_nd(16, {"reduction": "none"}, _SCATTER_ND_CASES[:1] + _reductions(_16, "dup", *_ND_DUPLICATES)),
    _scatter_nd(
        18, {"reduction": "none"}, _SCATTER_ND_CASES[:1] + _reductions(_18, "dup", *_ND_DUPLICATES) + _ND_MEETING
    ),
)  # fmt: skip
