"""`--slo-p99`: in virtual time, with run times that scatter and stall, arrivals that do not wait, and overload."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

import pytest

from bench.simulation import Outcome, RunTimes, poisson, simulate
from infera_server.scheduling.costs import GroupCosts
from infera_server.scheduling.goal import FLOOD, REMEMBERED, Goal
from infera_server.scheduling.jobs import Job
from infera_server.scheduling.schedule import Schedule

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
GOAL = 0.020
SEED = 1

GPU = RunTimes(fixed=2e-3, a_row=0.2e-3, scatter=0.1)
CPU = RunTimes(fixed=1e-3, a_row=1e-3, scatter=0.1)
TIGHT = RunTimes(fixed=8e-3, a_row=1e-3, scatter=0.05)
"""One row takes nearly half of the goal."""


STALLING = RunTimes(fixed=2e-3, a_row=0.2e-3, scatter=0.1, stall=10e-3, stalls=1000)
"""One run in 1000 takes half of the goal longer, and makes all late that wait."""


def peak(times: RunTimes) -> float:
    """The most rows a second."""
    return max(b / times.mean(b) for b in BUCKETS)


def run(times: RunTimes, load: float, requests: int, goal: float | None = GOAL) -> tuple[Outcome, Goal | None]:
    """Poisson arrivals at `load` times the peak."""
    rng = random.Random(SEED)
    rate = load * peak(times)
    schedule = Schedule(BUCKETS, goal=Goal(goal) if goal else None)
    arrivals = poisson(rate, requests / rate, rng)
    return simulate(schedule, arrivals, lambda group, bucket: times.draw(bucket, rng)), schedule.goal


@pytest.mark.parametrize("times", [GPU, CPU, TIGHT], ids=["gpu", "cpu", "tight"])
@pytest.mark.parametrize("load", [0.1, 0.5, 0.8, 1.5, 5.0])
def test_99_of_100_answers_are_within_the_goal_at_any_load(times: RunTimes, load: float) -> None:
    outcome, goal = run(times, load, 12000)
    assert outcome.quantile(0.99) <= GOAL
    assert goal is not None
    assert len(outcome.answered) + sum(outcome.refused.values()) > 11000
    assert not outcome.refused["deadline"]


def test_stalls_leave_99_of_100_within_the_goal() -> None:
    outcome, _ = run(STALLING, 1.5, 30000)
    assert outcome.quantile(0.99) <= GOAL
    assert outcome.quantile(1.0) > GOAL


def test_without_the_goal_they_are_not() -> None:
    outcome, _ = run(GPU, 1.5, 8000, goal=None)
    assert outcome.quantile(0.99, since=outcome.ended / 3) > 3 * GOAL


@pytest.mark.parametrize(("times", "least"), [(GPU, 0.7), (CPU, 0.7)], ids=["gpu", "cpu"])
def test_overload_costs_little_of_the_throughput(times: RunTimes, least: float) -> None:
    """The peak needs batches of 64, which take three quarters of the goal, or three times as long as it."""
    outcome, _ = run(times, 5.0, 20000)
    assert outcome.rate(since=outcome.ended / 3) >= least * peak(times)


def test_of_a_moderate_load_hardly_anything_is_refused() -> None:
    outcome, goal = run(GPU, 0.5, 8000)
    assert sum(outcome.refused.values()) <= 8
    assert goal is not None
    assert "is met: p99" in goal.state


def test_what_alone_takes_longer_is_said_once_and_still_served(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        outcome, goal = run(RunTimes(30e-3, 1e-3), 0.3, 500)
    assert goal is not None
    assert len(caplog.records) == 1
    assert "out of reach: a run of 1 row takes 3" in caplog.text
    assert "out of reach" in goal.state
    assert outcome.answered


def test_a_goal_missed_for_reasons_unknown_is_said_and_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    """Answers that the estimates do not explain: another process on the device."""
    goal = Goal(GOAL, "m")
    answer = Job({}, lambda *_: None, queued_at=0.0, estimate=GOAL, allowed=GOAL)
    schedule = Schedule(goal=goal)
    with caplog.at_level(logging.INFO):
        for _ in range(2 * REMEMBERED):
            schedule.answered([answer], 1.5 * GOAL)
        assert goal.margin.value == pytest.approx(1.5, abs=0.1)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert f"missed: {REMEMBERED} of the last {REMEMBERED} answers took longer" in goal.state
        for _ in range(2 * REMEMBERED):
            schedule.answered([answer], GOAL / 2)
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert "is met" in goal.state
    assert goal.margin.value < 1.0


def test_the_largest_bucket_depends_on_what_arrives() -> None:
    costs = GroupCosts(BUCKETS, 1.0)
    for bucket in BUCKETS:
        costs.learn(bucket, TIGHT.mean(bucket))
    goal = Goal(GOAL)
    goal.margin.value = 1.0

    def largest(rate: float) -> int:
        goal.arrivals.value = rate
        return BUCKETS[goal.largest(costs)]

    assert largest(10) == 2  # two runs of 2 rows, one after the other, are just within the goal
    assert largest(400) == 4
    assert largest(FLOOD) == 4  # of 8 only those who come in the last quarter of a run would be in time


def job(rows: int) -> Job:
    return Job({}, lambda *_: None, rows, group="x")


def slow_runs() -> Schedule:
    """Batches of one row are all that the goal allows: they take all of it."""
    schedule = Schedule(BUCKETS, goal=Goal(GOAL))
    costs = schedule.costs.of("x")
    for bucket in BUCKETS:
        costs.learn(bucket, 0.018 + 0.002 * bucket)
    assert schedule.goal is not None
    assert schedule.goal.largest(costs) == 0
    return schedule


def test_a_request_of_many_rows_is_reckoned_as_one_run() -> None:
    schedule = slow_runs()
    one, _, _, _, sixteen, *_ = schedule.costs.of("x").typical
    assert schedule.forecast(job(16), 0.0) == pytest.approx(sixteen)
    schedule.add(job(1))
    assert schedule.wait(0.0) == pytest.approx(one)
    assert schedule.forecast(job(16), 0.0) == pytest.approx(one + sixteen)


def test_requests_of_many_rows_that_wait_are_reckoned_as_one_run_each() -> None:
    schedule = slow_runs()
    sixteen = schedule.costs.of("x").typical[4]
    schedule.add(job(16))
    assert schedule.wait(0.0) == pytest.approx(sixteen)
    assert schedule.forecast(job(16), 0.0) == pytest.approx(2 * sixteen)


def test_nothing_is_known_before_the_first_answer() -> None:
    goal = Goal(GOAL)
    assert goal.p99 is None
    assert "nothing was answered yet" in goal.state


def test_where_refusing_does_not_help_little_is_refused() -> None:
    """Something after the run makes every answer late."""

    class Late(Schedule):
        def answered(self, jobs: Sequence[Job], now: float) -> None:
            super().answered(jobs, now + 2 * GOAL)

    rng, rate = random.Random(SEED), 0.8 * peak(GPU)
    schedule = Late(BUCKETS, goal=Goal(GOAL))
    outcome = simulate(schedule, poisson(rate, 20000 / rate, rng), lambda group, bucket: GPU.draw(bucket, rng))
    assert schedule.goal is not None
    assert "missed: 2000 of the last 2000 answers" in schedule.goal.state
    assert outcome.refused["goal"] < 0.1 * 20000


@pytest.mark.parametrize("load", [1.5, 5.0])
@pytest.mark.parametrize("patience", [0.02, 0.05])
def test_deadlines_are_kept_in_overload_and_little_is_run_in_vain(load: float, patience: float) -> None:
    """Without a goal: clients that wait for 20 or 50 ms, and more of them than can be served."""
    rng, rate = random.Random(SEED), load * peak(GPU)
    arrivals = poisson(rate, 20000 / rate, rng, patience=patience)
    outcome = simulate(Schedule(BUCKETS), arrivals, lambda group, bucket: GPU.draw(bucket, rng))
    late = sum(seconds > patience for _, seconds in outcome.answered)
    assert late <= 0.01 * len(outcome.answered)
    assert outcome.rate(since=outcome.ended / 5) > 0.7 * peak(GPU)
    assert outcome.refused["would_expire"]
