"""Operators that ask for a shape or give a tensor another one: all of them views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Cases, Op, Site, f32
from infera_gpu.ops._families import INT64, i64, narrow_cases, normalized, plain, shaped
from infera_gpu.spec import Array, TensorSpec


def _window(site: Site) -> tuple[int, ...]:
    """The dimensions that Shape returns: `start` and `end` clamp as a Python slice's bounds do."""
    dims = site.spec(0).dims
    return dims[slice(site.attrs.get("start", 0), site.attrs.get("end"))]


def _shape(since: int, attrs: dict[str, Any], cases: tuple[Case, ...]) -> Op:
    return Op(
        "Shape",
        since,
        infer=lambda site: (TensorSpec((len(_window(site)),), INT64),),
        compute=plain(lambda xp, site, x: xp.asarray(_window(site), dtype=INT64)),
        attrs=attrs,
        cases=cases,
        shapes_only=True,
    )


_SHAPE = (
    _shape(1, {}, (Case("matrix", (f32(2, 3),)), Case("scalar", (f32(),)), Case("empty", (f32(0, 5),)))),
    _shape(
        15,
        {"start": 0, "end": None},
        (
            Case("all", (f32(2, 3),)),
            Case("middle", (f32(2, 3, 4, 5),), {"start": 1, "end": -1}),
            Case("clamped", (f32(2, 3),), {"start": -9, "end": 9}),
            Case("none", (f32(2, 3),), {"start": 2, "end": 1}),
            *narrow_cases((2, 3)),
        ),
    ),
)

_SIZE = Op(
    "Size",
    1,
    infer=lambda site: (TensorSpec((), INT64),),
    compute=plain(lambda xp, site, x: xp.asarray(site.spec(0).size, dtype=INT64)),
    cases=Cases(
        lambda: (
            Case("matrix", (f32(2, 3),)),
            Case("scalar", (f32(),)),
            Case("empty", (f32(0, 5),)),
            *narrow_cases((2, 3)),
        )
    ),
    shapes_only=True,
)


def view_op(
    name: str,
    since: int,
    shape: Callable[[Site], Sequence[int]],
    cases: tuple[Case, ...],
    *,
    attrs: dict[str, Any] | None = None,
    values: tuple[int, ...] = (),
) -> Op:
    """An operator that gives input 0 the shape `shape(site)`, its elements staying in order."""
    return Op(
        name,
        since,
        infer=shaped(shape),
        compute=plain(lambda xp, site, x, *_: x.reshape(tuple(shape(site)))),
        view=lambda x, site: x.reshape(site.outs[0].dims, copy=False),
        attrs=attrs or {},
        values=values,
        cases=cases,
    )


def _reshaped(site: Site) -> tuple[int, ...]:
    spec, wanted = site.spec(0), site.ints(1) or ()
    keep = not site.attrs.get("allowzero")
    if keep and any(d == 0 and i >= spec.ndim for i, d in enumerate(wanted)):
        raise site.fail(f"shape {list(wanted)} keeps a dimension that {spec} has not")
    dims = [spec.dims[i] if d == 0 and keep else d for i, d in enumerate(wanted)]
    if dims.count(-1) > 1 or any(d < -1 for d in dims):
        raise site.fail(f"shape {list(wanted)} is not valid: one -1 at most, no other negative size")
    if -1 in dims:
        rest = -math.prod(dims)
        dims[dims.index(-1)] = spec.size // rest if rest else 0
    if math.prod(dims) != spec.size:
        raise site.fail(f"cannot reshape {spec} to {list(wanted)}")
    return tuple(dims)


_RESHAPE_CASES = (
    Case("split", (f32(2, 6), i64(2, 3, 2))),
    Case("infer", (f32(2, 3, 4), i64(-1, 4))),
    Case("keep", (f32(2, 3, 4), i64(0, -1))),
    Case("scalar", (f32(1, 1), np.zeros(0, np.int64))),
    Case("empty", (f32(0, 3), i64(3, 0))),
)
_RESHAPE = (
    view_op("Reshape", 5, _reshaped, _RESHAPE_CASES[:4], values=(1,)),
    view_op(
        "Reshape",
        14,
        _reshaped,
        (
            *_RESHAPE_CASES[:4],
            Case("allowzero", (f32(0, 3), i64(3, 0)), {"allowzero": 1}),
            *narrow_cases((2, 6), i64(4, -1)),
        ),
        attrs={"allowzero": 0},
        values=(1,),
    ),
)


def _axes(site: Site) -> tuple[int, ...] | None:
    """The axes from the attribute or input 1; None where they are left out."""
    return site.attrs["axes"] if "axes" in site.attrs else site.ints(1)


def _squeezed(site: Site) -> tuple[int, ...]:
    spec, axes = site.spec(0), _axes(site)
    if axes is None:
        return tuple(d for d in spec.dims if d != 1)
    dropped = normalized(site, axes, spec.ndim)
    for axis in dropped:
        if spec.dims[axis] != 1:
            raise site.fail(f"cannot squeeze axis {axis} of {spec}")
    return tuple(d for i, d in enumerate(spec.dims) if i not in dropped)


def _unsqueezed(site: Site) -> tuple[int, ...]:
    spec, axes = site.spec(0), _axes(site) or ()
    rank = spec.ndim + len(axes)
    added = normalized(site, axes, rank)
    rest = iter(spec.dims)
    return tuple(1 if i in added else next(rest) for i in range(rank))


