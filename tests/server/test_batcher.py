"""The batcher alone: who runs with whom, in what order, and what the others do not notice."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import pytest

from infera_server.errors import Expired, Overloaded, Unavailable
from infera_server.scheduling import batcher as batcher_module
from infera_server.scheduling import runner
from infera_server.scheduling.batcher import Batcher
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.rows import Arrays, HostArray, Layout
from infera_server.scheduling.turns import Turns
from tests.server.support import WAIT, flat, until

LAYOUT = Layout({"x": 0}, {"y": 0}, (1, 2, 4, 8))


class Engine:
    """y = 2x, one run at a time as the gate allows; rows that hold a negative number fail."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.runs: list[HostArray] = []

    def __call__(self, feeds: Arrays) -> Arrays:
        self.runs.append(feeds["x"].copy())
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT)
        if (feeds["x"] < 0).any():
            raise IndexError("negative")
        return {"y": feeds["x"] * 2}


class Caller:
    """What one job got back."""

    def __init__(self, batcher: Batcher, x: HostArray, deadline: float = float("inf")) -> None:
        self.results: list[Arrays | Exception] = []
        self.batch: Batch | None = None
        self.x = x
        self.job = Job({"x": x}, self._done, len(x), x.shape[1:], x.nbytes, deadline)
        batcher.submit(self.job)

    def _done(self, result: Arrays | Exception, batch: Batch | None) -> None:
        self.results.append(result)
        self.batch = batch

    def answer(self) -> Arrays | Exception:
        until(lambda: bool(self.results))
        (result,) = self.results
        return result

    def check(self) -> None:
        result = self.answer()
        assert isinstance(result, dict), result
        np.testing.assert_array_equal(result["y"], self.x * 2)


@pytest.fixture
def engine() -> Engine:
    return Engine()


class Clock:
    """The time as batches are told it: it may run ahead."""

    ahead = worked = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def thread_time(self) -> float:
        return time.thread_time() + self.worked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (batcher_module, runner):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    made = flat(Batcher(engine, LAYOUT, max_queue=16), (3,))
    yield made
    made.close()
    engine.gate.release(1000)
    assert made.join(WAIT)


def rows(n: int, width: int = 3, start: float = 1.0) -> HostArray:
    return np.arange(start, start + n * width, dtype=np.float32).reshape(n, width)


Key = TypeVar("Key")


def keep(got: dict[Key, Arrays | Exception], key: Key, result: Arrays | Exception, batch: Batch | None) -> None:
    """The callback that notes a result under `key`."""
    got[key] = result


def occupy(batcher: Batcher, engine: Engine) -> Caller:
    """A caller whose run has begun, so that what comes next waits."""
    caller = Caller(batcher, rows(1))
    assert engine.entered.acquire(timeout=WAIT)
    return caller


def test_idle_runs_at_once_and_alone(batcher: Batcher, engine: Engine) -> None:
    engine.gate.release()
    caller = Caller(batcher, rows(1))
    caller.check()
    assert caller.batch is not None
    assert (caller.batch.rows, caller.batch.padded) == (1, 1)
    assert engine.runs[0].shape == (1, 3)


def test_what_waits_runs_together_in_order_padded_to_a_bucket(batcher: Batcher, engine: Engine) -> None:
    first = occupy(batcher, engine)
    callers = [Caller(batcher, rows(n, start=10 * n)) for n in (1, 2, 2)]
    engine.gate.release(2)
    for caller in [first, *callers]:
        caller.check()
    together = engine.runs[1]
    assert together.shape == (8, 3)
    np.testing.assert_array_equal(together[:5], np.concatenate([c.x for c in callers]))
    np.testing.assert_array_equal(together[5:], np.repeat(callers[-1].x[-1:], 3, axis=0))
    assert len({id(c.batch) for c in callers}) == 1


def test_a_batch_is_never_over_the_largest_bucket(batcher: Batcher, engine: Engine) -> None:
    occupy(batcher, engine)
    callers = [Caller(batcher, rows(3)) for _ in range(5)]
    engine.gate.release(10)
    for caller in callers:
        caller.check()
    assert [len(run) for run in engine.runs[1:]] == [8, 8, 4]  # 6, 6 and 3 rows, padded


def test_one_job_of_an_odd_size_is_padded_and_cut(batcher: Batcher, engine: Engine) -> None:
    engine.gate.release()
    caller = Caller(batcher, rows(3))
    caller.check()
    assert engine.runs[0].shape == (4, 3)


