"""Shared memory of clients: regions that are registered by name, which requests then name instead of sending tensors.

System regions are POSIX shared memory objects, mapped and read in place. CUDA regions are allocations of another
process, which are copied from and to. A region lives as long as something refers to it: what is unregistered while a
request uses it stays mapped until that has been answered. Texts are Triton's.

Who may register regions may use all of them, and nobody else may. Such a client is trusted with every shared memory
object that the server's user can open, and not to shrink or change one while a request uses it.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from infera_gpu.devices.cuda import shared_vram
from infera_gpu.devices.ipc import HANDLE_BYTES
from infera_gpu.errors import DeviceError
from infera_server.codec import Buffer, short
from infera_server.errors import BadRequest, Forbidden, NotFound, Taken
from infera_server.requests import Region

FOLDER = Path("/dev/shm")
"""Where Linux keeps POSIX shared memory objects, by their names without the slash."""

MAX_NAME = 255
MAX_REGIONS = 1024
MAX_SIZE = 2**63 - 1


class Memory(Protocol):
    """Memory that a region lies in."""

    def read(self, offset: int, nbytes: int) -> memoryview:
        """The bytes: a view where the host can see them, else a copy."""

    def write(self, offset: int, data: Any) -> None:
        """Copy a contiguous uint8 array to `offset`."""


class Mapped:
    """A part of a POSIX shared memory object. Raises BadRequest where there is none, or it is smaller.

    The file stays open, so that a shrunk one is noticed: to touch its missing pages would end the process.
    """

    def __init__(self, key: str, offset: int, nbytes: int) -> None:
        self._key, self._offset, self._end = key, offset, offset + nbytes
        self._file = _open(key)
        try:
            if not nbytes or not self._is_whole():
                raise BadRequest(f"Invalid shared memory region: '{short(key)}'")
            whole = mmap.mmap(self._file, self._end)  # from 0: an offset need not be one of a page
        except BaseException:
            os.close(self._file)
            raise
        self._bytes = memoryview(whole)[offset:]

    def __del__(self) -> None:
        if hasattr(self, "_bytes"):
            os.close(self._file)

    def _is_whole(self) -> bool:
        return os.fstat(self._file).st_size >= self._end

    def _part(self, offset: int, nbytes: int) -> memoryview:
        if not self._is_whole():
            raise BadRequest(f"shared memory '{short(self._key)}' has become smaller than what was registered")
        return self._bytes[offset : offset + nbytes]

    def read(self, offset: int, nbytes: int) -> memoryview:
        return self._part(offset, nbytes)

    def write(self, offset: int, data: Any) -> None:
        self._part(offset, len(data))[:] = data


def _open(key: str) -> int:
    """A descriptor of the object called `key`: a name in one folder, with or without its slash, never a path."""
    name = key.removeprefix("/")
    refusal = BadRequest(f"Unable to open shared memory region: '{short(key)}'")
    try:
        if not name or "/" in name or name in (".", "..") or len(os.fsencode(name)) > MAX_NAME:
            raise refusal
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(FOLDER / name, flags)
    except (OSError, ValueError):  # ValueError: a NUL, half a character
        raise refusal from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise refusal
    return file


@dataclass(frozen=True, slots=True)
class Registered:
    """A region, and what its status says beside its name. `origin` is what it was registered with."""

    kind: str
    memory: Memory
    nbytes: int
    told: dict[str, Any]
    origin: tuple[str | int, ...]


@dataclass(eq=False)
class Kind:
    """The regions of one kind; names are shared with the other."""

    kind: str
    label: str
    _all: dict[str, Registered]
    _limit: int

    def status(self, name: str | None = None) -> list[dict[str, Any]]:
        """All regions, or one. Raises NotFound."""
        if name is None:
            return [self._told(n, r) for n, r in self._all.items() if r.kind == self.kind]
        found = self._all.get(name)
        if found is None:
            raise NotFound(f"Unable to find {self.kind} shared memory region: '{short(name)}'")
        if found.kind != self.kind:
            other = "CUDA" if found.kind == "cuda" else "system"
            raise NotFound(
                f"The region named '{short(name)}' is registered as {other} shared memory, "
                f"not {self.label} shared memory"
            )
        return [self._told(name, found)]

    def unregister(self, name: str | None = None) -> None:
        """Forget a region, or all of this kind; one that is not there is no error."""
        for known in [name] if name is not None else list(self._all):
            if known in self._all and self._all[known].kind == self.kind:
                del self._all[known]

    def _told(self, name: str, region: Registered) -> dict[str, Any]:
        return {"name": name, **region.told, "byte_size": region.nbytes}

    def _check(self, name: str, offset: int, nbytes: int) -> None:
        """Raises BadRequest where the name is taken or the limits do not allow so much more."""
        if name in self._all:
            raise Taken(f"shared memory region '{short(name)}' already in manager")
        total = sum(r.nbytes for r in self._all.values()) + nbytes
        if len(self._all) >= MAX_REGIONS or total > self._limit or offset + nbytes > MAX_SIZE:
            raise BadRequest(
                f"failed to register shared memory region '{short(name)}': at most {MAX_REGIONS:,} regions of "
                f"{self._limit:,} bytes altogether may be registered"
            )


class SystemRegions(Kind):
    """POSIX shared memory."""

    def register(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Map `nbytes` bytes at `offset` of the object called `key`. Raises BadRequest."""
        self._check(name, offset, nbytes)
        memory = Mapped(key, offset, nbytes)
        self._all[name] = Registered(self.kind, memory, nbytes, {"key": key, "offset": offset}, (key, offset, nbytes))


