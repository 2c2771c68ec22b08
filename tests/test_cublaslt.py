"""Products by cuBLASLt: what its descriptors say, computed by a stand-in. Nothing here runs on a GPU."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton")

from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_kernels.launch import CudaLauncher, RecordingLauncher, nominal_target
from infera_kernels.launch import cublaslt as cublaslt_module
from infera_kernels.launch.cublaslt import ALIGNED, Product, lying
from infera_kernels.launch.nvidia import LibraryError
from infera_kernels.triton.matmul import matmul
from infera_kernels.triton.tiles import TF32, TF32X3, Tile
from infera_kernels.tuning import DeviceTiles
from tests.fake_cublaslt import FakeCublasLt, with_library
from tests.text import parse

pytestmark = pytest.mark.kernels


@pytest.fixture
def library() -> FakeCublasLt:
    return FakeCublasLt()


@pytest.fixture
def launcher(library: FakeCublasLt) -> Any:
    return with_library(RecordingLauncher(), library)


def array(rng: np.random.Generator, shape: tuple[int, ...], lie: str = "rows", dtype: Any = np.float32) -> Any:
    """Random numbers: rows or columns in one piece, the matrix a part of a larger one ("... apart")."""
    how, apart = lie.removesuffix(" apart"), lie.endswith(" apart")
    whole = [n + 3 * apart for n in shape]
    if how == "columns":
        whole[-2:] = whole[:-3:-1]
    made = rng.standard_normal(whole).astype(dtype)
    made = made.swapaxes(-1, -2) if how == "columns" else made
    return made[tuple(slice(2 * apart, n + 2 * apart) for n in shape)]


def workspace(nbytes: int = 1 << 12) -> Any:
    """As a plan gives it, of the host's memory."""
    raw = np.empty(nbytes + ALIGNED, np.uint8)
    return raw[-raw.ctypes.data % ALIGNED :][:nbytes]


def run(launcher: Any, a: Any, b: Any, out: Any, **options: Any) -> int:
    """How many calls there are, after they have been made."""
    calls = matmul(a, b, out, launcher, **{"workspace": workspace(), **options})
    for fn, given in calls:
        fn(*given)
    return len(calls)


def want(a: Any, b: Any, bias: Any, residual: Any, activation: str | None, alpha: float, beta: float) -> Any:
    total = alpha * (a.astype(np.float64) @ b.astype(np.float64))
    total += 0 if bias is None else bias.astype(np.float64)
    total += 0 if residual is None else beta * residual.astype(np.float64)
    return FUNCTIONS[activation](total)


FUNCTIONS: dict[str | None, Callable[[Any], Any]] = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}

LIES = ("rows", "columns", "rows apart", "columns apart")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("left", LIES)
@pytest.mark.parametrize("right", LIES)
@pytest.mark.parametrize("terms", ["", "bias", "residual", "bias residual relu", "relu", "bias gelu_tanh"])
def test_products(library: FakeCublasLt, launcher: Any, dtype: Any, left: str, right: str, terms: str) -> None:
    rng = np.random.default_rng(len(left + right + terms))
    a, b = array(rng, (5, 7), left, dtype), array(rng, (7, 11), right, dtype)
    bias = array(rng, (11,), dtype=dtype) if "bias" in terms else None
    residual = array(rng, (5, 11), "rows apart", dtype) if "residual" in terms else None
    out = array(rng, (5, 11), "rows apart" if "apart" in left else "rows", dtype)
    given: dict[str, Any] = {"alpha": 0.5, "beta": 2.0 if residual is not None else 1.0}
    activation = next((name for name in FUNCTIONS if name and name in terms), None)
    calls = run(launcher, a, b, out, bias=bias, residual=residual, activation=activation, **given)
    assert (calls, len(library.asked), launcher.launches) == (1, 1, [])
    tolerance = {4: 1e-6, 2: 1e-2}[np.dtype(dtype).itemsize]
    made = want(a, b, bias, residual, activation, **given)
    np.testing.assert_allclose(out.astype(np.float64), made, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("left", "right", "lie"),
    [
        ((3, 5, 7), (3, 7, 11), "rows apart"),
        ((2, 3, 5, 7), (1, 1, 7, 11), "rows"),
        ((2, 3, 5, 7), (2, 3, 7, 11), "columns"),
        ((1, 5, 7), (4, 7, 11), "rows"),
        ((4, 5, 7), (7, 11), "rows apart"),
    ],
)
def test_batches(library: FakeCublasLt, launcher: Any, left: Any, right: Any, lie: str) -> None:
    rng = np.random.default_rng(1)
    a, b, bias = array(rng, left, lie), array(rng, right, lie), array(rng, (11,))
    out = np.empty((a @ b).shape, np.float32)
    residual = array(rng, out.shape)
    assert run(launcher, a, b, out, residual=residual, bias=bias) == 1
    assert (len(library.asked), launcher.launches) == (1, [])
    np.testing.assert_allclose(out, want(a, b, bias, residual, None, 1.0, 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(2, 1, 5), (5, 1, 1), (2, 3, 1), (64, 2, 3)])
