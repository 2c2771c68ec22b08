"""Operators whose output shapes depend on data: NonZero, Compress, Unique, NonMaxSuppression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.op import Case, Cases, Op, Site
from infera_gpu.ops._families import i64, plain
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import indexing as portable


def _unknown(site: Site) -> Sequence[TensorSpec | None]:
    return (None,) * max(1, len(site.node.outputs))


def _compress(xp: Any, site: Site, x: Array, condition: Array) -> Array:
    """The condition may be shorter than the axis: what it does not cover is left out."""
    axis = None if site.attrs["axis"] is None else site.axis()
    rows = x.reshape(-1) if axis is None else x
    kept = xp.flatnonzero(condition[: rows.shape[axis or 0]])
    return xp.take(rows, kept, axis=axis or 0)


def _unique(xp: Any, site: Site, x: Array) -> Sequence[Array]:
    axis = None if site.attrs["axis"] is None else site.axis()
    return portable.unique(xp, x, axis, in_order=not site.attrs["sorted"])


def _scalar(ins: Sequence[Array | None], i: int) -> Any:
    x = ins[i] if i < len(ins) else None
    return None if x is None else x.reshape(-1)[0].item()


def _suppress(xp: Any, site: Site, boxes: Array, scores: Array, *options: Array | None) -> Array:
    limit, iou, score = (_scalar(options, i) for i in range(3))
    centered = bool(site.attrs["center_point_box"])
    return portable.non_max_suppression(boxes, scores, limit or 0, iou or 0.0, score, centered=centered)


_ROWS = np.array([[1, 0, 0], [1, 0, 0], [2, 3, 4], [0, 5, 5]], np.float32)
_BOXES = np.array(
    [[[0, 0, 1, 1], [0, 0.1, 1, 1.1], [0, -0.1, 1, 0.9], [0, 10, 1, 11], [1, 11.1, 0, 10.1], [0, 100, 1, 101]]],
    np.float32,
)
_SCORES = np.array([[[0.9, 0.75, 0.6, 0.95, 0.5, 0.3], [0.1, 0.2, 0.95, 0.4, 0.45, 0.8]]], np.float32)
_HALF, _LOW = np.array([0.5], np.float32), np.array([0.35], np.float32)

OPS: tuple[Op, ...] = (
    Op(
        "NonZero",
        9,
        infer=_unknown,
        compute=plain(lambda xp, site, x: xp.stack(xp.nonzero(xp.atleast_1d(x))).astype(xp.int64)),
        cases=Cases(
            lambda: (
                Case("matrix", (np.array([[1, 0, 2], [0, 0, 3]], np.float32),)),
                Case("none", (np.zeros((2, 2), np.bool_),)),
            )
        ),
    ),
    Op(
        "Compress",
        9,
        infer=_unknown,
        compute=plain(_compress),
        attrs={"axis": None},
        cases=Cases(
            lambda: (
                Case("flat", (_ROWS, np.array([False, True, True, False, True]))),
                Case("rows", (_ROWS, np.array([True, False, True])), {"axis": 0}),
                Case("last", (_ROWS, np.array([False, False, True])), {"axis": -1}, opset=11),
            )
        ),
    ),
    Op(
        "Unique",
        11,
        infer=_unknown,
        compute=plain(_unique),
        attrs={"axis": None, "sorted": 1},
        cases=Cases(
            lambda: (
                Case("flat", (_ROWS,), n_outs=4),
                Case("in_order", (np.array([2, 1, 1, 3, 4, 3], np.int64),), {"sorted": 0}, n_outs=4),
                Case("rows", (_ROWS,), {"axis": 0}, n_outs=4),
                Case("rows_in_order", (_ROWS,), {"axis": 0, "sorted": 0}, n_outs=4),
                Case("columns", (_ROWS,), {"axis": 1}, n_outs=4),
                Case("values", (_ROWS,)),
            )
        ),
        portable=False,
    ),
    Op(
        "NonMaxSuppression",
        10,
        infer=_unknown,
        compute=plain(_suppress),
        attrs={"center_point_box": 0},
        cases=Cases(
            lambda: (
                Case("best", (_BOXES, _SCORES, i64(3), _HALF, _LOW)),
                Case("one", (_BOXES, _SCORES, i64(1), _HALF)),
                Case("no_limit_given", (_BOXES, _SCORES)),
                Case("centered", (np.abs(_BOXES), _SCORES, i64(9), _HALF), {"center_point_box": 1}),
                Case("all", (_BOXES, _SCORES, i64(9), np.array([1], np.float32))),
            )
        ),
        portable=False,
    ),
)
