"""Launches of two sessions on two GPUs, of different architectures. CuPy and the driver are stand-ins."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infera_gpu.devices import cuda
from infera_gpu.errors import DeviceLostError
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_kernels.launch import CudaLauncher, KernelCache
from infera_kernels.launch.cuda import CupyDriver
from tests import fake_cupy
from tests.text import parse

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

ARCHITECTURES = (90, 80)
MODEL = parse(
    "g (float[N, 64] x) => (float[N, 64] y) <float[64] w = {"
    + ", ".join(["2"] * 64)
    + "}> { a = Mul(x, w) y = Softmax(a) }"
)


@dataclass(frozen=True)
class Launch:
    device: int
    kernel: str
    stream: int
    pointers: tuple[int, ...]


class Driver:
    """The parts of CuPy by which modules are loaded and launched; a module is the GPU's that is current."""

    CUDADriverError = fake_cupy.CUDADriverError
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.streams: dict[int, fake_cupy.Stream] = {}
        self.pointers: dict[str, int] = {}
        """How many of a kernel's parameters are addresses: the first ones."""
        self._functions: dict[int, tuple[int, str]] = {}
        self._addresses = itertools.count(0x7000, 0x10)

    def module(self) -> Any:
        device = fake_cupy.CURRENT.device
        cubins: list[bytes] = []

        def function(name: str) -> Any:
            address = next(self._addresses)
            self._functions[address] = device, name
            return SimpleNamespace(ptr=address)

        return SimpleNamespace(load=cubins.append, get_function=function)

    def check_status(self, status: int) -> None: ...

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None: ...

    @property
    def launchKernel(self) -> Callable[..., None]:
        return self._launch

    def _launch(self, function: int, *config: int) -> None:
        *_, stream, parameters, extra = config
        assert extra == 0
        device, name = self._functions[function]
        if device != fake_cupy.CURRENT.device:
            raise fake_cupy.CUDADriverError(fake_cupy.INVALID_HANDLE)
        given = (ctypes.c_void_p * self.pointers[name]).from_address(parameters)
        made = Launch(device, name, stream, tuple(ctypes.c_uint64.from_address(at or 0).value for at in given))
        self.streams[stream].put("launch", lambda: self.launches.append(made))


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Any:
    fake: Any = fake_cupy.install(monkeypatch, fake_cupy.module(gpus=2))
    fake.cuda.function = SimpleNamespace(Module=driver.module)
    vars(fake.cuda.runtime).update(
        cudaDevAttrMultiProcessorCount=16,
        cudaDevAttrMaxSharedMemoryPerBlockOptin=97,
        deviceGetAttribute=lambda attribute, device: {16: 108, 97: 163 * 1024}[attribute],
        getDeviceProperties=lambda device: {"name": b"a GPU"},
    )
    capability = property(lambda device: str(ARCHITECTURES[device.id]))
    monkeypatch.setattr(fake_cupy.Device, "compute_capability", capability, raising=False)
    api = SimpleNamespace(driver=driver, runtime=SimpleNamespace(driverGetVersion=lambda: 13000))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", api)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    return fake


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def sessions(cupy: Any, driver: Driver, kernels: Path) -> list[Session]:
    made = []
    for index in range(2):
        device = cuda.CudaDevice(index)
        driver.streams[device._stream.ptr] = device._stream
        device._launcher = CudaLauncher(index, device._stream, driver=CupyDriver(), cache=KernelCache(kernels))
        made.append(Session(load_graph(MODEL), device))
    return made


def batch(rows: int) -> dict[str, HostArray]:
    return {"x": np.ones((rows, 64), np.float32)}


def prepared(sessions: list[Session], driver: Driver) -> None:
    """Binds plans of both, so that the driver can be told what their kernels take; launches are forgotten."""
    driver.pointers = {}
    for session in sessions:
        session.reserve(batch(4), batch(5))
    for session in sessions:
        for loaded in session.device._launcher._loaded.values():  # type: ignore[attr-defined]
            types = loaded.binary.spec.types
            count = next((i for i, type in enumerate(types) if not type.startswith("*")), len(types))
            assert driver.pointers.setdefault(loaded.binary.spec.name, count) == count


def launched_rightly(cupy: Any, sessions: list[Session], driver: Driver) -> None:
    """Every launch went to a module of its stream's GPU, with addresses there."""
    blocks = [[(m.ptr, m.ptr + m.nbytes) for m in vram.blocks] for vram in cupy.vrams]
    streams = [session.device._stream.ptr for session in sessions]  # type: ignore[attr-defined]
    assert {launch.device for launch in driver.launches} == {0, 1}
    for launch in driver.launches:
        assert launch.stream == streams[launch.device]
        assert launch.pointers
        for pointer in launch.pointers:
            assert any(low <= pointer < high for low, high in blocks[launch.device])


def test_a_launch_goes_to_the_module_of_its_gpu(cupy: Any, sessions: list[Session], driver: Driver) -> None:
    prepared(sessions, driver)
    for session, arch in zip(sessions, ARCHITECTURES, strict=True):
        launcher: Any = session.device.launcher
        assert launcher.target.arch == arch
        assert {loaded.binary.spec.arch for loaded in launcher._loaded.values()} == {arch}
    for turn in range(6):  # launched, recorded, replayed
        sessions[turn % 2].run(batch(4))
        assert fake_cupy.CURRENT.device == 0
    launched_rightly(cupy, sessions, driver)
    each = [[launch for launch in driver.launches if launch.device == i] for i in range(2)]
    assert len(each[0]) == len(each[1]) >= 3


def test_launches_of_two_threads_stay_apart(cupy: Any, sessions: list[Session], driver: Driver) -> None:
    prepared(sessions, driver)

    def work(index: int) -> None:
        cupy.cuda.Device(1 - index).use()
        for turn in range(10):
            sessions[index].run(batch(4 + turn % 2))
        assert fake_cupy.CURRENT.device == 1 - index

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    launched_rightly(cupy, sessions, driver)


def test_a_fault_on_one_stops_no_launches_on_the_other(cupy: Any, sessions: list[Session], driver: Driver) -> None:
    prepared(sessions, driver)
    for session in sessions:
        session.run(batch(4))
    fake_cupy.Device.faults[1] = 700
    with pytest.raises(DeviceLostError, match="cuda:1"):
        sessions[1].run(batch(4))
    before = len(driver.launches)
    sessions[0].run(batch(4))
    assert len(driver.launches) > before
    assert sessions[0].device.lost == ""
