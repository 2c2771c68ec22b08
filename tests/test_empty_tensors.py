"""Every operator's cases with an axis of size zero, through a session: as onnxruntime, where that has an answer."""

from __future__ import annotations

import faulthandler
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import onnx
import pytest

import infera_gpu
from infera_gpu.errors import InferaError
from infera_gpu.graph import HostArray
from infera_gpu.op import Case, Op
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec, spec_of
from tests.cases import OLDEST, inputs_of, opset_of
from tests.oracle import model_of, of_onnxruntime

CASES = 2
"""Cases of each operator that are tried."""

REFUSED = {
    "RoiAlign": "a picture without pixels has none to take samples from",
    "DFT": "there is no transform of no samples, as NumPy says too",
    "LinearRegressor": "its coefficients are for another number of features",
    "LinearClassifier": "its coefficients are for another number of features",
}
"""Where onnxruntime gives numbers all the same."""

NAN = {"ReduceMean"}
"""The mean of nothing is not a number, as in NumPy and PyTorch; onnxruntime gives 0."""

UNSET = {"ConvInteger", "QLinearConv", "LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}
"""Of sums over no channels, and of states after no steps, onnxruntime gives what its memory held."""


def emptied(case: Case) -> Iterator[tuple[int, Case]]:
    """The case with each axis of its first input set to zero, and with it the axes of other inputs of that size."""
    first = case.ins[0] if case.ins else None
    if not isinstance(first, TensorSpec):
        return
    for axis, size in enumerate(first.dims):
        if not size:
            continue

        def cut(spec: object, axis: int = axis, size: int = size, ndim: int = first.ndim) -> object:
            if not isinstance(spec, TensorSpec) or spec.ndim != ndim or spec.dims[axis] != size:
                return spec
            return TensorSpec((*spec.dims[:axis], 0, *spec.dims[axis + 1 :]), spec.dtype)

        yield axis, replace(case, ins=tuple(map(cut, case.ins)))  # type: ignore[arg-type]


TRIED = [
    pytest.param(op, case, id=f"{op.qualified}-{case.id}-{axis}")
    for op in registry()
    if op.domain in ("", "ai.onnx.ml", "com.microsoft") and op.pure and not op.host
    for original in op.cases[:CASES]
    if opset_of(op, original) >= OLDEST or op.domain
    for axis, case in emptied(original)
]


def answered(model: onnx.ModelProto, fed: dict[str, HostArray]) -> list[HostArray] | None:
    """onnxruntime's answer, from a child process: it divides by sizes that are zero, and dies of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        faulthandler.disable()  # of how it dies nobody needs to read
        try:
            answer = of_onnxruntime(model, fed)
        except Exception:
            answer = None
        with os.fdopen(writing, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    return pickle.loads(data) if data else None


@pytest.mark.parametrize(("op", "case"), TRIED)
def test_nothing_is_computed_on_nothing(op: Op, case: Case) -> None:
    ins = inputs_of(op, case)
    unknown = [TensorSpec((), np.dtype(np.float32))] * case.n_outs
    try:
        model, fed = model_of(op, case, ins, unknown)
    except onnx.checker.ValidationError:
        pytest.skip("no model")
    for output in model.graph.output:
        output.ClearField("type")
    want = answered(model, fed)
    if want is None:  # then all that is asked is no exception but ours
        with suppress(InferaError), infera_gpu.load(model, device="cpu") as session:
            session.run(fed)
        return
    with infera_gpu.load(model, device="cpu") as session:
        try:
            got = list(session.run(fed).values())
        except InferaError:
            if op.name not in REFUSED:
                raise
            return
    if op.name in UNSET:
        with infera_gpu.load(model, device="cpu", fuse=False) as session:
            again = list(session.run(fed).values())
        for g, a, w in zip(got, again, want, strict=True):
            assert spec_of(g) == spec_of(np.asarray(w))
            np.testing.assert_array_equal(g, a)
        return
    if op.name in NAN:
        assert all(np.isnan(g).all() and not np.asarray(w).any() for g, w in zip(got, want, strict=True) if g.size)
        return
    for g, w in zip(got, want, strict=True):
        assert spec_of(g) == spec_of(np.asarray(w))
        np.testing.assert_allclose(np.asarray(g, np.float64), np.asarray(w, np.float64), atol=case.tol * 10)
