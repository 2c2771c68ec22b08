"""Softmax, LogSoftmax, Hardmax. Before opset 13 they flatten to a matrix at `axis`; from 13 on they take that axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from infera_gpu.op import Buffers, Call, Case, Kernel, Op, Site, f32, same_as
from infera_gpu.ops import _jit, _triton_norm
from infera_gpu.ops._families import reads_floats, split_of
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.softmax import softmax
from infera_kernels.portable import softmax as portable

Form = Callable[[Any, Array], Array]
"""(array module, (outer, axis, inner) in float64) -> the same shape, normalised along the middle."""


def _shape(site: Site) -> tuple[int, int, int]:
    """The input as (outer, axis, inner)."""
    dims, axis = site.spec(0).dims, _axis(site)
    if site.opset < 13:
        return math.prod(dims[:axis]), math.prod(dims[axis:]), 1
    return math.prod(dims[:axis]), dims[axis] if dims else 1, math.prod(dims[axis + 1 :])


def _axis(site: Site) -> int:
    """Before 13 the axis may also be the rank: everything is batch."""
    if site.opset < 13 and site.attrs["axis"] == site.spec(0).ndim:
        return site.spec(0).ndim
    return site.axis()


def _infer(site: Site) -> Sequence[TensorSpec | None]:
    _axis(site)
    return same_as()(site)


def _compute(form: Form) -> Callable[[Any, Site, Array], Array]:
    def compute(xp: Any, site: Site, x: Array) -> Array:
        if not x.size:
            return x.copy()
        made = form(xp, x.astype(xp.float64).reshape(_shape(site)))
        return made.reshape(x.shape).astype(x.dtype)

    return compute


def _kernel(log: bool) -> Kernel:
    def bind(site: Site, io: Buffers) -> Sequence[Call]:
        shape = _shape(site)
        return softmax(io.ins[0].reshape(shape), io.outs[0].reshape(shape), io.scratch, split_of(io), log=log)

    return Kernel(bind, reads_floats, inplace=(0,))


_CASES = (
    Case("matrix", (f32(5, 7),)),
    Case("one", (f32(1, 1),)),
    Case("first-axis", (f32(5, 7, 3),), {"axis": 0}),
    Case("middle-axis", (f32(3, 5, 7),), {"axis": 1}),
    Case("last-axis", (f32(2, 3, 4, 9),), {"axis": 3}),
    Case("large-values", (f32(4, 9),), low=-200, high=200),
    Case("blocks", (f32(130, 521),)),
    Case("long-rows", (f32(2, 20000),)),
    Case("channels", (f32(2, 21, 33, 35),), {"axis": 1}),
    Case("wide-inner", (f32(3, 700, 65),), {"axis": 1}),
)
_NEGATIVE = (Case("negative-axis", (f32(3, 4, 5),), {"axis": -2}), Case("no-rows", (f32(0, 5),)))

_FORMS: tuple[tuple[str, Form, dict[str, Kernel]], ...] = (
    (
        "Softmax",
        portable.softmax,
        {"cpu": _kernel(log=False)} | _triton_norm.softmax(_shape, "softmax") | _jit.softmax(_shape),
    ),
    ("LogSoftmax", portable.log_softmax, {"cpu": _kernel(log=True)} | _triton_norm.softmax(_shape, "log_softmax")),
    ("Hardmax", portable.hardmax, _triton_norm.softmax(_shape, "hardmax")),
)

OPS: tuple[Op, ...] = tuple(
    Op(name, since, _infer, _compute(form), cases, {"axis": axis}, kernels=kernels)
    for name, form, kernels in _FORMS
    for since, axis, cases in ((1, 1, _CASES), (13, -1, _CASES + _NEGATIVE))
)
