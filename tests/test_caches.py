"""Sizes of blocks go by the cache that there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from infera_kernels.cpu import caches
from infera_kernels.cpu.caches import MOST, USUAL, block_of, second_level


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    caches._times.cache_clear()
    yield
    caches._times.cache_clear()


@pytest.mark.parametrize(
    ("told", "times"),
    [
        (USUAL, 1),
        (USUAL // 2, 1),
        (3 * USUAL - 1, 2),
        (4 * USUAL, 4),
        (64 * USUAL, MOST),
        (0, 1),  # a virtual machine, or a processor, that does not tell
        (OSError("not here"), 1),
        (ValueError("no such name"), 1),
    ],
)
def test_a_block_is_larger_where_the_cache_is(
    told: int | Exception, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sysconf(name: int) -> int:
        assert name == caches.SECOND_LEVEL
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(sys, "platform", "linux")
    assert block_of(1000) == times * 1000


def test_another_system_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 30)
    assert second_level() == USUAL


def test_the_system_tells_what_linux_does() -> None:
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index2/size", encoding="ascii") as file:
            told = file.read().strip()
    except OSError:
        pytest.skip("the system tells nothing of its caches")
    assert second_level() == int(told.removesuffix("K")) << 10
