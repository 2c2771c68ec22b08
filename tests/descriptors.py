"""What this process has open."""

from __future__ import annotations

import os

from infera_gpu.devices.processes import POOL


def open_files() -> int:
    """How many, without those of worker processes, which go at any time: when the last session of another test does."""
    POOL.end()
    assert POOL.memory is None or POOL.memory.file >= 0  # there from here on
    return len(os.listdir("/proc/self/fd"))
