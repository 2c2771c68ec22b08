"""com.microsoft: operators that ONNX has taken over since, and small ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Registry, Site, f32
from infera_gpu.ops import generate, indexing, linear_attention, pad, rearrange, sample, select, shape
from infera_gpu.ops._ms import ms_op, wide
from infera_gpu.spec import Array, TensorSpec, spec_of

_STANDARD = Registry(
    op for module in (generate, indexing, linear_attention, pad, rearrange, sample, select, shape) for op in module.OPS
)


def _standard(name: str, opset: int) -> Op:
    op = _STANDARD.find("", name, opset)
    assert op is not None
    return op


def _same(name: str, opset: int, *cases: Case, called: str = "", without: str = "") -> Op:
    """The standard operator as of an opset, with its own cases but one if none are given."""
    op = _standard(name, opset)
    kept = cases or tuple(c for c in op.cases if c.opset is None and c.id != without)
    return replace(op, name=called or name, domain="com.microsoft", since=1, cases=kept)


def _only(op: Op, **fixed: Any) -> Op:
    """The operator with further attributes, which may have these values only."""

    def infer(site: Site) -> Sequence[TensorSpec | None]:
        for name, value in fixed.items():
            if site.attrs[name] != value:
                raise site.fail(f"{name} is {site.attrs[name]}, only {value} is supported")
        return op.infer(site)

    return replace(op, infer=infer, attrs={**op.attrs, **fixed})


_UNIQUE, _RANGE = _standard("Unique", 11), _standard("Range", 11)


def _with_delta(site: Site) -> Site:
    """The site of the standard Range, whose delta may not be left out."""
    if site.has(2):
        return site
    one = np.ones((), site.spec(0).dtype)
    return replace(site, ins=(*site.ins[:2], spec_of(one)), values=(*site.values[:2], one))


def _range(xp: Any, site: Site, start: Array, limit: Array, delta: Array | None = None) -> Array:
    step = xp.ones((), start.dtype) if delta is None else delta
    return _RANGE.outputs(xp, _with_delta(site), (start, limit, step))[0]


def _windows(site: Site) -> tuple[int, int, int, int]:
    """Axis, size, step and number of windows."""
    axis, size, step = site.axis("dim"), int(site.attrs["size"]), int(site.attrs["step"])
    length = site.spec(0).dims[axis] if site.spec(0).ndim else 0
    if step < 1 or not 1 <= size <= length:
        raise site.fail(f"windows of {size} elements in steps of {step} do not fit axis {axis} of {site.spec(0)}")
    return axis, size, step, (length - size) // step + 1


def _infer_unfold(site: Site) -> Sequence[TensorSpec]:
    axis, size, _, count = _windows(site)
    dims = site.spec(0).dims
    return (TensorSpec((*dims[:axis], count, *dims[axis + 1 :], size), site.spec(0).dtype),)


def _unfold(xp: Any, site: Site, x: Array) -> Array:
    axis, size, step, count = _windows(site)
    taken = xp.arange(count)[:, None] * step + xp.arange(size)
    return xp.ascontiguousarray(xp.moveaxis(xp.take(x, taken, axis=axis), axis + 1, -1))


def _infer_unique(site: Site) -> Sequence[None]:
    if site.spec(0).ndim != 1:
        raise site.fail(f"x is {site.spec(0)}, expected one axis")
    return (None,) * max(1, len(site.node.outputs))


def _unique(xp: Any, site: Site, x: Array) -> Sequence[Array]:
    """Values in the order in which they come first."""
    made, _, places, counts = _UNIQUE.outputs(xp, replace(site, attrs={"axis": None, "sorted": 0}), (x,))
    return made, places, counts


def _infer_distance(site: Site) -> tuple[TensorSpec]:
    a, b = site.spec(0), site.spec(1)
    if a.ndim != 2 or b.ndim != 2 or a.dims[1] != b.dims[1] or a.dtype != b.dtype:
        raise site.fail(f"A is {a} and B is {b}, expected rows of one length")
    if site.attrs["metric"] not in ("euclidean", "sqeuclidean"):
        raise site.fail(f"metric '{site.attrs['metric']}' is not one of euclidean, sqeuclidean")
    return (TensorSpec((a.dims[0], b.dims[0]), a.dtype),)


def _distance(xp: Any, site: Site, a: Array, b: Array) -> Array:
    """By |a|² + |b|² - 2 ab in float64; rounding may leave it below 0."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    squares = xp.maximum(squares, 0)
    return (xp.sqrt(squares) if site.attrs["metric"] == "euclidean" else squares).astype(a.dtype)


