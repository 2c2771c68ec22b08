"""Parts of steps in worker processes: the same results and errors as in this one, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import infera_gpu
from infera_gpu.devices import processes
from infera_gpu.devices import shared as shared_memory
from infera_gpu.devices.processes import Processes
from infera_gpu.devices.sending import Region
from infera_gpu.devices.worker_process import VARIABLE
from infera_gpu.errors import DeviceError
from infera_gpu.graph import HostArray
from infera_gpu.op import Call, Case, Op
from infera_kernels.cpu.process import ASLEEP
from infera_kernels.jit import installed
from tests import elsewhere
from tests.buffers import GuardedBuffers
from tests.cases import assert_close, compute, covered, run, variants, wrong
from tests.test_threads import LITTLE, PATIENCE, _python, feeds, model, together

pytestmark = pytest.mark.skipif(bool(processes.unavailable()), reason=processes.unavailable())

JIT = [False, *[True] * installed()]
"""Without compiled kernels, and with them where they can be."""


def in_turn(parts: Sequence[Sequence[Call]], threads: int) -> None:
    for part in parts:
        run(part)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(1e-3)


@pytest.fixture
def pool() -> Iterator[Processes]:
    own = Processes()
    yield own
    own.end()


def array(pool: Processes, shape: tuple[int, ...], dtype: Any = np.int64) -> HostArray:
    """Zeros in memory that workers see."""
    assert pool.memory is not None
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    made: HostArray = np.ndarray(shape, dtype, pool.memory.block(nbytes))
    made[...] = 0
    return made


def made(pool: Processes, region: Region) -> Region:
    """The region, after a run."""
    pool.run(region)
    return region


def ready(pool: Processes, number: int = 1) -> list[int]:
    """Has the pool start workers; their processes."""
    x = array(pool, (number + 1,))
    region = Region([[(np.copyto, (x[i : i + 1], 1))] for i in range(number + 1)], number + 1, in_turn)
    until(lambda: made(pool, region).sent)
    return [w.process for w in pool.workers]


def shared(pool: Processes, count: int = 2) -> tuple[Region, HostArray]:
    """A region of so many parts, of which each notes its process when all have begun; what they note. It is like one
    that was run before."""
    marks = array(pool, (2, count))
    who, begun = marks
    parts: list[list[Call]] = []
    for i in range(count):
        mine = begun[i : i + 1]
        others = [begun[j : j + 1] for j in range(count) if j != i]
        parts.append(
            [
                (np.add, (mine, 1, mine)),
                *((elsewhere.wait_for, (other, mine)) for other in others),
                (elsewhere.note_process, (who[i : i + 1],)),
            ]
        )
    region = Region(parts, count, in_turn)
    region.runs = 1
    return region, who


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """While it makes no step, from the beginning on."""
    os.kill(process, signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, process, os.WSTOPPED)
        yield
    finally:
        os.kill(process, signal.SIGCONT)


# ---- the pool


@pytest.mark.parametrize("number", [1, 3])
def test_every_process_makes_a_part_at_the_same_time(pool: Processes, number: int) -> None:
    workers = ready(pool, number)
    region, who = shared(pool, number + 1)
    pool.run(region)
    assert who.tolist() == [os.getpid(), *workers]


def test_the_first_run_of_a_region_is_made_here(pool: Processes) -> None:
    who = array(pool, (2,))
    region = Region([[(elsewhere.note_process, (who[i : i + 1],))] for i in range(2)], 2, in_turn)
    pool.run(region)
    assert who.tolist() == [os.getpid()] * 2
    assert not pool.workers


def test_what_a_worker_computes_is_seen_and_it_sees_what_changed(pool: Processes) -> None:
    """Also arrays of every kind: strided, backwards, windows, read-only, of one element, of another byte order."""
    ready(pool)
    x, y = array(pool, (2, 40), np.float32), array(pool, (2, 6, 3), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x, 6, axis=1)[:, ::14]
    small = np.arange(6, dtype=">f4")[::-1]
    region = Region(
        [
            [
                (np.multiply, (windows[i].T[::-1], small.reshape(6, 1), y[i])),
                (np.add, (y[i], np.float32(2), y[i])),
                (np.add.reduce, (y[i][::-1], 0, None, y[i][0])),
            ]
            for i in range(2)
        ],
        2,
        in_turn,
    )
    for seed in range(20):
        x[...] = np.random.default_rng(seed).standard_normal(x.shape)
        pool.run(region)
        want = windows.swapaxes(1, 2)[:, ::-1] * small.reshape(6, 1) + np.float32(2)
        want[:, 0] = want[:, ::-1].sum(axis=1)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert region.sent is pool.workers


def test_what_cannot_be_sent_is_made_on_threads(pool: Processes) -> None:
    """Functions of Python's, and arrays of objects."""
    ready(pool)
    made: list[int] = []
    objects = np.array([object()])
    for calls in ([(made.append, (1,))], [(np.copyto, (objects, objects))], [(np.vectorize(abs), (1,))]):
        region = Region([calls, calls], 2, in_turn)
        for _ in range(3):
            pool.run(region)
        assert region.sent is False
    assert made == [1] * 6


