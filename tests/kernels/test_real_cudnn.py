"""The real cuDNN, without a GPU: it takes the graphs that it is given and has plans for them, on an H200."""

from __future__ import annotations

import _ctypes
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

DRIVER = """
int cuInit(int flags) { return 100; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 0; return 0; }
int cuGetErrorName(int error, const char **name) { *name = "none"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
"""
REFUSING = (
    *("cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeIm2col", "cuTensorMapEncodeTiled"),
    *("cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel", "cuOccupancyMaxPotentialClusterSize"),
    *("cuLibraryLoadData", "cuLibraryLoadFromFile", "cuLibraryUnload", "cuLibraryGetKernel", "cuKernelGetFunction"),
    *("cuKernelSetAttribute", "cuKernelGetAttribute", "cuLinkCreate", "cuLinkAddData", "cuLinkComplete"),
    *("cuLinkDestroy", "cuDeviceGet", "cuCtxGetCurrent", "cuCtxGetLimit", "cuCtxPushCurrent", "cuCtxPopCurrent"),
    "cuStreamGetCtx",
)
"""What cuDNN wants of a driver to make plans, which for some it compiles: these never do anything."""


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
    source.write_text(DRIVER + "".join(f"int {name}(void) {{ return 100; }}\n" for name in REFUSING))
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", driver, source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([*folders(), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.real_cudnn"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [*map(json.loads, done.stdout.splitlines())]
    assert len(rows) == 22
    assert [row for row in rows if not row.get("plans") or not row["restored"]] == []


FOUND = """
import ctypes, sys
from infera_kernels.launch import cudnn
other = cudnn.find if sys.argv[2:] else lambda name: None
cudnn.find = lambda name, off="": ctypes.CDLL(sys.argv[1]) if name == "cudnn" else other(name)
print(cudnn.installed())
"""
"""Says which release there is of the library that is named; cuBLASLt is found with one word more."""


@pytest.mark.parametrize(
    ("without", "more", "used"), [("none", ["blas"], True), ("graph", ["blas"], False), ("none", [], False)]
)
def test_it_is_not_used_where_it_would_end_the_process(
    tmp_path: Path, without: str, more: list[str], used: bool
) -> None:
    """Its parts lie where it does not find cuBLASLt by itself; where the system looks, another thing has a part's
    name."""
    at = next((folder for folder in folders() if Path(folder, "libcudnn.so.9").exists()), None)
    if at is None:
        pytest.skip("needs cuDNN: make test-cudnn")
    place = tmp_path / "nvidia" / "cudnn" / "lib"
    place.mkdir(parents=True)
    for part in Path(at).iterdir():
        if without not in part.name:
            (place / part.name).symlink_to(part)
    if used:
        (tmp_path / "libcudnn_graph.so.9").write_bytes(Path(_ctypes.__file__).read_bytes())
    command = [sys.executable, "-c", FOUND, str(place / "libcudnn.so.9"), *more]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert bool(done.stdout.strip()) is used
    assert ("cuDNN is not used" in done.stderr) is not used
