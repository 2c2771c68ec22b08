"""Operators on sequences, strings and subgraphs: every case as a model, through a session and through onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

import infera_gpu
from infera_gpu.op import Case, Op
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec
from tests.cases import assert_close, inputs_of, opset_of
from tests.protos import attributes, value_info


def cases() -> Iterator[Any]:
    for op in registry():
        for case in op.cases if op.host else ():
            yield pytest.param(op, case, id=f"{op.qualified}-{case.id}")


def model_of(op: Op, case: Case) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The case as a model, and what to feed it: what a case gives as arrays are initialisers."""
    ins = inputs_of(op, case)
    names = ["" if x is None else f"in{i}" for i, x in enumerate(ins)]
    outs = [f"out{i}" for i in range(case.n_outs)]
    fed = {n: x for n, x, c in zip(names, ins, case.ins, strict=True) if isinstance(c, (TensorSpec, list, dict))}
    fixed = [
        numpy_helper.from_array(x, n)
        for n, x in zip(names, ins, strict=True)
        if isinstance(x, np.ndarray) and n not in fed
    ]
    node = helper.make_node(op.name, names, outs, domain=op.domain, **attributes(case.attrs))
    graph = helper.make_graph(
        [node],
        "case",
        [value_info(n, x) for n, x in fed.items()],
        [onnx.ValueInfoProto(name=o) for o in outs],
        fixed,
    )
    opsets = [helper.make_opsetid(op.domain, opset_of(op, case))]
    if op.domain:
        opsets.append(helper.make_opsetid("", 17))
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=max(8, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    ), fed


def oracle(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, feeds))
    except (ort_errors.NotImplemented, ort_errors.InvalidGraph, ort_errors.Fail, ort_errors.RuntimeException):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(ReferenceEvaluator(model).run(None, feeds))


def assert_same(got: Any, want: Any, tol: float, what: str) -> None:
    if isinstance(want, list):
        assert isinstance(got, list), f"{what} is {type(got).__name__}, expected a list"
        assert len(got) == len(want), what
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_same(g, w, tol, f"{what}[{i}]")
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), what
        for k, w in want.items():
            assert_same(got[k], w, tol, f"{what}[{k!r}]")
    elif want is None or isinstance(want, (str, int, float)):
        assert got == pytest.approx(want, rel=tol) if isinstance(want, float) else got == want, what
    else:
        want = np.asarray(want)
        assert_close(got, want.astype(object) if want.dtype.kind in "US" else want, tol, what)


@pytest.mark.parametrize(("op", "case"), [*cases()])
@pytest.mark.parametrize("device", ["cpu", "recording"])
def test_case(op: Op, case: Case, device: str) -> None:
    model, feeds = model_of(op, case)
    got = infera_gpu.load(model, device=device).run(feeds)
    if not op.pure:
        return
    for (name, g), w in zip(got.items(), oracle(model, feeds), strict=True):
        assert_same(g, w, case.tol, name)
