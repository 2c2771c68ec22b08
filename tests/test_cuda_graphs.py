"""CUDA graphs: what is captured, when, and what happens beside it. Nothing here runs on a GPU."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from infera_gpu.devices import cuda
from infera_gpu.devices.graphs import TRIES, CapturedCalls, Turnstile
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.errors import DeviceError
from infera_gpu.loader import load_graph
from infera_gpu.op import Call
from infera_gpu.plan import ALONE, uncaptured
from infera_gpu.session import Session
from tests import fake_cupy
from tests.text import parse

COPIES = """
    g (float[N, 4] x, float[N, 4] z, float[N, 4] w) => (float[N, 12] y) {
        a = Exp(x)
        y = Concat <axis = 1> (a, z, w)
    }"""
FEEDS = {name: np.arange(12, dtype=np.float32).reshape(3, 4) + i for i, name in enumerate("xzw")}


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_cupy.install(monkeypatch)


def counted(stream: fake_cupy.Stream, counts: list[int], i: int = 0) -> Call:
    def add() -> None:
        counts[i] += 1

    return stream.put, ("add", add)


def test_calls_are_made_then_recorded_then_replayed() -> None:
    stream, counts = fake_cupy.Stream(), [0]
    calls = CapturedCalls([counted(stream, counts), counted(stream, counts)], stream, turnstile := Turnstile())
    logs = []
    for _ in range(4):
        with turnstile:
            stream.log.clear()
            calls()
            logs.append(stream.log.copy())
    stream.synchronize()
    assert logs == [["add", "add"], ["replay 2"], ["replay 2"], ["replay 2"]]
    assert counts == [8]


def test_a_recording_that_is_refused_is_ended_and_says_why() -> None:
    """Not at once: it may have been another thread's call that ended it. The run is right all the same."""
    stream, counts = fake_cupy.Stream(), [0]

    def refused() -> None:
        if stream.recorded is not None:
            stream.refuse_while_recording()

    calls = CapturedCalls([counted(stream, counts), (refused, ())], stream, turnstile := Turnstile())
    with turnstile:
        for _ in range(TRIES):
            calls()
        for _ in range(2):
            with pytest.raises(fake_cupy.CUDARuntimeError, match="900"):
                calls()
            assert stream.recorded is None
    with turnstile:  # nobody is locked out
        stream.synchronize()
    assert counts == [TRIES]


@pytest.mark.parametrize("at", ["a call", "the end", "a library's call"])
def test_a_recording_that_another_thread_ends_is_made_in_the_next_run(at: str) -> None:
    stream, counts, ended = fake_cupy.Stream(), [0], list[bool]()

    def disturb() -> None:
        if stream.recorded is not None and not ended:
            ended.append(True)
            if at == "a call":
                stream.refuse_while_recording()
            stream.recorded = None
            if at == "a library's call":
                raise RuntimeError("status 14")  # which does not say why

    calls = CapturedCalls([counted(stream, counts), (disturb, ())], stream, turnstile := Turnstile())
    logs = []
    with turnstile:
        for _ in range(4):
            stream.log.clear()
            calls()
            logs.append(stream.log.copy())
        stream.synchronize()
    assert logs == [["add"], ["add"], ["replay 1"], ["replay 1"]]
    assert counts == [4]


def test_what_fails_while_a_stream_records_is_raised_at_once() -> None:
    stream = fake_cupy.Stream()

    def broken() -> None:
        if stream.recorded is not None:
            raise ValueError("broken")

    calls = CapturedCalls([(broken, ())], stream, turnstile := Turnstile())
    with turnstile:
        calls()
        with pytest.raises(ValueError, match="broken"):
            calls()
    assert stream.recorded is None


def test_nobody_waits_for_a_stream_that_records(cupy: Any) -> None:
    """`synchronize`, after a run that failed or that shares its arena, is called outside of it."""
    device = cuda.CudaDevice(0)
    recording, done = threading.Event(), threading.Event()

    def record() -> None:
        with device.running(), device._turnstile.alone():
            device._stream.begin_capture()
            recording.set()
            time.sleep(0.05)
            device._stream.end_capture()
            done.set()

    thread = threading.Thread(target=record)
    thread.start()
    assert recording.wait(10)
    device.synchronize()
    assert done.is_set()
    thread.join(10)


