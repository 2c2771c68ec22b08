"""What tests of plans on disk share: a model, what it is fed, and where its plans are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu.lower import lower
from infera_gpu.plan import Plan
from infera_kernels.cpu.aligned import aligned
from tests.text import parse

NODES = """
    g (float[N, 3, 9, W] x, float[N, 4, 9, W] z) => (float[M, K] y, float[N, 4, 9, W] again)
    <float[4, 3, 3, 3] w = {WEIGHTS}, float[4] b = {0.1, 0.2, 0.3, 0.4}, int64[2] to = {1, -1}> {
        c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
        r = Relu(c)
        joined = Concat<axis = 1>(r, z)
        mean = ReduceMean<axes = [2], keepdims = 0>(joined)
        shape = Shape(x)
        last = Slice<starts = [3], ends = [4]>(shape)
        size = Cast<to = 1>(last)
        y0 = Reshape(mean, to)
        y = Div(y0, size)
        again = Tanh(r)
    }"""
"""A convolution whose output is written where a Concat would copy it, and a size that is known when it is planned."""


def model_file(path: Path, nodes: str = NODES) -> Path:
    weights = ", ".join(f"{v:.3f}" for v in np.sin(np.arange(108)))
    model = parse(nodes.replace("WEIGHTS", weights), opset=9)
    path.write_bytes(model.SerializeToString())
    return path


def feeds(count: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal((count, n, 9, 11)).astype(np.float32) for k, n in (("x", 3), ("z", 4))}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of entries, which are kept during the test."""
    monkeypatch.setenv("INFERA_GRAPH_CACHE", "1")
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever a segment is planned."""
    found: list[int] = []

    def counted(*args: Any) -> Plan:
        found.append(len(args[0].nodes))
        return lower(*args)

    monkeypatch.setattr("infera_gpu.stages.lower", counted)
    return found


def plans(kept: Path) -> list[Path]:
    return sorted(kept.glob("*/*.plan"))


def graph_kept(path: Path, **options: Any) -> Path:
    """The model, whose graph is kept from now on."""
    for _ in range(2):
        infera_gpu.load(path, device="cpu", **options).close()
    return path


def bytes_of(content: bytes) -> np.ndarray[Any, Any]:
    data: np.ndarray[Any, Any] = aligned((len(content),), np.uint8)
    data[:] = np.frombuffer(content, np.uint8)
    return data
