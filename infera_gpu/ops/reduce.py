"""Reductions over axes, the position of an extremum, running sums and products, and the k largest."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Call, Case, Cases, Kernel, Op, Site, f32
from infera_gpu.ops._families import INT64, i64, native, normalized, plain, single
from infera_gpu.ops._later import Kinds
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import reduce as cpu


def _axes(site: Site) -> tuple[int, ...]:
    """The axes to reduce, from the attribute or input 1: all of them where none are named, unless that means none."""
    named = site.attrs["axes"] if "axes" in site.attrs else site.ints(1)
    rank = site.spec(0).ndim
    if named:
        return normalized(site, named, rank)
    return () if site.attrs.get("noop_with_empty_axes") else tuple(range(rank))


def _reduced(site: Site, axes: tuple[int, ...]) -> tuple[int, ...]:
    dims = site.spec(0).dims
    if site.attrs["keepdims"]:
        return tuple(1 if i in axes else d for i, d in enumerate(dims))
    return tuple(d for i, d in enumerate(dims) if i not in axes)


_KINDS = {
    "ReduceSum": "sum",
    "ReduceMean": "mean",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ReduceProd": "prod",
    "ReduceL1": "l1",
    "ReduceL2": "l2",
    "ReduceLogSum": "log_sum",
    "ReduceLogSumExp": "log_sum_exp",
    "ReduceSumSquare": "sum_square",
}
_FLOAT_ONLY = ("mean", "l2", "log_sum", "log_sum_exp")


def _infer_reduction(site: Site) -> tuple[TensorSpec]:
    return (TensorSpec(_reduced(site, _axes(site)), site.spec(0).dtype),)


def _reduction_cases(kind: str, *, axes_input: bool) -> tuple[Case, ...]:
    low = 0.1 if kind == "log_sum" else -2.0

    def case(id: str, shape: tuple[int, ...], axes: tuple[int, ...] | None, low: float = low, **attrs: Any) -> Case:
        if axes is None:
            return Case(id, (f32(*shape),), attrs, low=low)
        if axes_input:
            return Case(id, (f32(*shape), i64(*axes)), attrs, low=low)
        return Case(id, (f32(*shape),), {"axes": axes, **attrs}, low=low)

    cases = (
        case("all", (3, 4), None),
        case("last", (3, 5), (-1,)),
        case("first", (7, 3), (0,), keepdims=0),
        case("middle", (2, 3, 5), (1,)),
        case("planes", (2, 3, 7, 7), (2, 3), keepdims=0),
        case("outer", (2, 3, 4), (0, 2)),
        case("one", (3, 1), (1,)),
        case("scattered", (2, 3, 5, 7, 2), (1, 3)),
        case("long", (2, 20001), (1,), low=0.1),
    )
    return (*cases, case("noop", (2, 3), (), noop_with_empty_axes=1)) if axes_input else cases


def _more_cases(kind: str) -> tuple[Case, ...]:
    """Other types, where axes are an input."""
    half = TensorSpec((5, 9), np.dtype(np.float16))
    more: tuple[Case, ...] = (Case("half", (half, i64(0)), tol=2e-3, low=0.1),)
    if kind in ("sum", "max", "min", "prod"):
        more += (Case("int32", (np.arange(-5, 7, dtype=np.int32).reshape(3, 4), i64(1))),)
    if kind in ("mean", "l2"):
        more += (Case("large", (np.array([[2**30 + 9, 2**30 - 2, 2**30], [-5, 3, -5]], np.int32), i64(1))),)
    if kind in ("max", "min"):
        more += (
            Case("bool", (np.array([[True, False], [False, False]]), i64(1)), opset=20),
            Case("none", (f32(2, 0), i64(1)), opset=20),
        )
    return more


def _reductions(name: str, kind: str) -> tuple[Op, Op]:
    def supports(site: Site) -> bool:
        dtype = site.spec(0).dtype
        return native(site) and dtype != np.float16 and (dtype.kind == "f" or kind not in _FLOAT_ONLY)

    def bind(site: Site, io: Buffers) -> list[Call]:
        return cpu.reduction(kind, io.ins[0], _axes(site), io.outs[0], io.scratch)

    def compute(xp: Any, site: Site, x: Array, axes: Array | None = None) -> Array:
        from infera_kernels.portable import reduce as portable

        over = _axes(site)
        return portable.reduction(xp, kind, x, over, _reduced(site, over))

    kernels = Kinds(
        {"cpu": Kernel(bind=bind, supports=supports, strided=True, strided_out=True)},
        "_triton_reduce",
        lambda gpu: gpu.reduction(lambda site: kind, _axes),
    )

    def version(since: int, attrs: dict[str, Any], cases: Cases, values: tuple[int, ...]) -> Op:
        return Op(
            name,
            since,
            infer=_infer_reduction,
            compute=plain(compute),
            kernels=kernels,
            attrs={"keepdims": 1, **attrs},
            values=values,
            cases=cases,
        )

    return (
        version(1, {"axes": None}, Cases(lambda: _reduction_cases(kind, axes_input=False)), ()),
        version(
            13 if kind == "sum" else 18,
            {"noop_with_empty_axes": 0},
            Cases(lambda: _reduction_cases(kind, axes_input=True) + _more_cases(kind)),
            (1,),
        ),
    )


def _arg_spec(site: Site) -> tuple[TensorSpec]:
    axis = site.axis()
    if site.spec(0).ndim and not site.spec(0).dims[axis]:
        raise site.fail(f"axis {axis} of {site.spec(0)} has no elements to choose from")
    return (TensorSpec(_reduced(site, (axis,)), INT64),)


def _arg(name: str, since: int) -> Op:
    largest = name == "ArgMax"

    def last(site: Site) -> bool:
        return bool(site.attrs.get("select_last_index"))

    def bind(site: Site, io: Buffers) -> list[Call]:
        return cpu.arg_extremum(io.ins[0], site.axis(), io.outs[0], io.scratch, largest=largest, last=last(site))

    def compute(xp: Any, site: Site, x: Array) -> Array:
        from infera_kernels.portable import reduce as portable

        axis = site.axis()
        return portable.arg_extremum(xp, x, axis, largest=largest, last=last(site)).reshape(_reduced(site, (axis,)))

    attrs: dict[str, Any] = {"axis": 0, "keepdims": 1, **({"select_last_index": 0} if since >= 12 else {})}
    return Op(
        name,
        since,
        infer=_arg_spec,
        compute=plain(compute),
        kernels=Kinds(
            {"cpu": Kernel(bind=bind, supports=native, strided=True, strided_out=True)},
            "_triton_reduce",
            lambda gpu: gpu.reduction(
                lambda site: f"{'arg_max' if largest else 'arg_min'}{'_last' if last(site) else ''}",
                lambda site: (site.axis(),) if site.spec(0).ndim else (),
            ),
        ),
        attrs=attrs,
        cases=Cases(lambda: _arg_cases(select_last="select_last_index" in attrs)),
    )


def _arg_cases(*, select_last: bool) -> tuple[Case, ...]:
    ties = np.array([[2, 7, 7, 1], [3, 1, 3, 1]], np.float32)
    return (
        Case("first", (f32(5, 4),)),
        Case("last", (f32(3, 5, 7),), {"axis": -1, "keepdims": 0}),
        Case("middle", (f32(3, 5, 7),), {"axis": 1}),
        Case("ties", (ties,), {"axis": 1}),
        Case("one", (f32(1),)),
        Case("empty", (f32(0, 3),), {"axis": 1}),
        *(Case("last_ties", (ties,), {"axis": a, "select_last_index": 1}) for a in (0, 1) if select_last),
    )


def _scan_axis(site: Site) -> int:
    return normalized(site, (single(site, 1, "axis") or 0,), site.spec(0).ndim)[0]


def _scan_spec(site: Site) -> tuple[TensorSpec]:
    _scan_axis(site)
    return (site.spec(0),)


def _scan(name: str, since: int, function: str, ufunc: Any, identity: int) -> Op:
    def flags(site: Site) -> dict[str, bool]:
        return {k: bool(site.attrs[k]) for k in ("exclusive", "reverse")}

    def bind(site: Site, io: Buffers) -> list[Call]:
        return cpu.scan(ufunc, io.ins[0], _scan_axis(site), io.outs[0], identity=identity, **flags(site))

    def compute(xp: Any, site: Site, x: Array, axis: Array) -> Array:
        from infera_kernels.portable import reduce as portable

        return portable.scan(xp, function, x, _scan_axis(site), identity=identity, **flags(site))

    return Op(
        name,
        since,
        infer=_scan_spec,
        compute=plain(compute),
        kernels=Kinds(
            {"cpu": Kernel(bind=bind, supports=native, strided=True, strided_out=True)},
            "_triton_reduce",
            lambda gpu: gpu.scan(function.removeprefix("cum"), _scan_axis),
        ),
        attrs={"exclusive": 0, "reverse": 0},
        values=(1,),
        cases=Cases(_scan_cases),
    )


def _scan_cases() -> tuple[Case, ...]:
    signs = np.where(np.arange(40001) % 7 < 3, -1, 1).astype(np.float32)  # exact in any order
    axis0, axis1 = np.array(0), np.array(-1, np.int32)
    return (
        Case("rows", (f32(3, 4), axis0)),
        Case("columns", (f32(3, 4), axis1)),
        Case("exclusive", (f32(3, 4), axis1), {"exclusive": 1}),
        Case("reverse", (f32(3, 4), axis0), {"reverse": 1}),
        Case("both", (f32(3, 4), axis1), {"exclusive": 1, "reverse": 1}),
        Case("int32", (np.arange(6, dtype=np.int32).reshape(2, 3), axis1)),
        Case("one", (f32(1), axis0), {"exclusive": 1}),
        Case("empty", (f32(0, 3), axis0)),
        Case("past_tile", (signs[:15000].reshape(1, 5000, 3), np.array(1)), {"exclusive": 1}),
        Case("shared", (signs.reshape(1, -1), axis1), {"reverse": 1}),
    )


def _k(site: Site) -> int:
    if "k" in site.attrs:
        return int(site.attrs["k"])
    return single(site, 1, "k") or 0


def _top_k_spec(site: Site) -> tuple[TensorSpec, TensorSpec]:
    axis, k = site.axis(), _k(site)
    dims = list(site.spec(0).dims)
    if not 0 <= k <= dims[axis]:
        raise site.fail(f"k is {k}, but axis {axis} of {site.spec(0)} has {dims[axis]} elements")
    dims[axis] = k
    return TensorSpec(tuple(dims), site.spec(0).dtype), TensorSpec(tuple(dims), INT64)


def _top_k(since: int) -> Op:
    def compute(xp: Any, site: Site, x: Array, k: Array | None = None) -> tuple[Array, Array]:
        from infera_kernels.portable import reduce as portable

        return portable.top_k(xp, x, _k(site), site.axis(), largest=bool(site.attrs.get("largest", 1)))

    attrs: dict[str, Any] = {"axis": -1}
    if since == 1:
        attrs["k"] = REQUIRED
    if since >= 11:
        attrs |= {"largest": 1, "sorted": 1}
    return Op(
        "TopK",
        since,
        infer=_top_k_spec,
        compute=plain(compute),
        kernels=Kinds({}, "_triton_reduce", lambda gpu: gpu.best(_k)),
        attrs=attrs,
        values=() if since == 1 else (1,),
        cases=Cases(lambda: _top_k_cases(since)),
    )


def _top_k_cases(since: int) -> list[Case]:
    if since == 1:
        return [Case("last", (f32(3, 7),), {"k": 3}, n_outs=2), Case("first", (f32(5, 2),), {"k": 1, "axis": 0}, 2)]
    cases = [
        Case("last", (f32(3, 7), i64(3)), n_outs=2),
        Case("first", (f32(5, 2), i64(5)), {"axis": 0}, n_outs=2),
        Case("ties", (np.array([1, 3, 3, 1, 3], np.float32), i64(4)), n_outs=2),
    ]
    if since >= 11:
        cases += [
            Case("smallest", (f32(3, 7), i64(3)), {"largest": 0}, n_outs=2),
            Case("int64", (np.array([5, -9, 7, 5]), i64(3)), n_outs=2),
            Case("none", (f32(3, 7), i64(0)), n_outs=2),
            Case("half", (TensorSpec((2, 9, 3), np.dtype(np.float16)), i64(4)), {"axis": 1}, n_outs=2),
        ]
    return cases


OPS: tuple[Op, ...] = (
    *(op for name, kind in _KINDS.items() for op in _reductions(name, kind)),
    *(_arg(name, since) for name in ("ArgMax", "ArgMin") for since in (1, 12)),
    _scan("CumSum", 11, "cumsum", np.add, 0),
    _scan("CumProd", 26, "cumprod", np.multiply, 1),
    *map(_top_k, (1, 10, 11)),
)
