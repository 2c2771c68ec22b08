"""kserve's clients and NVIDIA's perf_analyzer, over HTTP and gRPC."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.clients.support import kserve_python, perf_analyzer
from tests.server.support import Running, doubler, serving

pytestmark = pytest.mark.clients

X = np.arange(8, dtype=np.float32).reshape(2, 4)
LIMIT_S = 120


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}) as running:
        yield running


def address(server: Running, protocol: str) -> str:
    return f"127.0.0.1:{server.host.grpc_port}" if protocol == "grpc" else server.address


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
    command = [
        *perf_analyzer(), "-m", "double", "-u", address(server, protocol), "-i", protocol, "--async",
        "--concurrency-range", "4", "--request-count", "200", "-b", "2", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Request count: 200" in done.stdout
