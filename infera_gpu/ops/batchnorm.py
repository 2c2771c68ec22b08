"""BatchNormalization for inference; in training mode, an operator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.graph import Attrs, HostArray, Node
from infera_gpu.op import Buffers, Call, Case, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops._triton_norm import Rows, affine
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.norm import batch_norm

_PARAMETERS = ("scale", "bias", "mean", "variance")


def _infer(site: Site) -> Sequence[TensorSpec]:
    x = site.spec(0)
    if len([o for o in site.node.outputs if o]) > 1:
        raise site.fail("it has more than one output, which means training; export the model for inference")
    if x.ndim < 1:
        raise site.fail(f"input 0 is {x}, expected (batch, channels, ...)")
    for i, name in enumerate(_PARAMETERS, 1):
        if site.spec(i).dims != _parameter_shape(site):
            raise site.fail(f"{name} is {site.spec(i)}, expected {list(_parameter_shape(site))} for an input {x}")
    return (x,)


def _parameter_shape(site: Site) -> tuple[int, ...]:
    """One parameter a channel, or one an element where not `spatial`."""
    dims = site.spec(0).dims
    if not site.attrs.get("spatial", 1):
        return dims[1:]
    return dims[1:2] if len(dims) > 1 else (1,)


def _broadcast(site: Site, a: Array) -> Array:
    """A parameter, shaped to broadcast to the input."""
    trailing = site.spec(0).ndim - 1 - a.ndim
    return a.reshape(*a.shape, *(1,) * max(trailing, 0))


def _compute(xp: Any, site: Site, x: Array, *parameters: Array) -> Array:
    scale, bias, mean, variance = (_broadcast(site, p.astype(xp.float64)) for p in parameters)
    factor = scale / xp.sqrt(variance + site.attrs["epsilon"])
    return (x * factor + (bias - mean * factor)).astype(x.dtype)


def _supports(site: Site) -> bool:
    dtype = site.spec(0).dtype
    return dtype in (np.float32, np.float64) and all(site.spec(i).dtype == dtype for i in range(5))


def _bind(site: Site, io: Buffers) -> Sequence[Call]:
    scale, bias, mean, variance = (_broadcast(site, a) for a in io.ins[1:5])
    epsilon = float(site.attrs["epsilon"])
    return batch_norm(io.ins[0], scale, bias, mean, variance, io.outs[0], io.scratch, epsilon=epsilon)


def _positive(n: int) -> np.ndarray[Any, np.dtype[Any]]:
    return np.linspace(0.1, 3, n, dtype=np.float32)


def _case(name: str, *shape: int, **attrs: Any) -> Case:
    channels = f32(shape[1])
    return Case(name, (f32(*shape), channels, channels, channels, _positive(shape[1])), attrs)


_CASES = (
    _case("images", 2, 3, 5, 7),
    _case("one", 1, 1, 1, 1),
    _case("matrix", 4, 6),
    _case("sequence", 2, 5, 9, epsilon=0.01),
    _case("volume", 1, 3, 2, 3, 4),
    _case("large", 2, 9, 33, 35),
)
_PER_ELEMENT = Case(
    "per-element",
    (f32(2, 3, 4, 5), f32(3, 4, 5), f32(3, 4, 5), f32(3, 4, 5), _positive(60).reshape(3, 4, 5)),
    {"spatial": 0},
)
_HALF = TensorSpec((2, 3, 5, 7), np.dtype(np.float16))
_NARROW = (
    Case("half", (_HALF, *(TensorSpec((3,), _HALF.dtype),) * 3, _positive(3).astype(np.float16)), tol=2e-3),
    Case("half_of_floats", (_HALF, f32(3), f32(3), f32(3), _positive(3)), tol=2e-3, opset=15),
    Case("double", tuple(TensorSpec(s.shape, np.dtype(np.float64)) for s in (f32(2, 3, 5), *(f32(3),) * 4)), low=0.1),
)
_ATTRS: Attrs = {"epsilon": 1e-5, "momentum": 0.9}


def _factors(site: Site) -> tuple[HostArray, HostArray] | None:
    """What the input is multiplied by, and what is added then, in float32; None where that is not known."""
    known = [site.value(i) for i in range(1, 5)]
    scale, bias, mean, variance = (None if a is None else _broadcast(site, a.astype(np.float64)) for a in known)
    if scale is None or bias is None or mean is None or variance is None:
        return None
    factor = scale / np.sqrt(variance + site.attrs["epsilon"])
    return factor.astype(np.float32), (bias - mean * factor).astype(np.float32)


def _channels(site: Site) -> Rows:
    dims = site.spec(0).dims
    shape = dims if len(dims) > 1 else (*dims, 1)
    return Rows("affine", shape, tuple(a for a in range(len(shape)) if a != 1))


def _flat_factors(site: Site) -> tuple[HostArray, HostArray] | None:
    known = _factors(site)
    return known and (known[0].reshape(-1), known[1].reshape(-1))


def _last_axis(site: Site) -> Rows:
    dims = site.spec(0).dims
    return Rows("affine", dims, tuple(range(len(dims) - 1)))


CHANNELS_LAST = affine(_last_axis, _flat_factors, lambda site, a: a)
"""The kernels where channels are the last axis."""

_KERNELS = {"cpu": Kernel(_bind, _supports, inplace=(0,), strided=True, strided_out=True)} | affine(
    _channels, _factors, _broadcast
)


def _expand(site: Site) -> Expansion | None:
    """In training mode, an operator of its own."""
    if not site.attrs.get("training_mode", 0):
        return None
    n = site.node
    attrs = {name: site.attrs[name] for name in ("epsilon", "momentum")}
    return Expansion((Node("TrainingBatchNormalization", n.inputs, n.outputs, attrs, "infera", n.name),))


def _infer_training(site: Site) -> Sequence[TensorSpec]:
    (x,) = _infer(replace(site, node=replace(site.node, outputs=site.node.outputs[:1])))
    return x, site.spec(3), site.spec(4)


def _train(xp: Any, site: Site, x: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> Sequence[Array]:
    """Normalised by the batch's own mean and variance, towards which the running ones move."""
    axes = tuple(i for i in range(x.ndim) if i != 1)
    wide = x.astype(xp.float64)
    own = wide.mean(axis=axes), wide.var(axis=axes)
    momentum = site.attrs["momentum"]
    running = [
        (old * momentum + new * (1 - momentum)).astype(old.dtype)
        for old, new in zip((mean, variance), own, strict=True)
    ]
    return _compute(xp, site, x, scale, bias, *own), *running


_TRAINING = Op(
    "TrainingBatchNormalization",
    1,
    _infer_training,
    _train,
    (replace(_case("images", 2, 3, 5, 7), n_outs=3), replace(_case("matrix", 4, 6, momentum=0.3), n_outs=3)),
    _ATTRS,
    domain="infera",
)

OPS: tuple[Op, ...] = (
    _TRAINING,
    *(
        Op("BatchNormalization", since, _infer, _compute, cases, {**_ATTRS, **more}, kernels=_KERNELS, expand=_expand)
        for since, cases, more in (
            (7, (*_CASES, _PER_ELEMENT), {"spatial": 1}),
            (9, _CASES, {}),
            (14, (*_CASES, *_NARROW), {"training_mode": 0}),
        )
    ),
)
