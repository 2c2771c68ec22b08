"""Who is admitted and who runs with whom, by a clock that the tests hold; costs are learned from given times."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import pytest

from infera_server.errors import Overloaded
from infera_server.scheduling.backlog import Selection
from infera_server.scheduling.costs import FADE, WINDOW, Costs, Window
from infera_server.scheduling.jobs import ANY_LEVELS, Job, Levels
from infera_server.scheduling.schedule import Schedule

BUCKETS = (1, 2, 4, 8, 16, 32, 64)


def job(rows: int = 1, group: Hashable = None, at: float = 0.0, level: int = 5, deadline: float = float("inf")) -> Job:
    return Job({"x": np.zeros((rows, 3))}, lambda *_: None, rows, group, 100, deadline, level, at)


def schedule(seconds: Mapping[int, float], buckets: tuple[int, ...] = BUCKETS, **options: object) -> Schedule:
    """One whose buckets are known to take so long, in the group None."""
    made = Schedule(buckets, **options)  # type: ignore[arg-type]
    for bucket, took in seconds.items():
        made.costs.of(None).learn(bucket, took)
    return made


def affine(fixed: float, a_row: float) -> dict[int, float]:
    return {bucket: fixed + a_row * bucket for bucket in BUCKETS}


def take(schedule: Schedule, now: float = 0.0) -> tuple[int, int]:
    """(rows, bucket) of the next batch."""
    selection = schedule.take(now)
    assert selection is not None
    return sum(j.rows for j in selection.jobs), selection.bucket


# --- costs -----------------------------------------------------------------------------------------------------------


def test_one_stalled_run_moves_nothing_and_a_lasting_change_does() -> None:
    window = Window()
    for _ in range(WINDOW):
        window.add(1.0)
    window.add(100.0)
    assert (window.median, window.high) == (1.0, 1.0)
    for _ in range(WINDOW):
        window.add(3.0)
    assert (window.median, window.high) == (3.0, 3.0)


def test_what_never_ran_is_inferred_from_its_neighbour() -> None:
    costs = Costs((1, 2, 4)).of("a")
    assert costs.typical == [0, 0, 0]
    costs.learn(2, 2.0)
    assert costs.typical == [1.5, 2.0, 3.0]
    costs.learn(1, 1.9)
    assert costs.typical == [1.9, 2.0, 3.0]


def test_a_slowdown_seen_in_one_bucket_is_one_of_all() -> None:
    costs = Costs((1, 2, 4)).of("a")
    for seconds, own in ((1.0, 0.5), (3.0, 0.5)):
        costs.learn(1, seconds, own)
    for _ in range(WINDOW):
        costs.learn(4, 2.0, 1.0)
    assert costs.typical == [1.0, 1.5, 2.0]
    assert costs.own == [0.5, 0.75, 1.0]
    for _ in range(WINDOW):
        costs.learn(4, 3.0, 0.8)
    assert costs.typical == pytest.approx([1.5, 2.25, 3.0])
    assert costs.high[0] == pytest.approx(1.5 * 2.0)
    assert costs.own == pytest.approx([0.4, 0.6, 0.8])
    costs.learn(1, 1.5, 0.4)  # which has been remembered as it would have been now: the median of 1.5, 4.5 and 1.5
    assert costs.typical[0] == pytest.approx(1.5)
    for _ in range(WINDOW):
        costs.learn(4, 2.0, 1.0)
    assert costs.typical == pytest.approx([1.0, 1.5, 2.0])


def test_under_load_that_slows_runs_down_batches_stay_full() -> None:
    times = affine(1.0, 0.1)
    made = schedule(times)
    for _ in range(WINDOW):
        made.costs.of(None).learn(64, times[64])
    for _ in range(WINDOW):
        made.costs.of(None).learn(64, 1.3 * times[64])
    for _ in range(64):
        made.add(job())
    assert take(made) == (64, 64)


def test_a_bucket_that_alone_became_slower_is_not_chosen_for_ever() -> None:
    """Others are taken to be as much slower, until one is tried: what is found then moves only its own time."""
    made, now, chosen = Schedule(BUCKETS), 0.0, []
    for _ in range(WINDOW):
        for bucket, took in affine(40.0, 1.4).items():
            made.costs.of(None).learn(bucket, took)
    times = affine(40.0, 1.4) | {64: 1.9 * (40.0 + 1.4 * 64)}
    for _ in range(3000):
        while made.queued < 128:
            made.add(job(at=now))
        selection = made.take(now)
        assert selection is not None
        now += times[selection.bucket]
        made.ran(selection, times[selection.bucket])
        chosen.append(selection.bucket)
    assert chosen[-200:].count(32) > 150


def test_the_run_that_makes_a_bucket_s_plan_does_not_count() -> None:
    """It takes 1000 times as long here; small buckets, which ran before, would have been chosen for long."""
    made, planned = Schedule((1, 2, 4, 8)), set()
    made.costs.of(None).learn(1, 1e-3)
    now, chosen = 0.0, []
    for _ in range(12):
        for _ in range(8 - made.queued):
            made.add(job(at=now))
        selection = made.take(now)
        assert selection is not None
        took = 1e-3 if selection.bucket in planned or selection.bucket == 1 else 1.0
        planned.add(selection.bucket)
        now += took
        made.ran(selection, took)
        chosen.append(selection.bucket)
    assert chosen == [8] * 12
    costs = made.costs.of(None)
    assert [costs.runs(i) for i in range(4)] == [1, 0, 0, 11]


def test_a_new_group_begins_with_its_nearest_in_proportion() -> None:
    costs = Costs((1, 2))
    costs.of("short", 10).learn(1, 1.0)
    costs.of("long", 1000).learn(1, 50.0)
    assert costs.of("longer", 1200).typical[0] == pytest.approx(60.0)
    assert costs.of("shorter", 5).typical[0] == pytest.approx(0.5)


# --- the choice of a batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "rows", "batches"),
    [
        # little a row, much a run: 33 rows run padded to 64, in 164 instead of 132 + 101
        ({32: 132e-3, 64: 133e-3}, 33, [(33, 64)]),
        # the time goes with the rows: 32 run, and one by itself
        ({32: 32e-3, 64: 64e-3, 1: 1e-3}, 33, [(32, 32), (1, 1)]),
        # a bucket that is slower than two of its half is never used
        ({32: 32e-3, 64: 80e-3}, 64, [(32, 32), (32, 32)]),
        ({1: 1e-3, 2: 2.5e-3, 4: 6e-3}, 2, [(1, 1), (1, 1)]),
        # equal a row: the larger
        ({32: 32e-3, 64: 64e-3}, 64, [(64, 64)]),
    ],
)
def test_the_batch_takes_the_least_time_a_row(
    costs: dict[int, float], rows: int, batches: list[tuple[int, int]]
) -> None:
    known = affine(100e-3, 1e-3) | costs
    made = schedule(known)
    for _ in range(rows):
        made.add(job())
    assert [take(made) for _ in batches] == batches
    assert made.queued == made.queued_rows == made.queued_bytes == 0


def test_the_choice_is_computed_for_every_backlog() -> None:
    """Against every alternative: no prefix in any bucket takes less time a row, but for the 5 % in favour of more."""
    for fixed in (0.0, 1e-3, 10e-3, 100e-3):
        costs = affine(fixed, 1e-3)
        for waiting in range(1, 65):
            made = schedule(costs)
            for _ in range(waiting):
                made.add(job())
            rows, bucket = take(made)
            assert rows == min(waiting, bucket)
            best = min(costs[b] / min(waiting, b) for b in BUCKETS)
            assert costs[bucket] / rows <= best / 0.95 + 1e-12


def test_a_bucket_that_was_slow_by_accident_is_tried_again() -> None:
    made = schedule(affine(1e-3, 1e-5) | {64: 0.2})
    tries = 0
    while True:
        for _ in range(64):
            made.add(job())
        selection = made.take(0.0)
        assert selection is not None
        if selection.bucket == 64:
            break
        made.ran(selection, made.costs.of(None).typical[5])
        for left in made.clear():
            del left
        tries += 1
    assert 0.2 * FADE**tries / 64 == pytest.approx((1e-3 + 32e-5) / 32 / 0.95, rel=0.1)


def test_jobs_of_several_rows_stay_whole_and_in_order() -> None:
    made = schedule(affine(100e-3, 0))
    for rows in (30, 30, 30, 2):
        made.add(job(rows))
    assert take(made) == (60, 64)
    assert take(made) == (32, 32)


def test_groups_take_turns_oldest_first_however_much_one_sends() -> None:
    made = schedule(affine(1e-3, 0))
    made.add(job(64, "busy", at=0.0))
    made.add(job(1, "rare", at=0.5))
    waits = 0
    for step in range(1, 5):
        made.add(job(64, "busy", at=step))
        selection = made.take(step)
        assert selection is not None
        if selection.group == "rare":
            break
        waits += 1
    assert waits == 1  # what came before it, and nothing that came after


def test_smaller_levels_go_first_and_the_rest_in_order() -> None:
    made = schedule(affine(1e-3, 1.0))  # one at a time
    sent = [job(level=level, at=at) for at, level in enumerate((5, 9, 1, 5, 1))]
    for each in sent:
        made.add(each)
    order = []
    while made.queued and (selection := made.take(9.0)):
        order += [sent.index(j) for j in selection.jobs]
    assert order == [2, 4, 0, 3, 1]


def test_levels_decide_between_groups_too() -> None:
    made = schedule(affine(1e-3, 0))
    made.add(job(group="early", at=0.0))
    made.add(job(group="urgent", at=1.0, level=1))
    selection = made.take(2.0)
    assert selection is not None
    assert selection.group == "urgent"


@pytest.mark.parametrize(("priority", "level"), [(0, 5), (1, 1), (9, 9), (10, 5), (2**63, 5)])
def test_a_priority_that_there_is_not_is_the_default(priority: int, level: int) -> None:
    assert ANY_LEVELS.level(priority) == level
    assert Levels(0, 0).level(priority) == 0


def test_rows_that_would_be_padding_go_to_narrower_groups() -> None:
    made = schedule(affine(1e-3, 0), widens=lambda group, into: group < into)
    made.add(job(5, 64, at=0.0))
    made.add(job(2, 32, at=1.0))
    made.add(job(1, 128, at=2.0))
    made.add(job(2, 16, at=3.0))
    selection = made.take(4.0)
    assert selection is not None
    assert [(j.rows, j.group) for j in selection.jobs] == [(5, 64), (2, 32)]  # 7 of 8: two rows more have no room
    assert (selection.group, selection.bucket, made.queued) == (64, 8, 2)


# --- admission -------------------------------------------------------------------------------------------------------


def running(made: Schedule, rows: int = 64, now: float = 0.0) -> Selection:
    made.add(job(rows, at=now))
    selection = made.take(now)
    assert selection is not None
    return selection


def test_the_forecast_is_what_runs_and_what_waits_and_its_own_run() -> None:
    made = schedule(dict.fromkeys(BUCKETS, 0.01))
    assert made.forecast(job(), 0.0) == pytest.approx(10e-3)
    running(made)
    assert made.forecast(job(), 4e-3) == pytest.approx(6e-3 + 10e-3)
    made.add(job(60))
    assert made.forecast(job(4), 4e-3) == pytest.approx(6e-3 + 10e-3)
    assert made.forecast(job(5), 4e-3) == pytest.approx(6e-3 + 20e-3)
    for bucket in BUCKETS:
        made.costs.of("other", 3.0).learn(bucket, 10e-3)
    made.add(job(1, group="other"))
    assert made.forecast(job(4), 4e-3) == pytest.approx(6e-3 + 20e-3)
    assert made.forecast(job(4, level=1), 4e-3) == pytest.approx(6e-3 + 10e-3)  # it goes before all that waits


def test_other_models_on_the_device_are_reckoned_with() -> None:
    made = schedule(dict.fromkeys(BUCKETS, 0.01))
    made.ran(running(made), 10e-3, waited=5e-3)
    assert made.forecast(job(65), 0.0) == pytest.approx(2 * (10e-3 + 5e-3))


def test_what_cannot_make_its_deadline_is_refused_at_once_and_told_when_to_come_back() -> None:
    made = schedule(dict.fromkeys(BUCKETS, 0.01))
    running(made)
    made.margin.value = 1.2
    made.add(job(64, deadline=0.025))
    with pytest.raises(Overloaded, match="would take about 36 ms, it has 25 ms") as refusal:
        made.add(job(1, deadline=0.025))
    assert refusal.value.reason == "would_expire"
    assert refusal.value.retry_after == pytest.approx(11e-3)
    made.add(job(1, deadline=0.037))


def test_an_idle_model_tries_whatever_it_believes() -> None:
    made = schedule(dict.fromkeys(BUCKETS, 10.0))
    made.add(job(1, deadline=0.001))
    assert take(made) == (1, 1)


def test_a_full_queue_says_when_it_has_run_empty() -> None:
    made = schedule(dict.fromkeys(BUCKETS, 0.01), max_queue=64)
    running(made)
    for _ in range(64):
        made.add(job())
    with pytest.raises(Overloaded) as refusal:
        made.add(job(at=2e-3))
    assert refusal.value.reason == "queue_full"
    assert refusal.value.retry_after == pytest.approx(8e-3 + 10e-3)


def test_late_jobs_leave_and_the_next_deadline_is_known() -> None:
    made = schedule(dict.fromkeys(BUCKETS, 0.001))
    first, second, third = job(deadline=1.0), job(deadline=3.0), job(deadline=2.0)
    for each in (first, second, third):
        made.add(each)
    assert made.late(0.5) == []
    assert made.late(1.0) == [first]
    assert made.late(2.5) == [third]
    assert made.late(3.0) == [second]
    assert made.queued == 0


def test_a_batch_over_the_limit_is_not_taken() -> None:
    made = schedule(affine(1e-3, 1e-3))
    for _ in range(8):
        made.add(job())
    assert made.may_take(2.5e-3)
    assert made.take(0.0, within=2.5e-3) is None
    assert made.queued == 8
    assert made.take(0.0, within=2.5e-3, each=0.9e-3) is None
    assert made.take(0.0, within=2.5e-3, each=1e-3) is not None
    made.add(job())
    assert made.take(0.0, within=1.5e-3, each=1.0) is None
    assert made.take(0.0, within=20e-3) is not None
    unknown = Schedule(BUCKETS)
    unknown.add(job())
    assert not unknown.may_take(1.0)
    assert unknown.take(0.0, within=1.0) is None
