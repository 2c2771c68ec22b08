"""What tests of cuDNN share: the stand-in, a launcher that has it, a model, and a clock that is told the times."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.loader import load_graph
from infera_gpu.op import Call
from infera_gpu.session import Session
from infera_kernels.launch import RecordingLauncher, cudnn
from infera_kernels.launch.cudnn import WORKSPACE
from infera_kernels.tuning import DeviceTiles, Store
from tests.fake_cudnn import FakeCudnn, with_cudnn
from tests.text import parse

HALF, BFLOAT = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeCudnn:
    """One with no handles yet, and none to come from launchers of earlier tests."""
    gc.collect()
    monkeypatch.setattr(cudnn, "_idle", {})
    return FakeCudnn()


@pytest.fixture
def launcher(library: FakeCudnn) -> Any:
    return with_cudnn(RecordingLauncher(), library)


def workspace() -> Any:
    return np.empty(WORKSPACE, np.uint8)


def run(calls: Sequence[Call]) -> None:
    for fn, args in calls:
        fn(*args)


MODEL = """
    g (float16[N, 5, 6, C] x) => (float16[N, 5, 6, 16] y) {
        a = Transpose <perm = [0, 3, 1, 2]> (x)
        b = Conv <pads = [P, P, P, P]> (a, w, v)
        c = Relu (b)
        y = Transpose <perm = [0, 2, 3, 1]> (c)
    }"""


def model(channels: int = 8, window: int = 3) -> Any:
    import onnx

    text = MODEL.replace("C]", f"{channels}]").replace("P", str(window // 2), 4)
    made, rng = parse(text), np.random.default_rng(0)
    for name, shape in (("w", (16, channels, window, window)), ("v", (16,))):
        values = rng.standard_normal(shape).astype(np.float16)
        made.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return made


def opened(library: FakeCudnn, store: Store | None = None, made: Any = None, **options: Any) -> Session:
    device = RecordingDevice(**options)
    with_cudnn(device.launcher, library)
    device.tiles = DeviceTiles(device.launcher.target, store)  # type: ignore[attr-defined]
    return Session(load_graph(made or model()), device)


class Timer:
    """Makes the calls; those of a plan of cuDNN's take `seconds`, launches 10 us."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, calls: Sequence[Call]) -> float:
        run(calls)
        plans = [args[0] for fn, args in calls if getattr(fn, "__name__", "") == "_run"]
        return self.seconds[f"way{len(plans)}"] if plans else 1e-5