def test_a_ufunc_is_numpys_whatever_else_has_it(pool: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the caller's that have imported one come before NumPy where pickle looks."""
    (worker,) = ready(pool)
    other = ModuleType("other")
    vars(other).update(log=np.log, add=np.add)
    monkeypatch.setitem(sys.modules, "other", other)
    for name in [n for n in sys.modules if n.split(".")[0] != "other"]:
        sys.modules[name] = sys.modules.pop(name)
    x = array(pool, (2, 4), np.float32)
    x[...] = 1
    calls: list[list[Call]] = [[(np.log, (x[i], x[i])), (np.add.reduce, (x[i], 0))] for i in range(2)]
    region = Region(calls, 2, in_turn)
    region.runs = 1
    pool.run(region)
    assert not x.any()
    assert [w.process for w in pool.workers] == [worker]


def test_a_worker_cannot_write_to_what_it_has_a_copy_of(pool: Processes) -> None:
    ready(pool)
    private = np.zeros(4, np.float32)
    region, _ = shared(pool)
    region.parts[1].append((np.copyto, (private, 1)))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="read-only"):
        pool.run(region)


@pytest.mark.parametrize("mine", [False, True])
def test_an_error_comes_back_when_every_part_has_ended(pool: Processes, mine: bool) -> None:
    ready(pool)
    region, who = shared(pool)
    region.parts[0 if mine else 1].append((elsewhere.fail, (IndexError("seven"),)))  # type: ignore[attr-defined]
    for _ in range(3):
        who[...] = 0
        with pytest.raises(IndexError, match="seven"):
            pool.run(region)
        assert who.all()
    region, who = shared(pool)
    pool.run(region)
    assert who.all()


def test_an_error_that_cannot_be_sent_is_told(pool: Processes) -> None:
    ready(pool)
    region, _ = shared(pool)
    region.parts[1].append((elsewhere.fail_strangely, ()))  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="Strange"):
        pool.run(region)


def test_an_interrupt_is_raised_when_every_part_has_ended(pool: Processes) -> None:
    """Wherever it comes: in this process's part, or while it waits for the other; and nothing hangs afterwards."""
    ready(pool)
    who = array(pool, (2,))
    region = Region(
        [[(elsewhere.take_time, (1e-3 * (1 + i),)), (elsewhere.note_process, (who[i : i + 1],))] for i in range(2)],
        2,
        in_turn,
    )
    region.runs = 1

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    interrupted = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in np.linspace(1e-5, 3e-3, 200):
            who[...] = 0
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                pool.run(region)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            ended = who.copy()
            time.sleep(3e-3)
            np.testing.assert_array_equal(who, ended, "something was written after the run had ended")
            ready(pool)  # there are new workers where a message was cut off
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted
    workers = ready(pool)
    region, who = shared(pool)
    pool.run(region)
    assert who.tolist() == [os.getpid(), *workers]


