"""What GPU sections are run with, and what is made of what they return: outcomes, a table and a file."""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from bench.environment import commit, cpu_model, package_version
from infera_gpu.devices.cuda import LOST
from infera_gpu.errors import DeviceLostError
from infera_gpu.telemetry import Telemetry, snapshot
from infera_kernels.launch import cublaslt, cudnn
from infera_kernels.launch.devices import Device

PACKAGES = (
    *("infera-gpu", "numpy", "cupy-cuda12x", "cupy-cuda13x", "cupy", "triton", "onnx", "onnxruntime", "torch"),
    *("ml_dtypes", "nvidia-ml-py"),
)


def loses_the_gpu(error: BaseException) -> bool:
    """Whether no call of CUDA works in this process after it, which CuPy's errors tell by `status`, PyTorch's by
    `error_code`."""
    numbers = {getattr(error, name, None) for name in ("status", "error_code")}
    return isinstance(error, DeviceLostError) or not LOST.isdisjoint(numbers)


def first_line(error: Exception) -> str:
    """An error on one line, of at most 300 characters."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {text}"[:300]


class CheckFailed(Exception):
    """A check found something wrong: what, in one line, and everything it learned."""

    def __init__(self, summary: str, facts: Mapping[str, Any]) -> None:
        super().__init__(summary)
        self.facts = facts


@dataclass(frozen=True)
class Tried:
    """What a case came to: what is wrong (empty: nothing), what it found, of the types that JSON has, and whether it
    took the GPU or its life from its process."""

    problem: str
    found: Any = None
    lost: bool = False

    @classmethod
    def of(cls, check: Callable[[], Any]) -> Tried:
        """Runs it. Raises what loses the GPU: no case after it can be run in this process."""
        try:
            return cls("", check())
        except Exception as error:
            if loses_the_gpu(error):
                raise
            return cls.failed(error)

    @classmethod
    def failed(cls, error: Exception) -> Tried:
        """With the place where it was raised, or what a check found all the same."""
        if isinstance(error, CheckFailed):
            return cls(str(error), plain(error.facts))
        *_, frame = traceback.extract_tb(error.__traceback__) or [None]
        where = f" ({Path(frame.filename).name}:{frame.lineno})" if frame else ""
        return cls(first_line(error) + where, lost=loses_the_gpu(error))


CASE_SECONDS = 60.0
"""That a case may take, compilation included, unless its section says more."""


class Cases(Protocol):
    """Runs the cases of a section, one after the other, by their names."""

    def known(self, name: str) -> Tried | None:
        """What an earlier process found, where the section goes on in this one."""
        ...

    def run(self, name: str, check: Callable[[], Any], seconds: float = CASE_SECONDS) -> Tried:
        """See `Tried.of`. A case that takes longer than `seconds` may be ended, and its process with it."""
        ...


class OwnCases:
    """Cases of a section that is run in one process."""

    def known(self, name: str) -> Tried | None:
        return None

    def run(self, name: str, check: Callable[[], Any], seconds: float = CASE_SECONDS) -> Tried:
        return Tried.of(check)


@dataclass(frozen=True)
class Context:
    """`open` makes a new device, with or without `batch_invariant`; sections stop taking up work at `deadline`, by
    time.monotonic. `card` is the GPU's peaks, where it is listed; `reading` says its clock, power and temperature."""

    open: Callable[..., Any]
    deadline: float
    card: Device | None = None
    cases: Cases = field(default_factory=OwnCases)
    reading: Callable[[], Mapping[str, Any]] = dict

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


Section = Callable[[Context], tuple[str, Mapping[str, Any]]]
"""Returns a line for the table and what goes into the file. Raises CheckFailed, or whatever breaks."""


@dataclass(frozen=True)
class Outcome:
    """What became of a section; `summary` is its line of the table, `readings` are of the GPU before it and after."""

    section: str
    status: Literal["ok", "failed", "skipped"]
    seconds: float
    summary: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    readings: Sequence[Mapping[str, Any]] = ()

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: plain(value) for name, value in vars(self).items()}


def plain(value: Any) -> Any:
    """The value of the types that JSON has: names are strings, and what it does not know is told in words."""
    match value:
        case Mapping():
            return {str(k): plain(v) for k, v in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(v) for v in value]
        case None | bool() | int() | float() | str():
            return value
        case np.generic():
            return plain(value.item())
        case _:
            return str(value)


OUT_OF_TIME = "out of time; see --minutes"


def outcome_of(name: str, section: Section, context: Context, *, resumed: bool = False) -> Outcome:
    """Runs a section, unless the time is over; one that is `resumed` then tells of what it has. One that fails raises
    nothing."""
    if context.left() <= 0 and not resumed:
        return Outcome(name, "skipped", 0.0, OUT_OF_TIME)
    began, before = time.monotonic(), context.reading()
    status: Literal["ok", "failed"] = "failed"
    facts: Mapping[str, Any]
    try:
        summary, facts = section(context)
        status = "ok"
    except CheckFailed as failure:
        summary, facts = str(failure), failure.facts
    except Exception as error:
        summary, facts = first_line(error), {"traceback": traceback.format_exc()}
    return Outcome(name, status, round(time.monotonic() - began, 2), summary, facts, (before, context.reading()))


def table(outcomes: Sequence[Outcome], width: int = 0) -> str:
    """One line a section; `width` is the least of the first column."""
    width = max(width, *(len(o.section) for o in outcomes))
    return "\n".join(f"{o.section:<{width}}  {o.status:<7}  {o.seconds:7.1f} s  {o.summary}" for o in outcomes)


def write(
    directory: Path,
    gpu: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    wanted: Sequence[str],
    now: datetime,
    topic: str = "",
) -> Path:
    """The results file, of a run that began `now` and is to have the outcomes `wanted`."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(gpu.get("name", "gpu")).lower()).strip("-")
    path = directory / f"{'-'.join(filter(None, (slug, topic)))}-{now:%Y-%m-%dT%H%M%S}.json"
    record = {
        "time": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": plain(gpu),
        "cpu": cpu_model(),
        "python": sys.version.split()[0],
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "passed": [o.section for o in outcomes if o.status == "ok"] == list(wanted),
        "sections": [o.record() for o in outcomes],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


READINGS = ("sm_clock", "power", "temperature", "throttles")
"""Of `infera_gpu.telemetry.GpuReading`."""


_telemetry = cache(Telemetry)
"""Stays open, so that readings are of the moment."""


def reading_of(index: int) -> dict[str, Any]:
    """READINGS of a GPU now; None where NVML does not say."""
    found = next((r for r in _telemetry().read() if r.index == index), None)
    return {name: getattr(found, name, None) for name in READINGS}


def gpu_of(index: int) -> dict[str, Any]:
    """Name, driver and memory of a GPU that is there."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(index)
    readings, state = snapshot()
    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "memory_bytes": properties["totalGlobalMem"],
        "driver": next((r.driver for r in readings if r.index == index), None) or state,
        "cuda_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "cublaslt": cublaslt.installed(),
        "cudnn": cudnn.installed(),
    }
