"""Sizes of blocks go by the cache that there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infera_kernels.cpu import caches
from infera_kernels.cpu.caches import MOST, USUAL, WHERE, block_of, second_level


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(caches, "WHERE", str(tmp_path))
    caches._times.cache_clear()
    yield
    caches._times.cache_clear()


def tell(monkeypatch: pytest.MonkeyPatch, told: int | Exception) -> None:
    def sysconf(name: int) -> int:
        assert name == caches.SECOND_LEVEL
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.parametrize(
    ("told", "times"), [(USUAL, 1), (USUAL // 2, 1), (3 * USUAL - 1, 2), (4 * USUAL, 4), (64 * USUAL, MOST)]
)
def test_a_block_is_larger_where_the_cache_is(told: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, told)
    assert block_of(1000) == times * 1000


SILENT = [0, OSError("not here"), ValueError("no such name")]


@pytest.mark.parametrize("silent", SILENT, ids=str)
def test_what_the_c_library_does_not_tell_the_system_may(
    silent: int | Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(monkeypatch, silent)
    (tmp_path / "uevent").touch()
    for index, (level, size) in enumerate([("1", "64K"), ("1", "48K"), ("2", "1M"), ("3", "32M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(level + "\n")
        (folder / "size").write_text(size + "\n")
    assert second_level() == 1 << 20
    (tmp_path / "index2" / "size").write_text("much\n")
    assert second_level() == USUAL


@pytest.mark.parametrize("silent", SILENT, ids=str)
def test_where_nobody_tells_blocks_are_the_usual_ones(silent: int | Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, silent)
    assert second_level() == USUAL
    assert block_of(1000) == 1000


def test_another_system_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 30)
    assert second_level() == USUAL


def test_both_tell_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = second_level()
    monkeypatch.setattr(caches, "WHERE", WHERE)
    tell(monkeypatch, 0)
    listed = second_level()
    assert asked == listed or USUAL in (asked, listed), "where neither is silent"