def test_thin_matrices(library: FakeCublasLt, launcher: Any, m: int, n: int, k: int) -> None:
    """Strides of axes of one element say nothing."""
    rng = np.random.default_rng(m)
    a, b, out = array(rng, (m, k), "columns apart"), array(rng, (k, n), "columns"), np.empty((m, n), np.float32)
    run(launcher, a, b, out)
    np.testing.assert_allclose(out, a @ b, rtol=1e-5, atol=1e-6)
    assert len(library.asked) == 1


@pytest.mark.parametrize(
    "what",
    [
        "one row",
        "tile",
        "no workspace",
        "gelu",
        "tf32x3",
        "parts",
        "every other",
        "a row for all",
        "two batches",
        "turned",
    ],
)
def test_what_it_does_not_have_is_launched(library: FakeCublasLt, launcher: Any, what: str) -> None:
    rng = np.random.default_rng(2)
    a, b, out, given = array(rng, (8, 6)), array(rng, (6, 4)), np.empty((8, 4), np.float32), dict[str, Any]()
    match what:
        case "one row":
            a, out = a[:1], out[:1]
        case "tile":
            given["tile"] = Tile(16, 32, 32, 4, 3)
        case "no workspace":
            given["workspace"] = None
        case "gelu":
            given["activation"] = "gelu"
        case "tf32x3":
            given["precision"] = TF32X3
        case "parts":
            given["partial"] = np.empty((2, out.size), np.float32)
        case "every other":
            b = array(rng, (6, 8))[:, ::2]
        case "a row for all":
            given["residual"] = array(rng, (1, 4))
        case "two batches":
            a, b = array(rng, (2, 3, 8, 6)), array(rng, (2, 3, 6, 4)).swapaxes(0, 1)[:3].swapaxes(0, 1)
            a, out = array(rng, (3, 2, 8, 6)).swapaxes(0, 1), np.empty((2, 3, 8, 4), np.float32)
        case "turned":
            out = np.empty((4, 8), np.float32).T
    assert run(launcher, a, b, out, **given) == len(launcher.launches) > 0
    assert not library.asked


def test_tf32_is_asked_for_by_name(library: FakeCublasLt, launcher: Any) -> None:
    """And float32 means float32."""
    a, b, out = np.ones((4, 4), np.float32), np.ones((4, 4), np.float32), np.empty((4, 4), np.float32)
    run(launcher, a, b, out)
    run(launcher, a, b, out, precision=TF32)
    assert [operation.compute for operation in library.asked] == [68, 77]


def test_an_algorithm_is_asked_for_once_for_alike_products(library: FakeCublasLt, launcher: Any) -> None:
    x = np.zeros(4096, np.float32)
    skip = -x.ctypes.data // 4 % 64
    calls = []
    for offset in (0, 64, 0, 16):  # the last is aligned to 64 bytes alone
        a, b, out = (x[skip + at : skip + at + 16].reshape(4, 4) for at in (offset, 256, 512))
        calls += matmul(a, b, out, launcher, workspace=workspace())
    assert library.heuristics == 2
    for fn, args in calls:
        fn(*args)
    del calls, fn, args
    gc.collect()
    assert list(library.alive.values()) == ["handle"]


@pytest.mark.parametrize("name", ["cublasLtCreate", "cublasLtMatmulAlgoGetHeuristic"])
def test_where_it_does_not_work_tiles_are_launched(library: FakeCublasLt, launcher: Any, name: str) -> None:
    library.status[name] = 1
    a, b, out = np.ones((4, 4), np.float32), np.ones((4, 4), np.float32), np.empty((4, 4), np.float32)
    for _ in range(2):
        assert run(launcher, a, b, out) == 1
    assert len(launcher.launches) == 2


