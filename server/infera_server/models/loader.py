"""How a file becomes a model that can run: its place, its turn, its session."""

from __future__ import annotations

import atexit
import ctypes
import gc
import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

from infera_gpu.errors import InferaError, OutOfMemoryError
from infera_server.metrics import ModelStats
from infera_server.models.definition import Definition
from infera_server.models.discovery import Source
from infera_server.models.limited import limited
from infera_server.models.loaded import Loaded
from infera_server.models.model import Model, Opener, Post, open_isolated, open_model, open_session
from infera_server.models.modelconfig import ConfigError
from infera_server.models.placement import Place, Placement
from infera_server.models.replicas import Replicas
from infera_server.models.room import HostRoom, NoRoomError, planned_bytes
from infera_server.models.servable import Front
from infera_server.pipelines.answers import ResponseCache
from infera_server.pipelines.ensemble import Lookup
from infera_server.pipelines.ensembles import build
from infera_server.pipelines.fronts import before, cached
from infera_server.scheduling.rows import Arrays
from infera_server.scheduling.turns import Turns
from infera_server.settings import Settings


class Loader:
    """Opens models and lets go of them. Safe to use from several threads.

    `opener` is how a file becomes a session; None is the runtime, at the place that the settings give. `lookup` finds
    the models of ensembles.
    """

    def __init__(self, settings: Settings, lookup: Lookup, opener: Opener | None = None) -> None:
        self.settings = settings
        self._lookup = lookup
        self._opener = opener
        self._cache = ResponseCache(size) if (size := settings.response_cache_bytes) else None
        self._placement = Placement(settings.device, settings.vram_limit, settings.pins)
        self._turns: defaultdict[str, Turns] = defaultdict(Turns)
        self._room = HostRoom(settings.memory_limit) if settings.memory_limit else None
        self._counts: WeakKeyDictionary[Loaded, int] = WeakKeyDictionary()
        self._places: WeakKeyDictionary[Loaded, Sequence[Place]] = WeakKeyDictionary()
        self._guard = threading.Lock()

    def open(self, source: Source, definition: Definition, post: Post) -> Loaded:
        """A model that takes requests. `post(fn, arg)` must call `fn(arg)` in the event loop's thread.

        Raises NoRoomError where memory is short, and whatever loading raises; `reason_of` says it in words.
        """
        if definition.is_ensemble:
            timeout = self.settings.request_timeout
            ensemble = build(source.name, source.version, definition.config, self._lookup, timeout, definition.labels)
            return Loaded(cached(ensemble, definition, self._cache), source, definition)
        if self._opener is not None:
            return self._counted(self._joined([self._open(source, definition, self._opener, post)], source, definition))
        places: list[Place] = []
        parts: list[tuple[Model, Front]] = []
        try:
            for device in definition.devices(self.settings) or (None,):
                place = self._placement.take(source.name, _size(source.path), device)
                places.append(place)
                opener = (
                    partial(open_isolated, place=place, name=source.name)
                    if self.settings.isolate
                    else partial(open_session, place=place)
                )
                stats = parts[0][0].stats if parts else None
                parts.append(self._open(source, definition, opener, post, stats))
            joined, parts = self._joined(parts, source, definition), []
            loaded = self._counted(joined)
        except BaseException as error:
            for _, front in parts:
                front.close()
            for place in places:
                self._placement.give_back(place)
            if isinstance(error, OutOfMemoryError):
                raise NoRoomError(error, place.device) from None
            raise
        with self._guard:
            self._places[loaded] = places
        return loaded

    def _joined(self, parts: Sequence[tuple[Model, Front]], source: Source, definition: Definition) -> Loaded:
        """The version, which runs on one device or several. Raises ConfigError."""
        fronts = [front for _, front in parts]
        front = cached(fronts[0] if len(fronts) == 1 else Replicas(fronts), definition, self._cache)
        devices = [model.device for model, _ in parts]
        notes = limited(definition.config, self.settings, source.name, devices)
        return Loaded(front, source, definition, parts[0][0], notes)

    def _counted(self, loaded: Loaded) -> Loaded:
        """The version, where there is room for it. Raises NoRoomError."""
        if self._room is not None and loaded.device == "cpu" and loaded.model is not None:
            nbytes = planned_bytes(loaded.model)
            try:
                self._room.take(loaded.name, nbytes)
            except NoRoomError:
                loaded.front.close()
                raise
            with self._guard:
                self._counts[loaded] = nbytes
        return loaded

    def _open(
        self, source: Source, definition: Definition, opener: Opener, post: Post, stats: ModelStats | None = None
    ) -> tuple[Model, Front]:
        """A model, and what stands before it."""
        model = open_model(
            source.name,
            source.version,
            source.path,
            definition.tuned(self.settings),
            post=post,
            turns_of=self._turns_of,
            opener=opener,
            definition=definition,
            stats=stats,
        )
        try:
            return model, before(model, definition, self.settings)
        except BaseException:
            model.close()
            raise

    def run(self, model: Model, feeds: Arrays) -> Arrays:
        """Run a model that does not serve yet, when it is its turn on the device. Raises what the run raises."""
        with self._turns_of(model.device):
            return model.session.run(feeds)

    def close(self, loaded: Loaded) -> None:
        """Wait for a model's accepted requests, as long as they may take, and let go of its device.

        Its memory is free once nobody knows the model any more: `return_memory` gives it back to the system.
        """
        loaded.front.join(self.settings.request_timeout)
        loaded.front.close()
        with self._guard:
            places, counted = self._places.pop(loaded, ()), self._counts.pop(loaded, 0)
        if self._room is not None:
            self._room.give_back(counted)
        for place in places:
            self._placement.give_back(place)

    def _turns_of(self, device: str) -> Turns:
        with self._guard:
            return self._turns[device]

    @property
    def is_stuck(self) -> bool:
        """Whether a run has kept a device for longer than a request may wait."""
        with self._guard:
            return any(turns.held_for() > self.settings.request_timeout for turns in self._turns.values())


def reason_of(error: Exception) -> str:
    """What went wrong with a load, for the index."""
    return str(error) if isinstance(error, InferaError | ConfigError) else f"{type(error).__name__}: {error}"


def settle() -> None:
    """Free what is garbage, and look at what is left no more: a collection while requests are answered would take as
    long as there are objects of models."""
    gc.collect()
    gc.freeze()


atexit.register(gc.unfreeze)  # libraries complain of what is never freed: Triton's does, in thirty lines


def return_memory() -> None:
    """Give freed memory back to the system, which glibc else keeps for the next allocation."""
    gc.unfreeze()
    settle()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.iterdir() if f.is_file()) if path.is_dir() else path.stat().st_size
