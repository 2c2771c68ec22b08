"""Every kernel that whole models bind on a GPU is compiled, fits on the card, and is launched as its PTX wants it.

The device is the CUDA one over a stand-in for CuPy, the launcher the real one; the driver loads nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import infera_gpu
from bench.inputs import EXAMPLES
from bench.models import BUILT, path_of
from infera_gpu.devices import cuda
from infera_gpu.devices.cuda import CudaDevice
from infera_gpu.errors import UnreachableError
from infera_kernels.launch import CudaLauncher, KernelCache
from tests import fake_cupy
from tests.kernels.test_bound_model import Driver

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

QUICK = {"silero-vad-v6-fw"}
"""Convolutions, a recurrent cell and data movement: 13 kernels."""


def marked(name: str, precision: str) -> Any:
    marks = [] if name in BUILT else [pytest.mark.models]
    quick = name in QUICK and precision == "fp32"
    return pytest.param(
        name, precision, id=f"{name}-{precision}", marks=marks if quick else [*marks, pytest.mark.large]
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize(
    ("name", "precision"), [marked(name, precision) for precision in ("fp32", "fp16") for name in EXAMPLES]
)
def test_kernels_of_a_model(name: str, precision: Any, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cupy.install(monkeypatch, fake_cupy.module(free=64 << 30))
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    try:
        path = path_of(name)
    except UnreachableError as error:
        pytest.skip(f"{name} is out of reach: {error}")
    with infera_gpu.load(path, device="cuda", precision=precision) as session:
        device, driver = session.device, Driver()
        assert isinstance(device, CudaDevice)
        driver.streams[device._stream.ptr] = device._stream
        launcher = CudaLauncher(0, device._stream, driver=driver, cache=KernelCache(kernels))
        device._launcher = driver.launcher = launcher
        session.reserve(EXAMPLES[name][0].feeds())
        assert launcher._loaded
        for loaded in launcher._loaded.values():
            assert loaded.binary.spec.shared_bytes <= launcher.target.shared_bytes
