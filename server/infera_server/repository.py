"""Which models there are, which versions, and in what state."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from infera_gpu.errors import InferaError
from infera_server.codec import short
from infera_server.errors import NotFound, Unavailable
from infera_server.model import Model, Opener, Post, open_model, open_session
from infera_server.placement import Placement
from infera_server.settings import Settings
from infera_server.turns import Turns

MAX_LOADERS = 4

RESERVED = frozenset({"stats"})
"""Names in the place of a model that mean something else: `GET /v2/models/stats` is about all of them."""


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

    Raises DiscoveryError where a path holds none, two models would have one name, or a name cannot be served.
    """
    found: dict[tuple[str, str], Source] = {}
    for path in paths:
        sources = list(_sources(path))
        if not sources:
            raise DiscoveryError(f"{path} holds no model: expected .onnx files or NAME/VERSION/model.onnx")
        for source in sources:
            _check_name(source)
            other = found.setdefault((source.name, source.version), source)
            if other is not source:
                raise DiscoveryError(f"{other.path} and {source.path} would both be served as {source}; rename one")
    return list(found.values())


def _check_name(source: Source) -> None:
    """Raises DiscoveryError for a name that the protocol cannot say."""
    try:
        source.name.encode()
    except UnicodeEncodeError:
        raise DiscoveryError(f"{str(source.path)!a} is not named in UTF-8; rename it") from None
    if source.name in RESERVED:
        raise DiscoveryError(f"{source.path} would be served at /v2/models/{source.name}, which is taken; rename it")


def _is_model(path: Path) -> bool:
    return path.suffix.lower() == ".onnx" and path.is_file()


def _sources(path: Path) -> Iterator[Source]:
    if path.is_file():
        yield Source(path.stem, "1", path)
    elif path.is_dir():
        own = list(_versions(path))
        yield from own
        if not own:
            for child in sorted(path.iterdir()):
                if _is_model(child):
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
        files = sorted(filter(_is_model, child.iterdir()))
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
    opener: Opener | None = None
    """How a file becomes a session; None is the runtime, at the place that the settings give."""
    _entries: dict[str, dict[str, Entry]] = field(init=False)
    _served: dict[tuple[str, str | None], Model] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._placement = Placement(self.settings.device, self.settings.vram_limit, self.settings.pins)
        self._entries = {}
        for source in sorted(self.sources, key=lambda s: (s.name, int(s.version))):
            self._entries.setdefault(source.name, {})[source.version] = Entry(source)
        self._turns: defaultdict[str, Turns] = defaultdict(Turns)
        self._guard = threading.Lock()
        self._stopped = False

    def load(self, post: Post, progress: Callable[[Entry], None] = lambda entry: None) -> None:
        """Load everything, several at a time; a failure is noted in its entry and stops no other.

        `post(fn, arg)` must call `fn(arg)` in the event loop's thread. `progress` is called as each entry is settled.
        """
        entries = list(self.entries())
        waiting: SimpleQueue[Entry] = SimpleQueue()
        settled: SimpleQueue[Entry] = SimpleQueue()
        for entry in entries:
            waiting.put(entry)

        def work() -> None:
            with suppress(Empty):
                while True:
                    settled.put(self._load(waiting.get_nowait(), post))

        for _ in range(min(len(entries), os.cpu_count() or 1, MAX_LOADERS)):
            threading.Thread(target=work, name="infera-load", daemon=True).start()  # the process's exit waits for none
        for _ in entries:
            entry = settled.get()
            if not self._stopped:
                progress(entry)

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
                turns_of=self._turns_of,
                opener=self.opener or self._open_at(source),
            )
        except Exception as error:
            entry.reason = str(error) if isinstance(error, InferaError) else f"{type(error).__name__}: {error}"
            entry.state = State.UNAVAILABLE
            self._choose_default(source.name)
            return entry
        with self._guard:
            if late := self._stopped:
                entry.state, entry.reason = State.UNAVAILABLE, "the server was stopped while it was loaded"
            else:
                entry.model, entry.state = model, State.READY
                self._served[source.name, source.version] = model
        if late:
            model.close()
        else:
            self._choose_default(source.name)
        return entry

    def _open_at(self, source: Source) -> Opener:
        """The runtime, with a place for this model."""
        return partial(open_session, place=self._placement.take(source.name, source.path.stat().st_size))

    def _choose_default(self, name: str) -> None:
        """The newest version is the default, once no newer one may still come."""
        with self._guard:
            for entry in sorted(self._entries[name].values(), key=lambda e: int(e.source.version), reverse=True):
                if entry.state is State.LOADING:
                    return
                if entry.model is not None:
                    self._served[name, None] = entry.model
                    return

    def stop(self) -> None:
        """Load nothing more; what is being loaded is thrown away when it is done."""
        with self._guard:
            self._stopped = True

    def _turns_of(self, device: str) -> Turns:
        with self._guard:
            return self._turns[device]

    @property
    def is_stuck(self) -> bool:
        """Whether a run has kept a device for longer than a request may wait."""
        with self._guard:
            return any(turns.held_for() > self.settings.request_timeout for turns in self._turns.values())

    @property
    def lost(self) -> str:
        """Why a device works no more, which only a new process mends; empty while all do."""
        return next(filter(None, (model.lost for model in self.ready())), "")

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
