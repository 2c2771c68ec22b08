"""Kernels that whole models bind on a GPU are compiled, fit on the card, and are launched as their PTX wants it.

The device is the CUDA one over a stand-in for CuPy, the launcher the real one; the driver loads nothing. All models are
planned and bound; what is compiled is one launch of each family, a kernel with its types of elements, that no model
before had. The large tests compile the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import infera_gpu
from bench.inputs import EXAMPLES
from bench.models import BUILT, path_of
from infera_gpu import opening
from infera_gpu.devices import cuda
from infera_gpu.devices.cuda import CudaDevice
from infera_gpu.errors import UnreachableError
from infera_kernels.calls import Call
from infera_kernels.launch import CudaLauncher, KernelCache
from infera_kernels.launch.compiling import nothing
from tests import fake_cupy
from tests.kernels.support import Family, family_of
from tests.kernels.test_bound_model import Driver

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

MODELS = [
    pytest.param(name, precision, id=f"{name}-{precision}", marks=[] if name in BUILT else [pytest.mark.models])
    for precision in ("fp32", "fp16")
    for name in EXAMPLES
]


class Sampling:
    """Launches what is of a family that has not been `seen`; nothing comes of the rest."""

    def __init__(self, launcher: CudaLauncher, seen: set[Family]) -> None:
        self._launcher, self._seen = launcher, seen

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        **options: Any,
    ) -> Call:
        family = family_of(kernel, args, constexprs)
        if family in self._seen:
            return nothing, ()
        self._seen.add(family)
        return self._launcher.launch(kernel, grid, args, constexprs, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def seen() -> set[Family]:
    return set()


def bound(
    name: str,
    precision: Any,
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
    through: Callable[[CudaLauncher], Any] = lambda launcher: launcher,
) -> CudaLauncher:
    """The launcher that a model's plan has been bound to, `through` another. Skips what is out of reach."""
    fake_cupy.install(monkeypatch, fake_cupy.module(free=64 << 30))
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    try:
        path = path_of(name)
    except UnreachableError as error:
        pytest.skip(f"{name} is out of reach: {error}")
    monkeypatch.setattr(opening, "_fixed", lambda session: None)  # it is planned once the launcher is there
    with infera_gpu.load(path, device="cuda", precision=precision) as session:
        device, driver = session.device, Driver()
        assert isinstance(device, CudaDevice)
        driver.streams[device._stream.ptr] = device._stream
        launcher = CudaLauncher(0, device._stream, driver=driver, cache=KernelCache(kernels))
        driver.launcher = launcher
        device._launcher = through(launcher)
        session.reserve(EXAMPLES[name][0].feeds())
    for loaded in launcher._loaded.values():
        assert loaded.binary.spec.shared_bytes <= launcher.target.shared_bytes
    return launcher


@pytest.mark.parametrize(("name", "precision"), MODELS)
def test_families_of_kernels(
    name: str, precision: Any, kernels: Path, seen: set[Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(seen)
    launcher = bound(name, precision, kernels, monkeypatch, lambda launcher: Sampling(launcher, seen))
    assert len(launcher._loaded) == len(seen) - before
    assert seen


@pytest.mark.large
@pytest.mark.parametrize(("name", "precision"), MODELS)
def test_every_kernel(name: str, precision: Any, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound(name, precision, kernels, monkeypatch)._loaded
