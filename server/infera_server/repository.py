"""Which models there are, which versions, and in what state."""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from infera_gpu.errors import InferaError
from infera_server.codec import short
from infera_server.errors import NotFound, Unavailable
from infera_server.model import Model, Opener, Post, open_model, open_session
from infera_server.settings import Settings

log = logging.getLogger(__name__)


class DiscoveryError(ValueError):
    """The paths do not say what to serve."""


class State(Enum):
    LOADING = "LOADING"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Source:
    """A model file and what it is served as."""

    name: str
    version: str
    path: Path

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(slots=True, eq=False)
class Entry:
    """A source and how far it is."""

    source: Source
    state: State = State.LOADING
    reason: str = ""
    model: Model | None = None


def discover(paths: Sequence[Path]) -> list[Source]:
    """The models at `paths`: ONNX files, folders of them, model folders (`NAME/1/model.onnx`) or folders of these.

    Raises DiscoveryError where a path holds none or two models would have one name.
    """
    found: dict[tuple[str, str], Source] = {}
    for path in paths:
        sources = list(_sources(path))
        if not sources:
            raise DiscoveryError(f"{path} holds no model: expected .onnx files or NAME/VERSION/model.onnx")
        for source in sources:
            other = found.setdefault((source.name, source.version), source)
            if other is not source:
                raise DiscoveryError(f"{other.path} and {source.path} would both be served as {source}; rename one")
    return list(found.values())


def _sources(path: Path) -> Iterator[Source]:
    if path.is_file():
        yield Source(path.stem, "1", path)
    elif path.is_dir():
        own = list(_versions(path))
        yield from own
        if not own:
            for child in sorted(path.iterdir()):
                if child.is_file() and child.suffix == ".onnx":
                    yield Source(child.stem, "1", child)
                elif child.is_dir():
                    yield from _versions(child)
    else:
        raise DiscoveryError(f"{path} does not exist")


def _versions(folder: Path) -> Iterator[Source]:
    """The versions in a model's folder: `model.onnx`, or the only .onnx file, in folders named by a number."""
    name = folder.resolve().name
    for child in sorted(folder.iterdir()):
        if not (child.is_dir() and child.name.isascii() and child.name.isdigit() and int(child.name) > 0):
            continue
        files = sorted(child.glob("*.onnx"))
        named = [f for f in files if f.name == "model.onnx"] or files
        if len(named) > 1:
            raise DiscoveryError(f"{child} holds {len(named)} .onnx files, none of them named model.onnx")
        if named:
            yield Source(name, str(int(child.name)), named[0])


@dataclass(eq=False)
class Repository:
    """All models by name and version. Lookups are dictionary lookups: no text of a request reaches the file system."""

    settings: Settings
    sources: Sequence[Source]
    opener: Opener = open_session
    _entries: dict[str, dict[str, Entry]] = field(init=False)
    _served: dict[tuple[str, str | None], Model] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._entries = {}
        for source in sorted(self.sources, key=lambda s: (s.name, int(s.version))):
            self._entries.setdefault(source.name, {})[source.version] = Entry(source)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._guard = threading.Lock()
        self._stopped = False

    def load(self, post: Post, progress: Callable[[Entry], None] = lambda entry: None) -> None:
        """Load everything, several at a time; a failure is noted in its entry and stops no other.

        `post(fn, arg)` must call `fn(arg)` in the event loop's thread. `progress` is called as each entry is settled.
        """
        entries = list(self.entries())
        workers = min(len(entries), os.cpu_count() or 1, 4)
        with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="infera-load") as pool:
            for done in as_completed([pool.submit(self._load, entry, post) for entry in entries]):
                progress(done.result())

    def _load(self, entry: Entry, post: Post) -> Entry:
        source = entry.source
        if self._stopped:
            entry.state, entry.reason = State.UNAVAILABLE, "the server was stopped before it was loaded"
            return entry
        try:
            model = open_model(
                source.name,
                source.version,
                source.path,
                self.settings,
                post=post,
                device_lock=self._lock_of,
                opener=self.opener,
            )
        except Exception as error:
            entry.reason = str(error) if isinstance(error, InferaError) else f"{type(error).__name__}: {error}"
            entry.state = State.UNAVAILABLE
            log.error("%s (%s) cannot be served: %s", source, source.path, entry.reason)
            return entry
        with self._guard:
            entry.model, entry.state = model, State.READY
            self._served[source.name, source.version] = model
            newest = max(
                (e for e in self._entries[source.name].values() if e.model), key=lambda e: int(e.source.version)
            )
            assert newest.model is not None
            self._served[source.name, None] = newest.model
        return entry

    def stop(self) -> None:
        """Load nothing more; what is being loaded is finished."""
        self._stopped = True

    def _lock_of(self, device: str) -> threading.Lock:
        with self._guard:
            return self._locks[device]

    def get(self, name: str, version: str | None = None) -> Model:
        """A model that can run; the newest version by default. Raises NotFound or Unavailable."""
        model = self._served.get((name, version))
        if model is not None:
            return model
        versions = self._entries.get(name)
        if versions is None:
            raise NotFound(f"Request for unknown model: '{short(name)}' is not found")
        if version is not None and version not in versions:
            raise NotFound(f"Request for unknown model: '{name}' version {short(version)} is not found")
        entries = list(versions.values()) if version is None else [versions[version]]
        if any(e.state is State.LOADING for e in entries):
            raise Unavailable(f"model '{name}' is still loading")
        if version is None:
            raise NotFound(f"Request for unknown model: '{name}' has no available versions")
        raise NotFound(f"Request for unknown model: '{name}' version {version} is not at ready state")

    def entries(self) -> Iterator[Entry]:
        """Everything there is, ready or not, by name and version."""
        for versions in self._entries.values():
            yield from versions.values()

    def ready(self) -> Iterator[Model]:
        """The models that can run."""
        return (entry.model for entry in self.entries() if entry.model is not None)

    def versions(self, name: str) -> list[str]:
        """The versions of a model that can run."""
        return [v for v, entry in self._entries.get(name, {}).items() if entry.model is not None]

    @property
    def is_settled(self) -> bool:
        """Whether nothing is loading."""
        return all(entry.state is not State.LOADING for entry in self.entries())
