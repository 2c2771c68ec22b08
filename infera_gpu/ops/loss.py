"""Losses of a classifier: (batch, classes, ...) against the classes of (batch, ...)."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops._families import plain
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import loss as portable
from infera_kernels.portable.softmax import log_softmax

REDUCTIONS = ("none", "sum", "mean")


def _infer(site: Site) -> tuple[TensorSpec]:
    x, target = site.spec(0), site.spec(1)
    if x.ndim < 2 or target.dims != (x.dims[0], *x.dims[2:]):
        raise site.fail(f"target is {target}, expected the axes of {x} without its second")
    if target.dtype.kind not in "iu":
        raise site.fail(f"target is {target}, expected integers")
    if site.has(2) and site.spec(2).dims != (x.dims[1],):
        raise site.fail(f"weight is {site.spec(2)}, expected {x.dims[1]} elements, one a class")
    if site.attrs["reduction"] not in REDUCTIONS:
        raise site.fail(f"reduction is '{site.attrs['reduction']}', expected one of {', '.join(REDUCTIONS)}")
    return (TensorSpec(target.shape if site.attrs["reduction"] == "none" else (), x.dtype),)


def _infer_softmax(site: Site) -> tuple[TensorSpec, TensorSpec]:
    return *_infer(site), site.spec(0)


def _loss(xp: Any, site: Site, x: Array, target: Array, weight: Array | None = None) -> Array:
    ignored = site.attrs["ignore_index"]
    if xp is np:
        counted = target if ignored is None else target[target != ignored]
        low, high = counted.min(initial=0), counted.max(initial=0)
        if low < 0 or high >= x.shape[1]:
            raise IndexError(f"target {low if low < 0 else high} is out of range for {x.shape[1]} classes")
    return portable.negative_log_likelihood(
        xp, x, target, weight, reduction=site.attrs["reduction"], ignored=None if ignored is None else int(ignored)
    )


def _softmax_loss(xp: Any, site: Site, x: Array, target: Array, weight: Array | None = None) -> tuple[Array, Array]:
    wide = x.astype(np.float32) if x.dtype.itemsize < 4 else x
    log = log_softmax(xp, wide)
    return _loss(xp, site, log, target, weight).astype(x.dtype), log.astype(x.dtype)


_TARGET = np.array([[4, 0, 2], [1, 1, 3]])
_WEIGHT = np.array([0.2, 0.9, 1.5, 0.4, 0.7], np.float32)
CASES = (
    Case("vector", (f32(3, 5), np.array([1, 0, 4]))),
    *(Case(r, (f32(2, 5, 3), _TARGET, _WEIGHT), {"reduction": r}) for r in REDUCTIONS),
    Case("ignored", (f32(2, 5, 3), _TARGET, _WEIGHT), {"ignore_index": 1}),
    Case("ignored_outside", (f32(2, 5, 3), np.where(_TARGET == 1, -7, _TARGET)), {"ignore_index": -7}),
    Case("image", (f32(1, 5, 2, 3), _TARGET[None]), {"reduction": "none"}),
    Case("int32", (f32(3, 5), np.array([1, 0, 4], np.int32)), {"reduction": "sum"}),
)
_ATTRS = {"ignore_index": None, "reduction": "mean"}

OPS = (
    Op("NegativeLogLikelihoodLoss", 12, infer=_infer, compute=plain(_loss), attrs=_ATTRS, cases=CASES),
    Op(
        "SoftmaxCrossEntropyLoss",
        12,
        infer=_infer_softmax,
        compute=plain(_softmax_loss),
        attrs=_ATTRS,
        cases=(*CASES, Case("probabilities", (f32(2, 5, 3), _TARGET), n_outs=2)),
    ),
)
