"""Runs on several threads: the same results, errors and concurrency as on one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import infera_gpu
from infera_gpu import cpus
from infera_gpu.devices import open_device
from infera_gpu.devices.workers import Workers
from infera_gpu.errors import DeviceError, InputError, PlanError
from infera_gpu.op import Call, Case, Op
from infera_kernels.calls import LEAST_NS, SERIAL, Split, one_after_the_other
from infera_kernels.cpu.parts import along, parts
from infera_server.models.model import threads_of
from infera_server.settings import Settings
from tests.buffers import GuardedBuffers
from tests.cases import assert_close, compute, covered, run, variants, wrong
from tests.text import parse

LITTLE = 1e-3
"""Nanoseconds: everything is worth a part of its own."""

PATIENCE = 60.0
"""Seconds after which a test that hangs fails."""


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    user = open_device("cpu", threads=4)
    made.enter(user, 4)
    yield made
    made.leave(user)


def together(*work: Callable[[], object]) -> None:
    """Does all the work at the same time. Raises the first error; AssertionError where something hangs."""
    errors: list[BaseException] = []

    def guarded(do: Callable[[], object]) -> None:
        try:
            do()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(do,), daemon=True) for do in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


# ---- the pool


def test_every_part_runs_once(workers: Workers) -> None:
    for count in (1, 2, 3, 4, 9):
        made: list[int] = []
        workers.run([[(made.append, (i,)), (made.append, (i + 100,))] for i in range(count)], 4)
        assert sorted(made) == [*range(count), *range(100, 100 + count)]


def test_parts_run_at_the_same_time(workers: Workers) -> None:
    """Each part waits until all have begun."""
    barrier = threading.Barrier(4, timeout=PATIENCE)
    workers.run([[(barrier.wait, ())]] * 4, 4)


def test_no_more_parts_at_a_time_than_threads(workers: Workers) -> None:
    """A region of two threads, while the pool has four."""
    barrier = threading.Barrier(3)

    def meet() -> None:
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait(0.05)

    workers.run([[(meet, ())]] * 3, 2)


def test_an_error_comes_back_when_every_part_has_ended(workers: Workers) -> None:
    begun, ended = threading.Event(), threading.Event()

    def fail() -> None:
        begun.wait(PATIENCE)
        raise IndexError("seven")

    def slow() -> None:
        begun.set()
        threading.Event().wait(0.1)
        ended.set()

    for order in ([fail, slow], [slow, fail]):
        begun.clear()
        ended.clear()
        with pytest.raises(IndexError, match="seven"):
            workers.run([[(do, ())] for do in order], 4)
        assert ended.is_set()


def test_a_busy_pool_is_not_waited_for(workers: Workers) -> None:
    """While one region holds every worker, another ends on its caller's thread."""
    release = threading.Event()
    barrier = threading.Barrier(5, timeout=PATIENCE)

    def hold() -> None:
        barrier.wait()
        release.wait(PATIENCE)

    def other() -> None:
        barrier.wait()
        made: list[int] = []
        workers.run([[(made.append, (i,))] for i in range(4)], 4)
        assert made == [0, 1, 2, 3]
        release.set()

    together(lambda: workers.run([[(hold, ())]] * 4, 4), other)


def test_regions_nest(workers: Workers) -> None:
    made: list[int] = []
    inner: list[list[Call]] = [[(made.append, (i,))] for i in range(4)]
    workers.run([[(workers.run, (inner, 4))]] * 4, 4)
    assert sorted(made) == sorted([0, 1, 2, 3] * 4)


def test_many_regions_of_many_callers(workers: Workers) -> None:
    def call() -> None:
        for i in range(200):
            made: list[int] = []
            workers.run([[(made.append, (k,))] for k in range(2 + i % 4)], 2 + i % 3)
            assert sorted(made) == list(range(2 + i % 4))

    together(*[call] * 6)


def test_workers_have_the_settings_of_a_run(workers: Workers) -> None:
    barrier = threading.Barrier(4, timeout=PATIENCE)
    found: list[Any] = []

    def look() -> None:
        barrier.wait()
        found.append((np.geterr()["divide"], np.getbufsize()))

    with open_device("cpu", threads=1).running():
        workers.run([[(look, ())]] * 4, 4)
    assert len(set(found)) == 1


def test_threads_end_with_the_last_user() -> None:
    made = Workers()
    users = [open_device("cpu", threads=threads) for threads in (2, 4)]
    for user in users:
        made.enter(user, user.threads)
    assert made.running == 0
    made.run([[]] * 4, 4)
    assert made.running == 3
    made.leave(users[0])
    assert made.running == 3
    made.leave(users[1])
    patience = threading.Event()
    for _ in range(1000):
        if made.running:
            patience.wait(PATIENCE / 1000)
    assert made.running == 0