def test_nobody_is_inside_while_one_records() -> None:
    """Threads run graphs of their own on one stream; what one records must be its own calls and nothing else."""
    stream, turnstile, counts = fake_cupy.Stream(), Turnstile(), [0] * 8
    failures: list[BaseException] = []

    def run(i: int) -> None:
        try:
            for _ in range(20):
                calls = CapturedCalls([counted(stream, counts, i)] * 3, stream, turnstile)
                for _ in range(4):
                    with turnstile:
                        calls()
                        time.sleep(0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    stream.synchronize()
    assert counts == [20 * 4 * 3] * 8


def test_two_that_want_to_be_alone_do_not_wait_for_each_other() -> None:
    turnstile, answers = Turnstile(), []
    inside = threading.Barrier(2)

    def run() -> None:
        with turnstile:
            inside.wait(10)
            with turnstile.alone() as alone:
                answers.append(alone)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(answers) in ([False, True], [True, True])


def test_a_run_that_stays_inside_holds_up_nobody_for_long() -> None:
    """One that plans a new shape does. Who would record goes on without; newcomers wait for a twentieth of the time."""
    turnstile, planned, answers = Turnstile(), threading.Event(), []

    def plan() -> None:
        with turnstile:
            planned.wait(10)

    planning = threading.Thread(target=plan)
    planning.start()
    waited, until = [], time.monotonic() + 1.5

    def run() -> None:
        while time.monotonic() < until:
            began = time.monotonic()
            with turnstile:
                waited.append(time.monotonic() - began)
                with turnstile.alone() as alone:
                    answers.append(alone)
            time.sleep(0.001)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(answers)
    assert max(waited) < 1.2, "one waits 0.1 s here, and a slow machine adds to that; the planning takes ten"
    planned.set()
    planning.join(10)
    turnstile._resumes_at = 0.0
    with turnstile, turnstile.alone() as alone:
        assert alone


def test_a_run_within_a_run_does_not_wait_for_a_recording() -> None:
    turnstile, started = Turnstile(), threading.Event()

    def record() -> None:
        started.set()
        with turnstile, turnstile.alone():
            pass

    with turnstile:
        thread = threading.Thread(target=record)
        thread.start()
        started.wait(10)
        time.sleep(0.05)  # it waits for this run by now
        with turnstile:
            pass
    thread.join(10)
    assert not thread.is_alive()


def test_the_cuda_device_replays_copies(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    session = Session(load_graph(parse(COPIES)), device)
    assert session.plan_for(FEEDS).graphs == (range(1, 3),)
    for n in range(4):
        device._stream.log.clear()
        out = session.run(FEEDS)
        np.testing.assert_array_equal(out["y"], np.concatenate([np.exp(FEEDS["x"]), FEEDS["z"], FEEDS["w"]], 1))
        assert ("replay 2" in device._stream.log) == bool(n)


def test_captures_are_declined_by_choice_alone(cupy: Any) -> None:
    device = cuda.CudaDevice(0, captures=False)
    session = Session(load_graph(parse(COPIES)), device)
    assert session.plan_for(FEEDS).graphs is None
    for _ in range(3):
        session.run(FEEDS)
    assert not any(line.startswith("replay") for line in device._stream.log)


def test_a_capture_that_cuda_refuses_is_a_device_error(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda.CudaDevice(0)
    session = Session(load_graph(parse(COPIES)), device)
    session.run(FEEDS)
    monkeypatch.setattr(device._stream, "put", lambda what, call: device._stream.refuse_while_recording())
    for _ in range(TRIES - 1):
        session.run(FEEDS)
    with pytest.raises(DeviceError, match="cuda:0 failed in a run"):
        session.run(FEEDS)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("nodes", "reasons"),
    [
        ("y = Exp(x)", [ALONE]),
        ("a = Exp(x) b = Softmax(a) y = MatMul(b, x)", [""] * 3),
        ("a = Softmax(x) b = Det(a) y = Add(a, b)", [ALONE, "allocates", ALONE]),
    ],
)
def test_plans_give_a_reason_for_each_step_in_no_graph(nodes: str, reasons: list[str]) -> None:
    graph = load_graph(parse(f"g (float[4, 4] x) => (float[4, 4] y) {{ {nodes} }}"))
    with Session(graph, RecordingDevice()) as session:
        plan = session.plan_for({"x": (4, 4)})
    assert plan.graphs is not None
    assert uncaptured(plan.steps, plan.graphs) == reasons
    for line, reason in zip(str(plan).splitlines()[-len(reasons) :], reasons, strict=True):
        assert f"({reason})" in line if reason else "(" not in line


def test_steps_that_copy_say_where_to() -> None:
    graph = load_graph(parse("g (float[4, 4] x) => (float[4, 4] y) { a = Exp(x) b = Bernoulli(a) y = Softmax(b) }"))
    with Session(graph, RecordingDevice()) as session:
        plan = session.plan_for({"x": (4, 4)})
    assert plan.graphs is not None
    reasons = dict(zip([s.kind for s in plan.steps], uncaptured(plan.steps, plan.graphs), strict=True))
    assert (reasons["download"], reasons["upload"]) == ("copies to the host", "copies to the device")
    assert uncaptured(plan.steps, plan.graphs)[2] == "runs on the host"


@pytest.mark.kernels
def test_plans_say_what_is_captured_and_why_not() -> None:
    device = RecordingDevice()
    text = """
        g (float[4, 4] x) => (float[4, 4] y) {
            a = Exp(x) b = Neg(a) c = Det(b) d = Add(b, c) e = Tanh(d) f = Sqrt(e) y = Add(f, d)
        }"""
    session = Session(load_graph(parse(text)), device)
    plan = session.plan_for({"x": (4, 4)})
    at = next(i for i, s in enumerate(plan.steps) if s.label.startswith("Det"))
    assert plan.graphs == tuple(r for r in (range(at), range(at + 1, len(plan.steps))) if len(r) > 1)
    assert f"{sum(map(len, plan.graphs))} of {len(plan.steps)} steps in {len(plan.graphs)} CUDA graphs" in str(plan)
    assert plan.steps[at].uncapturable in str(plan).splitlines()[-len(plan.steps) + at]
    x = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    for _ in range(2):
        device.events.clear()
        session.run({"x": x})
        assert [e.kind for e in device.events].count("replay") == len(plan.graphs)


def test_an_interrupt_while_waiting_to_be_alone_locks_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    turnstile = Turnstile()
    with turnstile:
        turnstile._inside += 1  # another run that goes on

        def interrupted(timeout: float) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(turnstile._changed, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt), turnstile.alone():
                pass
        turnstile._inside -= 1
    with turnstile, turnstile.alone() as alone:
        assert alone