def _axes_cases(shape: tuple[int, ...], choices: Sequence[tuple[int, ...]], *, as_input: bool) -> tuple[Case, ...]:
    return tuple(
        Case("_".join(map(str, axes)), (f32(*shape), i64(*axes)))
        if as_input
        else Case("_".join(map(str, axes)), (f32(*shape),), {"axes": axes})
        for axes in choices
    )


_SQUEEZE_CASES = Case("all", (f32(1, 3, 1, 2),)), Case("to_scalar", (f32(1, 1),))
_SQUEEZE = (
    view_op(
        "Squeeze",
        1,
        _squeezed,
        (*_SQUEEZE_CASES, *_axes_cases((1, 3, 1, 2), ((0,), (0, 2)), as_input=False)),
        attrs={"axes": None},
    ),
    view_op(
        "Squeeze",
        13,
        _squeezed,
        (
            *_SQUEEZE_CASES,
            *_axes_cases((1, 3, 1, 2), ((0,), (0, -2)), as_input=True),
            *narrow_cases((1, 3, 1), i64(2), since=21),
        ),
        values=(1,),
    ),
)
_UNSQUEEZE = (
    view_op(
        "Unsqueeze",
        1,
        _unsqueezed,
        _axes_cases((3, 2), ((0,), (1, 3)), as_input=False),
        attrs={"axes": REQUIRED},
    ),
    view_op(
        "Unsqueeze",
        13,
        _unsqueezed,
        (*_axes_cases((3, 2), ((0,), (3, 1), (-1, 0)), as_input=True), *narrow_cases((3, 2), i64(1), since=21)),
        values=(1,),
    ),
)


def _flattened(site: Site) -> tuple[int, int]:
    spec, axis = site.spec(0), int(site.attrs["axis"])
    if not -spec.ndim <= axis <= spec.ndim:
        raise site.fail(f"axis {axis} out of range for {spec}")
    axis += spec.ndim if axis < 0 else 0
    return math.prod(spec.dims[:axis]), math.prod(spec.dims[axis:])


_FLATTEN = view_op(
    "Flatten",
    1,
    _flattened,
    (
        Case("batch", (f32(2, 3, 4),)),
        Case("all", (f32(2, 3, 4),), {"axis": 0}),
        Case("end", (f32(2, 3, 4),), {"axis": 3}),
        Case("negative", (f32(2, 3, 4),), {"axis": -1}, opset=11),
        Case("empty", (f32(0, 3, 4),)),
        *narrow_cases((2, 1, 3), since=21),
    ),
    attrs={"axis": 1},
)

_IDENTITY = Op(
    "Identity",
    1,
    infer=shaped(lambda site: site.spec(0).dims),
    compute=lambda xp, site, x: (x,),
    view=lambda x, site: x,
    cases=Cases(
        lambda: (
            Case("matrix", (f32(2, 3),)),
            Case("scalar", (f32(),)),
            Case("int64", (np.arange(3),)),
            *narrow_cases((2, 3)),
        )
    ),
)


def _perm(site: Site) -> tuple[int, ...]:
    rank, perm = site.spec(0).ndim, site.attrs["perm"]
    if perm is None:
        return tuple(range(rank))[::-1]
    if sorted(perm) != list(range(rank)):
        raise site.fail(f"perm {list(perm)} does not permute the axes of {site.spec(0)}")
    return tuple(perm)


def _permuted(x: Array, site: Site) -> Array:
    return x.transpose(_perm(site))


_TRANSPOSE = Op(
    "Transpose",
    1,
    infer=shaped(lambda site: [site.spec(0).dims[i] for i in _perm(site)]),
    compute=plain(lambda xp, site, x: _permuted(x, site)),
    view=_permuted,
    attrs={"perm": None},
    cases=Cases(
        lambda: (
            Case("reversed", (f32(2, 3, 4),)),
            Case("heads", (f32(2, 3, 4, 5),), {"perm": (0, 2, 1, 3)}),
            Case("same", (f32(2, 3),), {"perm": (0, 1)}),
            Case("empty", (f32(0, 3),)),
            *narrow_cases((2, 3), since=21),
        )
    ),
)


def _expanded(site: Site) -> tuple[int, ...]:
    spec, wanted = site.spec(0), site.ints(1) or ()
    try:
        return np.broadcast_shapes(spec.dims, wanted)
    except ValueError:
        raise site.fail(f"cannot expand {spec} to {list(wanted)}") from None


_EXPAND = Op(
    "Expand",
    8,
    infer=shaped(_expanded),
    compute=plain(lambda xp, site, x, _: xp.broadcast_to(x, _expanded(site))),
    view=lambda x, site: np.broadcast_to(x, site.outs[0].dims),
    values=(1,),
    cases=Cases(
        lambda: (
            Case("rows", (f32(3, 1), i64(2, 1, 6))),
            Case("smaller", (f32(3, 4), i64(1))),
            Case("scalar", (f32(), i64(2, 3))),
            Case("empty", (f32(1, 3), i64(0, 3))),
        )
    ),
)

OPS: tuple[Op, ...] = (
    *_SHAPE,
    _SIZE,
    *_RESHAPE,
    *_SQUEEZE,
    *_UNSQUEEZE,
    _FLATTEN,
    _IDENTITY,
    _TRANSPOSE,
    _EXPAND,
)
