"""A device's time is shared by weight, whatever a turn takes. The clock is the tests'."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from infera_server.scheduling.batcher import Batcher
from infera_server.scheduling.jobs import Job
from infera_server.scheduling.rows import Arrays
from infera_server.scheduling.turns import Share, Turns
from tests.server.support import WAIT, until


class Clock:
    """Moved on by whoever has the device."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def contend(seconds: dict[str, float], weights: dict[str, float], total: float) -> dict[str, float]:
    """Models that always want the device take turns of `seconds` until `total` are used. Returns what each got."""
    clock = Clock()
    turns = Turns(clock)
    shares = {name: turns.share(name, weights.get(name, 1.0)) for name in seconds}

    def work(share: Share) -> None:
        kept = False
        while clock.now < total:
            if not kept:
                share.enter()
            while clock.now < total and len(turns._waiting) < len(shares) - 1:
                time.sleep(0)  # the others come back before this turn ends
            clock.now += seconds[share.name]
            kept = share.leave(again=clock.now < total)
        if kept:
            share.leave()

    with turns:
        threads = [threading.Thread(target=work, args=(share,)) for share in shares.values()]
        for thread in threads:
            thread.start()
        until(lambda: len(turns._waiting) == len(threads))
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert turns.held_for() == 0
    return {name: share.seconds for name, share in shares.items()}


@pytest.mark.parametrize(
    ("seconds", "weights", "parts"),
    [
        ({"heavy": 0.1, "light": 0.001}, {}, {"heavy": 0.5, "light": 0.5}),
        ({"heavy": 0.1, "light": 0.001}, {"light": 3.0}, {"heavy": 0.25, "light": 0.75}),
        ({"a": 0.03, "b": 0.01, "c": 0.002}, {"a": 2.0}, {"a": 0.5, "b": 0.25, "c": 0.25}),
    ],
)
def test_shares_are_by_weight_within_a_tenth(
    seconds: dict[str, float], weights: dict[str, float], parts: dict[str, float]
) -> None:
    got = contend(seconds, weights, 10.0)
    for name, part in parts.items():
        assert got[name] / 10.0 == pytest.approx(part, rel=0.1)


def test_who_was_away_does_not_catch_up() -> None:
    clock = Clock()
    turns = Turns(clock)
    busy, rare = turns.share("busy"), turns.share("rare")
    busy.enter()
    for _ in range(100):
        clock.now += 1.0
        assert busy.leave(again=True)
    done: list[int] = []

    def come_back() -> None:
        kept = False
        for _ in range(10):
            if not kept:
                rare.enter()
            clock.now += 1.0
            done.append(1)
            kept = rare.leave(again=True)
        if kept:
            rare.leave()

    thread = threading.Thread(target=come_back)
    thread.start()
    until(lambda: len(turns._waiting) == 1)
    clock.now += 1.0
    assert not busy.leave(again=True)  # it is behind, and next
    busy.enter()
    assert len(done) <= 2  # but has no 100 seconds to claim
    busy.leave()
    thread.join(WAIT)


def test_a_turn_that_would_have_to_wait_can_be_left() -> None:
    turns = Turns()
    first, second = turns.share("first"), turns.share("second")
    assert first.enter()
    assert turns.holder == "first"
    assert not second.enter(wait=False)
    assert not first.leave()
    assert turns.holder == ""
    assert second.enter(wait=False)
    second.leave()


def test_two_batchers_with_a_backlog_share_a_device_by_time() -> None:
    """One model's runs are ten times as long as the other's."""
    clock, over = Clock(), threading.Event()
    turns = Turns(clock)

    def taking(seconds: float) -> Callable[[Arrays], Arrays]:
        def run(feeds: Arrays) -> Arrays:
            while not turns._waiting and not over.is_set():
                time.sleep(0)  # the other one comes back before this turn ends
            clock.now += seconds
            return {}

        return run

    batchers = [
        Batcher(taking(seconds), None, name=name, turns=turns, max_queue=10_000)
        for name, seconds in (("heavy", 0.01), ("light", 0.001))
    ]
    with turns:
        for batcher in batchers:
            for _ in range(1000):
                batcher.submit(Job({}, lambda *_: None))
    until(lambda: sum(b.share.seconds for b in batchers) > 1.0)
    heavy, light = (b.share.seconds for b in batchers)
    over.set()
    for batcher in batchers:
        batcher.close()
        assert batcher.join(WAIT)
    assert heavy / (heavy + light) == pytest.approx(0.5, rel=0.1)
