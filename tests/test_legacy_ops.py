"""The forms before opset 7, which onnxruntime does not run: against what they are at opset 7, in onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import defs

import infera_gpu
from infera_gpu.errors import PlanError
from infera_gpu.graph import HostArray
from infera_gpu.op import Case, Op
from infera_gpu.ops import legacy
from infera_gpu.spec import TensorSpec
from tests import oracle
from tests.cases import OLDEST, assert_close, inputs_of, opset_of
from tests.test_host_ops import model_of


def cases() -> Iterator[Any]:
    for op in legacy.OPS:
        for case in op.cases:
            yield pytest.param(op, case, id=f"{op.qualified}-{case.id}")


def placed(op: Op, case: Case, ins: tuple[HostArray, ...]) -> tuple[HostArray, ...]:
    """The inputs as opset 7 takes them: the second with an axis for each axis of the first that follows it."""
    a, b, *rest = ins
    axis = case.attrs.get("axis")
    if op.name == "PRelu" and b.size > 1:
        axis = 1
    if axis is not None:
        first = axis % a.ndim
        b = np.expand_dims(b, tuple(range(b.ndim, a.ndim - first)))
    return (a, b, *rest)


@pytest.mark.parametrize(("op", "case"), [*cases()])
@pytest.mark.parametrize("opset", [1, 6])
def test_an_old_form_is_what_it_says_at_opset_7(op: Op, case: Case, opset: int) -> None:
    schema = defs.get_schema(op.name, opset)
    old = replace(case, opset=opset)
    if schema.attributes.get("consumed_inputs") and schema.attributes["consumed_inputs"].required:
        old = replace(old, attrs={**case.attrs, "consumed_inputs": (0, 0)})
    assert opset_of(op, old) == opset
    model, feeds = model_of(op, old)
    with infera_gpu.load(model, device="cpu") as session:
        got = session.run(feeds)["out0"]

    ins: Any = inputs_of(op, case)
    now = defs.get_schema(op.name, OLDEST)
    attrs = {k: v for k, v in case.attrs.items() if k in now.attributes}
    given: Any = placed(op, case, ins)
    new = replace(case, ins=given, attrs=attrs, opset=OLDEST)
    answer = oracle.of_onnxruntime(*oracle.model_of(op, new, given, [TensorSpec(got.shape, got.dtype)]))
    assert answer is not None
    assert_close(got, np.asarray(answer[0]), case.tol, "output")


@pytest.mark.parametrize(
    ("attrs", "message"),
    [({}, "differ and broadcast is not set"), ({"broadcast": 1, "axis": 2}, "does not lie within")],
)
def test_operands_that_do_not_lie_within_each_other_are_refused(attrs: dict[str, Any], message: str) -> None:
    op = next(op for op in legacy.OPS if op.name == "Add")
    ins: Any = (np.ones((2, 3, 4), np.float32), np.ones((3, 4), np.float32))
    model, feeds = model_of(op, Case("bad", tuple(TensorSpec(x.shape, x.dtype) for x in ins), attrs, opset=6))
    with pytest.raises(PlanError, match=message), infera_gpu.load(model, device="cpu") as session:
        session.run(feeds)
