"""Every operator of the default ONNX domain on every type that its schema allows for its first input.

A case is converted to each type. Its results have the inferred types and shapes; they are those of a computation on the
same values in a type that holds them and every intermediate result (float64, int64, complex128), and the answer of
onnxruntime, or of onnx's reference where onnxruntime has no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import defs

import infera_gpu
from infera_gpu.errors import PlanError
from infera_gpu.graph import HostArray
from infera_gpu.op import Case, Op, f32
from infera_gpu.ops import registry
from infera_gpu.spec import DType, TensorSpec, dtype_of_onnx, onnx_of_dtype, spec_of
from infera_kernels.portable.quant import is_integer
from tests import oracle, test_host_ops
from tests.cases import assert_close, compute, inputs_of, site_of
from tests.test_opset_audit import NEWEST, SCHEMAS, TAKEN_APART

ROUNDINGS, HALF_ROUNDINGS = 4, 1.25
"""The bounds on errors, in epsilons of the result's type relative to the largest result.

A result is rounded once: half an epsilon. What is added up before, a few dozen terms of either sign and in another
order than the oracle's, gives a few more. Two-byte floats are added up in float32, so that they are rounded twice at
most, as in Attention, whose weights are; the oracles round them after every step.
"""

DTYPES: Mapping[str, DType] = {
    f"tensor({name.lower()})": dtype_of_onnx(code)
    for name, code in onnx.TensorProto.DataType.items()
    if code != onnx.TensorProto.UNDEFINED
}
TEXT, HALVES = np.dtype(object), tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16))
DOUBLES = tuple(np.dtype(t) for t in (np.float64, np.complex128))

REFUSED = {("Col2Im", TEXT): "cannot be added up"}
"""(operator, type) that the schema allows and nothing can compute: what the refusal says."""

SINGLE = {
    "BatchNormalization": "its parameters have a type of their own, float32 here, and the reference computes in it",
    "Erf": "the reference computes in float32",
    "Gelu": "the reference has Erf in it",
    "GridSample": "the grid is float32, and the oracles find the positions in it",
    "HardSwish": "alpha and beta are float32 where the reference takes it apart",
    "GroupNormalization": "onnxruntime computes in `stash_type`, float32",
    "Resize": "the scales are float32, and the reference finds other positions between the pixels in float64",
}
"""Operators whose float64 the oracles have in float32's precision."""

CASES = {
    "DequantizeLinear": Case("no_zero", (f32(3, 5), np.array(0.02, np.float32))),  # a float's can but be 0
}
TEXT_CASES = {
    "GridSample": Case("text", (f32(1, 2, 3, 2), f32(1, 2, 3, 2)), {"mode": "nearest", "padding_mode": "border"}),
    "Gather": Case("text", (f32(5), np.array([0, 4, 1]))),  # onnxruntime copies the first string of a row only
    "Resize": Case("text", (f32(2, 3), None, np.array([2, 1.5], np.float32))),
    "Trilu": Case("text", (f32(3, 3), np.array(-2))),
}
"""The case to convert, where it is not the operator's first on float32; and where strings need another one."""


def kind(dtype: DType) -> str:
    """Of ml_dtypes' types too: integer "i", float "f", complex "c", bool "b" or string "O"."""
    return "i" if is_integer(dtype) else dtype.kind if dtype.isbuiltin == 1 else "f"


NOT_ASKED: Mapping[str, tuple[str, str]] = {
    "GlobalLpPool": ("f", "neither oracle has it"),
    "GridSample": ("i", "the reference cuts every weight off to an integer"),
    "LRN": ("f", "the reference normalises as many channels as there are images"),
    "MaxRoiPool": ("f", "neither oracle has it"),
    "MeanVarianceNormalization": ("f", "the reference adds float32 constants, whatever the type"),
    "OneHot": ("if", "the reference takes a depth of another type for none"),
    "ReduceSumSquare": ("i", "the reference gives uint64 for uint32"),
    "Resize": ("ibcO", "the reference rounds integers where onnxruntime cuts them off, and has no other types"),
}
"""Operators for which onnx's reference is not asked where onnxruntime has no kernel: for which kinds, and why."""


def audited() -> Iterator[tuple[str, defs.OpSchema, Op]]:
    """Operators that work on tensors in an arena."""
    for name, versions in sorted(SCHEMAS.items()):
        schema, op = versions[-1], registry().find("", name, NEWEST)
        if (
            op is not None
            and name not in TAKEN_APART
            and not schema.deprecated
            and schema.inputs
            and not op.host
            and name != "ImageDecoder"
        ):
            yield name, schema, op


