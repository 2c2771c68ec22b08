"""Telemetry over a fake NVML: absent, partial, failing, recovering. No driver needed."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from infera_gpu.telemetry import GpuReading, Telemetry, snapshot

NOT_SUPPORTED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, GPU_IS_LOST = 3, 9, 12, 15


class FakeError(Exception):
    def __init__(self, value: int) -> None:
        self.value = value
        super().__init__(f"error {value}")


class FakeNvml:
    """Two GPUs. `errors` maps a function's name, or (name, GPU), to the error it raises."""

    NVMLError = FakeError
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1

    def __init__(self, gpus: int = 2) -> None:
        self.gpus = gpus
        self.errors: dict[str | tuple[str, int | None], int] = {}
        self.calls: list[str] = []
        self.open = 0

    def _enter(self, name: str, gpu: int | None = None) -> None:
        self.calls.append(name)
        if name != "nvmlInit" and not self.open:
            raise FakeError(1)
        error = self.errors.get(name, self.errors.get((name, gpu)))
        if error is not None:
            raise FakeError(error)

    def nvmlInit(self) -> None:
        self._enter("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self._enter("nvmlShutdown")
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        self._enter("nvmlSystemGetDriverVersion")
        return b"580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        self._enter("nvmlDeviceGetCount")
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> int:
        self._enter("nvmlDeviceGetHandleByIndex", index)
        return index

    def nvmlDeviceGetName(self, handle: int, /) -> str:
        self._enter("nvmlDeviceGetName", handle)
        return f"NVIDIA Test {handle}"

    def nvmlDeviceGetUtilizationRates(self, handle: int, /) -> Any:
        self._enter("nvmlDeviceGetUtilizationRates", handle)
        return SimpleNamespace(gpu=40 * handle, memory=1)

    def nvmlDeviceGetMemoryInfo(self, handle: int, /) -> Any:
        self._enter("nvmlDeviceGetMemoryInfo", handle)
        return SimpleNamespace(total=1000, used=300 + handle, free=700 - handle)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int, /) -> int:
        self._enter("nvmlDeviceGetTemperature", handle)
        return 50 + handle + sensor

    def nvmlDeviceGetPowerUsage(self, handle: int, /) -> int:
        self._enter("nvmlDeviceGetPowerUsage", handle)
        return 70_000 + handle

    def nvmlDeviceGetClockInfo(self, handle: int, type: int, /) -> int:
        self._enter("nvmlDeviceGetClockInfo", handle)
        return 1980 * type - handle

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int, /) -> int:
        self._enter("nvmlDeviceGetCurrentClocksEventReasons", handle)
        return 0x24 * handle


THROTTLED = ("sw_power_cap", "sw_thermal_slowdown")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


FIRST = GpuReading(0, "NVIDIA Test 0", "580.95.05", 0, 1000, 300, 700, 50, 70_000, 1980, ())
SECOND = GpuReading(1, "NVIDIA Test 1", "580.95.05", 40, 1000, 301, 699, 51, 70_001, 1979, THROTTLED)


@pytest.fixture
def nvml() -> FakeNvml:
    return FakeNvml()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def telemetry(nvml: FakeNvml, clock: Clock) -> Telemetry:
    return Telemetry(nvml, retry_seconds=10, clock=clock)


def test_two_gpus(telemetry: Telemetry, nvml: FakeNvml) -> None:
    assert nvml.calls == []
    assert telemetry.state == "not read yet"
    assert telemetry.read() == (FIRST, SECOND)
    assert telemetry.state == ""
    telemetry.read()
    assert nvml.calls.count("nvmlInit") == 1
    assert nvml.calls.count("nvmlDeviceGetName") == 2


def test_no_library_is_asked_for_once(telemetry: Telemetry, nvml: FakeNvml, clock: Clock) -> None:
    nvml.errors["nvmlInit"] = LIBRARY_NOT_FOUND
    assert telemetry.read() == ()
    assert telemetry.state == "no NVIDIA driver library"
    clock.now += 1e6
    assert telemetry.read() == ()
    assert nvml.calls == ["nvmlInit"]


def test_a_driver_that_comes_later(telemetry: Telemetry, nvml: FakeNvml, clock: Clock) -> None:
    nvml.errors["nvmlInit"] = DRIVER_NOT_LOADED
    assert telemetry.read() == ()
    assert telemetry.state == "NVML does not start: error 9"
    nvml.errors.clear()
    clock.now += 9
    assert telemetry.read() == ()
    clock.now += 1
    assert telemetry.read() == (FIRST, SECOND)
    assert telemetry.state == ""


