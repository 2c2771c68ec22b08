"""Every operator, on every one of its cases: against onnxruntime, and every fast kernel against the reference."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

import infera_gpu.ops
from infera_gpu.graph import HostArray
from infera_gpu.op import Call, Case, Op, Registry, Site
from infera_gpu.spec import TensorSpec, spec_of
from infera_kernels.jit import installed
from tests.allocations import transient
from tests.buffers import GuardedBuffers
from tests.cases import OLDEST, assert_close, compute, inputs_of, opset_of, run, site_of, wrong
from tests.oracle import oracle

OPS: tuple[Op, ...] = tuple(
    op
    for module in pkgutil.iter_modules(infera_gpu.ops.__path__)
    for op in getattr(importlib.import_module(f"infera_gpu.ops.{module.name}"), "OPS", ())
)
REGISTRY = Registry(OPS)

WITH_ORACLE = frozenset({"", "ai.onnx.ml", "com.microsoft"})
"""Domains that onnxruntime knows. References of others are compared in tests of their own."""

ALLOWANCE = 4096
"""Bytes of bookkeeping that a run may take and give back. Some case of every kernel has larger arrays."""


def allocated(calls: Sequence[Call]) -> int:
    """Bytes allocated at the peak of a warm run.

    NumPy's iterators copy broadcast operands through buffers of their own; the smallest buffers leave only arrays.
    """
    with np.errstate():
        np.setbufsize(16)
        return transient(lambda: run(calls))


def others_of(op: Op, case: Case) -> tuple[HostArray | None, ...]:
    """Inputs of the same specs with other values, those excepted that `infer` needs.

    Arrays that the case gives are turned round, and single numbers halved: indices stay in range, sizes positive.
    """
    drawn = inputs_of(op, replace(case, id=f"{case.id} again"))
    return tuple(
        x if x is None or i in op.values or isinstance(case.ins[i], TensorSpec) else _varied(x)
        for i, x in enumerate(drawn)
    )


def _varied(x: HostArray) -> HostArray:
    axis = next((i for i, d in enumerate(x.shape) if d > 1), None)
    if axis is not None:
        return np.flip(x, axis)
    return np.logical_not(x) if x.dtype == np.bool_ else np.asarray(x.astype(np.float64) / 2).astype(x.dtype)


def bindings(op: Op, case: Case, kind: str) -> list[Site]:
    """The sites of a case that a kernel supports: no input constant beside those that `infer` needs, each one, all but
    each one."""
    ins = inputs_of(op, case)
    site = site_of(op, case, ins)
    free = [i for i, x in enumerate(ins) if x is not None and i not in op.values]
    choices = {(), *((i,) for i in free), *(tuple(k for k in free if k != i) for i in free)} - {tuple(free)}
    sites = (
        replace(site, values=tuple(x if i in (*op.values, *chosen) else None for i, x in enumerate(ins)))
        for chosen in sorted(choices, key=lambda chosen: (len(chosen), chosen))
    )
    return [s for s in sites if op.kernels[kind].supports(s)]


def twins(site: Site) -> Iterator[tuple[int, int]]:
    """Pairs of inputs that one array may serve."""
    free = [i for i, s in enumerate(site.ins) if s is not None and site.value(i) is None]
    return ((i, j) for i, j in combinations(free, 2) if site.ins[i] == site.ins[j])


def references() -> Iterator[Any]:
    for op in OPS:
        for case in () if op.host else op.cases:
            yield pytest.param(op, case, id=f"{op.qualified}-{case.id}")


KINDS = ("jit", "cpu") if installed() else ("cpu",)
"""Of the kernels that run here."""


def kernels() -> Iterator[Any]:
    for op, kind in product(OPS, KINDS):
        for case in op.cases if kind in op.kernels else ():
            if bindings(op, case, kind):
                yield pytest.param(op, case, kind, id=f"{op.qualified}-{case.id}-{kind}")


@pytest.mark.parametrize(("op", "case"), [*references()])
def test_reference(op: Op, case: Case) -> None:
    assert REGISTRY.find(op.domain, op.name, opset_of(op, case)) is op, "a newer version answers at this opset"
    ins = inputs_of(op, case)
    site = site_of(op, case, ins)
    specs = op.infer(site)
    got = compute(op, site, ins)
    assert len(got) >= case.n_outs
    for i, (array, spec) in enumerate(zip(got, specs, strict=False)):
        assert spec is None or spec_of(array) == spec, f"output {i} is {spec_of(array)}, inferred {spec}"
    if op.domain not in WITH_ORACLE or not op.pure or (not op.domain and opset_of(op, case) < OLDEST):
        return  # test_legacy_ops.py and the ONNX suite compare the oldest forms
    for i, (g, w) in enumerate(zip(got, oracle(op, case, ins, [spec_of(g) for g in got]), strict=False)):
        assert_close(np.asarray(g), w, case.tol, f"output {i}")


@pytest.mark.parametrize(("op", "case", "kind"), [*kernels()])
def test_kernel(op: Op, case: Case, kind: str) -> None:
    """Bound once, run on two sets of values. What a kernel reads while it is bound is poison, or another run's."""
    kernel = op.kernels[kind]
    first, second = inputs_of(op, case), others_of(op, case)
    whole = site_of(op, case, first)
    wants = [made(op, case, whole, ins) for ins in (first, second)]
    for site in bindings(op, case, kind):
        known = [v is not None for v in site.values]
        mixed = tuple(a if k else b for a, b, k in zip(first, second, known, strict=True))
        changed = wants[1] if all(a is b for a, b in zip(mixed, second, strict=True)) else made(op, case, site, mixed)
        feeds = [(first, wants[0]), (mixed, changed)]
        options: list[dict[str, Any]] = [{}, *([{"strided": True}] if kernel.strided else [])]
        options += [{"strided_out": True}] if kernel.strided_out else []
        options += [{"rows_out": True}] if kernel.rows_out(site) else []
        options += [{"slices_out": True}] if kernel.slices_out(site) else []
        border = kernel.border and kernel.border(site)
        options += [{"border": border}] if border and not known[0] else []
        options += [{"inplace": i} for i in kernel.inplace if site.has(i) and not known[i] and takes_over(site, i)]
        for option, early in product(options, (False, True)):
            buffers = GuardedBuffers(first, site.outs, site.values, **option)
            if early:
                buffers.fill(first)
            calls = list(kernel.bind(site, buffers))
            for ins, want in feeds:
                check(buffers, calls, ins, want, case.tol, str(option))
            if not kernel.allocates and not early:
                buffers.prepare([wrong(w) for w in wants[0]])
                peak = allocated(calls)
                assert peak < ALLOWANCE, f"a run allocates {peak} bytes {option}"


