"""BatchNormalization for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import Attrs
from infera_gpu.op import Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.norm import batch_norm

_PARAMETERS = ("scale", "bias", "mean", "variance")


def _infer(site: Site) -> Sequence[TensorSpec]:
    x = site.spec(0)
    if site.attrs.get("training_mode", 0) or len([o for o in site.node.outputs if o]) > 1:
        raise site.fail("training mode is not supported; export the model for inference")
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
_ATTRS: Attrs = {"epsilon": 1e-5, "momentum": 0.9}
_KERNELS = {"cpu": Kernel(_bind, _supports, inplace=(0,), strided=True)}

OPS: tuple[Op, ...] = tuple(
    Op("BatchNormalization", since, _infer, _compute, cases, {**_ATTRS, **more}, kernels=_KERNELS)
    for since, cases, more in (
        (7, (*_CASES, _PER_ELEMENT), {"spatial": 1}),
        (9, _CASES, {}),
        (14, _CASES, {"training_mode": 0}),
    )
)
