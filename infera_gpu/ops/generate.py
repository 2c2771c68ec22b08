"""Tensors from shapes, numbers or attributes: all of them known while planning, so none has a kernel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import REQUIRED, Case, Cases, Op, Site, f32
from infera_gpu.ops._families import NARROW, element_type, i64, plain
from infera_gpu.spec import Array, DType, TensorSpec, spec_of


def _constant(site: Site) -> HostArray:
    """The value, from the one attribute that holds it."""
    given = [(name, value) for name, value in site.attrs.items() if value is not None]
    if len(given) != 1:
        raise site.fail(f"expected one value, got {', '.join(name for name, _ in given) or 'none'}")
    name, value = given[0]
    kinds = {"float": np.float32, "int": np.int64, "string": object}
    kind = name.removeprefix("value_").removesuffix("s")
    return np.asarray(value, kinds.get(kind)) if name != "value" else np.asarray(value)


def _constant_op(since: int, attrs: dict[str, Any], cases: tuple[Case, ...]) -> Op:
    return Op(
        "Constant",
        since,
        infer=lambda site: (spec_of(_constant(site)),),
        compute=plain(lambda xp, site: _constant(site)),
        attrs=attrs,
        cases=cases,
    )


_TENSOR = np.array([[1, 2, 3]], np.int32)
_FORMS: dict[str, Any] = {
    "value_float": 1.5,
    "value_floats": (0.5, 2.0),
    "value_int": -7,
    "value_ints": (3, 1, 2),
    "value_string": "a",
    "value_strings": ("a", "bc"),
}
_CONSTANT = (
    _constant_op(1, {"value": REQUIRED}, (Case("tensor", (), {"value": _TENSOR}),)),
    _constant_op(
        12,
        {"value": None, **dict.fromkeys(_FORMS)},
        (
            Case("tensor", (), {"value": _TENSOR}),
            *(Case(name, (), {name: value}) for name, value in _FORMS.items()),
        ),
    ),
)


def _fill(site: Site) -> HostArray:
    value = np.zeros(1, np.float32) if site.attrs["value"] is None else np.asarray(site.attrs["value"])
    if value.size != 1:
        raise site.fail(f"value has {value.size} elements, expected one")
    return value


def _filled_spec(site: Site) -> tuple[TensorSpec]:
    dims = site.ints(0) or ()
    if any(d < 0 for d in dims):
        raise site.fail(f"shape {list(dims)} has a negative size")
    return (TensorSpec(dims, _fill(site).dtype),)


_CONSTANT_OF_SHAPE = Op(
    "ConstantOfShape",
    9,
    infer=_filled_spec,
    compute=plain(lambda xp, site, shape: xp.full(site.ints(0) or (), _fill(site).reshape(-1)[0])),
    attrs={"value": None},
    values=(0,),
    cases=Cases(
        lambda: (
            Case("zeros", (i64(2, 3),)),
            Case("value", (i64(4),), {"value": np.array([-3], np.int64)}),
            Case("scalar", (np.zeros(0, np.int64),), {"value": np.array([True])}),
            Case("empty", (i64(0, 3),)),
            *(
                Case(dtype.name, (i64(2, 3),), {"value": np.ones(1, dtype)}, opset=max(20, since))
                for dtype, since in NARROW.items()
            ),
        )
    ),
)


def _steps(site: Site) -> int:
    """Elements of a Range: the difference is rounded to the operands' type, as in C, before it is divided."""
    values = [site.value(i) for i in range(3)]
    start, limit, delta = (None if v is None or v.size != 1 else v.reshape(()) for v in values)
    if start is None or limit is None or delta is None or not delta:
        raise site.fail("start, limit and a delta that is not 0 must be numbers known while planning")
    if not start.dtype == limit.dtype == delta.dtype:
        raise site.fail(f"start, limit and delta are {start.dtype}, {limit.dtype} and {delta.dtype}, expected one type")
    with np.errstate(all="ignore"):
        count = float(limit - start) / float(delta)
    if not math.isfinite(count):
        raise site.fail(f"from {start} to {limit} in steps of {delta} there is no number of elements")
    return max(0, math.ceil(count))


def _range(xp: Any, site: Site, start: Array, limit: Array, delta: Array) -> Array:
    wide = xp.float32 if start.dtype.itemsize == 2 and start.dtype.kind not in "iu" else start.dtype
    count = xp.arange(_steps(site)).astype(wide)
    return (start.astype(wide) + count * delta.astype(wide)).astype(start.dtype)


def _range_op(since: int, attrs: dict[str, Any], cases: tuple[Case, ...]) -> Op:
    return Op(
        "Range",
        since,
        infer=lambda site: (TensorSpec((_steps(site),), site.spec(0).dtype),),
        compute=plain(_range),
        attrs=attrs,
        values=(0, 1, 2),
        cases=cases,
    )


def _range_case(id: str, dtype: Any, *bounds: float) -> Case:
    return Case(id, tuple(np.array(b, dtype) for b in bounds))


_RANGE_CASES = (
    _range_case("up", np.int64, 1, 10, 3),
    _range_case("down", np.int32, 10, 4, -2),
    _range_case("float", np.float32, 0, 1, 0.3),
    _range_case("none", np.int64, 5, 1, 1),
)
_RANGE = (_range_op(11, {}, _RANGE_CASES), _range_op(27, {"stash_type": 1}, _RANGE_CASES[:1]))


def _eye_dtype(site: Site) -> DType:
    return element_type(site, "dtype", site.spec(0).dtype)


def _eye_spec(site: Site) -> tuple[TensorSpec]:
    if site.spec(0).ndim != 2:
        raise site.fail(f"input 0 is {site.spec(0)}, expected a matrix")
    return (TensorSpec(site.spec(0).shape, _eye_dtype(site)),)


def _eye(xp: Any, site: Site, x: Array) -> Array:
    rows, cols = site.spec(0).dims
    return xp.eye(rows, cols, k=int(site.attrs["k"])).astype(_eye_dtype(site))


_EYE_LIKE = Op(
    "EyeLike",
    9,
    infer=_eye_spec,
    compute=plain(_eye),
    attrs={"dtype": None, "k": 0},
    cases=Cases(
        lambda: (
            Case("square", (f32(3, 3),)),
            Case("above", (f32(2, 4),), {"k": 1}),
            Case("below", (f32(4, 2),), {"k": -2, "dtype": 7}),
        )
    ),
    shapes_only=True,
)

OPS: tuple[Op, ...] = (*_CONSTANT, _CONSTANT_OF_SHAPE, *_RANGE, _EYE_LIKE)
