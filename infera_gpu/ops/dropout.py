"""Dropout for inference: the input itself, and a mask.

From opset 12 on the mask keeps everything. Before, ONNX leaves it open and onnxruntime gives zeros, as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.spec import Array, TensorSpec

_TRAINING = 2


def _infer(site: Site) -> Sequence[TensorSpec]:
    mode = site.value(_TRAINING)
    if mode is not None and bool(mode):
        raise site.fail("training mode is not supported; export the model for inference")
    x = site.spec(0)
    mask = TensorSpec(x.shape, x.dtype if site.opset < 10 else np.dtype(np.bool_))
    return (x, mask)[: max(1, len(site.node.outputs))]


def _compute(xp: Any, site: Site, x: Array, *_: Array | None) -> Sequence[Array]:
    return (x, *(xp.full(spec.dims, site.opset >= 12, spec.dtype) for spec in site.outs[1:]))


_CASES = (Case("plain", (f32(3, 4),)), Case("empty", (f32(0, 2),)))
_MASK = (Case("mask", (f32(3, 4),), n_outs=2),)
_INPUTS = (
    Case("ratio", (f32(3, 4), np.array(0.4, np.float32)), n_outs=2),
    Case("inference", (f32(3, 4), None, np.array(False)), {"seed": 1}),
)

OPS: tuple[Op, ...] = tuple(
    Op("Dropout", since, _infer, _compute, cases, attrs, values=values, view=lambda x, site: x)
    for since, cases, attrs, values in (
        (7, _CASES, {"ratio": 0.5}, ()),
        (10, _CASES + _MASK, {"ratio": 0.5}, ()),
        (12, _CASES + _MASK + _INPUTS, {"seed": None}, (_TRAINING,)),
    )
)
