"""The operators' cases as data to run: inputs, sites, references, comparisons. Needs NumPy alone, not even pytest."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray, Node
from infera_gpu.op import Call, Case, Op, Site
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec, spec_of

OLDEST = 7
"""The oldest opset that onnxruntime supports: what cases run at unless they say another."""

Variant = tuple[Site, tuple[HostArray | None, ...]]
"""A case at concrete shapes, with its inputs."""


def opset_of(op: Op, case: Case) -> int:
    return max(op.since, case.opset or (OLDEST if op.domain == "" else 1))


def inputs_of(op: Op, case: Case) -> tuple[HostArray | None, ...]:
    """The case's inputs, random ones from a seed of its own; lists for the sequences of host operators."""
    rng = np.random.default_rng(zlib.crc32(f"{op.qualified} {case.id}".encode()))
    drawn: Any = tuple(_random(rng, i, case) if isinstance(i, TensorSpec) else i for i in case.ins)
    return drawn  # type: ignore[no-any-return]


def _random(rng: np.random.Generator, spec: TensorSpec, case: Case) -> HostArray:
    if spec.dtype == np.bool_:
        return np.asarray(rng.random(spec.dims) < 0.5)
    if spec.dtype.kind in "iu":
        bounds = np.iinfo(spec.dtype)
        low, high = max(int(np.ceil(case.low)), bounds.min), min(int(np.floor(case.high)), bounds.max)
        return rng.integers(low, high, spec.dims, endpoint=True).astype(spec.dtype)
    drawn = np.asarray(rng.uniform(case.low, case.high, spec.dims))
    if spec.dtype.kind == "c":
        return np.asarray(drawn + 1j * rng.uniform(case.low, case.high, spec.dims)).astype(spec.dtype)
    return drawn.astype(spec.dtype)


def site_of(op: Op, case: Case, ins: Sequence[HostArray | None], *, constant: bool = False) -> Site:
    """The case as a site: the inputs that `infer` needs are known, with `constant` all but the first."""
    node = Node(
        op.name,
        tuple("" if x is None else f"in{i}" for i, x in enumerate(ins)),
        tuple(f"out{i}" for i in range(case.n_outs)),
        case.attrs,
        op.domain,
    )
    values = tuple(x if i in op.values or (constant and i) else None for i, x in enumerate(ins))
    specs = tuple(None if x is None else spec_of(x) for x in ins)
    site = Site(node, op.fill(node), specs, values, opset=opset_of(op, case))
    outs = tuple(s for s in op.infer(site) if s is not None)
    return Site(node, site.attrs, specs, values, outs, site.opset)


def variants(op: Op, case: Case, kind: str) -> list[Variant]:
    """The sites of a case that a kernel supports: with the inputs after the first unknown, and constant."""
    ins = inputs_of(op, case)
    sites = [site_of(op, case, ins)]
    if len(ins) > 1:
        sites.append(site_of(op, case, ins, constant=True))
    return [(s, ins) for s in sites if op.kernels[kind].supports(s)]


def capped(case: Case, most: int) -> Case:
    """The case with no axis of a drawn input longer than `most`."""
    ins = (replace(v, shape=tuple(min(d, most) for d in v.dims)) if isinstance(v, TensorSpec) else v for v in case.ins)
    return replace(case, ins=tuple(ins))


def covered(kind: str, most: int = sys.maxsize) -> Iterator[tuple[Op, Case, list[Variant]]]:
    """Every case that an operator's kernel of this kind supports, operator by operator; those that are long for the
    CPU's blocks with axes of at most `most`."""
    for op in registry():
        for original in op.cases if kind in op.kernels else ():
            case = capped(original, most) if "past_block" in original.id else original
            found = variants(op, case, kind)
            if found:
                yield op, case, found


def compute(op: Op, site: Site, ins: Sequence[HostArray | None]) -> tuple[HostArray, ...]:
    """What the operator's own function makes of the inputs, in NumPy."""
    with np.errstate(all="ignore"):
        return op.outputs(np, site, ins)


def run(calls: Sequence[Call]) -> None:
    """As a plan does: infinities and NaNs are results, not warnings."""
    with np.errstate(all="ignore"):
        for fn, args in calls:
            fn(*args)


def wrong(want: HostArray) -> HostArray:
    """Values that differ from `want` everywhere."""
    if want.dtype.kind in "iu":
        return np.invert(want)
    if want.dtype.isbuiltin != 1 and want.dtype.itemsize == 1:
        return np.asarray((want.view(np.uint8) ^ 1).view(want.dtype))
    return np.logical_not(want) if want.dtype == np.bool_ else np.full_like(want, np.nan)


def assert_close(got: HostArray, want: HostArray, tol: float, what: str) -> None:
    """Equal for integers, booleans and strings; else within `tol` of the largest finite |want|."""
    assert got.dtype == want.dtype, f"{what} is {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{what} is {got.shape}, expected {want.shape}"
    if want.dtype.kind in "iubOUS":
        np.testing.assert_array_equal(got, want, err_msg=what)
        return
    wide = np.complex128 if want.dtype.kind == "c" else np.float64
    g, w = got.astype(wide), want.astype(wide)
    finite = np.isfinite(w)
    np.testing.assert_array_equal(g[~finite], w[~finite], err_msg=f"{what}: not finite")
    scale = np.abs(w[finite]).max(initial=0.0)
    np.testing.assert_allclose(g[finite], w[finite], rtol=0, atol=tol * scale, err_msg=what)
