"""Equal requests are answered once; nothing else is ever answered with what was kept."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from infera_server.errors import BadRequest, Expired, Overloaded, Unavailable
from infera_server.models.servable import Servable
from infera_server.pipelines.answers import OVERHEAD, ResponseCache, key_of
from infera_server.pipelines.response_cache import AWAY, MAX_WAITING, Cached
from infera_server.requests import Correlation, Output, Request
from infera_server.scheduling.explanation import explain
from infera_server.scheduling.rows import HostArray
from tests.server.desk import Answer, Desk, leaves_nothing, send
from tests.server.support import WAIT, FakeSession, any_width, doubler, spec


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


class Threads:
    """What is to be hashed in another thread, until the test lets it."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], bytes], Callable[[bytes], None]]] = []

    def __call__(self, work: Callable[[], bytes], then: Callable[[bytes], None]) -> None:
        self.waiting.append((work, then))

    def run(self) -> None:
        waiting, self.waiting = self.waiting, []
        for work, then in waiting:
            then(work())


def cached(
    desk: Desk, session: FakeSession, cache: ResponseCache | None = None, away: Threads | None = None, **settings: Any
) -> Cached:
    model = desk.open(session, **settings)
    session.block()
    session.gate.set()

    def soon(fn: Callable[[], None]) -> None:
        desk.post(lambda _: fn(), None)

    return Cached(model, cache or ResponseCache(1 << 20), soon, away or Threads())


def x(*values: float) -> HostArray:
    return np.array([[*values, 0, 0, 0][:4]], np.float32)


def test_an_equal_request_is_answered_without_a_run(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session)
    first, second = (desk.ask(model, x=x(3)) for _ in range(2))
    np.testing.assert_array_equal(first["y"], second["y"])
    assert session.batches == [1]
    assert (first.batch is None, second.batch is None) == (False, True)
    told = model.stats.as_dict()
    assert [told["inference_stats"][f"cache_{what}"]["count"] for what in ("hit", "miss")] == [1, 1]
    assert told["inference_stats"]["cache_hit"]["ns"] > 0
    assert [told["inference_stats"][what]["count"] for what in ("queue", "compute_infer")] == [2, 1]
    assert (told["inference_count"], told["execution_count"]) == (1, 1)


def test_the_answer_comes_later_than_submit_and_is_explained(desk: Desk) -> None:
    model = cached(desk, doubler())
    desk.ask(model, x=x(3))
    answer = Answer()
    job = send(model, answer, x=x(3))
    assert not answer.count
    desk.until(lambda: answer.count > 0)
    assert explain(answer.batch, job) == "cached"


def test_what_is_kept_cannot_be_changed_and_keeps_no_batch(desk: Desk) -> None:
    session = doubler()
    cache = ResponseCache(1 << 20)
    model = cached(desk, session, cache)
    session.block()
    blocker, *answers = (Answer() for _ in range(5))
    for i, answer in enumerate((blocker, *answers)):
        send(model, answer, x=x(i))
        if not i:
            session.wait_entered()
    session.gate.set()
    desk.until(lambda: all(a.count for a in answers))
    assert session.batches == [1, 4]
    kept = desk.ask(model, x=x(2))["y"]
    assert kept.base is None
    assert not kept.flags.writeable
    assert cache.nbytes == 5 * (OVERHEAD + 16)


@pytest.mark.parametrize("failure", [-1.0, 666.0])
def test_errors_are_not_kept(desk: Desk, failure: float) -> None:
    session = doubler()
    model = cached(desk, session)
    for _ in range(2):
        assert isinstance(desk.ask(model, x=x(failure)).result, Exception)
    assert session.batches == [1, 1]
    assert not model.cache.count


# --- keys ------------------------------------------------------------------------------------------------------------


def request(outputs: tuple[str, ...] = (), **feeds: Any) -> Request:
    return Request("", {n: np.asarray(a) for n, a in feeds.items()}, [Output(name, binary=True) for name in outputs])


A = np.arange(4, dtype=np.float32)


@pytest.mark.parametrize(
    "other",
    [
        request(x=A.reshape(2, 2)),
        request(x=A.view(np.int32)),
        request(x=A + 1),
        request(x=-0.0 * A),
        request(z=A),
        request(x=A, z=A),
        request(x=A[:0]),
        request(("y",), x=A),
        request(x=np.array(["ab", "c"], object)),
        request(x=np.array(["a", "bc"], object)),
        request(x=np.array(["abc", ""], object)),
    ],
)
def test_whatever_differs_makes_another_key(other: Request) -> None:
    assert key_of(1, other) not in (key_of(1, request(x=A)), key_of(2, other))
    assert key_of(1, other) == key_of(1, other)
    assert len(key_of(1, other)) == 32


def test_texts_are_told_apart_by_their_lengths() -> None:
    keys = {key_of(1, request(x=np.array(list(texts), object))) for texts in (("ab", "c"), ("a", "bc"), ("abc", ""))}
    assert len(keys) == 3


