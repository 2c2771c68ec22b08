"""The CUDA device over a stand-in for CuPy: what it asks for, and in which order. Nothing here runs on a GPU."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest

import infera_gpu
from infera_gpu.devices import cuda
from infera_gpu.errors import DeviceError, DeviceLostError, InputError, OutOfMemoryError
from infera_gpu.graph import HostArray
from infera_gpu.lease import Arena
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_kernels.launch import LaunchError, RecordingLauncher
from infera_kernels.launch.cuda import CupyDriver
from infera_kernels.launch.nvidia import LibraryError
from tests import fake_cupy
from tests.text import parse

MODEL = parse(
    """
    g (float[N, 4] x) => (float[N, 4] y, int64[2, K] at) {
        a = Exp(x)
        at = NonZero(x)
        b = Transpose <perm = [1, 0]> (a)
        c = Neg(b)
        y = Transpose <perm = [1, 0]> (c)
    }"""
)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_cupy.install(monkeypatch)


def test_a_session_answers_right_and_small_arrays_travel_among_its_steps(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    session = Session(load_graph(MODEL), device)
    x = np.array([[0, 1, 2, 3], [4, 0, 6, 7]], np.float32)
    for _ in range(2):
        device._stream.log.clear()
        out = session.run({"x": x})
        np.testing.assert_allclose(out["y"], -np.exp(x), rtol=1e-6)
        np.testing.assert_array_equal(out["at"], np.nonzero(x))
        assert device._stream.log[:2] == ["wait for the null stream", f"h2d {x.nbytes}"]
        assert device._stream.log[-1] == "sync event"
        assert device._stream.active == 0
    assert session.plan_for({"x": (2, 4)}).arenas.keys() == {"device"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float8e5m2", ml_dtypes.float8_e5m2), ("int4", ml_dtypes.int4), ("bfloat16", ml_dtypes.bfloat16), ("bool", bool)],
)
def test_views_of_any_type_are_copied(cupy: Any, name: str, dtype: type) -> None:
    graph = f"g ({name}[N, 3] x) => ({name}[3, N] y) {{ y = Transpose <perm = [1, 0]> (x) }}"
    session = Session(load_graph(parse(graph)), cuda.CudaDevice(0))
    x: HostArray = np.arange(6).reshape(2, 3).astype(dtype)
    np.testing.assert_array_equal(session.run({"x": x})["y"], x.T)


def test_arrays_on_the_gpu_are_not_brought_to_the_host(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    session = Session(load_graph(parse("g (float[N] x) => (float[N] y) { y = Exp(x) }")), device)
    x = cupy.asarray(np.arange(3, dtype=np.float32))
    np.testing.assert_allclose(session.run({"x": x})["y"], np.exp([0, 1, 2]), rtol=1e-6)
    assert not [e for e in device._stream.log if e.startswith("h2d")]
    out = {"y": cupy.asarray(np.zeros(3, np.float32))}
    device._stream.log.clear()
    session.run({"x": x}, out=out)
    assert device._stream.log == ["wait for the null stream", "copy 12", "copy 12", "sync event"]
    np.testing.assert_allclose(out["y"], np.exp([0, 1, 2]), rtol=1e-6)


def test_a_run_waits_for_the_callers_stream(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    session = Session(load_graph(MODEL), device)
    with fake_cupy.Stream(name="the caller's stream"):
        session.run({"x": np.ones((2, 4), np.float32)})
    assert device._stream.log[0] == "wait for the caller's stream"


def test_scalars_and_strided_results_are_copied_right(cupy: Any) -> None:
    model = parse("g (float[2, 3] x, float s) => (float[3, 2] y) { a = Mul(x, s) y = Transpose <perm = [1, 0]> (a) }")
    session = Session(load_graph(model), cuda.CudaDevice(0))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    feeds = {"x": x[::-1, ::-1], "s": np.array(2, np.float32)}
    want = 2 * feeds["x"].T
    np.testing.assert_array_equal(session.run(feeds)["y"], want)
    gaps = np.zeros((3, 4), np.float32)[:, ::2]
    session.run(feeds, out={"y": gaps})
    np.testing.assert_array_equal(gaps, want)


def test_a_kernel_on_the_host_waits_for_uploads_that_read_its_memory(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    calls = [(list, ()), (dict, ())]
    step = SimpleNamespace(space="host")
    for fn, args in device.wrap(cast(Any, step), cast(Any, calls), (), ()):
        fn(*args)
    assert device._stream.log == ["sync"]
    step.space = "device"
    assert device.wrap(cast(Any, step), cast(Any, calls), (), ()) is calls


def test_runs_of_several_threads_share_the_stream_and_no_memory(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    session = Session(load_graph(MODEL), device, arena=Arena(4))

    def answer(seed: int) -> None:
        x = np.random.default_rng(seed).standard_normal((1 + seed % 3, 4)).astype(np.float32)
        for _ in range(10):
            np.testing.assert_allclose(session.run({"x": x})["y"], -np.exp(x), rtol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(answer, range(8)))
    assert device._stream.active == 0
    assert fake_cupy.NULL.log == []


def test_closing_gives_arenas_and_temporaries_back(cupy: Any) -> None:
    session = Session(load_graph(parse("g (float[N, 2] x) => (float[N, 2] y) { y = Exp(x) }")), cuda.CudaDevice(0))
    session.run({"x": np.ones((5, 2), np.float32)})
    assert cupy.vram.used > 0
    session.close()
    assert cupy.vram.used == 0


def test_closing_gives_weights_back(cupy: Any) -> None:
    model = parse("g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    session = Session(load_graph(model), cuda.CudaDevice(0))
    session.run({"x": np.ones((5, 2), np.float32)})
    assert cupy.vram.used > 0
    session.close()
    assert cupy.vram.used == 0


def test_what_fails_in_cuda_is_a_device_error_that_names_the_step(cupy: Any) -> None:
    session = Session(load_graph(parse("g (float[N] x) => (float[N] y) { [boom] y = Exp(x) }")), cuda.CudaDevice(0))

    def fail(*_: Any) -> None:
        raise fake_cupy.CUDARuntimeError(1)

    cupy.exp = fail
    with pytest.raises(DeviceError, match="cuda:0 failed in a run: cudaError 1") as caught:
        session.run({"x": np.ones(3, np.float32)})
    assert "boom" in caught.value.__notes__[0]


@pytest.mark.parametrize("leaving", [False, True])
def test_a_fault_loses_the_gpu_wherever_it_is_met(cupy: Any, leaving: bool) -> None:
    """CUDA tells of it at the next call, which may be the one that makes another GPU current again."""
    session = Session(load_graph(parse("g (float[N] x) => (float[N] y) { y = Exp(x) }")), cuda.CudaDevice(0))
    other = Session(load_graph(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }")), cuda.CudaDevice(0))
    feeds = {"x": np.ones(3, np.float32)}
    session.run(feeds)
    if leaving:
        with pytest.raises(DeviceLostError, match="restart the process"), session.device.running():
            fake_cupy.Device.faults[0] = 700
    else:
        fake_cupy.Device.faults[0] = 700
        with pytest.raises(DeviceLostError, match="restart the process"):
            session.run(feeds)
    for lost in (session, other):
        with pytest.raises(DeviceLostError, match="restart the process"):
            lost.run(feeds)
        lost.close()


def test_a_device_that_is_not_closed_gives_temporaries_back(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    with device.running():
        cupy.empty((1000,), np.uint8)
    assert cupy.vram.used == 1000
    del device
    gc.collect()
    assert cupy.vram.used == 0


def test_arrays_that_cannot_be_read_are_an_input_error(cupy: Any) -> None:
    """Of another GPU, for one."""

    class Elsewhere:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 1

        def __dlpack__(self, **_: object) -> object:
            raise BufferError("it lies on cuda:1")

    session = Session(load_graph(parse("g (float[N] x) => (float[N] y) { y = Exp(x) }")), cuda.CudaDevice(0))
    with pytest.raises(InputError, match="input 'x' cannot be read on cuda:0: it lies on cuda:1"):
        session.run({"x": Elsewhere()})


def test_temporaries_that_do_not_fit_are_an_out_of_memory_error(cupy: Any) -> None:
    session = Session(load_graph(parse("g (float[N] x) => (float[N] y) { y = Exp(x) }")), cuda.CudaDevice(0))

    def fill(x: Any) -> Any:
        return cupy.empty((1 << 40,), np.uint8)

    cupy.exp = fill
    with pytest.raises(OutOfMemoryError, match=r"a run on cuda:0 needs 1,099,511,627,776 bytes") as caught:
        session.run({"x": np.ones(3, np.float32)})
    assert caught.value.available < 1 << 30


def test_cached_temporaries_make_room_for_an_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = fake_cupy.install(monkeypatch, fake_cupy.module(free=10_000))
    device = cuda.CudaDevice(0)
    with device.running():
        fake.empty((8_000,), np.uint8)
    assert fake.vram.used == 8_000  # nobody has it, the pool keeps it
    device.alloc(9_000, "device")
    with pytest.raises(OutOfMemoryError):
        device.alloc(11_000, "device")


def test_an_arena_that_does_not_fit_is_refused_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cupy.install(monkeypatch, fake_cupy.module(free=1000))
    session = infera_gpu.load(MODEL, device="cuda")
    with pytest.raises(OutOfMemoryError, match="1,000 are available") as caught:
        session.run({"x": np.zeros((1000, 4), np.float32)})
    assert caught.value.needed > 32_000


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (None, "CuPy is not installed"),
        (fake_cupy.module(gpus=0), "the driver reports no GPU"),
        (fake_cupy.module(error=RuntimeError("cudaErrorInsufficientDriver")), "no usable driver: cudaErrorInsuff"),
    ],
)
def test_a_gpu_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch, fake: Any, message: str) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if fake else None)
    with pytest.raises(DeviceError, match=message):
        infera_gpu.load(MODEL, device="cuda")
    assert infera_gpu.load(MODEL, device="auto").device.name == "cpu"


def test_a_gpu_number_that_does_not_exist_is_named(cupy: Any) -> None:
    with pytest.raises(DeviceError, match="cuda:3 does not exist; this machine has 1 GPU"):
        infera_gpu.load(MODEL, device="cuda:3")


VIEWED = parse(
    """
    g (float[N, 3] x, float[N, 3] z) => (float[3, N] y, float[N, 3] same) {
        a = Transpose <perm = [1, 0]> (x)
        b = Transpose <perm = [1, 0]> (z)
        y = Sub(a, b)
        same = Identity(x)
    }"""
)


def test_arrays_on_the_gpu_that_come_again_are_read_where_they_lie(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    session = Session(load_graph(VIEWED), device)
    rng = np.random.default_rng(0)
    x = cupy.asarray(rng.standard_normal((6, 3)).astype(np.float32))[2:]  # dense, not at the start of its memory
    z = cupy.asarray(rng.standard_normal((4, 3)).astype(np.float32))
    for i in range(4):
        out = session.run({"x": x[:], "z": z[:]})  # new objects, as from_dlpack makes them, over the same memory
        np.testing.assert_array_equal(out["y"], np.asarray(x).T - np.asarray(z).T)
        np.testing.assert_array_equal(out["same"], np.asarray(x))
        direct = next(iter(session._leases.values()))._direct
        assert len(direct) == (i > 0)  # the first run copies them: binding costs more than a copy
        x += np.float32(1)
    ((_, held),) = direct.values()
    device._stream.log.clear()
    session.run({"x": x[:], "z": z[:]})
    assert device._stream.log.count("copy 48") == 1  # of what Sub makes, none for an input
    assert np.shares_memory(held.given["x"], x)


def test_arrays_that_change_or_lie_apart_are_copied(cupy: Any) -> None:
    session = Session(load_graph(VIEWED), cuda.CudaDevice(0))
    rng = np.random.default_rng(1)
    arrays = [cupy.asarray(rng.standard_normal((4, 3)).astype(np.float32)) for _ in range(3)]
    wide = cupy.asarray(rng.standard_normal((4, 6)).astype(np.float32))[:, ::2]
    for x, z in [(arrays[i % 3], arrays[(i + 1) % 3]) for i in range(6)] + 3 * [(wide, wide)] + [(arrays[0], wide)]:
        out = session.run({"x": x, "z": z})
        np.testing.assert_array_equal(out["y"], np.asarray(x).T - np.asarray(z).T)
    assert not next(iter(session._leases.values()))._direct


def test_what_is_bound_to_the_callers_arrays_goes_when_the_arena_grows(cupy: Any) -> None:
    session = Session(load_graph(VIEWED), cuda.CudaDevice(0))
    x, big = (cupy.asarray(np.ones((n, 3), np.float32)) for n in (4, 20))
    for given in (x, x, x, big, big, x, x):
        np.testing.assert_array_equal(session.run({"x": given, "z": given})["y"], np.zeros(given.shape).T)


def test_where_batches_do_not_matter_arrays_are_read_in_place_if_aligned(cupy: Any) -> None:
    """Entries of a caller's batch lie anywhere, and kernels go by alignment."""
    device, invariant = cuda.CudaDevice(0), cuda.CudaDevice(0, batch_invariant=True)
    batch = cupy.asarray(np.zeros((8, 3), np.float32))
    aligned = [batch[i : i + 1].data.ptr % 16 == 0 for i in range(8)]
    assert any(aligned)
    assert not all(aligned)
    assert [invariant.block_of(batch[i : i + 1]) is not None for i in range(8)] == aligned
    assert all(device.block_of(batch[i : i + 1]) is not None for i in range(8))