def test_a_start_that_fails_half_way_is_undone(telemetry: Telemetry, nvml: FakeNvml, clock: Clock) -> None:
    nvml.errors["nvmlDeviceGetCount"] = 999
    assert telemetry.read() == ()
    assert nvml.open == 0
    nvml.errors.clear()
    clock.now += 10
    assert telemetry.read() == (FIRST, SECOND)
    assert nvml.open == 1


def test_no_gpu() -> None:
    telemetry = Telemetry(FakeNvml(gpus=0))
    assert telemetry.read() == ()
    assert telemetry.state == "the NVIDIA driver sees no GPU"


@pytest.mark.parametrize(
    ("function", "fields"),
    [
        ("nvmlDeviceGetUtilizationRates", {"utilization"}),
        ("nvmlDeviceGetMemoryInfo", {"memory_total", "memory_used", "memory_free"}),
        ("nvmlDeviceGetTemperature", {"temperature"}),
        ("nvmlDeviceGetPowerUsage", {"power"}),
        ("nvmlDeviceGetClockInfo", {"sm_clock"}),
        ("nvmlDeviceGetCurrentClocksEventReasons", {"throttles"}),
        ("nvmlDeviceGetName", {"name"}),
    ],
)
def test_what_is_not_supported_is_unknown(
    function: str, fields: set[str], telemetry: Telemetry, nvml: FakeNvml
) -> None:
    nvml.errors[function, 1] = NOT_SUPPORTED
    first, second = telemetry.read()
    assert first == FIRST
    unknown = {f for f in GpuReading.__slots__ if getattr(second, f) is None}
    assert unknown == fields
    assert telemetry.state == ""


def test_a_lost_gpu_and_its_return(telemetry: Telemetry, nvml: FakeNvml, clock: Clock) -> None:
    telemetry.read()
    nvml.errors["nvmlDeviceGetTemperature", 1] = GPU_IS_LOST
    assert telemetry.read() == (FIRST, GpuReading(1, "NVIDIA Test 1", "580.95.05"))
    assert telemetry.state == "GPU 1 (NVIDIA Test 1): error 15"
    nvml.errors["nvmlDeviceGetHandleByIndex", 1] = GPU_IS_LOST
    clock.now += 10
    assert telemetry.read() == (FIRST, GpuReading(1, None, "580.95.05"))
    assert telemetry.state == "GPU 1 cannot be opened"
    nvml.errors.clear()
    clock.now += 9
    assert telemetry.read()[1].power is None
    clock.now += 1
    assert telemetry.read() == (FIRST, SECOND)
    assert telemetry.state == ""
    assert nvml.calls.count("nvmlInit") == 3
    assert nvml.open == 1


def test_trouble_that_passes_by_itself(telemetry: Telemetry, nvml: FakeNvml) -> None:
    telemetry.read()
    nvml.errors["nvmlDeviceGetPowerUsage"] = 999
    assert [r.power for r in telemetry.read()] == [None, None]
    nvml.errors.clear()
    assert telemetry.read() == (FIRST, SECOND)
    assert telemetry.state == ""


def test_close(telemetry: Telemetry, nvml: FakeNvml) -> None:
    telemetry.read()
    telemetry.close()
    telemetry.close()
    assert nvml.open == 0
    assert nvml.calls.count("nvmlShutdown") == 1
    assert telemetry.read() == ()
    assert telemetry.state == "closed"
    assert nvml.calls.count("nvmlInit") == 1


def test_close_before_the_first_read(telemetry: Telemetry, nvml: FakeNvml) -> None:
    telemetry.close()
    assert telemetry.read() == ()
    assert nvml.calls == []


def test_many_threads_open_nvml_once(telemetry: Telemetry, nvml: FakeNvml) -> None:
    start = threading.Barrier(8)
    seen: list[tuple[GpuReading, ...]] = []

    def work() -> None:
        start.wait()
        seen.extend(telemetry.read() for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == [(FIRST, SECOND)] * 160
    assert nvml.calls.count("nvmlInit") == 1


def test_the_real_module_never_raises() -> None:
    readings, state = snapshot()
    assert all(r.name for r in readings) if readings else state != ""


def test_importing_loads_no_nvml_and_reading_warns_of_nothing() -> None:
    code = (
        "import sys, infera_gpu.telemetry as t; assert 'pynvml' not in sys.modules; "
        "t.snapshot(); assert 'pynvml' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
