"""What this machine offers and what infera will do with it. Nothing that cannot be determined is guessed."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Literal, TypeAlias

State: TypeAlias = Literal["ok", "absent", "unknown", "problem"]

Release: TypeAlias = tuple[int, int]

CUPY_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
CUPY_RANGE = ((14, 0), (15, 0))
TRITON_RANGE = ((3, 6), (3, 10))
"""The releases that are tested: from, and below. Of Triton compiler and launch interface count."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. `absent` is a thing that is not here and need not be; `problem` is one to act on."""

    subject: str
    state: State
    detail: str


def examine() -> Iterator[Finding]:
    """Every finding, one at a time: some take a second. Raises nothing: a check that fails is an unknown."""
    for subject, check in _CHECKS:
        try:
            yield from check()
        except Exception as error:
            yield Finding(subject, "unknown", f"could not be determined: {type(error).__name__}: {error}")


def _python() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _blas() -> Iterator[Finding]:
    import numpy as np
    from threadpoolctl import threadpool_info

    libraries = [lib for lib in threadpool_info() if lib["user_api"] == "blas"]
    if not libraries:
        yield Finding("BLAS", "unknown", f"NumPy {np.__version__} uses a BLAS that threadpoolctl does not know")
    for lib in libraries:
        yield Finding(
            "BLAS",
            "ok",
            f"NumPy {np.__version__} with {lib['internal_api']} {lib.get('version') or '(version unknown)'} for "
            f"{lib.get('architecture') or 'an unknown processor'}, {lib['num_threads']} threads on {os.cpu_count()} "
            "processors",
        )


def _loops() -> Iterator[Finding]:
    from infera_kernels.cpu.blas import openblas
    from infera_kernels.cpu.packed import inner

    if inner() is not None:
        yield Finding("BLAS loops", "ok", "weights are laid out once for the loops that OpenBLAS' products are made of")
        return
    found = openblas()
    what = f"OpenBLAS {found.version} for {found.architecture}" if found else "NumPy's BLAS"
    yield Finding(
        "BLAS loops",
        "absent",
        f"the inner loops of {what} are hidden or not known, and np.matmul lays weights out in every call, which is "
        "slower; on x86-64 with AVX2 pip install 'infera-gpu[blas]' brings known ones, and NumPy 2.1 to 2.4 have them",
    )


def _processes() -> Iterator[Finding]:
    from infera_gpu.devices.processes import unavailable
    from infera_gpu.devices.worker_process import VARIABLE

    why = unavailable()
    yield Finding(
        "Worker processes",
        "absent" if why else "ok",
        f"{why}: threads make the parts of a step on the CPU, which is slower where they are small"
        if why
        else f"with several threads they make parts of a step on the CPU; {VARIABLE}=0 leaves it to threads",
    )


def _numba() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        yield Finding("numba", "ok", f"{version('numba')} compiles kernels for the CPU")
    except PackageNotFoundError:
        yield Finding(
            "numba", "absent", "the CPU runs NumPy's kernels; pip install 'infera-gpu[jit]' compiles faster ones"
        )


def _driver() -> Iterator[Finding]:
    """The driver and every GPU, as NVML tells it."""
    from infera_gpu.telemetry import snapshot

    readings, state = snapshot()
    if not readings:
        yield Finding("NVIDIA driver", "absent" if _no_driver(state) else "unknown", state)
        return
    versions = {r.driver for r in readings if r.driver}
    yield Finding("NVIDIA driver", "ok" if versions else "unknown", ", ".join(versions) or "NVML tells no version")
    for r in readings:
        memory = f"{_known(r.memory_free, 1e-9, ' GB')} of {_known(r.memory_total, 1e-9, ' GB')} memory free"
        rest = (
            f"{_known(r.temperature, 1, ' °C')}, {_known(r.power, 1e-3, ' W')}, busy {_known(r.utilization, 1, ' %')}"
        )
        yield Finding(
            f"GPU {r.index}",
            "ok" if r.name and r.memory_free is not None else "unknown",
            f"{r.name or 'name unknown'}: {memory}, {rest}",
        )
    if state:
        yield Finding("NVML", "problem", state)


def _no_driver(state: str) -> bool:
    """Whether it is for want of a driver that NVML tells nothing."""
    return state.startswith("no ")


def _known(value: float | None, scale: float, unit: str) -> str:
    return "unknown" if value is None else f"{value * scale:,.4g}{unit}"


def _cupy() -> Iterator[Finding]:
    from infera_gpu.devices.cuda import NO_DRIVER, releases, why_unavailable
    from infera_gpu.telemetry import snapshot

    installed = [f"{name} {found}" for name in CUPY_PACKAGES if (found := _version(name))]
    if len(installed) > 1:
        yield Finding("CuPy", "problem", f"{' and '.join(installed)} overwrite each other: pip uninstall all but one")
        return
    reason = why_unavailable()
    if not installed:
        yield Finding("CuPy", "absent" if reason else "ok", reason or "")
    elif other := _untested(installed[0].split()[1], CUPY_RANGE):
        advice = "pip install 'infera-gpu[cuda12]' or '[cuda13]' brings one"
        detail = f"{installed[0]} {other}; {advice}"
        yield Finding("CuPy", "problem", detail if reason is None else f"{detail}. {reason}")
    else:
        made, supported = releases()
        told = f"{installed[0]} for CUDA {made[0]}" if made else installed[0]
        if reason == NO_DRIVER and _no_driver(snapshot()[1]):
            yield Finding("CuPy", "ok", f"{told}, and no driver: the CPU is used")
            return
        if reason and made and supported and supported[0] < made[0]:
            extra = "; infera-gpu[cuda12] brings one for that" if supported[0] == 12 else ""
            reason = f"the driver supports CUDA {supported[0]}.{supported[1]}{extra}"
        yield Finding("CuPy", "problem" if reason else "ok", f"{told}: {reason}" if reason else told)


