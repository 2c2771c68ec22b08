"""Pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Call, Kernel, Op, Site
from infera_gpu.ops._later import Kinds, cases_in
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import pad as cpu
from infera_kernels.portable.pad import blank, pad
from infera_kernels.triton.terms import AxisMap

_PADS, _VALUE, _AXES = 1, 2, 3


def _pads(site: Site) -> tuple[tuple[int, int], ...]:
    """(before, after) of every axis. Raises PlanError where they do not fit the input, or the mode is unknown.

    ONNX has the mode wrap from opset 19 on; PyTorch writes it at 18, and onnxruntime runs that.
    """
    x = site.spec(0)
    modes = ("constant", "edge", "reflect", *(("wrap",) if site.opset >= 18 else ()))
    if site.attrs["mode"] not in modes:
        raise site.fail(f"mode '{site.attrs['mode']}' is not one of {', '.join(modes)} at opset {site.opset}")
    flat = site.attrs["pads"] if "pads" in site.attrs else site.ints(_PADS)
    if flat is None:
        raise site.fail("input 1 (pads) is required")
    axes = site.ints(_AXES)
    named = range(x.ndim) if axes is None else [axis % x.ndim if -x.ndim <= axis < x.ndim else -1 for axis in axes]
    if -1 in named or len(flat) != 2 * len(named):
        raise site.fail(f"pads {list(flat)} and axes {axes} do not fit {x}")
    pads = [(0, 0)] * x.ndim
    for i, axis in enumerate(named):
        pads[axis] = (int(flat[i]), int(flat[i + len(named)]))
    return tuple(pads)


def _infer(site: Site) -> Sequence[TensorSpec]:
    x, pads = site.spec(0), _pads(site)
    if len(site.ins) > _VALUE and site.has(_VALUE) and site.spec(_VALUE).size != 1:
        raise site.fail(f"value is {site.spec(_VALUE)}, expected one")
    if site.attrs["mode"] != "constant" and any(n == 0 < max(p) for n, p in zip(x.dims, pads, strict=True)):
        raise site.fail(f"pads {pads} of an empty axis of {x} have nothing to repeat in mode '{site.attrs['mode']}'")
    shape = tuple(b + n + a for n, (b, a) in zip(x.dims, pads, strict=True))
    if any(n + min(b, 0) + min(a, 0) < 0 for n, (b, a) in zip(x.dims, pads, strict=True)):
        raise site.fail(f"pads {pads} remove more than there is in {x}")
    return (TensorSpec(shape, x.dtype),)


def _fill(site: Site, value: Array | None) -> Array:
    """The constant to pad with, 0-d."""
    if value is not None:
        return value.reshape(())
    dtype = site.spec(0).dtype
    return np.asarray(site.attrs["value"], dtype) if "value" in site.attrs else blank(np, dtype)


def _compute(xp: Any, site: Site, x: Array, pads: Array | None = None, value: Array | None = None, *_: Any) -> Array:
    return pad(xp, x, _pads(site), mode=site.attrs["mode"], value=_fill(site, value))


def _supports(site: Site) -> bool:
    return site.spec(0).dtype != object and cpu.fits(site.spec(0).dims, _pads(site), site.attrs["mode"])


def _bind(site: Site, io: Buffers) -> Sequence[Call]:
    value = io.ins[_VALUE] if len(io.ins) > _VALUE else None
    return cpu.pad(io.ins[0], io.outs[0], _pads(site), mode=site.attrs["mode"], value=_fill(site, value))


def _maps(site: Site) -> list[AxisMap]:
    """Each padded axis: the positions of its elements, padded as they are; -1 is the constant."""
    mode, maps = site.attrs["mode"], list[AxisMap]()
    for axis, (n, sides) in enumerate(zip(site.spec(0).dims, _pads(site), strict=True)):
        if any(sides):
            maps.append(AxisMap(axis, pad(np, np.arange(n), (sides,), mode=mode, value=-1)[:, None]))
    return maps


def _fill_of(site: Site, io: Buffers) -> Array | float:
    """What is known while planning is compiled in."""
    known = site.value(_VALUE)
    if known is None and len(io.ins) > _VALUE and io.ins[_VALUE] is not None:
        return io.ins[_VALUE]
    number: float = _fill(site, known).item()
    return number


_KERNELS = Kinds(
    {"cpu": Kernel(_bind, _supports, strided=True, strided_out=True)},
    "_triton_move",
    lambda gpu: gpu.mapping(_maps, _fill_of),
)
_MODE = {"mode": "constant"}


OPS: tuple[Op, ...] = (
    Op(
        "Pad",
        2,
        _infer,
        _compute,
        cases_in("_pad_cases", 2),
        {**_MODE, "pads": REQUIRED, "value": 0.0},
        kernels=_KERNELS,
    ),
    Op("Pad", 11, _infer, _compute, cases_in("_pad_cases", 11), _MODE, kernels=_KERNELS, values=(_PADS,)),
    Op("Pad", 18, _infer, _compute, cases_in("_pad_cases", 18), _MODE, kernels=_KERNELS, values=(_PADS, _AXES)),
    Op("Pad", 19, _infer, _compute, cases_in("_pad_cases", 19), _MODE, kernels=_KERNELS, values=(_PADS, _AXES)),
)
