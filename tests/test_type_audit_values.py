"""Operators on sequences, optional values, strings and subgraphs, on every type that their schemas allow.

They move tensors as they are, so that what they give for values of a type is what they give for float32 values,
converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu.op import Case, GraphText, Op, f32
from infera_gpu.ops import registry
from infera_gpu.spec import DType, TensorSpec
from tests.cases import inputs_of
from tests.test_host_ops import assert_same, model_of
from tests.test_opset_audit import NEWEST, SCHEMAS, TAKEN_APART
from tests.test_type_audit import DTYPES, allowed_types, audited, converted

_SCAN = "body ({t}[N] s, {t}[N] x) => ({t}[N] u, {t}[N] y) {{ u = Identity(x) y = Identity(s) }}"
_MAP = "body ({t}[N] x) => ({t}[N] y) {{ y = Identity(x) }}"
_FEW = [np.arange(3, dtype=np.float32), np.ones(2, np.float32)]

BODIES = {
    "Scan": (_SCAN, Case("moved", (f32(3), f32(5, 3)), {"num_scan_inputs": 1}, n_outs=2)),
    "SequenceMap": (_MAP, Case("moved", (_FEW,))),
}
"""Bodies that move tensors of type {t}, and the case that runs them."""

BY_CASES = {
    "ImageDecoder",
    "Loop",
    "RegexFullMatch",
    "StringConcat",
    "StringNormalizer",
    "StringSplit",
    "TfIdfVectorizer",
}
"""Operators whose cases have all types that the first input may have."""


def values_of(op: Op, case: Case) -> Any:
    return inputs_of(op, case)


def moving() -> Iterator[Any]:
    """(operator, case on float32, ONNX's name of a type) for every operator and every form of its first input.

    An optional value is the value itself, or nothing, at run time.
    """
    for op in registry():
        if op.domain or op.name in BY_CASES or not (op.host or op.name == "Identity"):
            continue
        schema = SCHEMAS[op.name][-1]
        if registry().find("", op.name, NEWEST) is not op or not schema.inputs:
            continue
        for name in allowed_types(schema):
            if name.startswith("optional") or (not op.host and name.startswith("tensor")):
                continue
            kind = name[name.rindex("(") + 1 :].rstrip(")")
            if op.name in BODIES:
                text, case = BODIES[op.name]
                case = replace(case, attrs={**case.attrs, "body": GraphText(text.format(t=kind))})
            else:
                form = list if name.startswith("seq") else (np.ndarray, TensorSpec)
                case = next((c for c in op.cases if isinstance(c.ins[0], form)), Case("moved", (_FEW,)))
            yield pytest.param(
                op, replace(case, opset=schema.since_version), DTYPES[f"tensor({kind})"], id=f"{op.name}-{name}"
            )


def each(value: Any, dtype: DType) -> Any:
    """The value with float32 arrays of the type."""
    if isinstance(value, list):
        return [each(v, dtype) for v in value]
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return (value * (1 + 0.5j)).astype(dtype) if dtype.kind == "c" else converted(value, dtype)
    return value


@pytest.mark.parametrize(("op", "case", "dtype"), [*moving()])
def test_tensors_are_moved_whatever_their_type(op: Op, case: Case, dtype: DType) -> None:
    drawn = values_of(op, case)
    plain = replace(case, attrs={k: _on_float(v) for k, v in case.attrs.items()})
    want = run(op, plain, drawn)
    got = run(op, case, each([*drawn], dtype))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_same(got[name], each(value, dtype), 0, name)


def _on_float(value: Any) -> Any:
    if not isinstance(value, GraphText):
        return value
    return next(
        GraphText(text.format(t="float")) for text, _ in BODIES.values() if value.text.count("[N]") == text.count("[N]")
    )


def run(op: Op, case: Case, ins: Any) -> dict[str, Any]:
    """The case as a model on these inputs, all of them fed."""
    fed = replace(case, ins=tuple(TensorSpec(x.shape, x.dtype) if isinstance(x, np.ndarray) else x for x in ins))
    model, _ = model_of(op, fed)
    with infera_gpu.load(model, device="cpu") as session:
        return session.run({f"in{i}": x for i, x in enumerate(ins) if x is not None})


@pytest.mark.parametrize("name", sorted(BY_CASES))
def test_cases_have_every_type(name: str) -> None:
    op = registry().find("", name, NEWEST)
    assert op is not None
    firsts = [values_of(op, case)[0] for case in op.cases]
    assert {DTYPES[t] for t in allowed_types(SCHEMAS[name][-1])} == {x.dtype for x in firsts if x is not None}


def test_every_operator_is_audited() -> None:
    """Those that If stands for are chosen while planning, of every type; others have no inputs."""
    names = {name for name, schemas in SCHEMAS.items() if schemas[-1].inputs and not schemas[-1].deprecated}
    moved = {p.values[0].name for p in moving()}
    assert names - {name for name, _, _ in audited()} - moved - BY_CASES == {"If"}
    assert "If" in TAKEN_APART
