"""How contenders take turns, on a clock that calls set forward. No GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu_timings
from bench.gpu_timings import ROUNDS, Contender, contended, gpu_seconds, in_turn


class Clock:
    """Of the GPU and of the host, in seconds; and an event."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, Counter[str]()

    def taking(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes so long, in turn."""

        def call() -> None:
            self.now += seconds[self.calls[name] % len(seconds)]
            self.calls[name] += 1

        return call


class Event:
    def __init__(self, clock: Clock) -> None:
        self._clock, self.at = clock, 0.0

    def record(self) -> None:
        self.at = self._clock.now

    def synchronize(self) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(gpu_timings, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def device(clock: Clock) -> Any:
    cuda = SimpleNamespace(Event=lambda: Event(clock), get_elapsed_time=lambda a, b: 1000 * (b.at - a.at))
    return SimpleNamespace(xp=SimpleNamespace(cuda=cuda))


def test_each_is_called_for_a_while_and_then_they_take_turns(clock: Clock) -> None:
    taken = in_turn(device(clock), {"short": clock.taking("short", 1e-4), "long": clock.taking("long", 0.3)})
    assert taken["short"] == pytest.approx([1e-4] * ROUNDS)
    assert taken["long"] == pytest.approx([0.3] * ROUNDS)
    assert clock.calls["short"] * 1e-4 >= gpu_timings.SPIN_SECONDS + ROUNDS * gpu_timings.ROUND_SECONDS * 0.98
    assert clock.calls["long"] == 3 + 3 + ROUNDS
    assert gpu_seconds(device(clock), clock.taking("one", 2e-3)) == pytest.approx(2e-3)


def test_what_is_done_besides_is_taken_off(clock: Clock) -> None:
    both = Contender(clock.taking("both", 0.04), 10, clock.taking("flush", 0.03))
    alone = Contender(clock.taking("alone", 0.02, 0.04), 2)
    taken = contended(device(clock), {"both": both, "alone": alone})
    assert taken.keys() == {"both", "alone"}
    assert taken["both"] == pytest.approx([1e-3] * ROUNDS)
    assert sorted(set(taken["alone"])) == pytest.approx([0.01, 0.02]), "every round is kept"