def _libraries() -> Iterator[Finding]:
    """What CuPy loads of CUDA, which is in none of its wheels."""
    from infera_gpu.devices.cuda import libraries

    for name, (release, error) in libraries().items():
        does, without, extra, state = _LOADED[name]
        if error is None:
            yield Finding(name, "ok", f"{release} {does}".strip())
        else:
            advice = f"infera-gpu[{extra}12] or [{extra}13] brings it, and so does a CUDA toolkit"
            yield Finding(name, state, f"{without}: {' '.join(str(error).split())}; {advice}")


_LOADED: Mapping[str, tuple[str, str, str, State]] = MappingProxyType(
    {
        "NVRTC": ("compiles CuPy's functions", "CuPy's functions cannot be compiled", "cuda", "problem"),
        "cuBLAS": (
            "multiplies what has no kernel here: float64, integers",
            "float64 and integers cannot be multiplied on a GPU",
            "cublas",
            "absent",
        ),
    }
)
"""What each does, what is not without it, the extras that bring it, and how much that matters."""


def _triton() -> Iterator[Finding]:
    found = _version("triton")
    if found is None:
        yield Finding("Triton", "absent", "not installed; it comes with infera-gpu[cuda12], [cuda13] or [kernels]")
        return
    other = _untested(found, TRITON_RANGE)
    yield Finding("Triton", "problem" if other else "ok", f"{found} {other}" if other else found)


def _untested(found: str, tested: tuple[Release, Release]) -> str:
    """What is wrong with a version that is not among the releases from the first to below the second; else empty."""
    low, high = tested
    if low <= _release(found) < high:
        return ""
    from_, below = (".".join(map(str, release)) for release in tested)
    return f"is not among the tested releases, {from_} to below {below}"


def _release(found: str) -> Release:
    """The first two numbers of a version; 0 where there is none."""
    numbers = [int(digits[0]) if (digits := re.match(r"\d+", part)) else 0 for part in found.split(".")[:2]]
    major, minor = (*numbers, 0)[:2]
    return major, minor


def _cublaslt() -> Iterator[Finding]:
    from infera_kernels.launch.cublaslt import OFF, installed

    yield _library("cuBLASLt", installed(), "multiplies matrices", "multiply matrices", OFF, "cublas")


def _cudnn() -> Iterator[Finding]:
    from infera_kernels.launch.cudnn import OFF, installed

    does = "computes convolutions and attention for which `infera tune` finds it faster", "compute them"
    yield _library("cuDNN", installed(), *does, OFF, "cudnn")


def _library(name: str, release: str, does: str, do: str, off: str, extra: str) -> Finding:
    """A library that does on a GPU what Triton's kernels do else."""
    if release:
        return Finding(name, "ok", f"{release} {does} on a GPU; {off}=0 leaves that to Triton's kernels")
    brings = f"infera-gpu[{extra}12] or [{extra}13] brings it"
    return Finding(name, "absent", f"not installed, not whole, or {off}=0: Triton's kernels {do}; {brings}")


def _kernels() -> Iterator[Finding]:
    """What "auto" chooses, and the kernel kinds that can run on it."""
    from infera_gpu.devices import open_device
    from infera_gpu.ops import registry

    device = open_device("auto")
    try:
        kinds = [*device.kinds, *(["portable"] if device.runs_portable else [])]
        yield Finding("Device 'auto'", "ok", f"{device.name}, kernel kinds {', '.join(kinds)} in order of preference")
    finally:
        device.close()
    ops = list(registry())
    counts = ", ".join(f"{sum(kind in op.kernels for op in ops)} with a '{kind}' kernel" for kind in device.kinds)
    names = len({(op.domain, op.name) for op in ops})
    told = f"{names} in {len(ops)} versions, {counts}; the others run their plain function"
    yield Finding("Operators", "ok", told)


def _cache() -> Iterator[Finding]:
    from infera_kernels.disk import default_directory

    path = default_directory().parent
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not os.path.isdir(existing):
        yield Finding("Cache", "problem", f"{path}: {existing} is no folder; set INFERA_CACHE_DIR to one")
    elif locked := next((p for p in (existing, *sorted(path.glob("*"))) if p.is_dir() and not _writable(p)), None):
        yield Finding("Cache", "problem", f"{path}: {locked} cannot be written to; set INFERA_CACHE_DIR to a folder")
    else:
        used = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        yield Finding("Cache", "ok", f"{path}, {used / 1e6:,.1f} MB")


def _writable(folder: str | os.PathLike[str]) -> bool:
    """Whether files can be made there, which permissions alone do not tell."""
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _peers() -> Iterator[Finding]:
    found = _version("onnxruntime") or _version("onnxruntime-gpu")
    if found:
        yield Finding("onnxruntime", "ok", f"{found}, a reference for `infera verify`")
    else:
        yield Finding(
            "onnxruntime", "absent", "not installed; `infera verify` compares with float64 and other devices only"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("Python", _python),
    ("BLAS", _blas),
    ("BLAS loops", _loops),
    ("Worker processes", _processes),
    ("numba", _numba),
    ("NVIDIA driver", _driver),
    ("CuPy", _cupy),
    ("CUDA libraries", _libraries),
    ("Triton", _triton),
    ("cuBLASLt", _cublaslt),
    ("cuDNN", _cudnn),
    ("Device 'auto'", _kernels),
    ("Cache", _cache),
    ("onnxruntime", _peers),
)
