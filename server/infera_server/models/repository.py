"""Which models there are, which versions, and in what state."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from queue import Empty, SimpleQueue

from infera_server.codec import short
from infera_server.errors import NotFound, RequestError, Unavailable
from infera_server.models.audience import Audience
from infera_server.models.definition import Definition, define
from infera_server.models.discovery import Problem, Source, Survey
from infera_server.models.loaded import Generation, Loaded
from infera_server.models.loader import Loader, reason_of, settle
from infera_server.models.model import Opener, Post
from infera_server.models.modelconfig import ConfigError
from infera_server.models.servable import Servable
from infera_server.models.serving import Serving
from infera_server.models.traffic import Traffic
from infera_server.settings import Settings

log = logging.getLogger(__name__)

MAX_LOADERS = 4

UNLOADED = "unloaded"
"""Triton's reason for a version that was taken out of service."""

KEPT = f"{UNLOADED}; kept for a rollback"


class State(Enum):
    """How far a version is, in Triton's words."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(slots=True, eq=False)
class Entry:
    """A source and how far it is."""

    source: Source
    state: State = State.LOADING
    reason: str = ""
    loaded: Loaded | None = None


@dataclass(eq=False)
class Repository:
    """All models by name and version. Lookups are dictionary lookups: no text of a request reaches the file system.

    After `load` it is changed in the event loop's thread only.
    """

    settings: Settings
    sources: Sequence[Source]
    opener: Opener | None = None
    """How a file becomes a session; None is the runtime, at the place that the settings give."""
    rescan: Callable[[], Survey] | None = None
    """Looks for models again; None: there are no others than `sources`."""
    problems: Mapping[str, Problem] = field(default_factory=dict)
    """What was found at the start and cannot be served, by name."""
    loader: Loader = field(init=False)
    serving: Serving = field(init=False)
    leaving: set[Loaded] = field(default_factory=set, init=False)
    """Models that take no new requests and have accepted ones to finish."""
    previous: dict[str, Generation] = field(default_factory=dict, init=False)
    """What served a model before, kept for a rollback."""
    traffic: dict[str, Traffic] = field(default_factory=dict, init=False)
    """What was set while the server ran, in place of what the folder says."""
    audience: Audience = field(default_factory=Audience, init=False)
    is_settled: bool = field(default=False, init=False)
    """Whether everything there was at the start is loaded, or cannot be."""
    definitions: dict[str, Definition] = field(default_factory=dict, init=False)
    """What each model was last loaded as."""
    _entries: Mapping[str, Mapping[str, Entry]] = field(init=False)

    def __post_init__(self) -> None:
        self.loader = Loader(self.settings, self.get, self.opener)
        self.serving = Serving(self.settings)
        self._entries = {}
        self._guard = threading.Lock()
        self._stopped = False
        wanted = self.settings.load_models
        for name in sorted({source.name for source in self.sources}):
            if "*" in wanted or name in wanted:
                self._define(name, [source for source in self.sources if source.name == name])
        for name, problem in self.problems.items():
            if "*" in wanted or name in wanted:
                self.note_problem(name, [problem.source], problem.reason)

    def _define(self, name: str, sources: Sequence[Source]) -> None:
        try:
            definition = self.definitions[name] = define(name, sources)
        except ConfigError as error:
            self._note(name, [Entry(sources[-1], State.UNAVAILABLE, str(error))])
        else:
            self._note(name, [Entry(source) for source in definition.sources])

    # --- starting --------------------------------------------------------------------------------------------------

    def load(self, post: Post, progress: Callable[[Entry], None] = lambda entry: None) -> None:
        """Load everything, several at a time; a failure is noted in its entry and stops no other.

        `post(fn, arg)` must call `fn(arg)` in the event loop's thread. `progress` is called as each entry is settled.
        """
        there = {source.name for source in self.sources}
        for option, names in self.settings.named_models().items():
            for name in sorted({*names} - there):
                log.warning("%s names '%s', and there is no such model", option, name)
        for entries in self._waves():
            self._load_all(entries, post, progress)
        for text in self.settings.without_effect({loaded.device for loaded in self.loaded()}):
            log.warning("%s", text)
        settle()
        self.is_settled = True
        self.audience.changed()

    def _waves(self) -> Iterator[Sequence[Entry]]:
        """Everything there is: models, then ensembles of those, then what is left, after what it is made of."""
        left = list(self.entries())
        while left:
            names = {entry.source.name for entry in left}
            wave = [entry for entry in left if not self._members(entry) & names] or left
            yield wave
            left = [entry for entry in left if entry not in wave]

    def _members(self, entry: Entry) -> frozenset[str]:
        definition = self.definitions.get(entry.source.name)
        return definition.members if definition else frozenset()

    def _load_all(self, entries: Sequence[Entry], post: Post, progress: Callable[[Entry], None]) -> None:
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
            self.audience.changed()
            if not self._stopped:
                progress(entry)

    def _load(self, entry: Entry, post: Post) -> Entry:
        source = entry.source
        if entry.state is not State.LOADING:
            return entry
        if self._stopped:
            entry.state, entry.reason = State.UNAVAILABLE, "the server was stopped before it was loaded"
            return entry
        try:
            loaded = self.loader.open(source, self.definitions[source.name], post)
        except Exception as error:
            entry.state, entry.reason = State.UNAVAILABLE, reason_of(error)
            self._choose_default(source.name)
            return entry
        with self._guard:
            if late := self._stopped:
                entry.state, entry.reason = State.UNAVAILABLE, "the server was stopped while it was loaded"
            else:
                entry.loaded, entry.state, entry.reason = loaded, State.READY, loaded.ignored
                self.serving.find[source.name, source.version] = loaded.front
        if late:
            loaded.front.close()
        else:
            self._choose_default(source.name)
        return entry

    def _choose_default(self, name: str) -> None:
        """The newest version is the default, once no newer one may still come."""
        with self._guard:
            for entry in reversed(list(self._entries[name].values())):
                if entry.state is State.LOADING:
                    return
                if entry.loaded is not None:
                    self._serve(name)
                    return

    def stop(self) -> None:
        """Load nothing more; what is being loaded is thrown away when it is done."""
        with self._guard:
            self._stopped = True

    # --- changing, in the event loop's thread ----------------------------------------------------------------------

    def mark_loading(self, name: str, sources: Iterable[Source]) -> None:
        """These versions are on their way; what serves them now goes on."""
        known = self._entries.get(name, {})
        self._note(name, [Entry(s) for s in sources if s.version not in known or known[s.version].loaded is None])
        self.audience.changed()

    def mark_failed(self, name: str, reasons: Mapping[str, str]) -> None:
        """These versions could not be loaded; what served them before goes on, and the index says why it is old."""
        for version, reason in reasons.items():
            entry = self._entries[name][version]
            entry.reason = reason
            if entry.loaded is None:
                entry.state = State.UNAVAILABLE
        self.audience.changed()

    def forget_failed(self, name: str) -> None:
        """Keep nothing of a model no version of which was ever served."""
        if name not in self.definitions:
            self._entries = {other: entries for other, entries in self._entries.items() if other != name}
            self.audience.changed()

    def note_problem(self, name: str, sources: Sequence[Source], reason: str) -> None:
        """What is there of a model now cannot be loaded, as the index says of all its versions."""
        known = self._entries.get(name, {})
        self._note(name, [Entry(s, State.UNAVAILABLE) for s in sources if s.version not in known])
        self.mark_failed(name, dict.fromkeys(self._entries[name], reason))

    def put(self, generation: Generation) -> list[Loaded]:
        """Serve these versions of a model from now on, and no others. Returns the models that no request finds now.

        Until they are let go they are `leaving`, and go on with what they have accepted.
        """
        name, models = generation.definition.name, generation.models
        before = self.generation(name)
        gone = [model for model in before.models.values() if model not in models.values()] if before else []
        for entry in self._entries.get(name, {}).values():
            if entry.loaded is not None:
                entry.loaded, entry.state = None, State.UNLOADING
        for loaded in models.values():
            loaded.definition = generation.definition  # what was loaded before may have other notes now
        self._note(name, [Entry(s, State.READY, loaded.ignored, loaded) for s, loaded in models.items()])
        self.definitions[name] = generation.definition
        self._serve(name)
        for loaded in gone:
            loaded.front.retired = True
        for loaded in models.values():
            loaded.front.retired = False
        self.leaving.update(gone)
        self.leaving.difference_update(models.values())
        self.audience.changed()
        return gone

    def generation(self, name: str) -> Generation | None:
        """What serves a model now; None where nothing does."""
        entries = self._entries.get(name, {}).values()
        models = {entry.source: entry.loaded for entry in entries if entry.loaded is not None}
        return Generation(self.definitions[name], models) if models else None

    def mark_unloaded(self, name: str, version: str, reason: str) -> None:
        """A version that was taken out of service is gone, or kept, unless it has come back."""
        entry = self._entries.get(name, {}).get(version)
        if entry is not None and (entry.state is State.UNLOADING or entry.reason == KEPT):
            entry.state, entry.reason = State.UNAVAILABLE, reason
            self.audience.changed()

    def mirror(
        self, entries: Iterable[Entry], find: Mapping[tuple[str, str | None], Servable], others: Iterable[Loaded]
    ) -> None:
        """Be what the repository of another process is: its entries, and what requests find there.

        `others` serve too, or have accepted requests to finish.
        """
        names: dict[str, dict[str, Entry]] = {}
        for entry in entries:
            names.setdefault(entry.source.name, {})[entry.source.version] = entry
        self._entries = names
        self.serving.find = dict(find)
        self.leaving = set(others)

    def _note(self, name: str, entries: Iterable[Entry]) -> None:
        """Add or replace entries. The mappings are new ones: other threads may be reading the old."""
        versions = {**self._entries.get(name, {}), **{entry.source.version: entry for entry in entries}}
        ordered = {v: versions[v] for v in sorted(versions, key=int)}
        self._entries = dict(sorted({**self._entries, name: ordered}.items()))

    def _serve(self, name: str) -> None:
        """Let requests find what the entries say."""
        models = {version: e.loaded.front for version, e in self._entries[name].items() if e.loaded is not None}
        self.serving.publish(name, models, self.traffic_of(name))
        for other in self.built_on(name):
            self.serving.forget_golden(other)

    def traffic_of(self, name: str) -> Traffic:
        """How requests for a model find a version: as set while the server ran, else as its folder says."""
        definition = self.definitions.get(name)
        return self.traffic.get(name) or (definition.traffic if definition is not None else Traffic())

    def set_traffic(self, name: str, traffic: Traffic) -> None:
        """From now on, until the server ends."""
        self.traffic[name] = traffic
        self._serve(name)
        self.audience.changed()

    # --- looking up ------------------------------------------------------------------------------------------------

    @property
    def is_stuck(self) -> bool:
        """Whether a run has kept a device for longer than a request may wait."""
        return self.loader.is_stuck

    @property
    def lost(self) -> str:
        """Why a device works no more, which only a new process mends; empty while all do."""
        if self.settings.isolate:
            return ""  # of an engine process, which is a new one by then
        return next(filter(None, (model.lost for model in self.ready())), "")

    def get(self, name: str, version: str | None = None) -> Servable:
        """A model that can run; the newest version by default. Raises NotFound or Unavailable."""
        model = self.serving.find.get((name, version))
        if model is not None:
            return model
        versions = self._entries.get(name)
        if versions is None:
            raise NotFound(f"Request for unknown model: '{short(name)}' is not found")
        if version is not None and not (version.isascii() and version.isdigit()):
            raise self._not_a_version(name, version)
        if version is not None and version != (plain := version.lstrip("0") or "0"):
            return self.get(name, plain)
        if version is not None and version not in versions:
            raise NotFound(f"Request for unknown model: '{name}' version {short(version)} is not found")
        entries = list(versions.values()) if version is None else [versions[version]]
        if any(e.state is State.LOADING for e in entries):
            raise Unavailable(f"model '{name}' is still loading")
        if version is None:
            raise NotFound(f"Request for unknown model: '{name}' has no available versions")
        raise Unavailable(f"Request for unknown model: '{name}' version {version} is not at ready state")

    def _not_a_version(self, name: str, label: str) -> RequestError:
        """Why a request finds nothing by a label of a model that is known."""
        if (version := self.traffic_of(name).labels.get(label)) is None:
            return NotFound(f"Request for unknown model: '{name}' has no version and no label '{short(label)}'")
        if any(entry.state is State.LOADING for entry in self._entries[name].values()):
            return Unavailable(f"model '{name}' is still loading")
        return NotFound(
            f"Request for unknown model: '{name}' label '{label}' names version {version}, which is not served"
        )

    def entries(self) -> Iterator[Entry]:
        """Everything that is or was loaded, ready or not, by name and version."""
        for versions in self._entries.values():
            yield from versions.values()

    def ready(self) -> Iterator[Servable]:
        """The models that can run."""
        return (entry.loaded.front for entry in self.entries() if entry.loaded is not None)

    def ready_of(self, name: str) -> Iterator[Servable]:
        """The versions of a model that can run."""
        return (entry.loaded.front for entry in self._entries.get(name, {}).values() if entry.loaded is not None)

    def loaded(self) -> list[Loaded]:
        """What serves now."""
        return [entry.loaded for entry in self.entries() if entry.loaded is not None]

    def dependents(self, name: str) -> set[str]:
        """The ensembles that a model is a step of."""
        return {loaded.name for loaded in self.loaded() if name in loaded.definition.members}

    def built_on(self, name: str) -> set[str]:
        """These, and the ensembles that they are steps of."""
        found = self.dependents(name)
        while more := {other for member in found for other in self.dependents(member)} - found:
            found |= more
        return found

    def ensembles(self) -> Iterator[Servable]:
        """Those of `working` that need others to finish what they have accepted."""
        return (loaded.front for loaded in (*self.loaded(), *self.leaving) if loaded.model is None)

    def working(self) -> Iterator[Servable]:
        """The models that can run, and those that have accepted requests to finish."""
        yield from self.ready()
        yield from [loaded.front for loaded in self.leaving]

    def unloaded(self) -> list[str]:
        """Models that were found and never loaded."""
        return sorted({source.name for source in self.sources} - self._entries.keys())

    def versions(self, name: str) -> list[str]:
        """The versions of a model that can run."""
        return [v for v, entry in self._entries.get(name, {}).items() if entry.loaded is not None]

    @property
    def has_failed(self) -> bool:
        """Whether something could not be loaded."""
        return any(
            entry.state is State.UNAVAILABLE and not entry.reason.startswith(UNLOADED) for entry in self.entries()
        )
