"""Loading, unloading and going back while the server runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from infera_server.codec import short
from infera_server.errors import BadRequest, NotFound, Unavailable
from infera_server.models.background import detached
from infera_server.models.definition import Definition
from infera_server.models.discovery import Source, Survey
from infera_server.models.evictions import Evictions, least_used
from infera_server.models.golden import running
from infera_server.models.loaded import Generation, Loaded
from infera_server.models.loader import reason_of, return_memory
from infera_server.models.overrides import requested
from infera_server.models.repository import KEPT, UNLOADED, Repository, State
from infera_server.models.room import NoRoomError

log = logging.getLogger(__name__)


class Control:
    """Changes what a repository serves, without losing a request. Used from the event loop's thread.

    What is loaded again replaces what serves once it is ready, all versions at once; a load that fails leaves that as
    it is. What served before is kept for a rollback, for as long as the settings say. Operations on one model wait for
    each other.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._settings = repository.settings
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading: set[asyncio.Task[None]] = set()
        self.evictions = Evictions(self._bring_back)

    async def load(self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Load a model as it is on the disk now, or with this configuration (in JSON) and these files in its place.

        Raises NotFound, BadRequest, or Unavailable during the start.
        """
        self._check_mode()
        loading = asyncio.get_running_loop().create_task(self._load_whole(name, config, files, set()))
        self._loading.add(loading)
        loading.add_done_callback(self._loading.discard)
        try:
            await asyncio.shield(loading)  # who asked may leave: what is half loaded would be nobody's
        except BadRequest as error:
            log.warning("model '%s' is not loaded: %s", short(name), error)
            raise

    async def _load_whole(
        self, name: str, config: str | None, files: Mapping[str, bytes] | None, tried: set[str]
    ) -> None:
        """Load a model; of an ensemble the models that are not served first, each of which is `tried` once."""
        tried.add(name)
        while True:
            async with self._turn(name):
                definition = await requested(name, config, files, self._settings.max_load_bytes, self.survey)
                missing = [m for m in definition.members if m not in tried and not self._repository.versions(m)]
                if not missing:
                    await self._load(definition)
                    return
            with suppress(BadRequest, NotFound):  # the ensemble says it
                await self._load_whole(missing[0], None, None, tried)

    async def _bring_back(self, definition: Definition) -> None:
        """Serve what was evicted, and of an ensemble its models. Raises BadRequest or Unavailable."""
        for member in definition.members:
            if (evicted := self.evictions.definition(member)) is not None:
                await self._bring_back(evicted)
        async with self._turn(definition.name):
            if not self._repository.versions(definition.name):
                await self._load(definition)

    async def load_changed(self, definition: Definition) -> None:
        """Load the versions of a model that are not served as they are there. Raises as `load`."""
        async with self._turn(definition.name):
            await self._load(definition, reuse=True)

    async def unload(self, name: str, dependents: bool = False) -> None:
        """Take a model out of service; what it has accepted is finished after the return. Raises NotFound.

        With `dependents` the models that an ensemble is made of go with it.
        """
        self._check_mode()
        async with self._turn(name):
            members = self._repository.definitions[name].members if name in self._repository.definitions else ()
            self.take_out(name)
        for member in members if dependents else ():
            with suppress(NotFound):
                await self.unload(member, dependents)

    def take_out(self, name: str) -> None:
        """`unload`, whoever may. Raises NotFound."""
        if not any(entry.source.name == name for entry in self._repository.entries()):
            raise NotFound(f"Request for unknown model: '{short(name)}' is not found")
        self.evictions.forget(name)
        self._take_out(name, UNLOADED)

    def _take_out(self, name: str, reason: str) -> None:
        before = self._repository.generation(name)
        if before is None:
            return
        self._serve(Generation(before.definition, {}), keep=False, reason=reason)
        for other in self._repository.dependents(name):
            self._take_out(other, UNLOADED)

    def _evict(self, name: str, reason: str) -> None:
        """Take a model out of service until somebody asks for it, and its ensembles with it."""
        gone = {name, *self._repository.built_on(name)}
        definitions = [self._repository.definitions[one] for one in gone]
        self._take_out(name, reason)
        for definition in definitions:
            self.evictions.add(definition)

    def _withdraw(self, loaded: Loaded, reason: str) -> None:
        """Serve the other versions of a model, where there are any."""
        before = self._repository.generation(loaded.name)
        others = {s: m for s, m in before.models.items() if m is not loaded} if before else {}
        if before is not None and others:
            self._serve(Generation(before.definition, others), keep=False, reason=reason)
        else:
            self._take_out(loaded.name, reason)

    async def roll_back(self, name: str) -> None:
        """Serve what served before the last load, which in turn is kept.

        Raises BadRequest where nothing was kept, or Unavailable where nothing may change.
        """
        self.check_changing()
        async with self._turn(name):
            before = self._repository.previous.get(name)
            if before is None:
                raise BadRequest(f"model '{short(name)}' has nothing to go back to: no earlier load of it is kept")
            self._serve(before, keep=True)
            log.info("model '%s' is rolled back to version %s", name, ", ".join(s.version for s in before.models))

    def expire(self) -> None:
        """Let go of what was kept for a rollback long enough, and of models whose engine processes are given up."""
        if self._settings.isolate:
            for loaded in self._repository.loaded():
                if loaded.front.lost:
                    self._withdraw(loaded, loaded.front.lost)
        for name, kept in list(self._repository.previous.items()):
            if time.monotonic() >= kept.until:
                self._forget_previous(name)

    async def survey(self) -> Survey:
        """Look for models again. Raises Unavailable."""
        repository = self._repository
        if repository.rescan is None:
            return Survey(repository.sources, {})
        try:
            found = await detached("infera-survey", repository.rescan)
        except OSError as error:
            raise Unavailable(f"the model repository cannot be read: {error}") from None
        repository.sources = found.sources
        return found

    def check_changing(self) -> None:
        """Raises Unavailable where nothing may change after the start."""
        if self._settings.model_control == "none":
            raise Unavailable("nothing may change after the start: the server runs with --model-control none")

    def _turn(self, name: str) -> asyncio.Lock:
        """The lock of a model's operations, which is kept while one has it or waits for it."""
        if (turn := self._turns.get(name)) is None:
            turn = self._turns[name] = asyncio.Lock()
        return turn

    def _check_mode(self) -> None:
        self.check_changing()
        if self._settings.model_control != "explicit":
            raise Unavailable("explicit model load / unload is not allowed if polling is enabled")

    # --- loading ---------------------------------------------------------------------------------------------------

    async def _load(self, definition: Definition, reuse: bool = False) -> None:
        name = definition.name
        if any(e.state is State.LOADING for e in self._repository.entries() if e.source.name == name):
            raise Unavailable(f"model '{name}' is still loading")
        before = self._repository.generation(name)
        kept = {
            source: model
            for source in definition.sources
            for old, model in (before.models.items() if before and reuse else ())
            if old.version == source.version and definition.is_unchanged(source.version, model.definition)
        }
        new = [source for source in definition.sources if source not in kept]
        if before and not new and len(kept) == len(before.models):
            self._repository.put(Generation(definition, kept))  # it may say otherwise how requests are spread
            _tell_notes(definition, kept)
            return
        self._repository.mark_loading(name, new)
        began = time.monotonic()
        opened = await self._open(definition, new)
        found = {source: kept.get(source) or opened[source] for source in definition.sources}
        self.evictions.took[name] = time.monotonic() - began
        self._serve(Generation(definition, found), keep=self._settings.keep_previous > 0)
        log.info("loaded model '%s' version %s", name, ", ".join(source.version for source in definition.sources))
        _tell_notes(definition, found)

    async def _open(self, definition: Definition, sources: list[Source]) -> Mapping[Source, Loaded]:
        """All of these versions, or none of them. Raises BadRequest."""
        name = definition.name
        opening = [self._open_version(source, definition) for source in sources]
        results = await asyncio.gather(*opening, return_exceptions=True)
        failures = {s.version: reason_of(r) for s, r in zip(sources, results, strict=True) if isinstance(r, Exception)}
        models = {s: r for s, r in zip(sources, results, strict=True) if isinstance(r, Loaded)}
        newest = definition.sources[-1]
        if not failures and newest in models and (difference := await self._compare(models[newest])):
            failures = {newest.version: difference}
        if not failures:
            return models
        for model in models.values():
            self._start(self._let_go(model, served=False))
        others = {s.version: "another version could not be loaded" for s in models if s.version not in failures}
        self._repository.mark_failed(name, failures | others)
        if not any(source.name == name for source in self._repository.sources):
            self._repository.forget_failed(name)  # a name that only this request knows
        reasons = "".join(f"version {v} is at UNAVAILABLE state: {reason};\n" for v, reason in failures.items())
        raise BadRequest(f"load failed for model '{name}': {reasons}")

    async def _open_version(self, source: Source, definition: Definition) -> Loaded:
        """Load a version, making room for it where it does not fit. Raises whatever loading raises."""
        post = asyncio.get_running_loop().call_soon_threadsafe
        while True:
            try:
                return await detached("infera-load", partial(self._repository.loader.open, source, definition, post))
            except NoRoomError as error:
                if error.hopeless or not await self._make_room(definition.name, error):
                    raise

    async def _make_room(self, name: str, error: NoRoomError) -> bool:
        """Let go of what is only kept for a rollback, else of the least recently used model. Returns whether of any."""
        repository = self._repository
        if self._tasks:  # others are on their way out already
            await asyncio.wait(tuple(self._tasks))
            return True
        kept = (n for n, g in repository.previous.items() if any(map(error.concerns, g.models.values())))
        if before := next(kept, None):
            self._forget_previous(before)
        elif self._settings.evict and (victim := self._victim(name, error)):
            idle = time.time() - victim.used_at / 1e3
            log.warning("model '%s', last used %.1f s ago, is unloaded to make room: %s", victim.name, idle, error)
            self._evict(victim.name, f"{UNLOADED}: evicted to make room for '{name}'")
            del victim  # or its memory would not be free
        else:
            return False
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        return True

    def _victim(self, name: str, error: NoRoomError) -> Loaded | None:
        """The model to go for `name`, by least recent use; pinned ones stay."""
        pinned = {name, *self._settings.pinned}
        models = [
            model
            for model in self._repository.loaded()
            if error.concerns(model) and model.name not in pinned and not self._repository.traffic_of(model.name).pinned
        ]
        return least_used(models, idle=self.evictions.is_wanted(name))

    async def _compare(self, loaded: Loaded) -> str:
        """How a model's answers differ from those kept of live traffic; empty where they do not, or none were kept."""
        golden = self._repository.serving.golden.get(loaded.name)
        if not golden:
            return ""
        rule = (self._repository.traffic.get(loaded.name) or loaded.definition.traffic).golden
        tolerance = self._settings.golden_tolerance if rule.tolerance is None else rule.tolerance
        model = loaded.model  # None: an ensemble, which runs by requests to its models
        run = running(loaded.front) if model is None else partial(self._repository.loader.run, model)
        try:
            return await detached("infera-golden", partial(golden.difference, run, tolerance))
        except Exception as error:
            return f"a golden request failed: {reason_of(error)}"

    # --- serving ---------------------------------------------------------------------------------------------------

    def _serve(self, generation: Generation, keep: bool, reason: str = UNLOADED) -> None:
        """Serve these versions and no others; with `keep`, what served before can be gone back to."""
        name, repository = generation.definition.name, self._repository
        before = repository.generation(name)
        if repository.previous.get(name) is generation:
            del repository.previous[name]
        gone = repository.put(generation)
        if generation.models:
            self.evictions.forget(name)
        self._forget_previous(name, before)
        if keep and before is not None:
            repository.previous[name] = replace(before, until=time.monotonic() + self._settings.keep_previous)
            for model in gone:
                repository.mark_unloaded(name, model.version, KEPT)
        else:
            for model in gone:
                self._start(self._let_go(model, reason))

    def _forget_previous(self, name: str, spared: Generation | None = None) -> None:
        """Let go of what only a rollback would need."""
        kept, now = self._repository.previous.pop(name, None), self._repository.generation(name)
        needed = {model for generation in (now, spared) if generation for model in generation.models.values()}
        for model in kept.models.values() if kept else ():
            if model not in needed:
                self._start(self._let_go(model))

    async def _let_go(self, model: Loaded, reason: str = UNLOADED, served: bool = True) -> None:
        """Wait for what a model has accepted, if it ever `served`, then give its memory back."""
        name, version = model.name, model.version
        await self._repository.audience.informed()
        model.front.drain()
        await detached("infera-unload", partial(self._repository.loader.close, model))
        self._repository.leaving.discard(model)
        del model
        await detached("infera-unload", return_memory)
        self._repository.mark_unloaded(name, version, reason)
        now = self._repository.generation(name)
        if not served:
            log.info("model '%s': version %s as it was loaded in vain is let go", name, version)
        elif now is not None and now.models:
            log.info("model '%s': what served as version %s before is unloaded", name, version)
        else:
            log.info("unloaded model '%s' version %s", name, version)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _tell_notes(definition: Definition, models: Mapping[Source, Loaded]) -> None:
    """Log what has no effect of what a model asks for; its versions ask for the same."""
    for note in models[definition.sources[-1]].notes:
        log.warning("model '%s': ignored: %s", definition.name, note)
