"""When what waits is looked at: at once, unless callers ask one after the other."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from infera_server.scheduling.arrivals import GAP, MOST, TURNS, Arrivals
from tests.server.grpc_support import channel, infer, request
from tests.server.support import doubler, serving


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def turns(count: int = 1) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def crowded(arrivals: Arrivals) -> None:
    """Have two requests, of which the second shows right after the first one's run."""
    arrivals.came()
    arrivals.soon(lambda: None)
    await turns()
    arrivals.came()
    await turns(TURNS)
    arrivals.soon(lambda: None)


def test_without_calls_it_is_the_next_turn() -> None:
    async def case() -> None:
        done: list[int] = []
        Arrivals().soon(lambda: done.append(1))
        assert not done
        await turns()
        assert done == [1]

    asyncio.run(case())


def test_a_lone_caller_waits_for_nobody() -> None:
    async def case() -> None:
        arrivals, done = Arrivals(Clock()), list[int]()
        for i in range(3):  # the next one comes when the loop has slept
            arrivals.noted()
            arrivals.came()
            arrivals.soon(lambda i=i: done.append(i))  # type: ignore[misc]
            await turns()
            assert done == list(range(i + 1))
            await turns(TURNS + 1)

    asyncio.run(case())


def test_those_that_come_one_after_the_other_are_waited_for() -> None:
    async def case() -> None:
        clock = Clock()
        arrivals, done = Arrivals(clock), list[int]()
        await crowded(arrivals)
        arrivals.soon(lambda: done.append(1))
        for _ in range(5):
            clock.now += 0.8 * GAP
            arrivals.noted()
            await turns(3)
        assert not done
        clock.now += 1.1 * GAP
        await turns(2)
        assert done == [1]
        # that was one: the next does not wait
        await turns(TURNS + 1)
        arrivals.came()
        arrivals.soon(lambda: done.append(2))
        await turns()
        assert done == [1, 2]

    asyncio.run(case())


def test_signs_without_an_end_are_not_waited_for() -> None:
    async def case() -> None:
        arrivals, done = Arrivals(Clock()), list[int]()
        await crowded(arrivals)
        arrivals.soon(lambda: done.append(1))
        for _ in range(2 * MOST):
            arrivals.noted()
            await turns()
        assert done == [1]

    asyncio.run(case())


def test_what_fails_keeps_no_other_from_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    async def case() -> None:
        arrivals, done = Arrivals(Clock()), list[int]()
        arrivals.came()
        arrivals.soon(lambda: 1 // 0)  # type: ignore[arg-type]
        arrivals.soon(lambda: done.append(1))
        await turns()
        assert done == [1]

    asyncio.run(case())
    assert "ZeroDivisionError" in caplog.text


def test_a_loop_that_ended_keeps_nothing_waiting() -> None:
    arrivals, done = Arrivals(Clock()), list[int]()

    async def ends() -> None:
        arrivals.came()
        arrivals.soon(lambda: done.append(1))

    async def goes_on() -> None:
        arrivals.came()
        arrivals.soon(lambda: done.append(2))
        await turns()

    for case in (ends, goes_on):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(case())
        loop.close()
    assert 2 in done


def test_a_call_over_grpc_tells_of_itself_and_then_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def telling(name: str) -> None:
        method = getattr(Arrivals, name)

        def told_of(*args: Any) -> None:
            told.append(name)
            method(*args)

        monkeypatch.setattr(Arrivals, name, told_of)

    for name in ("noted", "came", "soon"):
        telling(name)
    with serving({"double": doubler()}) as running, channel(running) as made:
        infer(made, request("double", np.ones((1, 4), np.float32)))
        assert told[:4] == ["noted", "came", "noted", "soon"]
