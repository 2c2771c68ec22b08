"""Sessions that share memory."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

import infera_gpu
from infera_gpu.devices.cpu import CpuDevice
from infera_gpu.errors import DeviceError, InputError
from infera_gpu.graph import HostArray
from infera_gpu.layout import Space
from tests.text import parse

SMALL = parse("g (float[N, 4] x) => (float[N, 4] y) { a = Exp(x) b = Sin(a) y = Add(a, b) }")
LARGE = parse("h (float[N, 64] x) => (float[N, 64] y) { a = Neg(x) b = Cos(a) y = Mul(a, b) }")
DYNAMIC = parse("d (float[N] x) => (int64[1, K] y, float[N] z) { a = Neg(x) y = NonZero(x) z = Exp(a) }")


def small(x: HostArray) -> Any:
    return np.exp(x) + np.sin(np.exp(x))


def large(x: HostArray) -> Any:
    return -x * np.cos(x)


@pytest.fixture(params=["cpu", "recording"])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_sessions_take_turns_in_memory_of_the_largest_plan(device: str) -> None:
    arena = infera_gpu.Arena()
    one = infera_gpu.load(SMALL, device=device, arena=arena)
    two = infera_gpu.load(LARGE, device=device, arena=arena)
    three = infera_gpu.load(DYNAMIC, device=device, arena=arena)
    rng = np.random.default_rng(0)
    for n in (3, 7, 7, 100, 3, 50):
        x, w, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, 4), (n, 64), (n,)))
        np.testing.assert_allclose(one.run({"x": x})["y"], small(x), rtol=1e-6)
        np.testing.assert_allclose(two.run({"x": w})["y"], large(w), rtol=1e-5, atol=1e-6)
        got = three.run({"x": v})
        np.testing.assert_array_equal(got["y"], [np.flatnonzero(v)])
        np.testing.assert_allclose(got["z"], np.exp(-v), rtol=1e-6)
    largest = two.plan_for({"x": (100, 64)})
    assert arena.nbytes == largest.arena_bytes + largest.staging


def test_what_a_session_bound_to_a_smaller_arena_is_let_go() -> None:
    arena = infera_gpu.Arena()
    sessions = [infera_gpu.load(LARGE, device="cpu", arena=arena) for _ in range(5)]
    tracemalloc.start()
    try:
        for n, session in enumerate(sessions):
            x = np.ones((10_000 + 1_000 * n, 64), np.float32)
            session.run({"x": x}, out={"y": x})
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1.5 * arena.nbytes
    finally:
        tracemalloc.stop()


def test_batch_sizes_of_one_session_share_its_arena() -> None:
    arena = infera_gpu.Arena()
    session = infera_gpu.load(LARGE, device="cpu", arena=arena)
    for n in (1, 16, 4, 2, 16):
        x = np.full((n, 64), n, np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], large(x), rtol=1e-5)
    assert arena.nbytes == session.plan_for({"x": (16, 64)}).arena_bytes


def test_runs_wait_for_each_other() -> None:
    arena = infera_gpu.Arena()
    sessions = [infera_gpu.load(m, device="cpu", arena=arena) for m in (SMALL, LARGE)]
    failures: list[BaseException] = []
    most = running = 0
    guard = threading.Lock()
    inner = arena.borrow, arena.give_back

    def borrow(*args: object) -> object:
        nonlocal running, most
        memory = inner[0](*args)  # type: ignore[arg-type]
        with guard:
            running += 1
            most = max(most, running)
        return memory

    def give_back(*args: object) -> None:
        nonlocal running
        with guard:
            running -= 1
        inner[1](*args)

    arena.borrow, arena.give_back = borrow, give_back  # type: ignore[assignment,method-assign]

    def work(seed: int) -> None:
        try:
            for i in range(40):
                which = (seed + i) % 2
                x = np.random.default_rng(i).standard_normal((1 + i % 5, (4, 64)[which])).astype(np.float32)
                want = (small, large)[which](x)
                np.testing.assert_allclose(sessions[which].run({"x": x})["y"], want, rtol=1e-5, atol=1e-6)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert most == 1


def test_the_last_session_that_is_closed_frees_the_memory() -> None:
    arena = infera_gpu.Arena(max_concurrency=2)
    one, two = (infera_gpu.load(m, device="cpu", arena=arena) for m in (SMALL, LARGE))
    x, w = np.ones((2, 4), np.float32), np.ones((2, 64), np.float32)
    one.run({"x": x})
    two.run({"x": w})
    two.close()
    assert arena.nbytes
    np.testing.assert_allclose(one.run({"x": x})["y"], small(x), rtol=1e-6)
    one.close()
    assert arena.nbytes == 0
    with pytest.raises(DeviceError, match="closed"):
        one.run({"x": x})
    with infera_gpu.load(SMALL, device="recording", arena=arena) as again:
        np.testing.assert_allclose(again.run({"x": x})["y"], small(x), rtol=1e-6)


def test_a_session_that_is_closed_while_its_run_waits_refuses_it() -> None:
    arena = infera_gpu.Arena()
    one, two = (infera_gpu.load(m, device="cpu", arena=arena) for m in (SMALL, LARGE))
    run = object()
    arena.borrow(one, run, lambda: None)
    refused: list[BaseException] = []

    def wait() -> None:
        try:
            two.run({"x": np.ones((2, 64), np.float32)})
        except DeviceError as error:
            refused.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    two.close()
    waiting.join(10)
    assert "closed" in str(refused[0])
    arena.give_back(run)


def test_devices_do_not_mix() -> None:
    arena = infera_gpu.Arena()
    one = infera_gpu.load(SMALL, device="cpu", arena=arena)
    with pytest.raises(DeviceError, match="the arena is on cpu, a session on recording cannot share it"):
        infera_gpu.load(SMALL, device="recording", arena=arena)
    del one
    gc.collect()
    infera_gpu.load(SMALL, device="recording", arena=arena)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, None])
def test_the_number_of_runs_is_positive(wrong: object) -> None:
    with pytest.raises(InputError, match="max_concurrency"):
        infera_gpu.Arena(wrong)  # type: ignore[arg-type]


def test_closing_gives_back_the_memory_of_loops() -> None:
    model = parse("""g (float[N, M] x, int64 n, bool c) => (float[A, B] y) {
        y = Loop (n, c, x) <body = b (int64 i, bool k, float[N, M] s) => (bool k2, float[N, M] t) {
            k2 = Identity(k)  a = Softmax(s)  t = Exp(a) }> }""")
    session = infera_gpu.load(model, device="cpu")
    feeds = {"x": np.ones((1000, 2000), np.float32), "n": np.array(2), "c": np.array(True)}
    session.run({**feeds, "x": feeds["x"][:1]})
    gc.disable()
    tracemalloc.start()
    try:
        session.run(feeds)
        session.close()
        assert tracemalloc.get_traced_memory()[0] < feeds["x"].nbytes / 2
    finally:
        tracemalloc.stop()
        gc.enable()


def test_closing_gives_back_what_dropped_sessions_share() -> None:
    names = "abcd"
    inputs, constants = (", ".join(f"float {n}{value}" for n in names) for value in ("", " = {2}"))
    model = parse(f"""g (float[N, 1000] x, {inputs}) => (float[N, 1000] y) <{constants}> {{
        t = Exp(x)  p = Mul(t, a)  q = Mul(p, b)  r = Mul(q, c)  y = Mul(r, d) }}""")
    arena = infera_gpu.Arena()
    session = infera_gpu.load(model, device="cpu", arena=arena)
    gc.disable()
    try:
        for count in (1, 2):
            for given in itertools.combinations(names, count):
                session.run({"x": np.ones((100, 1000), np.float32), **{n: np.array(3, np.float32) for n in given}})
        assert arena.nbytes
        session.close()
        assert not arena.nbytes
    finally:
        gc.enable()


def test_an_interrupt_right_after_borrowing_loses_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals and other threads may raise between any two steps of the interpreter."""
    session = infera_gpu.load(SMALL, device="cpu", max_concurrency=1)
    borrow = infera_gpu.Arena.borrow

    def interrupted(self: infera_gpu.Arena, *args: Any) -> Any:
        borrow(self, *args)
        raise KeyboardInterrupt

    feeds = {"x": np.ones((3, 4), np.float32)}
    with monkeypatch.context() as patched:
        patched.setattr(infera_gpu.Arena, "borrow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.run(feeds)
    np.testing.assert_allclose(session.run(feeds)["y"], small(feeds["x"]), rtol=1e-6)
    session.close()


def test_runs_that_are_first_together_make_a_constant_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    constant = CpuDevice.constant

    def slow(self: CpuDevice, host: HostArray, space: Space, **how: bool) -> HostArray:
        made.append(host.size)
        time.sleep(0.05)
        return constant(self, host, space, **how)

    monkeypatch.setattr(CpuDevice, "constant", slow)
    weight = numpy_helper.from_array(np.eye(40, dtype=np.float32), "w")
    model = parse("g (float[N, 40] x) => (float[N, 40] y) { y = MatMul(x, w) }")
    model.graph.initializer.append(weight)
    x = np.ones((5, 40), np.float32)
    with infera_gpu.load(model, device="cpu", jit=False) as session, ThreadPoolExecutor(3) as pool:
        start = threading.Barrier(3)

        def first(_: int) -> HostArray:
            start.wait()
            y: HostArray = session.run({"x": x})["y"]
            return y

        for y in pool.map(first, range(3)):
            np.testing.assert_array_equal(y, x)
    assert made == [1600]
