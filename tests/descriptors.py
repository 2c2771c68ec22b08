"""What this process has open."""

from __future__ import annotations

import gc
import os

from infera_gpu.devices.processes import POOL


def open_files() -> int:
    """How many, without those of garbage and of worker processes, which go at any time: what other tests left when
    something else is collected, the processes when the last session of another test is."""
    gc.collect()
    POOL.end()
    _ = POOL.memory  # its file is open from here on
    return len(os.listdir("/proc/self/fd"))
