"""Answers that are kept, and the keys they are found by."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from infera_server import codec
from infera_server.requests import Request
from infera_server.scheduling.rows import Arrays, HostArray

KEY_BYTES = 32


OVERHEAD = 512
"""Bytes that an answer takes in the cache besides its arrays."""


@dataclass(slots=True)
class Kept:
    """An answer and the model that gave it."""

    arrays: Arrays
    owner: int
    nbytes: int


class ResponseCache:
    """The answers of all models, at most `limit` bytes of them: the least recently used are dropped for new ones."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()

    @property
    def count(self) -> int:
        """Answers that are kept."""
        return len(self._kept)

    def get(self, key: bytes) -> Arrays | None:
        """The answer of this key, which is the most recently used from now on."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found.arrays

    def put(self, key: bytes, arrays: Arrays, owner: int) -> None:
        """Keep an answer, in memory of its own, if it is not larger than everything may be."""
        nbytes = OVERHEAD + sum(map(_nbytes, arrays.values()))
        if nbytes > self.limit or key in self._kept:
            return
        while self.nbytes + nbytes > self.limit:
            self._drop(next(iter(self._kept)))
        self._kept[key] = Kept({name: _own(array) for name, array in arrays.items()}, owner, nbytes)
        self.nbytes += nbytes

    def drop(self, owner: int) -> None:
        """Forget the answers of a model."""
        for key in [key for key, kept in self._kept.items() if kept.owner == owner]:
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        self.nbytes -= self._kept.pop(key).nbytes


def key_of(identity: int, request: Request) -> bytes:
    """What an answer depends on, hashed."""
    outputs = sorted([output.name for output in request.outputs])
    parts: list[object] = [identity, outputs]
    buffers = []
    for name, array in sorted(request.feeds.items()):
        buffer = _buffer(array)
        parts += name, array.dtype.num, array.shape, len(buffer)
        buffers.append(buffer)
    found = blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=KEY_BYTES)
    for buffer in buffers:
        found.update(buffer)
    return found.digest()


def _buffer(array: HostArray) -> Any:
    """The array's bytes, or itself where they are those."""
    if array.dtype.hasobject:
        return codec.to_bytes(array)
    whole = array if array.flags.c_contiguous else np.ascontiguousarray(array)
    return whole.reshape(-1).view(np.uint8)


def _nbytes(array: HostArray) -> int:
    """What an array takes in memory, its strings included."""
    return array.nbytes + (sum(len(str(item)) + 50 for item in array.flat) if array.dtype.hasobject else 0)


def _own(array: HostArray) -> HostArray:
    """The array in memory of its own, which nobody can change: a view would keep its whole batch."""
    own = array if array.base is None else array.copy()
    own.flags.writeable = False
    return own
