"""The forms that operators had before opset 7, by what they became.

Broadcasting was asked for with `broadcast`, and `axis` said where the second operand lies in the first. Everything else
of opset 1 to 6 that differs only in attributes without a meaning for inference (`consumed_inputs`, `is_test`) is here
too. The computation is the newer declaration's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops import activation, batchnorm, compare, elementwise, matmul
from infera_gpu.ops._families import plain
from infera_gpu.spec import Array, TensorSpec

Adapt = Callable[[Site, int], tuple[int, ...]]
"""The shape that input i is given before the newer form sees it."""


def _newest_of(ops: Sequence[Op], name: str) -> Op:
    """The oldest declaration of opset 6 or later."""
    return min((o for o in ops if o.name == name), key=lambda o: o.since)


def _older(new: Op, attrs: Mapping[str, Any], adapt: Adapt, cases: tuple[Case, ...], since: int = 1) -> Op:
    def adapted(site: Site) -> Site:
        ins = tuple(None if s is None else TensorSpec(adapt(site, i), s.dtype) for i, s in enumerate(site.ins))
        kept = {k: v for k, v in site.attrs.items() if k in new.attrs}
        return replace(site, ins=ins, attrs={**new.attrs, **kept})

    def compute(xp: Any, site: Site, *ins: Array) -> Array | Sequence[Array]:
        shaped = [None if x is None else x.reshape(adapt(site, i)) for i, x in enumerate(ins)]
        return new.compute(xp, adapted(site), *shaped)

    return Op(
        new.name,
        since,
        infer=lambda site: new.infer(adapted(site)),
        compute=plain(compute),
        attrs={**{k: v for k, v in new.attrs.items() if k not in ("training_mode",)}, **attrs},
        cases=cases,
        portable=new.portable,
    )


def _same(site: Site, i: int) -> tuple[int, ...]:
    return site.spec(i).dims


def _second(site: Site, i: int) -> tuple[int, ...]:
    """The second operand where `axis` puts it in the first: its end, where left out."""
    a, b = site.spec(0), site.spec(1)
    if i != 1 or a.dims == b.dims:
        return site.spec(i).dims
    if not site.attrs["broadcast"]:
        raise site.fail(f"{a} and {b} differ and broadcast is not set")
    axis = site.attrs["axis"]
    if axis is None:
        return b.dims
    at = axis + a.ndim if axis < 0 else axis
    if not 0 <= at <= a.ndim - b.ndim:
        raise site.fail(f"{b} at axis {axis} does not lie within {a}")
    return (*b.dims, *(1,) * (a.ndim - at - b.ndim))


def _slope(site: Site, i: int) -> tuple[int, ...]:
    """One slope a channel, on axis 1."""
    x, slope = site.spec(0), site.spec(1)
    if i == 1 and slope.ndim == 1 and slope.size > 1 and x.ndim > 2:
        return (*slope.dims, *(1,) * (x.ndim - 2))
    return site.spec(i).dims


_BROADCAST = {"axis": None, "broadcast": 0, "consumed_inputs": None}
_ARITHMETIC = tuple(
    _older(
        _newest_of((*elementwise.OPS, *compare.OPS), name),
        _BROADCAST,
        _second,
        (
            Case("same", (made(2, 3), made(2, 3)), opset=6),
            Case("end", (made(2, 3, 4), made(4)), {"broadcast": 1}, opset=6),
            Case("middle", (made(2, 3, 4), made(3)), {"broadcast": 1, "axis": 1}, opset=6),
            Case("first", (made(2, 3, 4), made(2)), {"broadcast": 1, "axis": 0}, opset=6),
            Case("pair", (made(2, 3, 4, 5), made(3, 4)), {"broadcast": 1, "axis": 1}, opset=6),
            Case("negative", (made(2, 3, 4), made(3)), {"broadcast": 1, "axis": -2}, opset=6),
            Case("one", (made(2, 3), made(1)), {"broadcast": 1}, opset=6),
        ),
    )
    for names, made in (
        (("Add", "Sub", "Mul", "Div", "Pow", "Greater", "Less"), f32),
        (("And", "Or", "Xor"), lambda *d: TensorSpec(d, np.dtype(np.bool_))),
        (("Equal",), lambda *d: TensorSpec(d, np.dtype(np.int32))),
    )
    for name in names
)
_CHANNELS = tuple(f32(3) for _ in range(3))

OPS = (
    *_ARITHMETIC,
    _older(
        _newest_of(matmul.OPS, "Gemm"),
        {"broadcast": 0},
        _same,
        (
            Case("bias", (f32(5, 4), f32(4, 3), f32(3)), {"broadcast": 1}, opset=6),
            Case("whole", (f32(5, 4), f32(4, 3), f32(5, 3)), {"alpha": 0.5, "beta": 2.0}, opset=6),
            Case("turned", (f32(4, 5), f32(3, 4), f32(1)), {"broadcast": 1, "transA": 1, "transB": 1}, opset=6),
        ),
    ),
    _older(
        _newest_of(activation.OPS, "PRelu"),
        {"consumed_inputs": None},
        _slope,
        (
            Case("channels", (f32(2, 3, 4), f32(3)), opset=6),
            Case("images", (f32(2, 3, 4, 5), f32(3)), opset=6),
            Case("one", (f32(2, 3), f32(1)), opset=6),
        ),
    ),
    _older(
        _newest_of(batchnorm.OPS, "BatchNormalization"),
        {"consumed_inputs": None, "is_test": 0},
        _same,
        (Case("images", (f32(2, 3, 4), *_CHANNELS, np.array([0.5, 1, 2], np.float32)), {"is_test": 1}, opset=6),),
    ),
)