def test_walked_backwards_it_is_launched(library: FakeCublasLt, launcher: Any) -> None:
    """Over the batch, which TMA cannot."""
    rng = np.random.default_rng(3)
    a, b, out = array(rng, (4, 5, 7))[::-1], array(rng, (4, 7, 3)), np.empty((4, 5, 3), np.float32)
    assert run(launcher, a, b, out) == len(launcher.launches) == 1
    assert not library.asked


def test_its_release_is_told(monkeypatch: pytest.MonkeyPatch, library: FakeCublasLt) -> None:
    monkeypatch.setattr(cublaslt_module, "library", lambda: library)
    assert cublaslt_module.installed() == "13.1.0"
    monkeypatch.setattr(cublaslt_module, "library", lambda: None)
    assert cublaslt_module.installed() == ""


def test_it_is_turned_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = SimpleNamespace(load_nvidia_dynamic_lib=lambda name: SimpleNamespace(abs_path=None))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", cast(Any, loaded))
    find = cublaslt_module.library.__wrapped__
    assert find() is not None  # of no path, the process itself
    monkeypatch.setenv(cublaslt_module.OFF, "0")
    assert find() is None


def test_a_product_that_fails_says_so(library: FakeCublasLt, launcher: Any) -> None:
    library.status["cublasLtMatmul"] = 13
    a, b, out = np.ones((4, 4), np.float32), np.ones((4, 4), np.float32), np.empty((4, 4), np.float32)
    with pytest.raises(LibraryError, match="cublasLtMatmul failed with status 13; INFERA_CUBLASLT=0"):
        run(launcher, a, b, out)


@pytest.mark.parametrize(
    ("rows", "columns", "strides", "found"),
    [
        (3, 4, (4, 1), (4, False)),
        (3, 4, (9, 1), (9, False)),
        (3, 4, (1, 3), (3, True)),
        (3, 4, (2, 1), None),
        (3, 4, (8, 2), None),
        (3, 4, (0, 1), None),
        (1, 4, (7, 1), (4, False)),
        (1, 4, (7, 5), (5, True)),
        (3, 1, (5, 7), (5, False)),
        (1, 1, (0, 0), (1, False)),
    ],
)
def test_how_matrices_lie(rows: int, columns: int, strides: tuple[int, int], found: Any) -> None:
    assert lying(rows, columns, strides) == found


def test_products_are_alike_by_all_but_their_arrays() -> None:
    """What an algorithm goes by is compared; a new field would be, too."""
    assert Product._fields == (
        *("sizes", "batch", "dtype", "a", "b", "out", "residual", "bias", "alpha", "beta", "activation", "tf32"),
    )


@pytest.mark.parametrize(("arch", "nbytes"), [(80, 1 << 22), (90, 1 << 25)])
def test_a_launcher_has_it_where_it_is_installed_and_asked_for(
    monkeypatch: pytest.MonkeyPatch, library: FakeCublasLt, arch: int, nbytes: int
) -> None:
    driver: Any = SimpleNamespace(version=lambda: 13000, target=lambda device: nominal_target(arch), launch_early=None)

    def made(**options: Any) -> CudaLauncher:
        return CudaLauncher(0, 0x50, driver=driver, **options)

    monkeypatch.setattr(cublaslt_module, "library", lambda: None)
    assert (made(libraries=True).library, made(libraries=True).target.library_bytes) == (None, 0)
    monkeypatch.setattr(cublaslt_module, "library", lambda: library)
    assert (made().library, made().target.library_bytes) == (None, 0)
    found = made(libraries=True)
    assert found.library is not None
    assert found.target.library_bytes == nbytes


@pytest.mark.parametrize(("activation", "wanted"), [("Identity", True), ("Relu", True), ("Sigmoid", False)])
def test_plans_leave_room_for_it(activation: str, wanted: bool) -> None:
    """In the arena, so that no run has that of another."""
    model = parse(
        f"""g (float[2, 3, 2] x) => (float[2, 3, 2] y) <float[2, 2] w = {{1, 2, 3, 4}}>
        {{ a = MatMul(x, w) y = {activation}(a) }}"""
    )
    for nbytes in (0, 1 << 12):
        device = RecordingDevice()
        device.tiles = DeviceTiles(replace(nominal_target(90), library_bytes=nbytes))
        session = Session(load_graph(model), device)
        (step,) = session.plan_for({"x": (2, 3, 2)}).steps
        assert (step.workspace.nbytes if step.workspace else 0) == wanted * nbytes
        session.run({"x": np.ones((2, 3, 2), np.float32)})
