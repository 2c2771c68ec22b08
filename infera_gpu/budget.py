"""How much GPU memory sessions may have together."""

from __future__ import annotations

import operator
import re
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import SupportsIndex

from infera_gpu.errors import InputError, OutOfMemoryError

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", 1):
    _UNITS |= {f"{_prefix}b": 1000**_power, f"{_prefix}ib": 1024**_power}


def bytes_of(size: SupportsIndex | str) -> int:
    """A number of bytes, plain (NumPy's integers too) or with a unit: 1000, "4GiB", "1.5 GB". Raises InputError."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-zA-Z]*)\s*", size)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match and unit:
            return int(float(match[1]) * unit)
    elif not isinstance(size, bool):
        with suppress(TypeError):
            if (nbytes := operator.index(size)) >= 0:
                return nbytes
    raise InputError(
        f"{size!r} is no amount of memory; expected bytes as a whole number, or a string as '4GiB' or '4.3GB'"
    )


class VramBudget:
    """Bytes of GPU memory that all sessions loaded with it have together: weights, arenas and temporaries.

    `load(..., vram_limit="4GiB")` gives a session a budget of its own. What a CUDA context and the code of kernels take
    is the driver's, and not counted.
    """

    def __init__(self, limit: SupportsIndex | str) -> None:
        self.limit = bytes_of(limit)
        self._used = 0
        self._changing = threading.Lock()
        self._returned = SimpleQueue[int]()
        """What was given back and is not taken off yet. Memory is also given back by the garbage collector, which may
        interrupt whoever holds the lock; a put waits for nobody."""

    @property
    def used(self) -> int:
        """Bytes that are out."""
        with self._changing:
            return self._settled()

    @property
    def available(self) -> int:
        """Bytes that may still be taken."""
        return self.limit - self.used

    def take(self, what: str, nbytes: int) -> None:
        """Count `nbytes` for `what`. Raises OutOfMemoryError, counting nothing, where that is more than is left."""
        with self._changing:
            available = self.limit - self._settled()
            if nbytes > available:
                raise OutOfMemoryError(what, needed=nbytes, available=available, limit=self.limit)
            self._used += nbytes

    def give_back(self, nbytes: int) -> None:
        self._returned.put(nbytes)

    def _settled(self) -> int:
        """`used`, of who holds the lock."""
        while not self._returned.empty():
            self._used -= self._returned.get()
        return self._used

    def __repr__(self) -> str:
        return f"<VramBudget: {self.used:,} of {self.limit:,} bytes used>"