@pytest.mark.kernels
def test_strided_copies_launch_a_kernel(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton is there; dense ones are the driver's."""
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    device = cuda.CudaDevice()
    device._launcher = launcher = RecordingLauncher()
    with device.running():
        for count, dtype in enumerate((np.float32, ml_dtypes.float8_e5m2), 1):
            x, y = device.xp.empty((4, 6), dtype), device.xp.empty((6, 4), dtype)
            fn, args = device.transfer(x.T, y)
            fn(*args)
            assert [launch.kernel for launch in launcher.launches] == ["pointwise_kernel"] * count
            assert device.transfer(x, y.reshape(4, 6))[0] is device.xp.copyto


@pytest.mark.parametrize(("status", "error"), [(209, LaunchError), (2, fake_cupy.CUDADriverError)])
def test_only_what_is_wrong_with_a_cubin_is_a_launch_error(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception]
) -> None:
    """What the device makes of others, where memory is out or the GPU is lost, it must see."""

    class Module:
        def load(self, cubin: bytes) -> None:
            raise fake_cupy.CUDADriverError(status)

    driver = SimpleNamespace(CUDADriverError=fake_cupy.CUDADriverError, launchKernel=None, check_status=None)
    api = SimpleNamespace(driver=driver, runtime=SimpleNamespace(driverGetVersion=lambda: 13000))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", cast(Any, api))
    monkeypatch.setattr(cupy.cuda, "function", SimpleNamespace(Module=Module), raising=False)
    with pytest.raises(error, match=str(status)):
        CupyDriver().load(0, b"", "kernel")