def test_neither_the_order_of_tensors_nor_their_layout_in_memory_matters() -> None:
    wide = np.arange(16, dtype=np.float32).reshape(4, 4)
    one = request(("a", "b"), x=wide[:, ::2], z=A)
    other = request(("b", "a"), z=A.copy(), x=np.ascontiguousarray(wide[:, ::2]))
    assert key_of(1, one) == key_of(1, other)
    unaligned = np.frombuffer(b"\0" + A.tobytes(), np.uint8)[1:].view(np.float32)
    assert key_of(1, request(x=unaligned)) == key_of(1, request(x=A))


def test_a_model_that_is_loaded_again_answers_for_itself(desk: Desk) -> None:
    """Under the same name and version, with the same cache."""
    cache = ResponseCache(1 << 20)
    old = cached(desk, doubler(), cache)
    assert desk.ask(old, x=x(3))["y"][0, 0] == 6
    tripler = FakeSession({"x": spec("N", 4)}, {"y": spec("N", 4)}, lambda feeds: {"y": feeds["x"] * 3})
    new = cached(desk, tripler, cache)
    assert desk.ask(new, x=x(3))["y"][0, 0] == 9
    old.drain()
    assert cache.count == 1
    assert desk.ask(new, x=x(3)).batch is None


def test_an_answer_that_comes_after_the_drain_is_not_kept(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session)
    session.block()
    answer = Answer()
    send(model, answer, x=x(3))
    session.wait_entered()
    model.drain()
    session.gate.set()
    desk.until(lambda: answer.count > 0)
    assert answer["y"][0, 0] == 6
    assert not model.cache.count
    with pytest.raises(Unavailable):
        send(model, Answer(), x=x(3))


def test_sequences_and_memory_that_clients_share_are_passed_on(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session)
    for _ in range(2):
        desk.ask(model, Correlation(1, start=True), x=x(3))
    assert session.batches == [1, 1]
    region = mmap.mmap(-1, 16)
    region[:] = x(3).tobytes()
    shared = np.frombuffer(memoryview(region), np.float32).reshape(1, 4)
    assert [desk.ask(model, x=shared)["y"][0, 0] for _ in range(2)] == [6, 6]
    assert session.batches == [1, 1, 1, 1]
    assert not model.cache.count


# --- room ------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first() -> None:
    cache = ResponseCache(3 * (OVERHEAD + 16))
    for key in b"a", b"b", b"c":
        cache.put(key, {"y": A.copy()}, 1)
    assert cache.get(b"a") is not None
    cache.put(b"d", {"y": A.copy()}, 2)
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert cache.nbytes == cache.limit
    cache.drop(1)
    assert (cache.count, cache.nbytes) == (1, OVERHEAD + 16)


def test_an_answer_larger_than_everything_is_not_kept() -> None:
    cache = ResponseCache(OVERHEAD + 15)
    cache.put(b"a", {"y": A.copy()}, 1)
    assert (cache.count, cache.nbytes) == (0, 0)


def test_texts_count_with_what_they_hold() -> None:
    cache = ResponseCache(1 << 20)
    cache.put(b"a", {"y": np.array(["x" * 1000], object)}, 1)
    assert cache.nbytes > OVERHEAD + 1000


# --- one run for all that ask the same --------------------------------------------------------------------------------


def together(desk: Desk, model: Servable, session: FakeSession, count: int, **more: Any) -> list[Answer]:
    """Send equal requests while the first of them runs."""
    session.block()
    answers = [Answer() for _ in range(count)]
    for i, answer in enumerate(answers):
        send(model, answer, x=x(3), **more)
        if not i:
            session.wait_entered()
    return answers


def test_equal_requests_at_a_time_run_once(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session)
    answers = together(desk, model, session, 5)
    assert model.queued == 0
    session.gate.set()
    desk.until(lambda: all(a.count for a in answers))
    assert {a["y"][0, 0] for a in answers} == {6}
    assert session.batches == [1]
    assert (model.stats.cache_hit.count, model.stats.cache_miss.count) == (4, 1)


def test_all_of_them_are_told_of_a_failure_that_is_the_inputs(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session)
    session.block()
    answers = [Answer() for _ in range(3)]
    for answer in answers:
        send(model, answer, x=x(-1))
    session.gate.set()
    desk.until(lambda: all(a.count for a in answers))
    assert all(isinstance(a.result, BadRequest) for a in answers)
    assert session.batches == [1]


def test_one_that_leaves_does_not_take_the_others_along(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session)
    session.block()
    answers = [Answer() for _ in range(3)]
    jobs = [send(model, answer, x=x(3)) for answer in answers]
    model.cancel(jobs[0])
    model.cancel(jobs[2])
    session.gate.set()
    desk.until(lambda: answers[1].count > 0)
    assert [a.count for a in answers] == [0, 1, 0]
    assert answers[1]["y"][0, 0] == 6