def variable(schema: defs.OpSchema, i: int) -> str | None:
    """The type variable of input i."""
    last = schema.inputs[-1]
    if i < len(schema.inputs):
        return str(schema.inputs[i].type_str)
    return str(last.type_str) if last.option == defs.OpSchema.FormalParameterOption.Variadic else None


def allowed_types(schema: defs.OpSchema) -> list[str]:
    """The names of the types that the first input may have."""
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    first = schema.inputs[0].type_str
    return sorted(constraints.get(first, [first]))


def chosen(op: Op, dtype: DType) -> Case:
    """The case to convert to a type."""
    special = {**CASES, **(TEXT_CASES if dtype == TEXT else {})}.get(op.name)
    cases = [c for c in op.cases if c.ins and isinstance(c.ins[0], (np.ndarray, TensorSpec))]
    return special or next(iter([c for c in cases if _first(c) == np.float32] or cases))


def _first(case: Case) -> DType:
    first = case.ins[0]
    assert isinstance(first, (np.ndarray, TensorSpec))
    return first.dtype


def converted(x: HostArray, dtype: DType) -> HostArray:
    """Values of a type that tell something: no zeros for integers, imaginary parts, small enough not to overflow."""
    if dtype == TEXT:
        made: HostArray = np.array([str(v) for v in x.reshape(-1).tolist()], object).reshape(x.shape)
        return made
    if dtype == np.bool_:
        return np.asarray(x > 0)
    if is_integer(dtype):
        bounds = ml_dtypes.iinfo(dtype)
        wide = np.sign(x.astype(np.float64)) * np.ceil(np.abs(x.astype(np.float64)))
        wide = np.abs(wide) if bounds.min == 0 else wide
        return np.asarray(np.clip(wide, float(bounds.min), float(bounds.max)).astype(dtype))
    if dtype.kind == "c":
        return np.asarray(x + 1j * np.flip(x)).astype(dtype)
    return np.asarray((np.abs(x) if dtype.name == "float8_e8m0fnu" else x).astype(dtype))


def attributes(op: Op, case: Case, dtype: DType) -> dict[str, Any]:
    """The case's attributes, floats as models hold them, with what the type asks for; random operators are seeded."""
    attrs = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in {**op.attrs, **case.attrs}.items()}
    attrs = {k: v for k, v in attrs.items() if k in case.attrs or isinstance(v, float)}
    if op.name == "BitCast":
        same = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}[dtype.itemsize]
        narrow = {"int4": "uint4", "float4_e2m1fn": "uint4", "uint4": "int4", "int2": "uint2", "uint2": "int2"}
        attrs["to"] = onnx_of_dtype(np.dtype(getattr(ml_dtypes, narrow[dtype.name]) if dtype.name in narrow else same))
    if op.name in ("RandomNormalLike", "RandomUniformLike") and kind(dtype) != "f":
        attrs["dtype"] = onnx.TensorProto.FLOAT
    return attrs if op.pure else {**attrs, "seed": 3.0}


@dataclass(frozen=True, slots=True)
class Example:
    """A case on some type; which of its inputs have the first one's type variable, and what was converted to them."""

    case: Case
    at: tuple[int, ...]
    drawn: tuple[HostArray | None, ...]

    def on(self, values: Callable[[HostArray, HostArray], HostArray | TensorSpec]) -> Case:
        """The case with `values(converted, drawn)` in their place."""
        ins: list[Any] = [*self.case.ins]
        for i in self.at:
            ins[i] = values(ins[i], self.drawn[i])  # type: ignore[arg-type]
        return replace(self.case, ins=tuple(ins))


def example(schema: defs.OpSchema, op: Op, dtype: DType) -> Example:
    """The operator's example on a type."""
    case = chosen(op, dtype)
    drawn = inputs_of(op, case)
    assert drawn[0] is not None
    at = tuple(
        i
        for i, x in enumerate(drawn)
        if x is not None and variable(schema, i) == variable(schema, 0) and x.dtype == drawn[0].dtype
    )
    plain = replace(case, ins=drawn, attrs=attributes(op, case, dtype), opset=schema.since_version)
    return Example(Example(plain, at, drawn).on(lambda x, _: converted(x, dtype)), at, drawn)


def wide(dtype: DType) -> DType | None:
    """A type that holds the values of another and what is computed from them; None where there is none."""
    return {"i": np.dtype(np.int64), "f": np.dtype(np.float64), "c": np.dtype(np.complex128)}.get(kind(dtype))


def outputs(op: Op, case: Case) -> list[HostArray]:
    """The case's outputs."""
    ins: Any = case.ins
    return [np.asarray(a) for a in compute(op, site_of(op, case, ins), ins)[: case.n_outs]]


