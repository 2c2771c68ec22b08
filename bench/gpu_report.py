"""What `bench.gpu_check` runs sections with, and makes of what they return: a table and a file."""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from bench.environment import commit, cpu_model, package_version
from infera_kernels.launch.devices import Device

PACKAGES = (
    *("infera-gpu", "numpy", "cupy-cuda12x", "cupy-cuda13x", "cupy", "triton", "onnx", "onnxruntime", "torch"),
    *("ml_dtypes", "nvidia-ml-py"),
)


@dataclass(frozen=True)
class Context:
    """`open` makes a new device; sections stop taking up work at `deadline`, by time.monotonic. `card` is the GPU's
    peaks, where it is listed."""

    open: Callable[[], Any]
    deadline: float
    card: Device | None = None

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


class CheckFailed(Exception):
    """A check found something wrong: what, in one line, and everything it learned."""

    def __init__(self, summary: str, facts: Mapping[str, Any]) -> None:
        super().__init__(summary)
        self.facts = facts


Section = Callable[[Context], tuple[str, Mapping[str, Any]]]
"""Returns a line for the table and what goes into the file. Raises CheckFailed, or whatever breaks."""


@dataclass(frozen=True)
class Outcome:
    """What became of a section; `summary` is its line of the table."""

    section: str
    status: Literal["ok", "failed", "skipped"]
    seconds: float
    summary: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def check(sections: Mapping[str, Section], context: Context) -> list[Outcome]:
    """Runs the sections in order. One that fails does not stop the others; none starts after the deadline."""
    outcomes = []
    for name, section in sections.items():
        if context.left() <= 0:
            outcomes.append(Outcome(name, "skipped", 0.0, "out of time; see --minutes"))
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        status: Literal["ok", "failed"] = "failed"
        facts: Mapping[str, Any]
        try:
            summary, facts = section(context)
            status = "ok"
        except CheckFailed as failure:
            summary, facts = str(failure), failure.facts
        except Exception as error:
            summary = f"{type(error).__name__}: {error}".partition("\n")[0]
            facts = {"traceback": traceback.format_exc()}
        outcomes.append(Outcome(name, status, round(time.monotonic() - began, 2), summary, facts))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a section."""
    width = max(len(o.section) for o in outcomes)
    return "\n".join(f"{o.section:<{width}}  {o.status:<7}  {o.seconds:7.1f} s  {o.summary}" for o in outcomes)


def write(directory: Path, gpu: Mapping[str, Any], outcomes: Sequence[Outcome], now: datetime, topic: str = "") -> Path:
    """The results file."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(gpu.get("name", "gpu")).lower()).strip("-")
    path = directory / f"{'-'.join(filter(None, (slug, topic)))}-{now:%Y-%m-%dT%H%M}.json"
    record = {
        "time": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": dict(gpu),
        "cpu": cpu_model(),
        "python": sys.version.split()[0],
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "passed": all(o.status == "ok" for o in outcomes),
        "sections": [asdict(o) for o in outcomes],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return path


def gpu_of(index: int) -> dict[str, Any]:
    """Name, driver and memory of a GPU that is there."""
    import cupy

    from infera_gpu.telemetry import snapshot

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
    }
