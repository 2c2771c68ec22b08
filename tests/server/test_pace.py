"""Refusals that come too fast are slowed down."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from infera_server.http.pace import BURST, RATE, Pace
from infera_server.server import SWITCH_INTERVAL
from tests.server.support import doubler, serving


@dataclass
class Clock:
    now: float = 100.0
    slept: float = 0.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@pytest.mark.parametrize(
    ("cost", "slept"), [(0.1 / RATE, 0.9), (0.5 / RATE, 0.5), (1.01 / RATE, 0.0), (10 / RATE, 0.0)]
)
def test_refusals_take_their_share_and_no_more(cost: float, slept: float) -> None:
    """`slept` is of the time that so many refusals may take."""
    clock = Clock()
    pace = Pace(clock.time, clock.sleep)
    for _ in range(BURST):
        pace.refused()  # the first look at the clock
    clock.slept, began = 0.0, clock.now
    count = 100 * BURST
    for _ in range(count):
        clock.now += cost
        pace.refused()
    assert clock.slept == pytest.approx(slept * count / RATE, rel=1e-6)
    assert clock.now - began >= 0.999 * count / RATE


def test_threads_hand_over_soon_while_a_server_runs() -> None:
    before = sys.getswitchinterval()
    with serving({"double": doubler()}):
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
    assert sys.getswitchinterval() == before


def test_now_and_then_a_refusal_is_free() -> None:
    clock = Clock()
    pace = Pace(clock.time, clock.sleep)
    for _ in range(5 * BURST):
        clock.now += 1.0
        pace.refused()
    assert clock.slept == 0.0