def assert_rounded(
    got: HostArray, want: HostArray, what: str, *, single: bool = False, roundings: float = ROUNDINGS
) -> None:
    """Equal but for rounding: integers, which wrap around, and narrow floats, which are only moved, exactly."""
    assert got.shape == want.shape, f"{what} is {got.shape}, expected {want.shape}"
    if kind(got.dtype) in "ibO" or (got.dtype.itemsize == 1 and kind(got.dtype) == "f"):
        np.testing.assert_array_equal(got, want.astype(got.dtype), err_msg=what)
        return
    epsilon = np.finfo(np.float32).eps if single else ml_dtypes.finfo(got.dtype).eps
    high = np.dtype(np.complex128 if got.dtype.kind == "c" else np.float64)
    assert_close(got.astype(high), want.astype(high), roundings * float(epsilon), what)


def answers(op: Op, case: Case, made: Sequence[TensorSpec], dtype: DType) -> list[HostArray] | None:
    """What an oracle answers; None where none is asked."""
    ins: Any = case.ins
    model, fed = oracle.model_of(op, case, ins, made)
    try:
        found = oracle.of_onnxruntime(model, fed)
    except oracle.NO_KERNEL:  # some kernels find that out while they run
        found = None
    if found is None:
        if kind(dtype) in NOT_ASKED.get(op.name, ("", ""))[0]:
            return None
        found = oracle.of_reference(model, fed)
    return oracle.as_made(found, made)


@pytest.mark.parametrize(
    ("schema", "op", "dtype"),
    [
        pytest.param(schema, op, DTYPES[t], id=f"{name}-{t[7:-1]}")
        for name, schema, op in audited()
        for t in allowed_types(schema)
        if t in DTYPES
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_type(schema: defs.OpSchema, op: Op, dtype: DType) -> None:
    made = example(schema, op, dtype)
    if (op.name, dtype) in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[op.name, dtype]):
            outputs(op, made.case)
        return
    got = outputs(op, made.case)
    specs = [spec_of(g) for g in got]
    ins: Any = made.case.ins
    for i, (spec, inferred) in enumerate(zip(specs, op.infer(site_of(op, made.case, ins)), strict=False)):
        assert inferred in (None, spec), f"output {i} is {spec}, inferred {inferred}"
    if schema.outputs[0].type_str == variable(schema, 0):
        assert specs[0].dtype == dtype
    found = answers(op, made.case, specs, dtype) if op.pure else None
    for i, (g, w) in enumerate(zip(got, found or (), strict=found is not None)):
        assert g.dtype == w.dtype, f"output {i} is {g.dtype}, the oracle's {w.dtype}"
        assert_rounded(g, w, f"output {i}, by the oracle", single=op.name in SINGLE and dtype in DOUBLES)
    for i, (g, w) in enumerate(zip(run(op, made), got, strict=True)):
        assert_rounded(g, w, f"output {i}, in a session")
    if wide(dtype) is not None and op.name != "BitCast":
        compare_with_another_type(op, made, dtype, got)
    elif found is None:
        compare_with_numbers(op, made, dtype, got)


def run(op: Op, made: Example) -> list[HostArray]:
    """What a session gives, which plans for kernels and views."""
    fed = made.on(lambda x, _: spec_of(x))
    graph, _ = test_host_ops.model_of(op, fed)
    with infera_gpu.load(graph, device="cpu") as session:
        return [*session.run({f"in{i}": made.case.ins[i] for i in made.at}).values()]


NARROWER = {
    np.dtype(a): np.dtype(b) for a, b in ((np.int64, np.int32), (np.float64, np.float32), (np.complex128, np.complex64))
}


def compare_with_another_type(op: Op, made: Example, dtype: DType, got: Sequence[HostArray]) -> None:
    """The same values give the same in a wider type; in half of the widest types, up to its precision."""
    other = NARROWER.get(dtype) or wide(dtype)
    for i, (g, w) in enumerate(zip(got, outputs(op, made.on(lambda x, _: x.astype(other))), strict=True)):
        a, b = (w, g) if dtype in NARROWER else (g, w)
        roundings = HALF_ROUNDINGS if dtype in HALVES else ROUNDINGS
        assert_rounded(a, b, f"output {i}, in {other}", roundings=roundings)


def compare_with_numbers(op: Op, made: Example, dtype: DType, got: Sequence[HostArray]) -> None:
    """Strings are moved as the numbers that they stand for are; booleans are 0 and 1, and what is not 0 is true."""
    as_numbers = made.on(lambda x, drawn: drawn if dtype == TEXT else x.astype(np.float64))
    for i, (g, w) in enumerate(zip(got, outputs(op, as_numbers), strict=True)):
        want = w if g.dtype != dtype else converted(w, TEXT) if dtype == TEXT else w != 0
        assert_rounded(g, want, f"output {i}, in numbers")