@pytest.mark.parametrize("axis", [1, 2])
def test_rows_may_lie_on_any_axis(axis: int) -> None:
    layout = Layout({"x": axis}, {"y": 0}, (1, 2, 4, 8))
    gate = threading.Event()

    def run(feeds: Arrays) -> Arrays:
        assert gate.wait(WAIT)
        return {"y": np.moveaxis(feeds["x"], axis, 0).sum((1, 2))}

    batcher = Batcher(run, layout)
    xs = [np.random.default_rng(n).random((2, 2, 2)).astype(np.float32) for n in range(4)]
    got: dict[int, Arrays | Exception] = {}
    for i, x in enumerate(xs):
        batcher.submit(Job({"x": x}, functools.partial(keep, got, i), 2))
    gate.set()
    batcher.drain()
    assert batcher.join(WAIT)
    for i, x in enumerate(xs):
        result = got[i]
        assert isinstance(result, dict)
        np.testing.assert_allclose(result["y"], np.moveaxis(x, axis, 0).sum((1, 2)))


def test_feeds_of_a_job_alone_are_run_as_they_lie(batcher: Batcher, engine: Engine) -> None:
    odd = np.frombuffer(b"?" + rows(2).tobytes(), np.float32, 6, 1).reshape(2, 3)
    engine.gate.release()
    seen: list[HostArray] = []
    batcher._runner.run = lambda feeds: (seen.append(feeds["x"]), engine(feeds))[1]  # type: ignore[func-returns-value]
    Caller(batcher, odd).check()
    assert len(seen) == 1
    assert seen[0] is odd


def test_shapes_take_turns_oldest_first(batcher: Batcher, engine: Engine) -> None:
    occupy(batcher, engine)
    narrow = [Caller(batcher, rows(8, 2)) for _ in range(2)]
    wide = Caller(batcher, rows(1, 5))
    narrow += [Caller(batcher, rows(8, 2)) for _ in range(3)]
    engine.gate.release(10)
    for caller in [*narrow, wide]:
        caller.check()
    assert [run.shape[1] for run in engine.runs[1:]] == [2, 2, 5, 2, 2, 2]


def test_a_full_queue_refuses_and_says_when_to_come_back(batcher: Batcher, engine: Engine) -> None:
    engine.gate.release()
    Caller(batcher, rows(1)).check()
    assert engine.entered.acquire(timeout=WAIT)
    occupy(batcher, engine)
    waiting = [Caller(batcher, rows(1)) for _ in range(16)]
    with pytest.raises(Overloaded, match="16 requests") as refusal:
        Caller(batcher, rows(1))
    assert refusal.value.retry_after == pytest.approx(2.5e-3, abs=5e-4)  # what runs, and two batches of 8
    engine.gate.release(10)
    for caller in waiting:
        caller.check()


def test_waiting_bytes_are_limited_too(engine: Engine) -> None:
    batcher = Batcher(engine, LAYOUT, max_queue_bytes=100)
    occupy(batcher, engine)
    Caller(batcher, rows(8))  # 96 bytes
    with pytest.raises(Overloaded, match="96 bytes"):
        Caller(batcher, rows(1))
    engine.gate.release(10)
    batcher.drain()
    assert batcher.join(WAIT)


def test_a_deadline_that_passes_in_the_queue_is_answered_without_a_run(
    batcher: Batcher, engine: Engine, clock: Clock
) -> None:
    occupy(batcher, engine)
    late = Caller(batcher, rows(1, start=50), deadline=time.monotonic() + WAIT)
    patient = Caller(batcher, rows(1))
    clock.ahead = 2 * WAIT
    engine.gate.release(2)
    assert isinstance(late.answer(), Expired)
    patient.check()
    assert not any((run == 50).any() for run in engine.runs)
    assert batcher.queued == batcher.schedule.queued_rows == batcher.schedule.queued_bytes == 0


def test_expire_answers_while_a_run_goes_on(batcher: Batcher, engine: Engine, clock: Clock) -> None:
    first = occupy(batcher, engine)
    late = Caller(batcher, rows(1), deadline=time.monotonic() + WAIT)
    clock.ahead = 2 * WAIT
    batcher.expire()
    assert isinstance(late.answer(), Expired)
    assert not first.results
    assert batcher.queued == 0


def test_a_cancelled_job_does_not_run_and_frees_its_place(batcher: Batcher, engine: Engine) -> None:
    occupy(batcher, engine)
    gone = Caller(batcher, rows(1, start=50))
    stays = Caller(batcher, rows(1))
    assert batcher.cancel(gone.job)
    assert batcher.queued == 1
    engine.gate.release(2)
    stays.check()
    assert not gone.results
    assert not any((run == 50).any() for run in engine.runs)


