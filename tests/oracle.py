"""What a case should give: onnxruntime's answer without optimisations, or that of onnx's reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from infera_gpu.graph import HostArray
from infera_gpu.op import Case, Op
from infera_gpu.spec import DType, TensorSpec, onnx_of_dtype
from tests.cases import opset_of
from tests.formulas import FORMULAS
from tests.protos import attributes, value_info

NO_KERNEL = (ort_errors.NotImplemented, ort_errors.InvalidGraph, ort_errors.Fail, ort_errors.RuntimeException)
"""What onnxruntime raises for a model that it has no implementation for."""


def is_passed(dtype: DType) -> bool:
    """Whether onnxruntime takes and gives arrays of the type: NumPy's own, and strings."""
    return bool(dtype.isbuiltin == 1)


def model_of(
    op: Op, case: Case, ins: Sequence[HostArray | None], made: Sequence[TensorSpec]
) -> tuple[onnx.ModelProto, dict[str, HostArray]]:
    """The case as a model that gives `made`, and what to feed it. Raises onnx.checker.ValidationError for no model.

    Types that onnxruntime cannot pass are constants, and outputs of them are cast to float32, which holds them all.
    """
    names = ["" if x is None else f"in{i}" for i, x in enumerate(ins)]
    present = {f"in{i}": (x, case.ins[i]) for i, x in enumerate(ins) if x is not None}
    fed = {k: x for k, (x, given) in present.items() if isinstance(given, TensorSpec) and is_passed(x.dtype)}
    fixed = [numpy_helper.from_array(x, k) for k, (x, _) in present.items() if k not in fed]
    nodes = [
        helper.make_node(
            op.name, names, [f"out{i}" for i in range(case.n_outs)], domain=op.domain, **attributes(case.attrs)
        )
    ]
    outputs = []
    for i, spec in enumerate(made[: case.n_outs]):
        name, code = f"out{i}", onnx_of_dtype(spec.dtype)
        if not is_passed(spec.dtype):
            nodes.append(helper.make_node("Cast", [name], [f"wide{i}"], to=TensorProto.FLOAT))
            name, code = f"wide{i}", TensorProto.FLOAT
        outputs.append(helper.make_tensor_value_info(name, code, [None] * spec.ndim))
    graph = helper.make_graph(nodes, "case", [value_info(k, v) for k, v in fed.items()], outputs, fixed)
    opsets = [helper.make_opsetid(op.domain, opset_of(op, case))]
    if op.domain:
        opsets.append(helper.make_opsetid("", 21))
    ir_version = max(8, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    known = op.domain or onnx.defs.has(op.name, opset_of(op, case), "")
    if known and (op.domain or not onnx.defs.get_schema(op.name, opset_of(op, case)).deprecated):
        onnx.checker.check_model(model)
    return model, fed


def of_onnxruntime(model: onnx.ModelProto, fed: dict[str, HostArray]) -> list[Any] | None:
    """onnxruntime's answer, None where it has no implementation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except NO_KERNEL:
        return None
    return list(session.run(None, fed))


def of_reference(model: onnx.ModelProto, fed: dict[str, HostArray]) -> list[Any]:
    """The answer of onnx's reference."""
    answers: Any = ReferenceEvaluator(model).run(None, fed)
    return list(answers)


def as_made(answers: Sequence[Any], made: Sequence[TensorSpec]) -> list[HostArray]:
    """Answers as arrays, those that were cast to be passed in the type that they had."""
    return [
        np.asarray(a) if is_passed(spec.dtype) else np.asarray(a).astype(spec.dtype)
        for a, spec in zip(answers, made, strict=False)
    ]


def oracle(op: Op, case: Case, ins: Sequence[HostArray | None], made: Sequence[TensorSpec]) -> list[HostArray]:
    """What onnxruntime answers; where it has no implementation, a formula of ours or onnx's reference.

    `made` are the specs expected of the outputs. Raises onnx.checker.ValidationError where the case is no valid model.
    """
    model, fed = model_of(op, case, ins, made)
    answers = of_onnxruntime(model, fed)
    if answers is None and op.domain == "com.microsoft":
        wide = FORMULAS[op.name]({**op.attrs, **case.attrs}, *ins)
        return [np.asarray(a).astype(spec.dtype) for a, spec in zip(wide, made, strict=False)]
    return as_made(of_reference(model, fed) if answers is None else answers, made)
