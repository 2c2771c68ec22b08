"""Every operator, on every one of its cases: against onnxruntime, and every fast kernel against the reference."""

from __future__ import annotations

import importlib
import pkgutil
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

import infera_gpu.ops
from infera_gpu.graph import HostArray, Node
from infera_gpu.op import Call, Case, Op, Registry, Site
from infera_gpu.spec import TensorSpec, onnx_of_dtype, spec_of
from tests.buffers import GuardedBuffers

OPS: tuple[Op, ...] = tuple(
    op
    for module in pkgutil.iter_modules(infera_gpu.ops.__path__)
    for op in getattr(importlib.import_module(f"infera_gpu.ops.{module.name}"), "OPS", ())
)
REGISTRY = Registry(OPS)

OLDEST = 7
"""The oldest opset that is supported here and by onnxruntime."""

WITH_ORACLE = frozenset({"", "ai.onnx.ml", "com.microsoft"})
"""Domains that onnxruntime knows. References of others are compared in tests of their own."""

ALLOWANCE = 4096
"""Bytes of bookkeeping that a run may take and give back. Some case of every kernel has larger arrays."""


def opset_of(op: Op, case: Case) -> int:
    return max(op.since, case.opset or 0, OLDEST if op.domain == "" else 1)


def inputs_of(op: Op, case: Case) -> tuple[HostArray | None, ...]:
    """The case's inputs, random ones from a seed of its own."""
    rng = np.random.default_rng(zlib.crc32(f"{op.qualified} {case.id}".encode()))
    return tuple(_random(rng, i, case) if isinstance(i, TensorSpec) else i for i in case.ins)


def _random(rng: np.random.Generator, spec: TensorSpec, case: Case) -> HostArray:
    if spec.dtype == np.bool_:
        return rng.random(spec.dims) < 0.5
    if spec.dtype.kind in "iu":
        bounds = np.iinfo(spec.dtype)
        low, high = max(int(np.ceil(case.low)), bounds.min), min(int(np.floor(case.high)), bounds.max)
        return rng.integers(low, high, spec.dims, endpoint=True).astype(spec.dtype)
    return np.asarray(rng.uniform(case.low, case.high, spec.dims)).astype(spec.dtype)


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


def oracle(op: Op, case: Case, ins: Sequence[HostArray | None], made: Sequence[TensorSpec]) -> list[HostArray]:
    """What onnxruntime answers without optimisations, or onnx's reference where it has no implementation.

    `made` are the specs expected of the outputs. Raises onnx.checker.ValidationError where the case is no valid model.
    """
    names = ["" if x is None else f"in{i}" for i, x in enumerate(ins)]
    attrs = {k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in case.attrs.items()}
    outs = [f"out{i}" for i in range(case.n_outs)]
    node = helper.make_node(op.name, names, outs, domain=op.domain, **attrs)
    fed = {f"in{i}": x for i, x in enumerate(ins) if x is not None and isinstance(case.ins[i], TensorSpec)}
    fixed = [
        numpy_helper.from_array(x, f"in{i}")
        for i, x in enumerate(ins)
        if x is not None and not isinstance(case.ins[i], TensorSpec)
    ]
    graph = helper.make_graph(
        [node],
        "case",
        [helper.make_tensor_value_info(k, onnx_of_dtype(v.dtype), v.shape) for k, v in fed.items()],
        [
            helper.make_tensor_value_info(o, onnx_of_dtype(s.dtype), [None] * s.ndim)
            for o, s in zip(outs, made, strict=False)
        ],
        fixed,
    )
    opsets = [helper.make_opsetid(op.domain, opset_of(op, case))]
    if op.domain:
        opsets.append(helper.make_opsetid("", 17))
    ir_version = max(8, helper.find_min_ir_version_for(opsets))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    known = op.domain or onnx.defs.has(op.name, opset_of(op, case), "")
    if known and (op.domain or not onnx.defs.get_schema(op.name, opset_of(op, case)).deprecated):
        onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except (ort_errors.NotImplemented, ort_errors.InvalidGraph, ort_errors.Fail, ort_errors.RuntimeException):
        return [np.asarray(a) for a in ReferenceEvaluator(model).run(None, fed)]
    return [np.asarray(a) for a in session.run(None, fed)]


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


