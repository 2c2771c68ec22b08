"""How much of what a block reads and writes the processor keeps near."""

from __future__ import annotations

import os
import sys
from functools import cache

USUAL = 1 << 19
"""Bytes of the second-level cache that sizes of blocks were chosen for, an EPYC Milan's."""

MOST = 4
"""Times as large as chosen that blocks become: beyond that there are few calls left to save."""

SECOND_LEVEL = 191
"""_SC_LEVEL2_CACHE_SIZE of glibc's bits/confname.h, for which Python has no name. On ARM it is 0."""

WHERE = "/sys/devices/system/cpu/cpu0/cache"
"""What Linux tells of the caches of a core. To read it takes a good part of a millisecond."""


def second_level() -> int:
    """Bytes of a core's second-level cache; USUAL where the system does not tell."""
    try:
        found = os.sysconf(SECOND_LEVEL) if sys.platform == "linux" else 0
    except (OSError, ValueError):  # another C library
        found = 0
    return found if found > 0 else _listed()


def _listed() -> int:
    try:
        for index in sorted(os.listdir(WHERE)):
            if index.startswith("index") and _told(index, "level") == "2":
                size = _told(index, "size")
                return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    except (OSError, ValueError, LookupError):
        pass
    return USUAL


def _told(index: str, what: str) -> str:
    with open(os.path.join(WHERE, index, what), encoding="ascii") as file:
        return file.read().strip()


@cache
def _times() -> int:
    return max(1, min(MOST, second_level() // USUAL))


def block_of(nbytes: int) -> int:
    """A block of so many bytes, or as many times as large as the second-level cache is: each block is a few calls."""
    return nbytes * _times()
