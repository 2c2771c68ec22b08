"""kserve's clients and NVIDIA's perf_analyzer, over HTTP and gRPC."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from infera_server.models.discovery import discover
from infera_server.models.repository import Repository
from infera_server.settings import Settings
from tests.clients.support import kserve_python, perf_analyzer
from tests.server.support import Running, doubler, hosting, serving

pytestmark = pytest.mark.clients

X = np.arange(8, dtype=np.float32).reshape(2, 4)
SUMS = """
max_batch_size: 4
sequence_batching { state { input_name: "s" output_name: "t" data_type: TYPE_FP32 dims: [1] } }
input { name: "x" data_type: TYPE_FP32 dims: [1] }
output { name: "y" data_type: TYPE_FP32 dims: [1] }
"""
TWICE = """
platform: "ensemble"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [4] }
output { name: "z" data_type: TYPE_FP32 dims: [4] }
ensemble_scheduling {
  step { model_name: "double" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } }
  step { model_name: "double" model_version: -1 input_map { key: "x" value: "y" } output_map { key: "y" value: "z" } }
}
"""
LIMIT_S = 120


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}) as running:
        yield running


def address(server: Running, protocol: str) -> str:
    return f"127.0.0.1:{server.host.grpc_port}" if protocol == "grpc" else server.address


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`sums`, which adds up what a sequence brings; `twice`, an ensemble of two steps; `words`, of texts."""
    root: Path = tmp_path_factory.mktemp("models")
    for name, text, config in (
        (
            "sums",
            "(float[N, 1] x, float[N, 1] s) => (float[N, 1] y, float[N, 1] t) {y = Add(x, s) t = Identity(y)}",
            SUMS,
        ),
        ("double", "(float[N, 4] x) => (float[N, 4] y) {y = Add(x, x)}", "max_batch_size: 8"),
        ("words", "(string[N, M] x) => (string[N, M] y) {y = Identity(x)}", "max_batch_size: 8"),
        ("twice", "", TWICE),
    ):
        folder = root / name / "1"
        folder.mkdir(parents=True)
        (folder.parent / "config.pbtxt").write_text(config)
        if text:
            made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
            onnx.save(made, folder / "model.onnx")
    with hosting(Repository(Settings(device="cpu", threads=1), discover([root]).sources)) as running:
        yield running


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_kserve(server: Running, protocol: str) -> None:
    script = Path(__file__).with_name("kserve_calls.py")
    command = [str(kserve_python()), str(script), protocol, address(server, protocol)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {"rest": "404", "grpc": "Request for unknown model: 'nope' is not found"}[protocol] in told.pop("unknown")
    answer = {"id": "7", "model": "double", "name": "y", "y": (2 * X).tolist()}
    assert told == {"live": True, "ready": True, "model_ready": True, "binary": answer, "plain": answer}


@pytest.mark.parametrize(
    ("protocol", "more"),
    [
        ("http", []),
        ("http", ["--shared-memory", "system"]),
        ("grpc", []),
        ("grpc", ["--shared-memory", "system"]),
        ("grpc", ["--streaming"]),
    ],
)
def test_perf_analyzer(server: Running, protocol: str, more: list[str]) -> None:
    assert "Request count: 200" in measured(server, protocol, "-m", "double", "--async", "-b", "2", *more)


@pytest.mark.parametrize(
    ("protocol", "more"),
    [
        ("http", ["-m", "sums", "--sequence-length", "5"]),
        ("grpc", ["-m", "sums", "--sequence-length", "5"]),
        ("grpc", ["-m", "sums", "--sequence-length", "5", "--streaming", "--async"]),
        ("http", ["-m", "words", "--shape", "x:3", "--string-length", "20"]),
        ("grpc", ["-m", "words", "--shape", "x:3", "--string-length", "20"]),
        ("http", ["-m", "double", "--input-tensor-format", "json", "--output-tensor-format", "json"]),
        ("grpc", ["-m", "double", "--grpc-compression-algorithm", "gzip"]),
        ("grpc", ["-m", "double", "--shared-memory", "system", "--streaming", "--async"]),
    ],
)
def test_perf_analyzer_of_sequences_texts_and_the_like(folders: Running, protocol: str, more: list[str]) -> None:
    assert "Request count: 200" in measured(folders, protocol, *more)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_perf_analyzer_is_told_of_the_steps_of_an_ensemble(folders: Running, protocol: str) -> None:
    told = measured(folders, protocol, "-m", "twice")
    assert "Request count: 200" in told
    steps = told.partition("double, version: 1")[2]
    assert "Successful request count: 0" not in steps
    assert "Successful request count: " in steps


def measured(server: Running, protocol: str, *more: str) -> str:
    """What perf_analyzer says of 200 requests, four at a time."""
    command = [
        *perf_analyzer(), "-u", address(server, protocol), "-i", protocol, "--concurrency-range", "4",
        "--request-count", "200", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
