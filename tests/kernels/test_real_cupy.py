"""Kernels bound to CuPy's own arrays, which lie in host memory: `make test-cupy`. Nothing here runs on a GPU."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy")
pytest.importorskip("triton")

from bench.build import bert
from bench.gpu_operators import bound
from infera_gpu import doctor
from infera_gpu.devices.cuda import releases
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_gpu.spec import spec_of
from infera_kernels.launch import RecordingLauncher
from tests.cases import compute, covered
from tests.fake_cublaslt import FakeCublasLt, with_library
from tests.real_cupy import HostCudaDevice

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parents[2]


def test_every_kernel_binds_to_cupys_arrays() -> None:
    """In every binding of every case: what a kernel asks of an array CuPy has, and nothing copies one to the host."""
    device, bindings, problems = HostCudaDevice(), 0, list[str]()
    with device.running():
        for op, case, variants in covered("triton"):
            for site, ins in variants:
                specs = [spec_of(w) for w in compute(op, site, ins)[: case.n_outs]]
                try:
                    bindings += sum(1 for _ in bound(device, op, site, ins, specs))
                except Exception as error:
                    problems.append(f"{op.qualified} {case.id}: {type(error).__name__}: {error}")
    assert not problems
    assert bindings > 5000


def test_a_model_is_planned_bound_and_run() -> None:
    graph = load_graph(bert(layers=1, hidden=16, heads=2, inner=16, vocabulary=50))
    ids = np.random.default_rng(1).integers(0, 50, (2, 7))
    library = FakeCublasLt()
    launcher = with_library(RecordingLauncher(), library)
    session = Session(graph, HostCudaDevice(launcher))
    runs = []
    for _ in range(3):
        before = len(launcher.launches)
        out = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
        runs.append([launch.kernel for launch in launcher.launches[before:]])
        assert {a.shape[:1] for a in out.values()} == {(2,)}
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) > 5
    assert len(library.asked) >= 3 * 3  # merged projections, those of attention, one of the feed-forward part


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fake driver got of `cupy_launches`, in a process of its own, where it is found as the driver."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler, to build a driver that records launches")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fakecuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True, timeout=60)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cupy_launches", str(folder / "kernels")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_driver_gets_what_a_launch_was_bound_to(launched: dict[str, Any]) -> None:
    """Through the driver's interface: arguments byte for byte, sizes, the stream, the attribute of a kernel that comes
    early, in the order of the calls."""
    arrays, kernels, launches = launched["arrays"], launched["kernels"], launched["launches"]
    assert [launch["kernel"] for launch in launches] == ["softmax_kernel", "matmul_kernel", "softmax_kernel"]
    for launch in launches:
        kernel = kernels[launch["kernel"]]
        assert launch["block"] == [kernel["threads"], 1, 1]
        assert launch["shared"] == kernel["shared"]
        assert launch["stream"] == 0x5A5A0
        assert launch["extra"] == 0
        assert launch["attribute"] == [6, 1]
    softmax, matmul, again = launches
    assert softmax == again
    # softmax_kernel(x, out, rows, cols, x_stride, out_stride) and Triton's two areas of scratch
    assert kernels["softmax_kernel"]["types"] == ["*fp16", "*fp16", "i32", "i32", "i32", "i32"]
    want = struct.pack("<QQiiiiQQ", arrays["x"], arrays["out"], 7, 1000, 1000, 1000, 0, 0)
    assert bytes.fromhex(softmax["parameters"]) == want
    assert softmax["grid"] == [7, 1, 1]
    assert softmax["block"] == [128, 1, 1]

    assert kernels["matmul_kernel"]["types"][:3] == ["*fp16"] * 3
    parameters = bytes.fromhex(matmul["parameters"])
    assert struct.unpack_from("<QQQ", parameters) == (arrays["a"], arrays["b"], arrays["c"])
    assert parameters[-16:] == bytes(16)
    assert matmul["grid"] == [4, 1, 1]
    assert matmul["block"] == [256, 1, 1]


def test_a_kernel_asks_for_more_than_48_kib_of_shared_memory_once(launched: dict[str, Any]) -> None:
    kernels = launched["kernels"]
    assert kernels["matmul_kernel"]["shared"] > 48 << 10
    assert kernels["matmul_kernel"]["set"] == [8, kernels["matmul_kernel"]["shared"]]
    assert kernels["softmax_kernel"]["set"] == [0, 0]


def test_what_the_driver_refuses_has_its_number(launched: dict[str, Any]) -> None:
    """By which the device knows whether the GPU is lost."""
    assert launched["status"] == 700
    assert launched["unloaded"].startswith("softmax_kernel: the driver (CUDA 13.0) does not load it: ")


def _asked() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call of a function of `xp`, outside of what is NumPy's alone: its name, the call, and where."""
    for folder in (ROOT / "infera_gpu", ROOT / "kernels" / "infera_kernels"):
        for path in sorted(folder.rglob("*.py")):
            if {"cpu", "jit"} & set(path.parts):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    _, xp, name = f".{ast.unparse(node.func)}".rpartition(".xp.")
                    if xp and name.replace(".", "").isidentifier():
                        yield name, node, f"{path.name}:{node.lineno}"


def test_what_is_asked_of_cupy_is_there() -> None:
    """Names, and arguments as far as CuPy says what it takes."""
    import cupy

    problems, seen = [], set()
    for name, call, where in _asked():
        found: Any = cupy
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            problems.append(f"{where}: there is no cupy.{name}")
            continue
        seen.add(name)
        if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
            continue
        try:
            signature = inspect.signature(found)
        except ValueError:  # what is compiled may not say
            continue
        try:
            signature.bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})
        except TypeError as error:
            problems.append(f"{where}: cupy.{name}: {error}")
    assert not problems
    assert len(seen) > 50


def test_doctor_names_the_extra_that_is_installed() -> None:
    """Of the extras, the one whose CuPy this is; there may be a GPU or not."""
    (found,) = doctor._cupy()
    made, _ = releases()
    assert made is not None
    package = f"cupy-cuda{made[0]}x"
    assert found.detail.startswith(f"{package} {version(package)} for CUDA {made[0]}")
    assert found.state == (
        "ok" if found.detail.endswith(("for CUDA 12", "for CUDA 13", "the CPU is used")) else "problem"
    )


def test_the_extra_brings_what_compiles_cupys_functions() -> None:
    """And doctor says so. cuBLAS, which is half a gigabyte, is an extra of its own."""
    findings = {finding.subject: finding for finding in doctor.examine()}
    assert findings["NVRTC"].state == "ok"
    compiled_for = releases()[0]
    assert compiled_for is not None
    assert findings["NVRTC"].detail.startswith(f"{compiled_for[0]}.")
    assert findings["cuBLAS"].state == findings["cuBLASLt"].state
