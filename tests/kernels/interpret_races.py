"""Kernels that race are found to, each in its way, and right ones are not."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from tests.kernels.known_races import KNOWN
from tests.kernels.races import Kind
from tests.kernels.support import execute
from tests.kernels.watching import WatchingLauncher

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton.recurrent import Cell, Inputs, States, Tiling, recurrent
from tests.kernels import racing_kernels as racing

pytestmark = pytest.mark.kernels

N = 16
Found = list[tuple[Kind, int, int]]


def found(kernel: Any, programs: int = 1, dtype: Any = np.float32, **constants: Any) -> Found:
    """Kind, first element of x and out together, and how many, where a kernel runs on 64 zeros each."""
    launcher = WatchingLauncher(known={(kernel.__name__, kind): "looked at here" for kind in Kind})
    memory = np.zeros(128, dtype)
    args = {"x": memory[:64], "out": memory[64:]}
    execute([launcher.launch(kernel, (programs,), args, {"N": N, **constants})])
    assert all(name == kernel.__name__ for name, _ in launcher.found)
    races = [race for _, race in launcher.found]
    return [(r.kind, (int(r.addresses[0]) - memory.ctypes.data) // memory.itemsize, len(r.addresses)) for r in races]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int8, np.bool_])
def test_memory_of_each_program_is_no_race(dtype: Any) -> None:
    assert found(racing.apart, 4, dtype) == []


def test_masked_lanes_touch_nothing() -> None:
    assert found(racing.masked, 4) == []


def test_what_one_program_writes_and_another_reads() -> None:
    assert found(racing.neighbours, 4) == [(Kind.SHARED, N, 3), (Kind.LATER, 1, 4 * (N - 1))]


def test_what_several_programs_write() -> None:
    assert found(racing.together, 4, OWN=True) == [(Kind.WRITTEN, 64, N)]
    assert found(racing.together, 4, OWN=False) == [(Kind.ALIKE, 64, N)]
    assert found(racing.together, 1, OWN=True) == []


def test_atomics_race_with_what_is_none() -> None:
    assert found(racing.counted, 4, READ=False) == []
    assert found(racing.counted, 4, READ=True) == [(Kind.SHARED, 64, 1), (Kind.BACK, 64, 1)]


@pytest.mark.parametrize(
    ("kernel", "kind", "first", "count"),
    [(racing.back, Kind.BACK, 0, N), (racing.reversed_in_place, Kind.LATER, 0, N), (racing.kept, Kind.INPLACE, 0, N)],
)
def test_what_a_barrier_puts_in_order(kernel: Any, kind: Kind, first: int, count: int) -> None:
    assert found(kernel, BARRIER=False) == [(kind, first, count)]
    assert found(kernel, BARRIER=True) == []


def test_one_lane_writes_what_all_read() -> None:
    assert found(racing.less_the_first) == [(Kind.LATER, 0, 1)]


def test_what_a_program_writes_twice() -> None:
    assert found(racing.twice, SECOND=1.0) == [(Kind.TWICE, 64 + N // 2, N // 2)]
    assert found(racing.twice, SECOND=0.0) == [(Kind.TWICE_ALIKE, 64 + N // 2, N // 2)]


def test_accesses_of_several_sizes() -> None:
    """A program writes bytes of elements that another one reads."""
    assert found(racing.bytes_of_others, 2) == [(Kind.SHARED, 0, N)]


def test_a_race_that_is_not_known_is_an_error() -> None:
    x = np.zeros(64, np.float32)
    launcher = WatchingLauncher()
    calls = [launcher.launch(racing.neighbours, (4,), {"x": x, "out": x[:0]}, {"N": N})]
    with pytest.raises(AssertionError, match=r"neighbours: x is written by one program and read by another.* 3 elem"):
        execute(calls)


def test_another_launch_is_another_time() -> None:
    """What one launch wrote the next one may read."""
    launcher = WatchingLauncher()
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    for a, b in ((x, y), (y, x)):
        execute([launcher.launch(racing.masked, (4,), {"x": a, "out": b}, {"N": N})])
    assert not launcher.found


def test_what_is_known_is_found() -> None:
    """An LSTM of one step, one sequence and 8 hidden units, four at a time."""
    launcher, (gates, r) = WatchingLauncher(), (np.zeros((1, 1, 1, 4, 8), np.float32), np.zeros((1, 32, 8), np.float32))
    h, c, y = (np.zeros(shape, np.float32) for shape in ((2, 1, 1, 8), (1, 1, 8), (1, 1, 1, 8)))
    cell = Cell("LSTM", [("sigmoid", 0.0, 0.0), ("tanh", 0.0, 0.0), ("tanh", 0.0, 0.0)])
    calls = recurrent(cell, Inputs(gates, r), States(h, c, None), y, None, None, launcher, Tiling(1, 4, 16, whole=True))
    execute(calls)
    assert {(name, race.kind) for name, race in launcher.found} == KNOWN.keys()
