"""Telemetry through nvidia-ml-py and a library that stands in for the driver's: there, absent, failing half-way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler to build the stand-in with"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the driver's library is looked for as on Linux"),
]

READ = """
import json, sys
from dataclasses import asdict
from infera_gpu.telemetry import Telemetry

telemetry = Telemetry(retry_seconds=0)
for _ in range(int(sys.argv[1])):
    readings = telemetry.read()
    print(json.dumps([telemetry.state, [asdict(r) for r in readings]]))
telemetry.close()
print(json.dumps([telemetry.state, [asdict(r) for r in telemetry.read()]]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stand-in for libnvidia-ml.so.1."""
    pytest.importorskip("pynvml")
    folder = tmp_path_factory.mktemp("nvml")
    assert COMPILER is not None
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return folder


def read(times: int, folder: Path | None, **environment: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(state, readings) of so many reads in a process of its own, and of one after closing."""
    found = {**os.environ, **environment, "LD_LIBRARY_PATH": str(folder or "")}
    command = [sys.executable, "-c", READ, str(times)]
    done = subprocess.run(command, capture_output=True, text=True, env=found, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_gpu_is_read(library: Path) -> None:
    (state, (first, second)), (closed, nothing) = read(1, library)
    assert (state, closed, nothing) == ("", "closed", [])
    assert first == {
        "index": 0,
        "name": "NVIDIA Stand-in 0",
        "driver": "580.95.05",
        "utilization": 40,
        "memory_total": 150 << 30,
        "memory_used": 50 << 30,
        "memory_free": 100 << 30,
        "temperature": 36,
        "power": 123456,
        "sm_clock": 1980,
        "throttles": ["sw_power_cap", "hw_thermal_slowdown"],
    }
    assert (second["index"], second["name"], second["utilization"]) == (1, "NVIDIA Stand-in 1", 41)


def test_what_a_gpu_does_not_know_is_unknown(library: Path) -> None:
    (state, readings), _ = read(1, library, FAKE_NVML_NO_POWER="1")
    assert state == ""
    assert [r["power"] for r in readings] == [r["throttles"] for r in readings] == [None, None]
    assert [r["temperature"] for r in readings] == [36, 36]


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_a_gpu_that_is_lost_half_way_is_unknown_and_the_other_is_read(asked: int, library: Path) -> None:
    for state, (first, second) in read(3, library, FAKE_NVML_LOST_AFTER=str(asked))[:-1]:
        assert state == "GPU 1 (NVIDIA Stand-in 1): GPU is lost"
        assert first["utilization"] == 40
        assert {second[k] for k in ("utilization", "memory_used", "temperature", "power", "sm_clock")} == {None}


def test_a_gpu_that_is_lost_between_readings_is_told(library: Path) -> None:
    states = [state for state, _ in read(3, library, FAKE_NVML_LOST_AFTER="7")]
    assert states == ["", *["GPU 1 (NVIDIA Stand-in 1): GPU is lost"] * 2, "closed"]


def test_a_driver_that_does_not_start_says_why(library: Path) -> None:
    (state, readings), _ = read(1, library, FAKE_NVML_INIT="9")
    assert state.startswith("NVML does not start: ")
    assert readings == []


def test_without_the_library_there_is_no_gpu_and_no_error() -> None:
    (state, readings), _ = read(1, None)
    if Path("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1").exists():
        pytest.skip("this machine has the driver's library")
    assert (state, readings) == ("no NVIDIA driver library", [])
