"""What passes made of small models, kept on disk: a model that is loaded often needs neither parsing nor passes.

Of a small model both take longer than its first inference. An entry is found by all that it depends on: the bytes of
the model, the sources of this package, what the passes were told of the device, and the versions of NumPy and Python.
It is written whole and holds no code (`graph_codec`); what is damaged counts as absent, and what cannot be written is
not kept. The oldest entries go where there are more than MAX_ENTRIES, or more bytes than MAX_TOTAL.

Entries lie in folders, one for each size of model file. The first time a model is loaded it gets its folder, the second
time its entry: who loads a model once pays for neither, nor for a hash, and a model without a folder is not looked for.
One that loads about as fast as it could be hashed and read gets none: it consists of weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

import infera_kernels
from infera_gpu.devices.base import Device, host_block
from infera_gpu.graph import Graph, HostArray
from infera_gpu.graph_codec import Damaged, Unencodable, decoded, encoded
from infera_gpu.source import Source
from infera_kernels.disk import default_directory, replace_file

MAX_BYTES = 1 << 23
"""Bytes of a model file, and of an entry, at most."""

MAX_TOTAL = 1 << 27
"""Bytes of all entries together."""

MAX_ENTRIES = 1024

NS_OF_A_BYTE = 3
"""Nanoseconds that it takes, about, to hash a byte of a model, to read one of an entry and to compare its checksum."""

SWITCH = "INFERA_GRAPH_CACHE"
"""The environment variable that turns all of this off: "0", "off", "no" or "false"."""

_EXTERNAL = b"location"
"""In every file whose tensors lie in other ones: these may change while the file stays as it is."""

_PACKAGES = ("", "passes", "ops")
"""Of this package, and `portable` of infera_kernels: whose sources decide what passes make of a graph."""

_IMPORTED_NS = time.time_ns()


class Entry:
    """The file of one graph, which need not be there, and what it is found by: a model, and what passes are told.

    `name` is the file's in `folder`, None where there is no folder yet.
    """

    def __init__(self, source: Path, told: bytes, folder: Path, name: str | None) -> None:
        self._source, self._told, self._folder, self._name = source, told, folder, name

    @property
    def path(self) -> Path | None:
        """Of the entry, None where there is no folder yet."""
        return None if self._name is None else self._folder / self._name

    def read(self) -> Graph | None:
        """The graph, named after the file as when it is loaded; None where none is kept, or what is kept is damaged."""
        if self._name is None:
            return None
        try:
            return replace(decoded(content(self._folder / self._name)), name=self._source.name)
        except (OSError, Damaged):
            return None

    def keep(self, graph: Graph, seconds: float) -> bool:
        """Of a graph that took so many seconds of a processor to load: the second time it is kept, where it can be.

        Returns whether it is kept now.
        """
        try:
            if self._name is not None:
                return self._write(self._folder / self._name, graph)
            if seconds * 1e9 > NS_OF_A_BYTE * self._source.stat().st_size:
                self._folder.mkdir(parents=True, exist_ok=True)
                if len(os.listdir(self._folder.parent)) > MAX_ENTRIES:
                    make_room(self._folder.parent)
        except (OSError, Unencodable):
            pass
        return False

    def _write(self, path: Path, graph: Graph) -> bool:
        """Unless the model is no longer what it was, or not all of it in one file."""
        model = self._source.read_bytes()
        if _EXTERNAL in model or path.name != _name(hashlib.sha256(model), self._told):
            return False
        content = encoded(graph)
        if len(content) > MAX_BYTES:
            return False
        replace_file(path, content)
        make_room(self._folder.parent)
        return True


def entry_of(source: Source, device: Device, precision: str) -> Entry | None:
    """Where the graph is kept that passes make of a model for a device; None of what is not kept."""
    if not isinstance(source, str | os.PathLike) or not enabled():
        return None
    try:
        path = Path(os.path.abspath(os.fsdecode(source)))
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or not 0 < about.st_size <= MAX_BYTES:
            return None
        folder = directory() / f"{about.st_size:x}"
        if not folder.is_dir():
            return Entry(path, b"", folder, None)
        if (sources := _sources()) is None:
            return None
        told = [device.strict, device.kinds, device.channels_last, precision, sources, np.__version__]
        more = json.dumps([*told, sys.version, platform.machine()]).encode()
        return Entry(path, more, folder, _name(_hashed(path), more))
    except (OSError, RuntimeError, ValueError):  # no such file, no home: who reads the model says so
        return None


def _hashed(path: Path) -> Any:
    """SHA-256 of a file's bytes."""
    with path.open("rb", buffering=0) as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        return hashlib.sha256(data)


def _name(model: Any, told: bytes) -> str:
    """The name of an entry, `model` being the SHA-256 of the model's bytes."""
    model.update(told)
    return f"{model.hexdigest()}.graph"


def enabled(environ: Mapping[str, str] = os.environ) -> bool:
    return environ.get(SWITCH, "").lower() not in ("0", "off", "no", "false")


def directory() -> Path:
    """$INFERA_CACHE_DIR/graphs, else $XDG_CACHE_HOME/infera-gpu/graphs, else ~/.cache/infera-gpu/graphs.

    Raises RuntimeError where there is no home.
    """
    return default_directory().with_name("graphs")


def content(path: Path) -> HostArray:
    """The bytes of a file, from a cache line on. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = host_block(size if size <= 2 * MAX_BYTES else 0)
        done = file.readinto(data.data)
        return data[:done]


def make_room(root: Path) -> None:
    """Removes the oldest entries where there are too many, and all empty folders where there are too many of these.
    Others may do so at the same time."""
    folders, kept = [file.path for file in os.scandir(root)], list[tuple[int, int, str]]()
    for folder in folders:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
            for file in found:
                with suppress(FileNotFoundError):
                    about = file.stat()
                    kept.append((about.st_mtime_ns, about.st_size, file.path))
    kept.sort()
    total = sum(size for _, size, _ in kept)
    while len(kept) > MAX_ENTRIES or (total > MAX_TOTAL and kept):
        _, size, path = kept.pop(0)
        total -= size
        Path(path).unlink(missing_ok=True)
    for folder in folders if len(folders) > MAX_ENTRIES else ():
        with suppress(OSError):  # most of them hold an entry
            os.rmdir(folder)


@cache
def _sources() -> str | None:
    """`fingerprint` of what decides what passes make of a graph. Looked at once a process."""
    import infera_gpu

    folders = [os.path.join(place, package) for place in infera_gpu.__path__ for package in _PACKAGES]
    found = fingerprint([*folders, *(os.path.join(place, "portable") for place in infera_kernels.__path__)])
    return found and f"{infera_gpu.__version__} {found}"


def fingerprint(folders: Iterable[str]) -> str | None:
    """Changes when a source in these folders does: how many there are, their bytes and the sum of their times.

    None where one has changed since this was imported: what runs is not what is there.
    """
    count = size = times = 0
    for folder in folders:
        with os.scandir(folder) as found:
            for file in found:
                if file.name.endswith(".py"):
                    about = file.stat()
                    if about.st_mtime_ns > _IMPORTED_NS:
                        return None
                    count, size, times = count + 1, size + about.st_size, times + about.st_mtime_ns
    return f"{count} {size} {times}"