def test_blas_has_one_thread_while_sessions_run() -> None:
    """From the first run until the last session is closed; an idle session and one that is garbage change nothing."""
    code = """if True:
        import gc
        from threadpoolctl import ThreadpoolController, threadpool_info
        from infera_gpu.devices import open_device

        def note():
            gc.collect()
            found.append({lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"})

        found = []
        ThreadpoolController().limit(limits=2, user_api="blas")
        one, two, lost, idle = (open_device("cpu", threads=n) for n in (1, 2, 2, 2))
        note()
        for device in (one, two, lost):
            with device.running():
                note()
        del device, lost
        for device in (idle, one, two, two):
            device.close()
            note()
        print(found)
    """
    assert _python(code) == str([{n} for n in (2, 1, 1, 1, 1, 1, 2, 2)])


# ---- kernels


def test_parts_cover_everything_and_are_worth_a_thread() -> None:
    split = Split(4, one_after_the_other)
    for count in (1, 3, 4, 64, 1001):
        for multiple in (1, 16):
            cuts = parts(count, 1e9, split, multiple=multiple)
            assert [i for cut in cuts for i in range(count)[cut]] == list(range(count))
            assert len(cuts) == min(4, -(-count // multiple))
            assert all(cut.start % multiple == 0 for cut in cuts)
    assert [len(parts(100, n * LEAST_NS, split)) for n in (0, 1, 2, 3, 9)] == [1, 1, 2, 3, 4]
    assert len(parts(100, 1e9, SERIAL)) == 1


def test_along_takes_a_part_of_what_does_not_broadcast() -> None:
    x = np.arange(24).reshape(2, 3, 4)
    assert along(x, -2, slice(1, 3)).shape == (2, 2, 4)
    assert along(x[:, :1], -2, slice(1, 3)).shape == (2, 1, 4)
    assert along(x[0, 0], -2, slice(1, 3)).shape == (4,)


def split_cases() -> Iterator[Any]:
    for op, case, _ in covered("cpu"):
        yield pytest.param(op, case, id=f"{op.qualified}-{case.id}")


SPLIT = {"Add", "Concat", "Conv", "Erf", "FusedConv", "FusedMatMul", "Gelu", "Gemm", "LayerNormalization", "MatMul"}
SPLIT |= {"Mul", "Pow", "Relu", "Softmax", "Split", "Where"}
"""Operators some case of which is split, of those that matter most."""


@pytest.mark.parametrize(("op", "case"), [*split_cases()])
def test_parts_of_a_kernel_make_the_whole(op: Op, case: Case) -> None:
    """However little there is to do: parts in the other order, of one array, strided, and in place."""
    kernel = op.kernels["cpu"]
    for site, ins in variants(op, case, "cpu"):
        want = compute(op, site, ins)[: case.n_outs]
        options: list[dict[str, Any]] = [{}, *([{"strided": True}] if kernel.strided else [])]
        options += [
            {"inplace": i}
            for i in kernel.inplace
            if site.has(i) and site.values[i] is None and site.ins[i] == site.outs[0]
        ]
        for option in options:
            for threads in (2, 3):
                buffers = GuardedBuffers(ins, site.outs, site.values, threads=threads, least_ns=LITTLE, **option)
                calls = list(kernel.bind(site, buffers))
                buffers.prepare([wrong(w) for w in want])
                run(calls)
                buffers.check()
                for i, (got, w) in enumerate(zip(buffers.outs, want, strict=False)):
                    assert_close(got, w, case.tol, f"output {i} in {threads} parts {option}")


def test_the_heavy_operators_are_split() -> None:
    found = set()
    for op, _, sites in covered("cpu"):
        for site, ins in sites:
            buffers = Counting(ins, site.outs, site.values, threads=2, least_ns=LITTLE)
            op.kernels["cpu"].bind(site, buffers)
            if buffers.parts > 1:
                found.add(op.name)
    assert found >= SPLIT


class Counting(GuardedBuffers):
    """Remembers into how many parts a kernel split."""

    parts = 1

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        self.parts = max(self.parts, len(parts))
        return super().parallel(parts)


# ---- sessions

MODEL = """
g (float[N, 64, 48] x) => (float[N, 64, 48] y) {
    h = MatMul(x, w1)
    s = Add(h, b1)
    g = Sigmoid(s)
    m = Mul(s, g)
    p = MatMul(m, w2)
    r = Add(p, x)
    n = LayerNormalization(r, one)
    y = Softmax(n)
}
"""


WEIGHTS = {"w1": (48, 192), "b1": (192,), "w2": (192, 48), "one": (48,)}


def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    made = parse(MODEL)
    for name, shape in WEIGHTS.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    return made


def feeds(n: int, seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).standard_normal((n, 64, 48), np.float32)}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is worth splitting."""
    monkeypatch.setattr("infera_gpu.devices.cpu.LEAST_NS", LITTLE)
    monkeypatch.setattr("infera_gpu.devices.processes.LEAST_NS", LITTLE)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("threads", [2, 3])
def test_runs_on_several_threads_equal_those_on_one(n: int, threads: int) -> None:
    with infera_gpu.load(model(), device="cpu", threads=1) as one:
        want = one.run(feeds(n))["y"]
    with infera_gpu.load(model(), device="cpu", threads=threads) as several:
        for _ in range(20):
            np.testing.assert_allclose(several.run(feeds(n))["y"], want, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("eager")
def test_two_sessions_of_many_callers() -> None:
    with (
        infera_gpu.load(model(), device="cpu", threads=3) as first,
        infera_gpu.load(model(), device="cpu", threads=2) as second,
        infera_gpu.load(model(), device="cpu", threads=1) as alone,
    ):

        def call(session: infera_gpu.Session, seed: int) -> None:
            want = alone.run(feeds(1 + seed, seed))["y"]
            for _ in range(50):
                np.testing.assert_allclose(session.run(feeds(1 + seed, seed))["y"], want, rtol=1e-5, atol=1e-7)

        together(*(partial(call, session, seed) for session in (first, second) for seed in range(3)))


@pytest.mark.usefixtures("eager")
def test_closing_while_runs_go_on() -> None:
    for _ in range(20):
        session = infera_gpu.load(model(), device="cpu", threads=2)
        session.run(feeds(2))

        def call(session: infera_gpu.Session = session) -> None:
            while True:
                session.run(feeds(2))

        with pytest.raises(DeviceError, match="closed"):
            together(call, call, session.close)


@pytest.mark.usefixtures("eager")
def test_the_bodies_of_loops_are_split_too() -> None:
    text = """
    g (float[64, 64] x, int64 n) => (float[64, 64] y) <bool go = {1}> {
        y = Loop(n, go, x) <body = body (int64 i, bool c, float[64, 64] a) => (bool d, float[64, 64] b) {
            d = Identity(c)
            s = MatMul(a, x)
            b = Tanh(s)
        }>
    }"""
    given = {"x": np.random.default_rng(0).standard_normal((64, 64), np.float32), "n": np.int64(5)}
    with infera_gpu.load(parse(text), device="cpu", threads=1) as one:
        want = one.run(given)["y"]
    with infera_gpu.load(parse(text), device="cpu", threads=2) as two:
        np.testing.assert_allclose(two.run(given)["y"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("eager")
def test_an_error_in_a_part_names_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Workers, parts: Any, threads: int) -> None:
        self_run(self, [*parts, [(int, ("nine",))]], threads)

    self_run = Workers.run
    monkeypatch.setattr(Workers, "run", broken)
    source = parse("g (float[200, 200] a) => (float[200, 200] c) { c = Tanh(a) }")
    with infera_gpu.load(source, device="cpu", threads=2) as session, pytest.raises(PlanError, match=r"Tanh.*nine"):
        session.run({"a": np.zeros((200, 200), np.float32)})


FORKED = """
import os, sys
import numpy as np
import infera_gpu
import infera_gpu.devices.processes
infera_gpu.devices.processes.LEAST_NS = 1e-3
from tests.test_threads import feeds, model
session = infera_gpu.load(model(), device="cpu", threads=2)
want = session.run(feeds(2))["y"]
for _ in range(3):
    child = os.fork()
    if not child:
        same = all(np.array_equal(session.run(feeds(2))["y"], want) for _ in range(20))
        os._exit(0 if same else 1)
    session.run(feeds(2))
    assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_runs_on() -> None:
    assert _python(FORKED) == "fine"


def test_no_threads_without_need() -> None:
    code = (
        "import threading, infera_gpu\n"
        "from tests.test_threads import feeds, model\n"
        "one = infera_gpu.load(model(), device='cpu', threads=1); one.run(feeds(64))\n"
        "two = infera_gpu.load(model(), device='cpu', threads=2); before = threading.active_count()\n"
        "two.run(feeds(64))\n"
        "print(before, threading.active_count())"
    )
    assert _python(code) == "1 2"


def _python(code: str) -> str:
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


# ---- how many


def test_the_plan_says_how_many_threads_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpus.VARIABLE, "3")
    with infera_gpu.load(model(), device="cpu") as session:
        plan = session.plan_for(feeds(64))
        assert "3 threads" in plan.headline
        assert f"({cpus.VARIABLE})" in plan.headline
        assert any("x3" in line for line in str(plan).splitlines())
    with infera_gpu.load(model(), device="cpu", threads=1) as session:
        assert "1 thread (as asked)" in session.plan_for(feeds(64)).headline
        assert all(step.parts == 1 for step in session.plan_for(feeds(64)).steps)


