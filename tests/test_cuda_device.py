"""The CUDA device over a stand-in for CuPy: what it asks for, and in which order. Nothing here runs on a GPU."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu.devices import cuda
from infera_gpu.errors import DeviceError, OutOfMemoryError
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from tests import fake_cupy
from tests.text import parse

MODEL = parse(
    """
    g (float[N, 4] x) => (float[N, 4] y, int64[2, K] at) {
        a = Exp(x)
        at = NonZero(x)
        b = Transpose <perm = [1, 0]> (a)
        c = Neg(b)
        y = Transpose <perm = [1, 0]> (c)
    }"""
)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if name == "cupy" else None)
    return fake


def test_a_session_answers_right_and_orders_everything_on_one_stream(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    session = Session(load_graph(MODEL), device)
    x = np.array([[0, 1, 2, 3], [4, 0, 6, 7]], np.float32)
    for _ in range(2):
        device._stream.log.clear()
        out = session.run({"x": x})
        np.testing.assert_allclose(out["y"], -np.exp(x), rtol=1e-6)
        np.testing.assert_array_equal(out["at"], np.nonzero(x))
        assert device._stream.log[0] == f"h2d {x.nbytes}"
        assert device._stream.log[-1] == "sync"
        assert device._stream.active == 0
    assert session.plan_for({"x": (2, 4)}).arenas.keys() == {"device"}


def test_arrays_on_the_gpu_are_not_brought_to_the_host(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    session = Session(load_graph(parse("g (float[N] x) => (float[N] y) { y = Exp(x) }")), device)
    x = cupy.asarray(np.arange(3, dtype=np.float32))
    np.testing.assert_allclose(session.run({"x": x})["y"], np.exp([0, 1, 2]), rtol=1e-6)
    assert not [e for e in device._stream.log if e.startswith("h2d")]
    out = {"y": cupy.asarray(np.zeros(3, np.float32))}
    device._stream.log.clear()
    session.run({"x": x}, out=out)
    assert device._stream.log == ["sync"]
    np.testing.assert_allclose(out["y"], np.exp([0, 1, 2]), rtol=1e-6)


def test_an_arena_that_does_not_fit_is_refused_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.module(free=1000))
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if name == "cupy" else None)
    session = infera_gpu.load(MODEL, device="cuda")
    with pytest.raises(OutOfMemoryError, match="1,000 are available") as caught:
        session.run({"x": np.zeros((1000, 4), np.float32)})
    assert caught.value.needed > 32_000


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (None, "CuPy is not installed"),
        (fake_cupy.module(gpus=0), "the driver reports no GPU"),
        (fake_cupy.module(error=RuntimeError("cudaErrorInsufficientDriver")), "no usable driver: cudaErrorInsuff"),
    ],
)
def test_a_gpu_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch, fake: Any, message: str) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if fake else None)
    with pytest.raises(DeviceError, match=message):
        infera_gpu.load(MODEL, device="cuda")
    assert infera_gpu.load(MODEL, device="auto").device.name == "cpu"


def test_a_gpu_number_that_does_not_exist_is_named(cupy: Any) -> None:
    with pytest.raises(DeviceError, match="cuda:3 does not exist; this machine has 1 GPU"):
        infera_gpu.load(MODEL, device="cuda:3")
