"""How many CPUs there are for this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from infera_gpu.errors import InputError

VARIABLE = "INFERA_THREADS"
"""An environment variable: how many threads a run on the CPU has where nobody says."""

MAX_THREADS = 1 << 12
"""More than any machine has CPUs, and few enough to be started."""

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> tuple[int, str]:
    """How many threads a run has where nobody says, and why: what INFERA_THREADS says, else one a core.

    Cores are those that the process may use, two hardware threads of one counting once, and no more than the control
    group's quota of time is worth. Raises InputError where the variable is set, and no positive number up to
    `MAX_THREADS`.
    """
    if asked := os.environ.get(VARIABLE, ""):
        if not asked.isdecimal() or len(asked) > 9 or not 1 <= int(asked) <= MAX_THREADS:
            raise InputError(f"{VARIABLE} is '{asked[:64]}', expected a positive number up to {MAX_THREADS}")
        return int(asked), VARIABLE
    cores = usable_cores()
    quota = _quota()
    if quota is not None and quota < cores:
        return quota, "the CPU time that the control group has"
    return cores, "every core"


def usable_cores() -> int:
    """Physical cores that the process may run on."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    """The hardware threads of a CPU's core, as the system writes them."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """CPUs' worth of time that the control group may use, at least 1; None where it is not limited."""
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None