def test_a_worker_that_does_not_come_is_not_waited_for(pool: Processes) -> None:
    (worker,) = ready(pool)
    who = array(pool, (2,))
    notes: list[list[Call]] = [[(elsewhere.note_process, (who[i : i + 1],))] for i in range(2)]
    region = Region([[(elsewhere.take_time, (0.01,)), *notes[0]], notes[1]], 2, in_turn)  # time enough to come
    until(lambda: made(pool, region) and who[1] == worker)
    with stopped(worker):
        pool.run(region)
        assert who.tolist() == [os.getpid()] * 2
    until(lambda: made(pool, region) and who[1] == worker)


def test_a_sleeper_that_is_stopped_is_not_waited_for(pool: Processes) -> None:
    """However often it is called: what it is called by must not fill the socket, which it does not read."""
    (worker,) = ready(pool)
    who = array(pool, (2,))
    region = Region([[(elsewhere.note_process, (who[i : i + 1],))] for i in range(2)], 2, in_turn)
    until(lambda: made(pool, region).sent)
    until(lambda: pool.workers[0].asleep)
    runs = Thread(target=lambda: [made(pool, region) for _ in range(5000)], daemon=True)
    with stopped(worker):
        runs.start()
        runs.join(PATIENCE)
        assert not runs.is_alive()
        assert who.tolist() == [os.getpid()] * 2


