"""What this process has open."""

from __future__ import annotations

import os

from infera_gpu.devices.processes import POOL


def open_files() -> int:
    """How many, without those of worker processes, which go at any time: when the last session of another test does."""
    POOL.end()
    _ = POOL.memory  # its file is open from here on
    return len(os.listdir("/proc/self/fd"))