def _infer_inverse(site: Site) -> Sequence[TensorSpec]:
    x = site.spec(0)
    if x.ndim < 2 or x.dims[-1] != x.dims[-2]:
        raise site.fail(f"X is {x}, expected square matrices")
    return (x,)


def _inverse(xp: Any, site: Site, x: Array) -> Array:
    try:
        return xp.linalg.inv(wide(x)).astype(x.dtype)
    except np.linalg.LinAlgError:
        raise site.fail("a matrix has no inverse") from None


_REGULAR = np.array([[[4, 1, 0], [2, 3, 1], [0, 1, 5]], [[1, 0, 2], [0, -2, 0], [1, 1, -1]]], np.float32)

OPS: tuple[Op, ...] = (
    _same("Trilu", 14),
    _same("GatherND", 11),
    _same("Pad", 11, without="integers"),  # which onnxruntime's has not
    _same("GridSample", 16),
    _same(
        "Unsqueeze",
        13,
        *(Case(str(axis), (f32(3, 2), np.array(axis, np.int32))) for axis in (0, 1, 2, -1, -2)),
        called="ExpandDims",
    ),
    _only(_same("LinearAttention", 27), state_window=0),
    _only(
        _same("CausalConvWithState", 27),
        ndim=1,
        dilation=1,
        channels_last=0,
        input_channel_offset=0,
        input_channels=0,
        state_channels_last=-1,
        state_length=0,
        state_update_capacity=0,
        state_window=0,
    ),
    replace(
        ms_op(
            "Range",
            lambda site: _RANGE.infer(_with_delta(site)),
            _range,
            (*_RANGE.cases, Case("no_delta", (np.array(2), np.array(7)))),
            needs=(0, 1),
        ),
        values=_RANGE.values,
    ),
    ms_op(
        "UnfoldTensor",
        _infer_unfold,
        _unfold,
        (
            Case("last", (f32(2, 3, 7),), {"size": 3, "step": 2}),
            Case("first", (f32(5, 2, 3),), {"size": 2, "dim": 0}),
        ),
        dim=-1,
        size=REQUIRED,
        step=1,
    ),
    replace(
        ms_op(
            "Unique",
            _infer_unique,
            _unique,
            (
                Case("repeated", (np.array([2, 1, 1, 3, 4, 3], np.float32),), n_outs=3),
                Case("empty", (f32(0),), n_outs=3),
            ),
        ),
        portable=_UNIQUE.portable,
    ),
    ms_op(
        "CDist",
        _infer_distance,
        _distance,
        (
            Case("squares", (f32(3, 4), f32(5, 4))),
            Case("euclidean", (f32(3, 4), f32(5, 4)), {"metric": "euclidean"}),
            Case("doubles", (np.arange(6.0).reshape(2, 3), np.arange(9.0).reshape(3, 3)), {"metric": "euclidean"}),
        ),
        metric="sqeuclidean",
        needs=(0, 1),
    ),
    ms_op(
        "Inverse",
        _infer_inverse,
        _inverse,
        (Case("batch", (_REGULAR,)), Case("matrix", (_REGULAR[0].astype(np.float64),))),
    ),
)
