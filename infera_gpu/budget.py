"""How much GPU memory sessions may have together."""

from __future__ import annotations

import re
import threading

from infera_gpu.errors import InputError, OutOfMemoryError

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", 1):
    _UNITS |= {f"{_prefix}b": 1000**_power, f"{_prefix}ib": 1024**_power}


def bytes_of(size: int | str) -> int:
    """A number of bytes, plain or with a unit: 1000, "4GiB", "1.5 GB". Raises InputError."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-zA-Z]*)\s*", size)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match and unit:
            return int(float(match[1]) * unit)
    elif isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    raise InputError(f"{size!r} is no amount of memory; expected bytes, or a string as '4GiB' or '4.3GB'")


class VramBudget:
    """Bytes of GPU memory that all sessions loaded with it have together: weights, arenas and temporaries.

    `load(..., vram_limit="4GiB")` gives a session a budget of its own. What a CUDA context and the code of kernels take
    is the driver's, and not counted.
    """

    def __init__(self, limit: int | str) -> None:
        self.limit = bytes_of(limit)
        self._used = 0
        self._changing = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are out."""
        return self._used

    @property
    def available(self) -> int:
        """Bytes that may still be taken."""
        return self.limit - self._used

    def take(self, what: str, nbytes: int) -> None:
        """Count `nbytes` for `what`. Raises OutOfMemoryError, counting nothing, where that is more than is left."""
        with self._changing:
            if nbytes > self.available:
                raise OutOfMemoryError(what, needed=nbytes, available=self.available, limit=self.limit)
            self._used += nbytes

    def give_back(self, nbytes: int) -> None:
        with self._changing:
            self._used -= nbytes

    def __repr__(self) -> str:
        return f"<VramBudget: {self._used:,} of {self.limit:,} bytes used>"
