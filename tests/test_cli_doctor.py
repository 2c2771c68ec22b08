"""`infera doctor`."""

from __future__ import annotations

import re
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from infera_gpu import doctor, telemetry
from infera_gpu.devices import cuda
from infera_kernels.cpu import blas, packed
from tests import fake_cupy
from tests.commandline import infera


def test_doctor_covers_every_subject() -> None:
    status, out, err = infera("doctor")
    assert err == ""
    for subject in (
        "Python",
        "BLAS",
        "NVIDIA driver",
        "CuPy",
        "Triton",
        "cuBLASLt",
        "Device 'auto'",
        "Cache",
        "onnxruntime",
    ):
        assert subject in out
    assert status == (1 if "problem" in out else 0)


def test_doctor_counts_operators_as_ops_does() -> None:
    listed = infera("ops", "--device", "cpu")[1].split(" operators")[0]
    assert re.search(rf"Operators +ok +{listed} in \d+ versions", infera("doctor")[1])


def test_doctor_says_unknown_where_a_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("no such bus")
        yield

    monkeypatch.setattr(doctor, "_CHECKS", (("Bus", broken),))
    assert list(doctor.examine()) == [doctor.Finding("Bus", "unknown", "could not be determined: OSError: no such bus")]


def test_doctor_tells_unknown_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    full = telemetry.GpuReading(0, "H200", "570.1", 0, 2_000_000_000, 0, 2_000_000_000, 30, 70_000)
    readings = (full, telemetry.GpuReading(1))
    monkeypatch.setattr(telemetry, "snapshot", lambda: (readings, "GPU 1 cannot be opened"))
    found = {f.subject: f for f in doctor._driver()}
    assert found["NVIDIA driver"] == doctor.Finding("NVIDIA driver", "ok", "570.1")
    assert (found["GPU 0"].state, found["GPU 1"].state, found["NVML"].state) == ("ok", "unknown", "problem")
    assert found["GPU 0"].detail == "H200: 2 GB of 2 GB memory free, 30 °C, 70 W, busy 0 %"
    assert found["GPU 1"].detail.count("unknown") == 6
    monkeypatch.setattr(telemetry, "snapshot", lambda: ((), "no NVIDIA driver library"))
    assert [f.state for f in doctor._driver()] == ["absent"]


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("13.6.0", "problem"),
        ("14.0.0", "ok"),
        ("14.1.1", "ok"),
        ("15.0.0a1", "problem"),
        ("15.1.0", "problem"),
        ("14", "ok"),
        ("13", "problem"),
        ("15", "problem"),
        ("14.0a1", "ok"),
        ("15.0a1", "problem"),
        ("?", "problem"),
    ],
)
@pytest.mark.parametrize("package", doctor.CUPY_PACKAGES)
def test_doctor_knows_which_releases_of_cupy_are_tested(
    package: str, version: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", {package: version}.get)
    monkeypatch.setattr(cuda, "releases", lambda: (None, None))
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    (found,) = doctor._cupy()
    wrong = (
        f"{package} {version} is not among the tested releases, 14.0 to below 15.0; pip install 'infera-gpu[cuda12]' "
        "or '[cuda13]' brings one"
    )
    assert found == doctor.Finding("CuPy", state, f"{package} {version}" if state == "ok" else wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "there is no GPU")
    (found,) = doctor._cupy()
    assert found.state == "problem"
    assert found.detail == (f"{package} {version}: there is no GPU" if state == "ok" else f"{wrong}. there is no GPU")


@pytest.mark.parametrize(
    ("made", "supported", "says"),
    [
        ((12, 9), (13, 1), "for CUDA 12"),
        ((13, 2), (13, 0), "for CUDA 13"),
        ((13, 2), (13, 0), "for CUDA 13: no usable driver"),
        ((12, 9), (11, 8), "for CUDA 12: the driver supports CUDA 11.8"),
        ((13, 2), (12, 4), "for CUDA 13: the driver supports CUDA 12.4; infera-gpu[cuda12] brings one for that"),
    ],
)
def test_doctor_says_which_cuda_cupy_is_for(
    made: tuple[int, int], supported: tuple[int, int] | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", {"cupy-cuda12x": "14.2.0"}.get)
    monkeypatch.setattr(cuda, "releases", lambda: (made, supported))
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "no usable driver" if ":" in says else None)
    (found,) = doctor._cupy()
    assert found == doctor.Finding("CuPy", "problem" if ":" in says else "ok", f"cupy-cuda12x 14.2.0 {says}")


@pytest.mark.parametrize("there", [True, False])
def test_doctor_knows_what_cupy_loads_of_cuda(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    def found() -> tuple[int, int]:
        if not there:
            raise RuntimeError("Failure finding\n'libnvrtc.so.13'")
        return 13, 1

    def module(name: str) -> Any:
        assert name == "cupy_backends.cuda.libs.cublas"
        if not there:
            raise ImportError("libcublas.so.13: no such file")

    monkeypatch.setattr(cuda, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda, "import_module", module)
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nvrtc=SimpleNamespace(getVersion=found)))
    nvrtc, cublas = doctor._libraries()
    if there:
        assert (nvrtc.state, cublas.state) == ("ok", "ok")
        assert nvrtc.detail.startswith("13.1 ")
    else:
        assert (nvrtc.state, cublas.state) == ("problem", "absent")
        assert "Failure finding 'libnvrtc.so.13'; infera-gpu[cuda12]" in nvrtc.detail
        assert "[cublas13]" in cublas.detail