CGROUPS: dict[str, tuple[str, dict[str, str], int | None]] = {
    "none": ("0::/\n", {}, None),
    "no limit": ("0::/\n", {"cpu.max": "max 100000"}, None),
    "two": ("0::/\n", {"cpu.max": "250000 100000"}, 2),
    "less than one": ("0::/\n", {"cpu.max": "50000 100000"}, 1),
    "of a group around it": (
        "0::/a/b\n",
        {"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "500000 100000"},
        3,
    ),
    "out of sight": ("0::/docker/12\n", {"cpu.max": "200000 100000"}, 2),
    "version 1": (
        "4:memory:/m\n2:cpu,cpuacct:/a\n0::/\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
        | {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"},
        4,
    ),
    "version 1, no limit": ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "damaged": ("0::/\n", {"cpu.max": "many"}, None),
}
"""What the system says of the process's control groups, and how many CPUs' worth of time that is."""


@pytest.mark.parametrize("case", CGROUPS.values(), ids=CGROUPS)
def test_a_quota_of_the_control_groups_counts(
    case: tuple[str, dict[str, str], int | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    groups, files, worth = case
    for name, text in {"own": groups, **{f"mounted/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpus, "_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cpus, "_MOUNTED", tmp_path / "mounted")
    monkeypatch.setattr(cpus, "usable_cores", lambda: 8)
    monkeypatch.delenv(cpus.VARIABLE, raising=False)
    why = "every core" if worth is None else "the CPU time that the control group has"
    assert cpus.default_threads() == (worth or 8, why)


def test_threads_where_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_GROUPS", Path("nowhere"))
    monkeypatch.setattr(cpus, "usable_cores", lambda: 8)
    for asked, threads in (("5", 5), ("", 8)):
        monkeypatch.setenv(cpus.VARIABLE, asked)
        assert cpus.default_threads()[0] == threads
    for asked in ("0", "many", "-1", "4097", "9" * 64, "nan"):
        monkeypatch.setenv(cpus.VARIABLE, asked)
        with pytest.raises(InputError, match=f"INFERA_THREADS is '{asked}', expected a positive number"):
            cpus.default_threads()


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", cpus.MAX_THREADS + 1])
def test_threads_that_there_cannot_be(threads: Any) -> None:
    with pytest.raises(InputError, match="expected a positive number up to 4096"):
        infera_gpu.load(model(), device="cpu", threads=threads)


def test_cores_are_counted_once() -> None:
    assert 1 <= cpus.usable_cores() <= (os.cpu_count() or 1)


def test_a_server_leaves_one_core_to_its_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_GROUPS", Path("nowhere"))
    monkeypatch.setattr(cpus, "usable_cores", lambda: 8)
    monkeypatch.delenv(cpus.VARIABLE, raising=False)
    assert threads_of(Settings())[0] == 7
    assert threads_of(Settings(threads=3)) == (3, "as set")
    monkeypatch.setattr(cpus, "usable_cores", lambda: 1)
    assert threads_of(Settings())[0] == 1
    monkeypatch.setenv(cpus.VARIABLE, "5")
    assert threads_of(Settings()) == (5, "as set")


def test_blas_gets_its_threads_back_when_the_last_session_is_collected() -> None:
    """In a process of its own: other tests' sessions are still there."""
    script = """
import gc
import numpy as np, threadpoolctl, infera_gpu
from tests.text import parse
def threads(): return [lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
threadpoolctl.threadpool_limits(2, "blas")
before = threads()
session = infera_gpu.load(parse("g (float[N] x) => (float[N] y) { y = Exp(x) }"), device="cpu")
session.run({"x": np.ones(3, np.float32)})
during = threads()
del session
gc.collect()
assert during == [1] * len(before), during
assert threads() == before, threads()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # Python 3.12's, of any such fork
def test_the_child_of_a_fork_waits_for_no_thread_of_its_parent() -> None:
    """An arena that another thread had when the process was forked would never be given back in the child."""
    arena = infera_gpu.Arena()
    borrowed, done = threading.Event(), threading.Event()

    def hold() -> None:
        arena.borrow(arena, done, lambda: None)
        borrowed.set()
        done.wait()
        arena.give_back(done)

    thread = threading.Thread(target=hold)
    thread.start()
    borrowed.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits
        arena.borrow(arena, child, lambda: None)
        os._exit(0)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