class CUBLASError(RuntimeError):
    """Of CuPy; its `status` is no number of CUDA's."""

    __module__ = "cupy_backends.cuda.libs.cublas"
    status = 700


class CompileException(Exception):
    __module__ = "cupy.cuda.compiler"


class DynamicLibNotFoundError(RuntimeError):
    __module__ = "cuda.pathfinder._dynamic_libs.load_dl_common"


@pytest.mark.parametrize(
    "error",
    [LibraryError("cudnnBackendExecute failed with status 5000"), CUBLASError("CUBLAS_STATUS_EXECUTION_FAILED")],
    ids=["ours", "of_cupy"],
)
def test_a_library_that_fails_because_the_gpu_is_lost_says_that(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    session = Session(load_graph(parse("g (float[N] x) => (float[N] y) { [boom] y = Exp(x) }")), cuda.CudaDevice(0))

    def fault(self: Any) -> None:
        raise fake_cupy.CUDARuntimeError(700)

    def fail(*_: Any) -> None:
        monkeypatch.setattr(fake_cupy.Stream, "synchronize", fault)
        raise error

    cupy.exp = fail
    with pytest.raises(DeviceLostError, match=f"a run met '{error}'") as caught:
        session.run({"x": np.ones(3, np.float32)})
    assert "boom" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (LibraryError("cublasLtMatmul failed with status 13"), DeviceError, "cuda:0 failed in a run: cublasLtMatmul"),
        (CUBLASError("CUBLAS_STATUS_EXECUTION_FAILED"), DeviceError, "failed in a run: CUBLAS_STATUS_EXECUTION_FAILED"),
        (CUBLASError("CUBLAS_STATUS_ALLOC_FAILED"), OutOfMemoryError, "needs more memory than CUDA gives"),
        (CompileException("nvrtc: error: x"), DeviceError, "failed in a run: nvrtc: error: x"),
        (DynamicLibNotFoundError("libnvrtc.so.13"), DeviceError, "libnvrtc.so.13; `infera doctor` says which"),
        (ImportError("libcublas.so.13: cannot open"), DeviceError, "cannot open; `infera doctor` says which"),
        (KeyError("ours"), KeyError, "ours"),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__) if not isinstance(x, str) else "",
)
def test_a_library_that_fails_is_a_device_error_that_names_the_step(
    cupy: Any, error: Exception, kind: type[Exception], says: str
) -> None:
    session = Session(load_graph(parse("g (float[N] x) => (float[N] y) { [boom] y = Exp(x) }")), cuda.CudaDevice(0))

    def fail(*_: Any) -> None:
        raise error

    cupy.exp = fail
    with pytest.raises(kind, match=says) as caught:
        session.run({"x": np.ones(3, np.float32)})
    assert type(caught.value) is kind
    assert "boom" in caught.value.__notes__[0]
    assert session.device.lost == ""
