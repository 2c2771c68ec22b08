"""Dropout: the input itself and a mask for inference; in training mode, an operator of its own that draws.

From opset 12 on the mask keeps everything. Before, ONNX leaves it open and onnxruntime gives zeros, as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import Node
from infera_gpu.op import Case, Expansion, Op, Site, f32
from infera_gpu.ops._families import NARROW, narrow, plain
from infera_gpu.ops.random import generator
from infera_gpu.spec import Array, TensorSpec

_TRAINING = 2


def _is_training(site: Site) -> bool:
    mode = site.value(_TRAINING)
    return mode is not None and bool(mode.reshape(-1)[0])


def _may_train(node: Node) -> bool:
    return len(node.inputs) > _TRAINING and bool(node.inputs[_TRAINING])


def _expand(site: Site) -> Expansion | None:
    if not _is_training(site):
        return None
    n = site.node
    return Expansion(
        (Node("TrainingDropout", n.inputs[:2], n.outputs, {"seed": site.attrs["seed"]}, "infera", n.name),)
    )


def _infer_training(site: Site) -> Sequence[TensorSpec]:
    if site.has(1) and site.spec(1).size != 1:
        raise site.fail(f"ratio is {site.spec(1)}, expected one number")
    return site.spec(0), TensorSpec(site.spec(0).shape, np.dtype(np.bool_))


def _train(xp: Any, site: Site, x: Array, ratio: Array | None = None) -> Sequence[Array]:
    """Each element with probability `ratio` 0, the others scaled so that the mean stays."""
    rate = 0.5 if ratio is None else float(np.asarray(ratio).reshape(-1)[0])
    if not 0 <= rate < 1:
        raise site.fail(f"ratio is {rate}, expected 0 to less than 1")
    if rate == 0:
        return x, np.ones(x.shape, np.bool_)
    kept = generator(site.attrs["seed"]).uniform(0, 1, x.shape) >= rate
    return (np.where(kept, x, 0) * (1 / (1 - rate))).astype(x.dtype), kept


def _infer(site: Site) -> Sequence[TensorSpec]:
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
    *(Case(dtype.name, (narrow(dtype, 2, 3),), opset=22) for dtype, since in NARROW.items() if since == 19),
)

_TRAINING_DROPOUT = Op(
    "TrainingDropout",
    1,
    _infer_training,
    plain(_train),
    (
        Case("half", (f32(3, 4),), n_outs=2),
        Case("seeded", (f32(3, 4), np.array(0.25, np.float32)), {"seed": 3}, n_outs=2),
    ),
    {"seed": None},
    domain="infera",
    portable=False,
    pure=False,
)

OPS: tuple[Op, ...] = (
    _TRAINING_DROPOUT,
    *(
        Op(
            *("Dropout", since, _infer, _compute, cases, attrs),
            values=values,
            view=lambda x, site: x,
            expand=_expand,
            draws=_may_train,
        )
        for since, cases, attrs, values in (
            (7, _CASES, {"ratio": 0.5}, ()),
            (10, _CASES + _MASK, {"ratio": 0.5}, ()),
            (12, _CASES + _MASK + _INPUTS, {"seed": None}, (_TRAINING,)),
        )
    ),
)
