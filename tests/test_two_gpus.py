"""The CUDA device on a machine with two GPUs, over a stand-in for CuPy. Nothing here runs on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu.devices import cuda
from infera_gpu.errors import DeviceError, DeviceLostError, OutOfMemoryError
from infera_gpu.session import Session
from tests import fake_cupy
from tests.text import parse

MODEL = parse(
    """
    g (float[N, 64] x) => (float[N, 64] y, int64[2, K] at) <float[64] w = {"""
    + ", ".join(["2"] * 64)
    + """}> {
        a = Exp(x)
        at = NonZero(x)
        b = Mul(a, w)
        y = Neg(b)
    }"""
)
ROWS = 300
"""As many as travel on streams of their own."""


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_cupy.install(monkeypatch, fake_cupy.module(gpus=2))


def current() -> int:
    return fake_cupy.CURRENT.device


@contextmanager
def on(cupy: Any, index: int) -> Iterator[None]:
    with cupy.cuda.Device(index):
        yield
        assert current() == index


def answered(session: Session, rows: int = ROWS, seed: int = 0) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)
    out = session.run({"x": x})
    np.testing.assert_allclose(out["y"], -2 * np.exp(x), rtol=1e-6)
    np.testing.assert_array_equal(out["at"], np.nonzero(x))


def used(cupy: Any) -> list[int]:
    return [vram.used for vram in cupy.vrams]


def fault(cupy: Any, index: int, status: int = 700) -> Any:
    """The next kernel on this GPU faults, of which the call after it tells. Returns what makes kernels well again."""
    healthy = cupy.exp

    def faulty(*args: Any, **kwargs: Any) -> Any:
        out = healthy(*args, **kwargs)
        if current() == index:
            fake_cupy.Device.faults[index] = status
        return out

    cupy.exp = faulty
    return lambda: setattr(cupy, "exp", healthy)


# ---- the stand-in


def test_what_belongs_to_another_gpu_is_refused(cupy: Any) -> None:
    zero, stream, event = cupy.asarray(np.ones(3, np.float32)), cupy.cuda.Stream(), cupy.cuda.Event(True)
    with on(cupy, 1):
        one = cupy.asarray(np.ones(3, np.float32))
        np.testing.assert_array_equal(zero.get(stream), np.ones(3))  # CuPy makes the array's GPU current
        assert (zero.device.id, one.device.id, one[1:].device.id) == (0, 1, 1)
        for refused, *given in ((cupy.exp, zero), (cupy.add, one, one, zero), (cupy.copyto, one, zero)):
            with pytest.raises(ValueError, match="Peer access is unavailable"):
                refused(*given)
        with pytest.raises(RuntimeError, match="does not match"), stream:
            pass
        with pytest.raises(fake_cupy.CUDARuntimeError, match="400"):
            stream.put("launch", lambda: None)
        with pytest.raises(fake_cupy.CUDARuntimeError, match="400"):
            cupy.cuda.Stream().record(event)
    assert current() == 0


# ---- one session, on the second


@pytest.mark.parametrize("mine", [0, 1])
def test_a_session_takes_memory_of_its_gpu_alone_and_leaves_the_callers_current(cupy: Any, mine: int) -> None:
    with on(cupy, mine):
        session = infera_gpu.load(MODEL, device="cuda:1")
        session.reserve({"x": (ROWS, 64)})
        assert current() == mine
        for rows in (2, ROWS, ROWS, 2 * ROWS):
            answered(session, rows)
            assert current() == mine
        with pytest.raises(infera_gpu.InferaError):
            session.run({"x": np.ones((2, 63), np.float32)})
        assert current() == mine
        assert used(cupy)[0] == 0
        assert used(cupy)[1] > session.constant_bytes
        streams = session.device._streams  # type: ignore[attr-defined]
        assert {s.device_id for s in (streams.entry, streams.compute, streams.exit)} == {1}
        assert any(e.startswith("h2d") for e in streams.entry.log)
        assert any(e.startswith("d2h") for e in streams.exit.log)
        session.close()
        assert current() == mine
        assert used(cupy) == [0, 0]


def test_what_is_asked_for_outside_of_a_run_is_its_gpus_too(cupy: Any) -> None:
    device = cuda.CudaDevice(1)
    arena = device.alloc(1000, "device")
    with device.weights(500):
        weight = device.constant(np.ones(100, np.float32), "device", lasting=True)
    constant = device.constant(np.ones(3, np.float32), "device")
    assert arena.memory.device_id == weight.device.id == constant.device.id == 1
    assert used(cupy) == [0, 1000 + 500 + 12]
    assert device.alloc(1000, "host").nbytes >= 1000
    assert used(cupy) == [0, 1000 + 500 + 12]
    del arena, weight, constant
    device.close()
    assert used(cupy) == [0, 0]
    assert current() == 0


def test_the_memory_that_counts_is_that_of_its_gpu(cupy: Any) -> None:
    with on(cupy, 1):
        full = cupy.empty((cupy.vrams[1].total - (1 << 16),), np.uint8)
    first = infera_gpu.load(MODEL, device="cuda:0")
    second = infera_gpu.load(MODEL, device="cuda:1")
    with pytest.raises(OutOfMemoryError, match="cuda:1") as caught:
        second.run({"x": np.ones((ROWS, 64), np.float32)})
    assert caught.value.available <= 1 << 16
    answered(first)
    del full
    with on(cupy, 1):
        cupy.get_default_memory_pool().free_all_blocks()
    answered(second)


def test_an_array_of_another_gpu_is_no_input_where_it_lies(cupy: Any) -> None:
    first, second = (infera_gpu.load(MODEL, device=f"cuda:{i}") for i in range(2))
    with on(cupy, 1):
        x = cupy.asarray(np.ones((4, 64), np.float32))
    assert first.device.accepts(x) is None
    for _ in range(3):
        y = second.run({"x": x})["y"]
        np.testing.assert_allclose(y, -2 * np.exp(np.ones((4, 64), np.float32)), rtol=1e-6)
    assert current() == 0


def test_a_run_waits_for_the_callers_stream_on_its_gpu(cupy: Any) -> None:
    """CuPy has a current stream for each."""
    session = infera_gpu.load(MODEL, device="cuda:1")
    there, elsewhere = (fake_cupy.Stream(name=f"the caller's on {i}", device_id=i) for i in (1, 0))
    with on(cupy, 1), there, on(cupy, 0), elsewhere:
        answered(session)
    assert session.device._stream.log[0] == "wait for the caller's on 1"  # type: ignore[attr-defined]


def test_a_device_that_is_not_closed_gives_its_gpus_temporaries_back(cupy: Any) -> None:
    device = cuda.CudaDevice(1)
    with device.running():
        cupy.empty((1000,), np.uint8)
    assert used(cupy) == [0, 1000]
    del device
    gc.collect()
    assert used(cupy) == [0, 0]


def test_a_gpu_beyond_the_last_is_named(cupy: Any) -> None:
    with pytest.raises(DeviceError, match=r"cuda:2 does not exist; this machine has 2 GPU\(s\), cuda:0 to cuda:1"):
        infera_gpu.load(MODEL, device="cuda:2")


# ---- two sessions


def test_two_sessions_take_turns_and_each_gives_back_what_is_its_own(cupy: Any) -> None:
    first, second = (infera_gpu.load(MODEL, device=f"cuda:{i}") for i in range(2))
    for seed in range(6):
        answered((first, second)[seed % 2], 2 + seed // 2, seed)
    zero, one = used(cupy)
    assert zero == one > 0
    first.close()
    assert used(cupy) == [0, one]
    answered(second)
    second.close()
    assert used(cupy) == [0, 0]


def test_two_sessions_run_from_two_threads(cupy: Any) -> None:
    sessions = [infera_gpu.load(MODEL, device=f"cuda:{i}", max_concurrency=2) for i in range(2)]

    def answer(seed: int) -> int:
        with on(cupy, seed // 2 % 2):
            for turn in range(8):
                answered(sessions[(seed + turn) % 2], 1 + (seed + turn) % 3, seed)
        return current()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(answer, range(8))) == {0}
    for session in sessions:
        assert session.device._stream.active == 0  # type: ignore[attr-defined]
        session.close()
    assert used(cupy) == [0, 0]


def test_weights_of_a_budget_count_on_their_gpu(cupy: Any) -> None:
    sessions = [infera_gpu.load(MODEL, device=f"cuda:{i}", vram_limit="1MiB") for i in range(2)]
    for session in sessions:
        answered(session)
    assert used(cupy)[0] == used(cupy)[1] > 0
    with pytest.raises(OutOfMemoryError, match="cuda:1"):
        answered(sessions[1], 100 * ROWS)
    answered(sessions[0])
    for session in sessions:
        session.close()
    assert used(cupy) == [0, 0]


# ---- one of them is out of memory, or lost


def test_out_of_memory_on_one_leaves_the_other_working(cupy: Any) -> None:
    first, second = (infera_gpu.load(MODEL, device=f"cuda:{i}") for i in range(2))
    cupy.vrams[1].total = cupy.vrams[1].used + (1 << 17)
    with pytest.raises(OutOfMemoryError, match="cuda:1") as caught:
        answered(second, 10 * ROWS)
    assert caught.value.available <= 1 << 17
    assert current() == 0
    answered(first, 10 * ROWS)
    answered(second, 2)  # and so does the one, with less


@pytest.mark.parametrize("mine", [0, 1])
def test_a_fault_loses_the_sessions_of_its_gpu_alone(cupy: Any, mine: int) -> None:
    first, second, third = (infera_gpu.load(MODEL, device=f"cuda:{i}") for i in (0, 1, 1))
    cpu = infera_gpu.load(MODEL, device="cpu")
    for session in (first, second, third):
        answered(session)
    cupy.cuda.Device(mine).use()  # whichever GPU the caller works on
    heal = fault(cupy, 1)
    with pytest.raises(DeviceLostError, match=r"cuda:1 is lost to this process: .*restart the process"):
        answered(second)
    heal()
    for session in (second, third):
        with pytest.raises(DeviceLostError, match=r"cuda:1 .*restart the process"):
            answered(session)
    with pytest.raises(DeviceLostError, match="restart the process"):
        infera_gpu.load(MODEL, device="cuda:1")
    for healthy in (first, cpu, infera_gpu.load(MODEL, device="cuda:0")):
        answered(healthy)
        assert healthy.device.lost == ""
    for session in (second, third, first):
        session.close()


def test_a_fault_that_shows_when_another_gpu_is_made_current_is_that_of_the_one_left(cupy: Any) -> None:
    first, second = (infera_gpu.load(MODEL, device=f"cuda:{i}") for i in range(2))
    with pytest.raises(DeviceLostError, match="cuda:1 is lost"), second.device.running():
        fake_cupy.Device.faults[1] = 700
    assert second.device.lost
    answered(first)
    assert first.device.lost == ""
    assert current() == 0


def test_who_comes_from_a_gpu_that_the_caller_lost_loses_no_other(cupy: Any) -> None:
    """The caller's own kernel faulted, and CUDA tells of it where his GPU is made current again."""
    first, second = (infera_gpu.load(MODEL, device=f"cuda:{i}") for i in range(2))
    for session in (first, second):
        answered(session)
    cupy.cuda.Device(1).use()
    fake_cupy.Device.faults[1] = 700
    for _ in range(3):
        answered(first)
        assert first.device.lost == ""
    with pytest.raises(DeviceLostError, match="cuda:1"):
        answered(second)
    answered(first)
    first.close()
    assert used(cupy)[0] == 0
