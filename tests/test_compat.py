"""The same code against onnxruntime and against infera_gpu."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

import infera_gpu
from tests.text import parse

MODEL = parse(
    """g (float[N, 4] x, int64[N] i) => (float[N, 4] y, int64[N] j, bool[N, 4] p) {
        y = Exp(x) j = Add(i, i) p = Less(x, y)
    }"""
).SerializeToString()


def session(module: Any) -> Any:
    options = module.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = module.GraphOptimizationLevel.ORT_ENABLE_ALL
    return module.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])


def test_changing_the_import_changes_no_answer() -> None:
    theirs, ours = session(onnxruntime), session(infera_gpu)
    feeds = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4), "i": np.arange(2)}
    for names in (None, ["p"], ["j", "y"]):
        for want, got in zip(theirs.run(names, feeds), ours.run(names, feeds), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)
            assert got.dtype == want.dtype
    for get in ("get_inputs", "get_outputs"):
        for want, got in zip(getattr(theirs, get)(), getattr(ours, get)(), strict=True):
            assert (got.name, got.shape, got.type) == (want.name, want.shape, want.type)
    assert ours.get_providers() == theirs.get_providers()
    assert ours.get_session_options().intra_op_num_threads == 1


def test_providers_fall_back_in_order() -> None:
    both = infera_gpu.InferenceSession(MODEL, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert both.get_providers() == infera_gpu.get_available_providers()
    chosen = infera_gpu.InferenceSession(MODEL, providers=[("CPUExecutionProvider", {})], provider_options=[{}])
    assert chosen.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.skipif(infera_gpu.get_device() == "GPU", reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_says_why() -> None:
    with pytest.raises(infera_gpu.DeviceError, match=r"infera-gpu\[cuda12\]|driver|GPU"):
        infera_gpu.InferenceSession(MODEL, providers=["CUDAExecutionProvider"])


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(infera_gpu.DeviceError, match="unknown provider 'TPU'"):
        infera_gpu.InferenceSession(MODEL, providers=["TPU"])
    with pytest.raises(infera_gpu.InputError, match="'q' is not an output"):
        session(infera_gpu).run(["q"], {"x": np.zeros((1, 4), np.float32), "i": np.zeros(1, np.int64)})
    with pytest.raises(AttributeError):
        setattr(infera_gpu.SessionOptions(), "no_such_option", 1)  # noqa: B010
