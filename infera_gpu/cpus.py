"""How many CPUs there are for this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from infera_gpu.errors import InputError

VARIABLE = "INFERA_THREADS"
"""An environment variable: how many threads a run on the CPU has where nobody says."""

MAX_THREADS = 1 << 12
"""More than any machine has CPUs, and few enough to be started."""

_CPUS = Path("/sys/devices/system/cpu")
_GROUPS, _MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def default_threads() -> tuple[int, str]:
    """How many threads a run has where nobody says, and why: what INFERA_THREADS says, else one a core.

    Cores are those that the process may use, two hardware threads of one counting once, and no more than the control
    groups' quota of time is worth. Raises InputError where the variable is set, and no positive number up to
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
    """CPUs' worth of time that the control groups may use, at least 1; None where none of them is limited."""
    limits = [limit for folder, version in _groups() if (limit := _limit(folder, version)) is not None]
    return max(1, int(min(limits))) if limits else None


def _groups() -> Iterator[tuple[Path, int]]:
    """The folders that limit the process's CPU time, with the version of control groups, from its own group up. In a
    container most of them are out of sight."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 1 and "cpu" not in controllers.split(","):
            continue
        root = _MOUNTED / "cpu" if version == 1 else _MOUNTED
        own = root / path.lstrip("/")
        yield from ((folder, version) for folder in (own, *own.parents) if folder.is_relative_to(root))


def _limit(folder: Path, version: int) -> float | None:
    """CPUs' worth of time that a group may use; None where it is not limited, or there is none."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
