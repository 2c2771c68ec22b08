"""The real cuDNN, without a GPU: it takes the graphs that it is given and has plans for them, on an H200."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

DRIVER = (
    *("cuGetErrorString", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload"),
    *("cuTensorMapEncodeIm2col", "cuTensorMapEncodeTiled"),
)
"""What cuDNN's libraries want of a driver to be loaded."""


def folders() -> list[str]:
    """Of NVIDIA's libraries among Python's packages."""
    found = find_spec("nvidia")
    places = [] if found is None else found.submodule_search_locations or []
    return [str(path) for place in places for path in Path(place).glob("*/lib")]


def test_it_has_plans_for_what_it_is_asked(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not any(Path(folder, "libcudnn.so.9").exists() for folder in folders()):
        pytest.skip("needs cuDNN and a C compiler: make test-cudnn")
    source, driver = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER))
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", driver, source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([*folders(), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.real_cudnn"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["name"]: row["plans"] for row in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 10
    assert {name: plans for name, plans in found.items() if plans != [True, True, True]} == {}