def test_an_interrupt_before_a_sleeper_is_called_leaves_it_to_be_called(
    pool: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(pool)
    (worker,) = pool.workers
    until(lambda: worker._words[worker._at + ASLEEP] not in (0, worker._woken))  # one that nobody has called
    sleep = worker._words[worker._at + ASLEEP]

    def interrupted(message: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(worker._connection, "send_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.wake()
    assert worker._words[worker._at + ASLEEP] == sleep
    worker.wake()
    until(lambda: worker._words[worker._at + ASLEEP] != sleep)


def test_a_worker_that_dies_in_a_part(pool: Processes) -> None:
    """Its run is lost; later ones are not, with a new worker, until too many have died."""
    for _ in range(processes.DEATHS):
        ready(pool)
        region, who = shared(pool)
        region.parts[1].append((elsewhere.die, ()))  # type: ignore[attr-defined]
        with pytest.raises(DeviceError, match=r"-9.*INFERA_PROCESSES=0"):
            pool.run(region)
        assert who[0] == os.getpid()
    x = array(pool, (2,))
    region = Region([[(np.copyto, (x[i : i + 1], 1))] for i in range(2)], 2, in_turn)
    for _ in range(3):
        pool.run(region)
    assert x.all()
    assert not pool.workers


def test_a_worker_that_dies_between_runs_costs_nothing(pool: Processes) -> None:
    (worker,) = ready(pool)
    region, who = shared(pool)
    pool.enter()
    pool.run(region)
    pool.leave()
    os.kill(worker, signal.SIGKILL)
    until(lambda: not pool.workers[0].alive)
    ones = Region([[(np.copyto, (who[i : i + 1], 1))] for i in range(2)], 2, in_turn)
    ones.runs = 1
    until(lambda: pool.workers[0].asleep or not pool.workers[0].alive)
    pool.enter()
    pool.run(ones)
    pool.leave()
    assert who.tolist() == [1, 1]
    assert ready(pool) != [worker]


def test_a_worker_that_is_killed_awake_is_replaced(pool: Processes) -> None:
    (worker,) = ready(pool)
    region, _ = shared(pool)
    pool.enter()
    pool.run(region)
    pool.workers[0]._words[pool.workers[0]._at + ASLEEP] = 0
    os.kill(worker, signal.SIGKILL)
    until(lambda: not pool.workers[0].alive)
    pool.workers[0]._words[pool.workers[0]._at + ASLEEP] = 0
    x = array(pool, (2,))
    ones = Region([[(np.add, (x[i : i + 1], 1, x[i : i + 1]))] for i in range(2)], 2, in_turn)
    ones.runs, ones.sent = 1, pool.workers
    ones.name = region.name
    pool.run(ones)
    pool.leave()
    pool.enter()
    pool.leave()
    assert x.tolist() == [1, 1]
    assert not pool.workers
    assert ready(pool) != [worker]


def test_regions_of_many_callers(pool: Processes) -> None:
    """Some with the worker, the others on threads of their own."""
    ready(pool)

    def call() -> None:
        x = array(pool, (2, 100), np.float64)
        region = Region([[(np.add, (x[i], 1, x[i]))] * 3 for i in range(2)], 2, in_turn)
        for i in range(1, 300):
            pool.run(region)
            assert (x == 3 * i).all()

    together(*[call] * 4)


def test_regions_are_forgotten(pool: Processes) -> None:
    """A worker lets go of memory when it hears of another region after the first one is gone."""
    (worker,) = ready(pool)

    def mapped() -> int:
        with open(f"/proc/{worker}/maps", encoding="ascii") as lines:
            return sum("memfd:infera" in line for line in lines)

    for _ in range(40):
        region, who = shared(pool)
        pool.run(region)
        del region, who
    assert mapped() < 12


def test_the_pages_of_blocks_go_back(pool: Processes) -> None:
    memory = pool.memory
    assert memory is not None

    def held() -> int:
        return os.fstat(memory.file).st_blocks * 512

    before = held()
    x = memory.block(1 << 24)
    x[...] = 1
    assert held() >= before + (1 << 24)
    part = x[5:7]
    del x
    assert held() >= before + (1 << 24)
    del part
    assert held() == before


def test_a_block_that_comes_while_others_are_sorted_is_found(pool: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, made = pool.memory, list[HostArray]()
    assert memory is not None
    first = memory.block(8)

    def slowly(addresses: list[int]) -> list[int]:
        if not made:
            made.append(memory.block(8))
        return sorted(addresses)

    monkeypatch.setattr(shared_memory, "sorted", slowly, raising=False)
    assert memory.place_of(first) is not None
    assert memory.place_of(made[0]) is not None


def test_windows_of_one_buffer_have_copies_of_their_own(pool: Processes) -> None:
    """Of all that each of them sees, as long as it is there."""
    memory = pool.memory
    assert memory is not None
    buffer = bytes(1 << 18)
    short, whole = np.frombuffer(buffer, np.uint8, 1 << 17), np.frombuffer(buffer, np.uint8)
    assert memory.place_of_copy(short)[1] < 1 << 18
    place = memory.place_of_copy(whole)
    assert place[1] >= 1 << 18
    del short
    assert memory.place_of_copy(whole) == place
    owner = np.zeros(1 << 18, np.uint8)
    place = memory.place_of_copy(as_strided(owner, (1 << 17,), (1,)))
    assert memory.place_of_copy(as_strided(owner, (1 << 18,), (1,))) == place
    assert memory.place_of_copy(owner) == place


def test_a_block_needs_no_descriptor_and_no_address_after_it_is_gone(pool: Processes) -> None:
    memory = pool.memory
    assert memory is not None

    def mapped() -> int:
        with open("/proc/self/maps", encoding="ascii") as lines:
            return sum("memfd:infera" in line for line in lines)

    descriptors, before = len(os.listdir("/proc/self/fd")), mapped()
    blocks = [memory.block(1 << 16) for _ in range(20)]
    for block in blocks:
        block[...] = 1
    assert len(os.listdir("/proc/self/fd")) == descriptors
    del block, blocks
    assert mapped() <= before


def test_more_than_can_be_mapped_is_refused(pool: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = pool.memory
    assert memory is not None
    monkeypatch.setattr(shared_memory, "require_host_memory", lambda what, nbytes: None)
    with pytest.raises(MemoryError, match="cannot be mapped"):
        memory.block(1 << 60)


@pytest.mark.skipif(sys.platform != "linux", reason="no files without a name")
def test_no_workers_where_files_are_limited() -> None:
    """The file of what they share only grows."""
    code = """import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from infera_gpu.devices.processes import unavailable
print(unavailable())"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ulimit -f" in found.stdout


# ---- kernels


class SharedBuffers(GuardedBuffers):
    """Parts are made by a pool, which no session ends."""

    pool: Processes

    def __init__(self, *args: Any, **named: Any) -> None:
        assert self.pool.memory is not None
        super().__init__(*args, memory=self.pool.memory.block, **named)
        self.regions: list[Region] = []

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        if len(parts) < 2:
            return super().parallel(parts)
        self.regions.append(Region([list(part) for part in parts], self.threads, in_turn))
        self.regions[-1].runs = 1
        return [(self.pool.run, (self.regions[-1],))]


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    SharedBuffers.pool = Processes()
    ready(SharedBuffers.pool)
    yield
    SharedBuffers.pool.end()


def split_cases() -> Iterator[Any]:
    for kind in ("cpu", *["jit"] * installed()):
        for op, case, _ in covered(kind):
            yield pytest.param(op, case, kind, id=f"{op.qualified}-{case.id}-{kind}")


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize(("op", "case", "kind"), [*split_cases()])
def test_parts_of_a_kernel_make_the_whole(op: Op, case: Case, kind: str) -> None:
    """Where a worker makes some of them: the calls of all NumPy and compiled kernels can be sent."""
    kernel = op.kernels[kind]
    for site, ins in variants(op, case, kind):
        want = compute(op, site, ins)[: case.n_outs]
        buffers = SharedBuffers(ins, site.outs, site.values, threads=2, least_ns=LITTLE)
        calls = list(kernel.bind(site, buffers))
        until(partial(_agree_and_are_told, buffers, calls, want, case.tol))
        until(lambda: all(w.ready for w in SharedBuffers.pool.workers))
        assert _agree_and_are_told(buffers, calls, want, case.tol)


def _agree_and_are_told(buffers: SharedBuffers, calls: list[Call], want: Sequence[HostArray], tol: float) -> bool:
    """Runs, and compares; whether all of it had been sent."""
    buffers.prepare([wrong(w) for w in want])
    run(calls)
    buffers.check()
    for i, (got, w) in enumerate(zip(buffers.outs, want, strict=False)):
        assert_close(got, w, tol, f"output {i}")
    return all(r.sent is buffers.pool.workers for r in buffers.regions)


# ---- sessions


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is worth splitting."""
    monkeypatch.setattr("infera_gpu.devices.processes.LEAST_NS", LITTLE)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("jit", JIT)
@pytest.mark.parametrize("threads", [2, 3])
def test_sessions(threads: int, jit: bool) -> None:
    """What is fed changes, and so do shapes; a session beside it is closed meanwhile."""
    with (
        infera_gpu.load(model(), device="cpu", threads=1, jit=jit) as one,
        infera_gpu.load(model(), device="cpu", threads=threads, jit=jit) as several,
    ):
        other = infera_gpu.load(model(), device="cpu", threads=threads, jit=jit)
        until(lambda: several.run(feeds(2)) and other.run(feeds(2)) and _with_workers(several))
        for seed in range(30):
            if seed == 15:
                other.close()
            n = 1 + seed % 3
            want = one.run(feeds(n, seed))["y"]
            for _ in range(3):
                np.testing.assert_allclose(several.run(feeds(n, seed))["y"], want, rtol=1e-5, atol=1e-7)


def _with_workers(session: infera_gpu.Session) -> bool:
    return bool(processes.POOL.workers) and all(w.ready for w in processes.POOL.workers)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("jit", JIT)
def test_nothing_is_started_where_it_is_unwanted(monkeypatch: pytest.MonkeyPatch, jit: bool) -> None:
    processes.POOL.end()
    monkeypatch.setenv(VARIABLE, "0")
    with infera_gpu.load(model(), device="cpu", threads=2, jit=jit) as session:
        for _ in range(5):
            session.run(feeds(2))
        assert not processes.POOL.workers


@pytest.mark.parametrize("jit", JIT)
@pytest.mark.parametrize(("threads", "where"), [(1, ""), (2, ", in 2 processes"), (9, "")])
def test_the_plan_says_where_parts_are_made(threads: int, where: str, jit: bool) -> None:
    with infera_gpu.load(model(), device="cpu", threads=threads, jit=jit) as session:
        some = "s" if threads > 1 else ""
        assert f" {threads} thread{some}{where} (as asked)" in session.plan_for(feeds(64)).headline


def _with(script: str, jit: bool) -> str:
    return script.replace("JIT", str(jit))


FORKED = """
import os, time
import numpy as np
import infera_gpu
from infera_gpu.devices import processes
processes.LEAST_NS = 1e-3
from tests.test_threads import feeds, model
session = infera_gpu.load(model(), device="cpu", threads=2, jit=JIT)
want = session.run(feeds(2))["y"]
while not (processes.POOL.workers and processes.POOL.workers[0].ready):
    session.run(feeds(2))
parent = processes.POOL.workers[0].process
go, tell = os.pipe()
child = os.fork()
if not child:
    os.close(tell)
    same = np.array_equal(session.run(feeds(2))["y"], want)
    os.read(go, 1)  # the other process has closed its session, and its arena holds something else
    while not (processes.POOL.workers and processes.POOL.workers[0].ready):
        same &= np.array_equal(session.run(feeds(2))["y"], want)
    same &= np.array_equal(session.run(feeds(2))["y"], want)
    os._exit(0 if same and processes.POOL.workers[0].process != parent else 1)
for _ in range(200):
    assert np.array_equal(session.run(feeds(2))["y"], want)
session.close()
del session
os.close(tell)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("jit", JIT)
def test_a_fork_has_workers_and_arenas_of_its_own(jit: bool) -> None:
    assert _python(_with(FORKED, jit)) == "fine"


CLOSED = """
import os
from infera_gpu.devices import processes
import infera_gpu
processes.LEAST_NS = 1e-3
from tests.test_threads import feeds, model
for _ in range(3):
    one, two = (infera_gpu.load(model(), device="cpu", threads=2, jit=JIT) for _ in range(2))
    while not (processes.POOL.workers and processes.POOL.workers[0].ready):
        one.run(feeds(2))
        two.run(feeds(2))
    worker, open_files = processes.POOL.workers[0].process, len(os.listdir("/proc/self/fd"))
    one.close()
    assert os.path.exists(f"/proc/{worker}")
    two.close()
    assert not os.path.exists(f"/proc/{worker}")
    assert len(os.listdir("/proc/self/fd")) < open_files
    del one, two
    assert os.fstat(processes.POOL.memory.file).st_blocks == 0
print("fine")
"""


@pytest.mark.parametrize("jit", JIT)
def test_workers_and_memory_go_with_the_last_session(jit: bool) -> None:
    assert _python(_with(CLOSED, jit)) == "fine"


LEFT = """
import os, sys
from infera_gpu.devices import processes
import infera_gpu
processes.LEAST_NS = 1e-3
from tests.test_threads import feeds, model
session = infera_gpu.load(model(), device="cpu", threads=2, jit=JIT)
while not (processes.POOL.workers and processes.POOL.workers[0].ready):
    session.run(feeds(2))
print(processes.POOL.workers[0].process, flush=True)
if sys.argv[1:]:
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("jit", JIT)
@pytest.mark.parametrize("killed", [False, True])
def test_workers_end_with_their_process(killed: bool, jit: bool) -> None:
    made = subprocess.run(
        [sys.executable, "-c", _with(LEFT, jit), *["x"] * killed], capture_output=True, text=True, timeout=PATIENCE
    )
    assert made.returncode == (-9 if killed else 0), made.stderr
    assert not made.stderr
    worker = int(made.stdout)

    def gone() -> bool:
        try:
            with open(f"/proc/{worker}/stat", encoding="ascii") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    until(gone)