class CudaRegions(Kind):
    """Allocations on GPUs, by CUDA IPC."""

    def register(self, name: str, handle: bytes, device_id: int, nbytes: int) -> None:
        """Open the allocation behind a cudaIpcMemHandle_t. Raises BadRequest."""
        if len(handle) != HANDLE_BYTES:
            raise BadRequest("'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t")
        self._check(name, 0, nbytes)
        try:
            memory = shared_vram(handle, device_id, nbytes)
        except DeviceError as error:
            raise BadRequest(f"failed to register CUDA shared memory region '{short(name)}': {error}") from None
        self._all[name] = Registered(
            self.kind, memory, nbytes, {"device_id": device_id}, (handle.hex(), device_id, nbytes)
        )


@dataclass(eq=False)
class Regions:
    """All regions by name, of at most `limit` bytes altogether."""

    limit: int
    system: SystemRegions = field(init=False)
    cuda: CudaRegions = field(init=False)
    _all: dict[str, Registered] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.system = SystemRegions("system", "system", self._all, self.limit)
        self.cuda = CudaRegions("cuda", "CUDA", self._all, self.limit)

    def told(self) -> list[list[Any]]:
        """All of them, for `mirror` in another process."""
        return [[name, region.kind, *region.origin] for name, region in self._all.items()]

    def mirror(self, told: Sequence[Sequence[Any]]) -> None:
        """Have these regions and no others. Raises BadRequest for one that this process cannot have."""
        wanted = {name: tuple(origin) for name, *origin in told}
        for name, region in list(self._all.items()):
            if wanted.get(name) != (region.kind, *region.origin):
                del self._all[name]
        for name, (kind, *origin) in wanted.items():
            if name in self._all:
                continue
            if kind == "system":
                self.system.register(name, *origin)
            else:
                self.cuda.register(name, bytes.fromhex(origin[0]), *origin[1:])

    def view(self, region: Region) -> memoryview:
        """The region's bytes, in place where the host can see them, else a copy. They keep its memory."""
        return self._memory(region).read(region.offset, region.nbytes)

    def write(self, region: Region, data: Buffer, output: str) -> None:
        """Copy an output's bytes to the start of the region. Raises BadRequest where they do not fit."""
        if len(data) > region.nbytes:
            raise BadRequest(
                f"shared memory size specified with the request for output '{output}' ({region.nbytes} bytes) "
                f"should be at least {len(data)} bytes to hold the results"
            )
        self._memory(region).write(region.offset, np.frombuffer(data, np.uint8))

    def hold(self, region: Region) -> Region:
        """The region together with its memory. Raises NotFound, or BadRequest for what is outside it."""
        return Region(region.name, region.offset, region.nbytes, self._memory(region))

    def _memory(self, region: Region) -> Memory:
        if region.memory is not None:
            return region.memory
        found = self._all.get(region.name)
        if found is None:
            raise NotFound(f"Unable to find shared memory region: '{short(region.name)}'")
        if region.offset >= found.nbytes:
            raise BadRequest(f"Invalid offset for shared memory region: '{region.name}'")
        if region.offset + region.nbytes > found.nbytes or not region.nbytes:
            raise BadRequest(f"Invalid offset + byte size for shared memory region: '{region.name}'")
        return found.memory


NO_REGIONS = Regions(0)
"""What a request is read with where there is no shared memory."""


class ClosedRegions(Regions):
    """What a request is read with whose client may not use shared memory: naming a region is refused."""

    def _memory(self, region: Region) -> Memory:
        raise Forbidden("the API key is not for management, which shared memory is for")


CLOSED_REGIONS = ClosedRegions(0)