def wrong(want: HostArray) -> HostArray:
    """Values that differ from `want` everywhere."""
    if want.dtype.kind in "iu":
        return np.invert(want)
    return np.logical_not(want) if want.dtype == np.bool_ else np.full_like(want, np.nan)


def run(calls: Sequence[Call]) -> None:
    """As a plan does: infinities and NaNs are results, not warnings."""
    with np.errstate(all="ignore"):
        for fn, args in calls:
            fn(*args)


def compute(op: Op, site: Site, ins: Sequence[HostArray | None]) -> tuple[HostArray, ...]:
    with np.errstate(all="ignore"):
        return op.outputs(np, site, ins)


def allocated(calls: Sequence[Call]) -> int:
    """Bytes allocated at the peak of a second run.

    NumPy's iterators copy broadcast operands through buffers of their own; the smallest buffers leave only arrays.
    """
    with np.errstate():
        np.setbufsize(16)
        tracemalloc.start()
        try:
            run(calls)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            run(calls)
            return tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()


def variants(op: Op, case: Case, kind: str) -> list[tuple[Site, tuple[HostArray | None, ...]]]:
    """The sites of a case that a kernel supports: with the inputs after the first unknown, and constant."""
    ins = inputs_of(op, case)
    sites = [site_of(op, case, ins)]
    if len(ins) > 1:
        sites.append(site_of(op, case, ins, constant=True))
    return [(s, ins) for s in sites if op.kernels[kind].supports(s)]


def references() -> Iterator[Any]:
    for op in OPS:
        for case in op.cases:
            yield pytest.param(op, case, id=f"{op.qualified}-{case.id}")


def kernels() -> Iterator[Any]:
    for op in OPS:
        for kind in op.kernels:
            if kind != "cpu":
                continue
            for case in op.cases:
                if variants(op, case, kind):
                    yield pytest.param(op, kind, case, id=f"{op.qualified}-{kind}-{case.id}")


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
    if op.domain not in WITH_ORACLE or not op.pure:
        return
    for i, (g, w) in enumerate(zip(got, oracle(op, case, ins, [spec_of(g) for g in got]), strict=False)):
        assert_close(np.asarray(g), w, case.tol, f"output {i}")


@pytest.mark.parametrize(("op", "kind", "case"), [*kernels()])
def test_kernel(op: Op, kind: str, case: Case) -> None:
    kernel = op.kernels[kind]
    for site, ins in variants(op, case, kind):
        want = compute(op, site, ins)[: case.n_outs]
        runs: list[dict[str, Any]] = [{}]
        if kernel.strided:
            runs.append({"strided": True})
        runs += [
            {"inplace": i}
            for i in kernel.inplace
            if i < len(ins) and site.has(i) and site.value(i) is None and site.ins[i] == site.outs[0]
        ]
        for options in runs:
            buffers = GuardedBuffers(ins, [spec_of(w) for w in want], site.values, **options)
            calls = list(kernel.bind(site, buffers))
            for _ in range(2):
                buffers.prepare([wrong(w) for w in want])
                run(calls)
                buffers.check()
                for i, (g, w) in enumerate(zip(buffers.outs, want, strict=True)):
                    assert_close(g, w, case.tol, f"output {i} {options}")
            if not kernel.allocates:
                buffers.prepare([wrong(w) for w in want])
                peak = allocated(calls)
                assert peak < ALLOWANCE, f"a run allocates {peak} bytes {options}"


@pytest.mark.parametrize(
    ("op", "kind"),
    [pytest.param(op, kind, id=f"{op.qualified}-{kind}") for op in OPS for kind in op.kernels if kind == "cpu"],
)
def test_some_case_takes_the_kernel(op: Op, kind: str) -> None:
    assert any(variants(op, case, kind) for case in op.cases), "its `supports` turns every case away"
