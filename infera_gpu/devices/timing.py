"""How long calls take on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from infera_gpu.op import Call

LAUNCHES = 4
"""What is queued while a buffer of twice the L2 cache is written, at least: some 30 us on the largest cards."""


class Timer(Protocol):
    """Seconds that a device takes for these calls, made once; they are made on its stream, within `running`."""

    def __call__(self, calls: Sequence[Call]) -> float: ...


class EventTimer:
    """By CUDA events around the calls. Before them a buffer of twice the L2 cache is written, once for LAUNCHES of
    them: they find nothing of theirs there, and are queued meanwhile, so that only the GPU's time counts."""

    def __init__(self, cupy: Any, stream: Any, l2_bytes: int) -> None:
        self._stream = stream
        self._begin, self._end, self._elapsed = cupy.cuda.Event(), cupy.cuda.Event(), cupy.cuda.get_elapsed_time
        self._flushed = cupy.empty((2 * l2_bytes,), "uint8")

    def __call__(self, calls: Sequence[Call]) -> float:
        for _ in range(1 + len(calls) // LAUNCHES):
            self._flushed.fill(0)
        self._begin.record(self._stream)
        for fn, args in calls:
            fn(*args)
        self._end.record(self._stream)
        self._end.synchronize()
        return float(self._elapsed(self._begin, self._end)) / 1000
