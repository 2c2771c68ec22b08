"""What NVML says about the GPUs of this machine. What it does not say is None, never 0."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_UNANSWERED = frozenset({3, 4, 13, 21})
"""NVML_ERROR_NOT_SUPPORTED, _NO_PERMISSION, _FUNCTION_NOT_FOUND, _NO_DATA: one value is unknown, the GPU is well."""

_LIBRARY_NOT_FOUND = 12

THROTTLES = (
    *("gpu_idle", "applications_clocks_setting", "sw_power_cap", "hw_slowdown", "sync_boost"),
    *("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "display_clock_setting"),
)
"""nvmlClocksEventReasons, from the lowest bit on."""
_RETRY_SECONDS = 10.0


class Nvml(Protocol):
    """The part of the module pynvml (nvidia-ml-py) that is used here."""

    @property
    def NVMLError(self) -> type[Exception]: ...
    @property
    def NVML_TEMPERATURE_GPU(self) -> int: ...
    @property
    def NVML_CLOCK_SM(self) -> int: ...
    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any, /) -> str | bytes: ...
    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, /) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetClockInfo(self, handle: Any, type: int, /) -> int: ...
    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any, /) -> int: ...


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one moment; None wherever NVML gives no answer."""

    index: int
    """NVML's number, in PCI order: CUDA_VISIBLE_DEVICES does not change it."""
    name: str | None = None
    driver: str | None = None
    """Version of the driver."""
    utilization: int | None = None
    """Percent of the last sampling period (up to a second) during which a kernel ran."""
    memory_total: int | None = None
    """Bytes, as the other two."""
    memory_used: int | None = None
    memory_free: int | None = None
    temperature: int | None = None
    """Degrees Celsius."""
    power: int | None = None
    """Milliwatts."""
    sm_clock: int | None = None
    """MHz, of the multiprocessors."""
    throttles: tuple[str, ...] | None = None
    """What holds the clocks down at the moment, of THROTTLES; empty: nothing does."""


@dataclass(frozen=True, slots=True)
class _Gpu:
    """What does not change from one reading to the next. A GPU that could not be opened has no handle."""

    index: int
    handle: Any = None
    name: str | None = None


class Telemetry:
    """Reads all GPUs, as often as one likes: NVML is loaded by the first `read` and stays open until `close`.

    After a failure NVML is opened again, at most every `retry_seconds`; a machine without the driver's library is
    asked once. Nothing raises for the state of the machine: `state` says what is wrong. Safe to use from several
    threads. `nvml` replaces the module pynvml, `clock` time.monotonic.
    """

    def __init__(
        self,
        nvml: Nvml | None = None,
        *,
        retry_seconds: float = _RETRY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = nvml
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._state = "not read yet"
        self._gpus: tuple[_Gpu, ...] = ()
        self._driver: str | None = None
        self._initialised = False
        self._failed = True
        self._retry_at = -math.inf
        self._closed = False

    @property
    def state(self) -> str:
        """Why something is unknown, as of the last reading; "" where every GPU answered."""
        return self._state

    def read(self) -> tuple[GpuReading, ...]:
        """Every GPU's reading, in NVML's order; empty where there is none or none can be asked."""
        with self._lock:
            if self._closed:
                return ()
            if self._failed and self._clock() >= self._retry_at:
                self._open()
            if not self._initialised:
                return ()
            problems: list[str] = []
            readings = tuple(self._read(gpu, problems) for gpu in self._gpus)
            if problems:
                self._fail("; ".join(problems))
            elif self._gpus:
                self._state = ""
            return readings

    def close(self) -> None:
        """Releases NVML. Later reads are empty. May be called twice."""
        with self._lock:
            self._shutdown()
            self._closed = True
            self._state = "closed"

    def _fail(self, state: str, *, retry: bool = True) -> None:
        self._state = state
        if not self._failed or self._clock() >= self._retry_at:
            self._retry_at = self._clock() + self._retry_seconds if retry else math.inf
        self._failed = True

    def _open(self) -> None:
        """Opens NVML afresh and finds the GPUs."""
        self._shutdown()
        if self._nvml is None:
            try:
                import pynvml
            except ImportError:
                self._fail("the package nvidia-ml-py is not installed", retry=False)
                return
            self._nvml = pynvml
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            self._initialised = True
            self._driver = _text(self._answer(nvml.nvmlSystemGetDriverVersion))
            self._gpus = tuple(self._find(i) for i in range(nvml.nvmlDeviceGetCount()))
        except nvml.NVMLError as e:
            self._shutdown()
            absent = getattr(e, "value", None) == _LIBRARY_NOT_FOUND
            self._fail("no NVIDIA driver library" if absent else f"NVML does not start: {e}", retry=not absent)
            return
        self._failed = False
        self._state = "" if self._gpus else "the NVIDIA driver sees no GPU"

    def _find(self, index: int) -> _Gpu:
        nvml = self._module
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            return _Gpu(index, handle, _text(self._answer(nvml.nvmlDeviceGetName, handle)))
        except nvml.NVMLError:
            return _Gpu(index)

    def _shutdown(self) -> None:
        if self._initialised:
            self._initialised = False
            self._gpus = ()
            try:
                self._module.nvmlShutdown()
            except self._module.NVMLError as e:
                self._state = f"NVML does not stop: {e}"

    @property
    def _module(self) -> Nvml:
        assert self._nvml is not None, "set before NVML is first used"
        return self._nvml

    def _answer(self, ask: Callable[..., T], *args: Any) -> T | None:
        """What NVML answers, None where it has no answer to that question. Raises NVMLError for a GPU in trouble."""
        try:
            return ask(*args)
        except self._module.NVMLError as e:
            if getattr(e, "value", None) in _UNANSWERED:
                return None
            raise

    def _read(self, gpu: _Gpu, problems: list[str]) -> GpuReading:
        nvml = self._module
        if gpu.handle is None:
            problems.append(f"GPU {gpu.index} cannot be opened")
            return GpuReading(gpu.index, gpu.name, self._driver)
        try:
            rates = self._answer(nvml.nvmlDeviceGetUtilizationRates, gpu.handle)
            memory = self._answer(nvml.nvmlDeviceGetMemoryInfo, gpu.handle)
            temperature = self._answer(nvml.nvmlDeviceGetTemperature, gpu.handle, nvml.NVML_TEMPERATURE_GPU)
            power = self._answer(nvml.nvmlDeviceGetPowerUsage, gpu.handle)
            sm_clock = self._answer(nvml.nvmlDeviceGetClockInfo, gpu.handle, nvml.NVML_CLOCK_SM)
            throttles = self._answer(nvml.nvmlDeviceGetCurrentClocksEventReasons, gpu.handle)
        except nvml.NVMLError as e:
            problems.append(f"GPU {gpu.index} ({gpu.name or 'name unknown'}): {e}")
            return GpuReading(gpu.index, gpu.name, self._driver)
        return GpuReading(
            gpu.index,
            gpu.name,
            self._driver,
            utilization=None if rates is None else int(rates.gpu),
            memory_total=None if memory is None else int(memory.total),
            memory_used=None if memory is None else int(memory.used),
            memory_free=None if memory is None else int(memory.free),
            temperature=temperature,
            power=power,
            sm_clock=sm_clock,
            throttles=None if throttles is None else tuple(n for i, n in enumerate(THROTTLES) if throttles >> i & 1),
        )


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def snapshot() -> tuple[tuple[GpuReading, ...], str]:
    """One reading of all GPUs, and the state of Telemetry after it."""
    telemetry = Telemetry()
    readings = telemetry.read()
    state = telemetry.state
    telemetry.close()
    return readings, state