def test_a_batch_that_fails_after_everybody_has_left(batcher: Batcher, engine: Engine) -> None:
    """There is nobody to run it again for, and the engine goes on."""
    first = Caller(batcher, np.zeros((1, 2)))
    assert engine.entered.acquire(timeout=WAIT)
    leaving = [Caller(batcher, np.full((1, 2), -1.0)) for _ in range(2)]
    engine.gate.release()
    assert engine.entered.acquire(timeout=WAIT)
    for caller in leaving:
        assert not batcher.cancel(caller.job)
    engine.gate.release()
    first.check()
    last = Caller(batcher, np.ones((1, 2)))
    engine.gate.release()
    last.check()
    assert not any(caller.results for caller in leaving)


def test_a_job_cancelled_during_its_run_disturbs_nobody(batcher: Batcher, engine: Engine) -> None:
    occupy(batcher, engine)
    pair = [Caller(batcher, rows(1)), Caller(batcher, rows(1))]
    engine.gate.release()
    assert engine.entered.acquire(timeout=WAIT)
    assert not batcher.cancel(pair[0].job)
    engine.gate.release()
    pair[1].check()
    assert not pair[0].results


def test_a_job_cancelled_as_it_is_taken_stays_cancelled(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    occupy(batcher, engine)
    pair = [Caller(batcher, rows(1)), Caller(batcher, rows(1))]
    lock, leaving = batcher._lock, [pair[0].job]

    class Lock:
        """The batcher's; right after the pair was taken one of them leaves."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *raised: object) -> None:
            lock.release()
            if leaving and not batcher.queued:
                batcher.cancel(leaving.pop())

    monkeypatch.setattr(batcher, "_lock", Lock())
    engine.gate.release(10)
    pair[1].check()
    assert not pair[0].results


def test_a_poisonous_job_fails_alone(batcher: Batcher, engine: Engine) -> None:
    occupy(batcher, engine)
    good = [Caller(batcher, rows(2, start=s)) for s in (10, 20)]
    bad = Caller(batcher, -rows(1))
    good.append(Caller(batcher, rows(1, start=30)))
    engine.gate.release(10)
    for caller in good:
        caller.check()
    assert isinstance(bad.answer(), IndexError)


def test_an_output_without_the_batch_fails_together_and_works_alone() -> None:
    batcher = Batcher(lambda feeds: {"y": feeds["x"].sum(0, keepdims=True)}, LAYOUT)
    caller = Caller(batcher, rows(3))
    result = caller.answer()
    assert isinstance(result, dict)
    np.testing.assert_array_equal(result["y"], rows(3).sum(0, keepdims=True))
    batcher.close()
    assert batcher.join(WAIT)


def test_without_a_layout_every_job_runs_alone(engine: Engine) -> None:
    batcher = Batcher(engine, None)
    callers = [Caller(batcher, rows(n)) for n in (1, 3, 1)]
    engine.gate.release(3)
    for caller in callers:
        caller.check()
    assert [len(run) for run in engine.runs] == [1, 3, 1]
    batcher.drain()
    assert batcher.join(WAIT)


def test_drain_finishes_what_was_accepted_and_refuses_the_rest(batcher: Batcher, engine: Engine) -> None:
    callers = [occupy(batcher, engine), *(Caller(batcher, rows(5, width)) for width in (2, 3, 2))]
    batcher.drain()
    with pytest.raises(Unavailable):
        Caller(batcher, rows(1))
    assert not batcher.join(0.01)
    engine.gate.release(10)
    assert batcher.join(WAIT)
    for caller in callers:
        caller.check()


def test_close_answers_what_waits(batcher: Batcher, engine: Engine) -> None:
    first = occupy(batcher, engine)
    waiting = Caller(batcher, rows(1))
    batcher.close()
    assert isinstance(waiting.answer(), Unavailable)
    engine.gate.release()
    first.check()


def test_a_failing_callback_does_not_stop_the_others(batcher: Batcher, engine: Engine) -> None:
    occupy(batcher, engine)

    def fail(result: Arrays | Exception, batch: Batch | None) -> None:
        raise ZeroDivisionError

    batcher.submit(Job({"x": rows(1)}, fail, 1, (3,)))
    after = Caller(batcher, rows(1))
    engine.gate.release(5)
    after.check()


# --- the device ----------------------------------------------------------------------------------------------------


def test_jobs_wait_until_the_device_is_free_and_others_join_them(engine: Engine, clock: Clock) -> None:
    turns = Turns()
    with turns:
        batcher = Batcher(engine, LAYOUT, turns=turns)
        first = Caller(batcher, rows(1))
        late = Caller(batcher, rows(1, start=50), deadline=time.monotonic() + WAIT)
        gone = Caller(batcher, rows(1, start=50))
        second = Caller(batcher, rows(1))
        assert batcher.queued == 4
        clock.ahead = 2 * WAIT
        assert batcher.cancel(gone.job)
        batcher.expire()
        assert isinstance(late.answer(), Expired)
    engine.gate.release(2)
    first.check()
    second.check()
    assert [len(run) for run in engine.runs] == [2]
    batcher.drain()
    assert batcher.join(WAIT)


def test_waiting_for_the_device_is_no_execution(engine: Engine, clock: Clock) -> None:
    turns = Turns()
    with turns:
        batcher = Batcher(engine, LAYOUT, turns=turns)
        caller = Caller(batcher, rows(1))
        until(lambda: len(turns._waiting) == 1)
        clock.ahead = 10 * WAIT
        engine.gate.release()
    caller.check()
    assert caller.batch is not None
    assert caller.batch.taken_at - caller.job.queued_at >= 10 * WAIT
    assert batcher.schedule.costs.of((3,)).typical[0] < 5 * WAIT
    batcher.drain()
    assert batcher.join(WAIT)


def test_the_device_is_handed_on_in_the_order_of_asking() -> None:
    turns, order = Turns(), []

    def take(name: int) -> None:
        for _ in range(3):
            with turns:
                order.append(name)

    with turns:
        threads = [threading.Thread(target=take, args=(name,)) for name in range(3)]
        for name, thread in enumerate(threads):
            thread.start()
            until(lambda count=name + 1: len(turns._waiting) == count)  # type: ignore[misc]
        assert turns.held_for() > 0
    for thread in threads:
        thread.join(WAIT)
    assert order == [0, 1, 2] * 3
    assert turns.held_for() == 0


def test_a_run_over_the_limit_is_answered_and_its_result_forgotten(engine: Engine, clock: Clock) -> None:
    batcher = Batcher(engine, LAYOUT, run_limit=WAIT)
    stuck = occupy(batcher, engine)
    batcher.expire()
    assert not stuck.results
    clock.ahead = 2 * WAIT
    batcher.expire()
    answer = stuck.answer()
    assert isinstance(answer, Expired)
    assert "has been running" in str(answer)
    engine.gate.release()
    batcher.drain()
    assert batcher.join(WAIT)
    assert len(stuck.results) == 1


def test_every_run_after_a_failed_batch_is_observed(batcher: Batcher, engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    occupy(batcher, engine)
    batcher.observe = lambda batch: seen.append((len(batch.jobs), batch.rows))
    callers = [Caller(batcher, rows(2)), Caller(batcher, -rows(1)), Caller(batcher, rows(1))]
    engine.gate.release(10)
    for caller in callers:
        caller.answer()
    until(lambda: len(seen) == 4)
    assert seen == [(1, 1), (1, 2), (1, 1), (1, 1)]
    assert [caller.batch.rows for caller in callers if caller.batch] == [2, 1, 1]


def test_strings_are_batched() -> None:
    gate = threading.Event()
    sizes: list[int] = []

    def run(feeds: Arrays) -> Arrays:
        assert gate.wait(WAIT)
        sizes.append(len(feeds["x"]))
        return {"y": feeds["x"]}

    batcher = Batcher(run, LAYOUT)
    got: dict[str, Arrays | Exception] = {}
    callers = [Job({"x": np.array([w], object)}, functools.partial(keep, got, w)) for w in ("a", "bb", "c")]
    for job in callers:
        batcher.submit(job)
    gate.set()
    batcher.drain()
    assert batcher.join(WAIT)
    assert {w: r["y"].tolist() for w, r in got.items() if isinstance(r, dict)} == {"a": ["a"], "bb": ["bb"], "c": ["c"]}
    assert max(sizes) > 1


def test_under_many_threads_everyone_gets_their_own_answer() -> None:
    batcher = Batcher(lambda feeds: {"y": feeds["x"] * 2}, LAYOUT, max_queue=1000)
    failures: list[BaseException] = []

    def call(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            for _ in range(30):
                Caller(batcher, rng.random((rng.integers(1, 9), rng.integers(1, 3))).astype(np.float32)).check()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not failures
    batcher.drain()
    assert batcher.join(WAIT)
    assert batcher.queued == batcher.schedule.queued_rows == batcher.schedule.queued_bytes == 0


def test_in_the_callers_thread_answers_come_before_all_accounts_and_find_the_model_idle() -> None:
    async def play() -> None:
        loop = asyncio.get_running_loop()
        x, events, counted = np.ones((1, 2), np.float32), list[str](), asyncio.Event()

        def observed(batch: Batch) -> None:
            events.append("counted")
            if events.count("counted") == 2:
                loop.call_soon(counted.set)

        batcher = Batcher(
            lambda feeds: {"y": feeds["x"] * 2}, LAYOUT, soon=loop.call_soon, inline_limit=1e3, observe=observed
        )
        costs = batcher.schedule.costs.of(x.shape[1:])
        for _ in range(4):
            costs.learn(1, 100.0)

        def first(result: Arrays | Exception, batch: Batch | None) -> None:
            events.append("first answer")
            batcher.submit(
                Job({"x": x}, second, 1, x.shape[1:], deadline=time.monotonic() + 50.0)
            )  # a run takes longer

        def second(result: Arrays | Exception, batch: Batch | None) -> None:
            events.append(f"second answer, {costs.runs(0)} runs known")

        batcher.submit(Job({"x": x}, first, 1, x.shape[1:]))
        await asyncio.wait_for(counted.wait(), WAIT)
        assert events == ["first answer", "second answer, 4 runs known", "counted", "counted"]
        assert costs.runs(0) == 6
        batcher.drain()
        assert batcher.join(WAIT)

    asyncio.run(play())


@pytest.mark.parametrize(("worked", "own"), [(60.0, 60.0), (40.0, 100.0)], ids=["others hold the lock", "it waits"])
def test_what_waits_for_the_interpreters_lock_still_counts_as_short(worked: float, own: float, clock: Clock) -> None:
    """Else a run that others have slowed down goes to the engine thread for good, where they slow it down."""

    def run(feeds: Arrays) -> Arrays:
        clock.ahead += 100.0
        clock.worked += worked
        return {"y": feeds["x"] * 2}

    batcher = Batcher(run, LAYOUT)
    for _ in range(4):
        Caller(batcher, rows(1)).check()
    batcher.drain()
    assert batcher.join(WAIT)
    costs = batcher.schedule.costs.of((3,))
    assert [costs.typical[0], costs.own[0]] == pytest.approx([100.0, own], abs=WAIT / 4)


@pytest.mark.parametrize("seed", range(4))
def test_whoever_runs_every_job_is_answered_once(seed: int) -> None:
    """Two models on one device, runs short and long, in the callers' thread and in theirs, with callers that leave."""

    async def play() -> None:
        loop, rng, turns = asyncio.get_running_loop(), np.random.default_rng(seed), Turns()
        loads = iter(rng.integers(0, 3, 10_000).tolist())

        def run(feeds: Arrays) -> Arrays:
            time.sleep((0.0, 0.0, 0.002)[next(loads)])
            return {"y": feeds["x"] * 2}

        batchers = [
            Batcher(run, LAYOUT, turns=turns, post=loop.call_soon_threadsafe, soon=loop.call_soon, inline_limit=1e-3)
            for _ in range(2)
        ]
        answers: dict[int, int] = {}
        left: set[int] = set()
        wrong: list[Arrays | Exception] = []

        def answered(number: int, x: HostArray, result: Arrays | Exception, batch: Batch | None) -> None:
            answers[number] = answers.get(number, 0) + 1
            right = np.array_equal(result["y"], x * 2) if isinstance(result, dict) else isinstance(result, Expired)
            if not right:
                wrong.append(result)

        for number in range(600):
            batcher = batchers[number % 2]
            x = rng.random((int(rng.integers(1, 9)), int(rng.integers(1, 3)))).astype(np.float32)
            deadline = time.monotonic() + float(rng.choice([0.001, 10.0]))
            job = Job({"x": x}, functools.partial(answered, number, x), len(x), x.shape[1:], x.nbytes, deadline)
            try:
                batcher.submit(job)
            except Overloaded:
                left.add(number)
            if rng.random() < 0.1 and number not in left:
                batcher.cancel(job)
                left.add(number)
            if rng.random() < 0.3:
                await asyncio.sleep(0)
            batcher.expire()
        for batcher in batchers:
            batcher.drain()
        while not all(batcher.join(0) for batcher in batchers):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert not wrong
        assert turns.held_for() == 0
        assert all(batcher.queued == 0 for batcher in batchers)
        assert {n for n in range(600) if answers.get(n, 0) != 1} == {n for n in left if not answers.get(n)}

    asyncio.run(asyncio.wait_for(play(), WAIT * 2))
