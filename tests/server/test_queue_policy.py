"""Queue policies of Triton's configuration: what waits how long, how many of it, and what becomes of it then."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from google.protobuf import text_format

from infera_server.errors import Overloaded
from infera_server.models.ignored import ignored
from infera_server.models.modelconfig import ModelConfig, new
from infera_server.models.queue_policy import QueuePolicies, QueuePolicy, policies
from infera_server.scheduling.jobs import Job
from infera_server.scheduling.schedule import Schedule
from tests.server.support import doubler, request_of, serving, until

X = np.ones((1, 4), np.float32)


def config(batching: str) -> ModelConfig:
    return text_format.Parse(f"max_batch_size: 1 dynamic_batching {{ {batching} }}", new())


def job(level: int = 1, at: float = 0.0, deadline: float = 30.0) -> Job:
    return Job({"x": X}, lambda *_: None, 1, None, 1, deadline, level, at)


def busy(**options: object) -> Schedule:
    """A schedule with a run of a second under way."""
    made = Schedule((1,), **options)  # type: ignore[arg-type]
    made.costs.of(None).learn(1, 1.0)
    made.add(job())
    assert made.take(0.0) is not None
    return made


BOTH = """priority_levels: 2 default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 500000 max_queue_size: 3 }
  priority_queue_policy { key: 1 value {
    timeout_action: DELAY default_timeout_microseconds: 100000 max_queue_size: 1 } }"""


def test_what_a_configuration_says() -> None:
    assert policies(None) is None
    assert policies(config("default_queue_policy { default_timeout_microseconds: 5 max_queue_size: 3 }")) is None
    assert policies(config("default_queue_policy { timeout_action: DELAY }")) == QueuePolicies(
        QueuePolicy(delays=True), {}
    )
    assert policies(config(BOTH)) == QueuePolicies(QueuePolicy(3, 0.5), {1: QueuePolicy(1, 0.1, delays=True)})
    assert ignored(config(BOTH)) == []


def test_each_level_has_its_own_length_and_time() -> None:
    found = policies(config(BOTH))
    assert found is not None
    made = busy(most_of=found.most)
    for level in (1, 2, 2, 2):
        made.add(job(level))
    for level, most in ((1, 1), (2, 3)):
        with pytest.raises(Overloaded, match=f"has {most} requests of priority {level} waiting") as error:
            made.add(job(level))
        assert error.value.reason == "queue_full"
    refused, delayed = job(2, 1.0), job(1, 1.0)
    for one in (refused, delayed):
        found.apply(one)
    assert (refused.deadline, refused.last_deadline) == (1.5, 0.0)
    assert (delayed.deadline, delayed.last_deadline) == (1.1, 30.0)
    hurried = job(1, 1.0, deadline=1.05)
    found.apply(hurried)
    assert (hurried.deadline, hurried.last_deadline) == (1.05, 0.0), "its own timeout is shorter, and final"


def test_what_is_delayed_runs_last_and_is_late_in_the_end() -> None:
    made = busy()
    delayed, urgent, other = job(1, 0.0, deadline=2.0), job(2, 0.1), job(2, 0.2)
    delayed.last_deadline = 30.0
    for one in (delayed, urgent, other):
        made.add(one)
    assert made.late(1.9) == []
    assert made.late(2.0) == []
    assert made.queued == 3
    order = [selection.jobs[0] for _ in range(3) if (selection := made.take(3.0))]
    assert order == [urgent, other, delayed]
    again = job(1, 3.0, deadline=5.0)
    again.last_deadline = 6.0
    made.add(again)
    assert made.late(5.5) == []
    assert made.late(6.0) == [again]
    assert made.queued == 0


def test_what_may_be_delayed_is_not_refused_for_its_first_deadline() -> None:
    made = busy()
    hopeless, patient = job(1, 0.0, deadline=0.5), job(1, 0.0, deadline=0.5)
    patient.last_deadline = 30.0
    with pytest.raises(Overloaded, match="the request would take about"):
        made.add(hopeless)
    made.add(patient)
    assert made.queued == 1


def test_a_server_delays_instead_of_refusing() -> None:
    """Its time is up while the first one runs, and then it goes behind the one that came later."""
    session = doubler()
    with serving({"double": session}, max_batch=1) as running:
        model = running.model("double")
        model.policies = QueuePolicies(QueuePolicy(timeout=0.01, delays=True), {5: QueuePolicy(timeout=20.0)})
        answers: list[tuple[str, int]] = []

        def ask(name: str, priority: int) -> threading.Thread:
            def work() -> None:
                status, _ = running.infer("double", request_of(X, parameters={"priority": priority}))
                answers.append((name, status))

            thread = threading.Thread(target=work)
            thread.start()
            return thread

        session.block()
        threads = [ask("first", 5)]
        session.wait_entered()
        threads.append(ask("delayed", 1))
        until(lambda: model.queued == 1)
        until(lambda: [j.level for j in model.batcher.schedule.jobs()] != [1])
        threads.append(ask("second", 5))
        until(lambda: model.queued == 2)
        assert next(model.batcher.schedule.jobs()).level == 5
        session.gate.set()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [("delayed", 200), ("first", 200), ("second", 200)]