def test_the_last_that_leaves_cancels_the_run(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session)
    session.block()
    send(model, Answer(), x=x(0))
    session.wait_entered()
    jobs = [send(model, Answer(), x=x(3)) for _ in range(2)]
    assert model.queued == 1
    for job in jobs:
        model.cancel(job)
    assert model.queued == 0
    session.gate.set()
    assert desk.ask(model, x=x(3))["y"][0, 0] == 6


def test_those_with_more_time_are_not_told_that_it_is_up(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session)
    session.block()
    send(model, blocker := Answer(), x=x(0))
    session.wait_entered()
    hasty, patient, hopeless = (Answer() for _ in range(3))
    for answer, timeout in ((hasty, 0.001), (hopeless, 0.001), (patient, None)):
        send(model, answer, x=x(3), timeout=timeout)
    while not (hasty.count and hopeless.count):
        model.expire()
        if not desk.posted.empty():
            fn, argument = desk.posted.get()
            fn(argument)
    assert isinstance(hasty.result, Expired)
    assert isinstance(hopeless.result, Expired)
    assert not patient.count
    session.gate.set()
    desk.until(lambda: patient.count > 0)
    assert patient["y"][0, 0] == 6
    assert blocker.count == 1


def test_so_many_may_wait_for_one_and_no_more(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session, max_queue=1)
    session.block()
    answers = [Answer() for _ in range(MAX_WAITING)]
    for answer in answers:
        send(model, answer, x=x(3))
    session.wait_entered()
    more = Answer()
    send(model, more, x=x(3))
    with pytest.raises(Overloaded):
        send(model, Answer(), x=x(4))
    session.gate.set()
    desk.until(lambda: all(a.count for a in (*answers, more)))
    assert session.batches == [1, 1]


def test_a_refusal_leaves_nothing_behind(desk: Desk) -> None:
    session = doubler()
    model = cached(desk, session, max_queue=1)
    session.block()
    send(model, Answer(), x=x(0))
    session.wait_entered()
    send(model, queued := Answer(), x=x(1))
    for _ in range(2):
        with pytest.raises(Overloaded):
            send(model, Answer(), x=x(3))
    session.gate.set()
    desk.until(lambda: queued.count > 0)
    assert desk.ask(model, x=x(3))["y"][0, 0] == 6


def test_giving_up_answers_everything(desk: Desk) -> None:
    session = any_width()
    away = Threads()
    model = cached(desk, session, away=away)
    session.block()
    answers = [Answer() for _ in range(3)]
    for answer in answers[:2]:
        send(model, answer, x=x(3))
    session.wait_entered()
    send(model, answers[2], x=large(1))
    model.give_up(Unavailable("too late"))
    desk.until(lambda: all(a.count for a in answers))
    assert all(isinstance(a.result, Unavailable) for a in answers)
    away.run()
    session.gate.set()


# --- large inputs ----------------------------------------------------------------------------------------------------


def large(value: float) -> HostArray:
    return np.full((1, AWAY // 4 + 1), value, np.float32)


def test_large_inputs_are_hashed_elsewhere(desk: Desk) -> None:
    session, away = any_width(), Threads()
    model = cached(desk, session, away=away)
    for batches in ([1], [1]):
        answer = Answer()
        send(model, answer, x=large(3))
        assert not answer.count
        away.run()
        desk.until(lambda: answer.count > 0)  # noqa: B023 - it is of this round
        assert answer["y"][0, -1] == 6
        assert session.batches == batches


def test_one_may_leave_before_its_key_is_known(desk: Desk) -> None:
    session, away = any_width(), Threads()
    model = cached(desk, session, away=away)
    model.cancel(send(model, Answer(), x=large(3)))
    away.run()
    assert not session.batches


def test_what_waits_for_its_key_is_run_before_the_end(desk: Desk) -> None:
    session, away = any_width(), Threads()
    model = cached(desk, session, away=away)
    answer = Answer()
    send(model, answer, x=large(3))
    model.drain()
    away.run()
    desk.until(lambda: answer.count > 0)
    assert answer["y"][0, 0] == 6
    assert model.join(WAIT)


def test_a_refusal_is_told_where_the_key_came_late(desk: Desk) -> None:
    session, away = any_width(), Threads()
    model = cached(desk, session, away=away, max_queue=1)
    session.block()
    answer = Answer()
    send(model, answer, x=large(3))
    send(model, Answer(), x=x(0))
    session.wait_entered()
    send(model, Answer(), x=x(1))
    away.run()
    assert isinstance(answer.result, Overloaded)
    session.gate.set()


def test_an_answered_request_leaves_nothing_to_collect(desk: Desk) -> None:
    """Neither one that ran nor one that was found."""
    model = cached(desk, doubler())
    for _ in range(2):
        assert leaves_nothing(lambda answer: send(model, answer, x=x(3)), desk.until)