def test_doctor_does_not_look_for_cuda_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert not list(doctor._libraries())


@pytest.mark.parametrize(
    ("nvml", "state", "says"),
    [
        ("no NVIDIA driver library", "ok", "for CUDA 13, and no driver: the CPU is used"),
        ("the NVIDIA driver sees no GPU", "problem", "for CUDA 13: CuPy has no NVIDIA driver here"),
    ],
)
def test_cupy_without_a_driver_is_no_problem_of_its_own(
    nvml: str, state: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fake_cupy.module(error=RuntimeError("CUDA driver version is insufficient for CUDA runtime version"))
    fake_cupy.install(monkeypatch, old)
    monkeypatch.setattr(cuda, "releases", lambda: ((13, 2), None))
    monkeypatch.setattr(doctor, "_version", {"cupy-cuda13x": "14.2.0"}.get)
    monkeypatch.setattr(telemetry, "snapshot", lambda: ((), nvml))
    (found,) = doctor._cupy()
    assert (found.state, found.detail) == (state, f"cupy-cuda13x 14.2.0 {says}")


@pytest.mark.parametrize(
    ("version", "state"), [("3.5.1", "problem"), ("3.6.0", "ok"), ("3.9.0+git", "ok"), ("3.10.0", "problem")]
)
def test_doctor_knows_which_releases_of_triton_are_tested(
    version: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", {"triton": version}.get)
    wrong = f"{version} is not among the tested releases, 3.6 to below 3.10"
    (found,) = doctor._triton()
    assert found == doctor.Finding("Triton", state, version if state == "ok" else wrong)  # type: ignore[arg-type]


def test_ranges_of_doctor_are_those_of_the_package() -> None:
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    low, high = ".".join(map(str, doctor.CUPY_RANGE[0])), doctor.CUPY_RANGE[1][0]
    first, below = (".".join(map(str, release)) for release in doctor.TRITON_RANGE)
    for cuda_release in (12, 13):
        cupy, triton, *libraries = extras[f"cuda{cuda_release}"]
        assert cupy == f"cupy-cuda{cuda_release}x>={low},<{high}"
        assert triton == f"triton>={first},<{below}"
        assert all(re.search(rf">={cuda_release}\b", library) for library in libraries)


def test_doctor_says_whether_weights_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = packed.inner() is not None
    assert [f.state for f in doctor._loops()] == ["ok" if known else "absent"]
    monkeypatch.setattr(packed, "inner", lambda: None)
    monkeypatch.setattr(blas, "openblas", lambda: None)
    (found,) = doctor._loops()
    assert found.state == "absent"
    assert "of NumPy's BLAS are hidden or not known" in found.detail
    assert "2.1 to 2.4" in found.detail


@pytest.mark.parametrize(
    ("place", "state", "says"),
    [
        ("", "ok", "0.0 MB"),
        ("new/cache", "ok", "0.0 MB"),
        ("file", "problem", "file is no folder"),
        ("file/cache", "problem", "file is no folder"),
        ("dangling", "problem", "dangling is no folder"),
    ],
)
def test_doctor_sees_whether_the_cache_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, state: str, says: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / place))
    monkeypatch.setattr(doctor, "_CHECKS", (("Cache", doctor._cache),))
    status, out, _ = infera("doctor")
    (found,) = doctor.examine()
    assert (found.state, status) == (state, 1 if state == "problem" else 0)
    assert says in found.detail
    assert state in out


def test_doctor_sees_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / "cache"))

    def refused(dir: Path) -> None:
        assert dir == tmp_path
        raise PermissionError

    monkeypatch.setattr(doctor, "TemporaryFile", refused)  # root may write anywhere
    (found,) = doctor._cache()
    assert found.state == "problem"
    assert "cannot be written to" in found.detail


@pytest.mark.parametrize("own", [True, False])
def test_doctor_counts_and_tries_the_whole_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    cache = tmp_path / "infera-gpu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("INFERA_CACHE_DIR", raising=False)
    if own:
        monkeypatch.setenv("INFERA_CACHE_DIR", str(cache))
    for name in ("models", "kernels", "graphs", "tuned"):
        (cache / name).mkdir(parents=True)
        (cache / name / "file").write_bytes(bytes(1_000_000))
    tried = []

    def writes(dir: Path) -> Any:
        tried.append(dir)
        if dir.name == "tuned":
            raise PermissionError
        return nullcontext()

    (found,) = doctor._cache()
    assert (found.state, found.detail) == ("ok", f"{cache}, 4.0 MB")
    monkeypatch.setattr(doctor, "TemporaryFile", writes)
    (found,) = doctor._cache()
    assert (found.state, len(tried)) == ("problem", 5)
    assert f"{cache / 'tuned'} cannot be written to" in found.detail
