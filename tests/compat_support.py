"""What the tests of infera_gpu.compat share: one model, and both runtimes to run the same code."""

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
CPU = ["CPUExecutionProvider"]
FEEDS: dict[str, np.ndarray[Any, Any]] = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4), "i": np.arange(2)}

both = pytest.mark.parametrize("ort", [onnxruntime, infera_gpu], ids=["onnxruntime", "infera_gpu"])
without_gpu = pytest.mark.skipif(infera_gpu.get_device() == "GPU", reason="needs a machine without a GPU")


def quiet(ort: Any) -> Any:
    """SessionOptions that keep onnxruntime from logging what a test provokes."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def refused(ort: Any, error: type[Exception]) -> type[Exception]:
    """What `ort` raises where infera_gpu raises `error`: onnxruntime has types of its own, and not always the same."""
    return error if ort is infera_gpu else Exception