@pytest.mark.parametrize(("op", "case", "kind"), [*kernels()])
def test_kernel_on_one_array_twice(op: Op, case: Case, kind: str) -> None:
    ins, kernel = list(inputs_of(op, case)), op.kernels[kind]
    for site in bindings(op, case, kind)[:1]:
        for i, j in twins(site):
            same = [ins[i] if k == j else x for k, x in enumerate(ins)]
            want = made(op, case, site, same)
            buffers = GuardedBuffers(same, site.outs, site.values)
            calls = list(kernel.bind(site, buffers))
            check(buffers, calls, same, want, case.tol, f"inputs {i} and {j} are one")


def made(op: Op, case: Case, site: Site, ins: Sequence[HostArray | None]) -> tuple[HostArray, ...]:
    """The case's outputs by the operator's own function."""
    return compute(op, site, ins)[: case.n_outs]


def takes_over(site: Site, i: int) -> bool:
    """Whether output 0 may lie in input i's memory."""
    return site.ins[i] == site.outs[0]


def check(
    buffers: GuardedBuffers,
    calls: Sequence[Call],
    ins: Sequence[HostArray | None],
    want: Sequence[HostArray],
    tol: float,
    what: str,
) -> None:
    """One run of bound calls on these inputs gives `want` and writes nothing else."""
    buffers.prepare([wrong(w) for w in want], ins)
    run(calls)
    buffers.check()
    for i, (g, w) in enumerate(zip(buffers.outs, want, strict=True)):
        assert_close(g, w, tol, f"output {i} {what}")


@pytest.mark.parametrize(
    ("op", "kind"),
    [pytest.param(op, kind, id=f"{op.qualified}-{kind}") for op in OPS for kind in op.kernels if kind in KINDS],
)
def test_some_case_takes_the_kernel(op: Op, kind: str) -> None:
    assert any(bindings(op, case, kind) for case in op.cases), "its `supports` turns every case away"
