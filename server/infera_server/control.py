"""Loading and unloading while the server runs."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

from infera_server.background import detached
from infera_server.codec import short
from infera_server.definition import Definition, NoVersionError, define
from infera_server.discovery import DiscoveryError, Source, Survey
from infera_server.errors import BadRequest, NotFound, Unavailable
from infera_server.loader import reason_of, return_memory
from infera_server.model import Model
from infera_server.modelconfig import ConfigError, from_json
from infera_server.overrides import from_files
from infera_server.repository import Repository, State

log = logging.getLogger(__name__)


class Control:
    """Changes what a repository serves, without losing a request. Used from the event loop's thread.

    What is loaded again replaces what serves once it is ready; a load that fails leaves that as it is. Operations on
    one model wait for each other.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Load a model as it is on the disk now, or with this configuration (in JSON) and these files in its place.

        Raises NotFound, BadRequest, or Unavailable during the start.
        """
        self._check_mode()
        async with self._turns[name]:
            definition = await self._define(name, config, files)
            if any(e.state is State.LOADING for e in self._repository.entries() if e.source.name == name):
                raise Unavailable(f"model '{name}' is still loading")
            self._repository.mark_loading(definition)
            models = await self._open(definition)
            self._repository.definitions[name] = definition
            self._replace(name, models)

    async def unload(self, name: str) -> None:
        """Take a model out of service; what it has accepted is finished after the return. Raises NotFound."""
        self._check_mode()
        async with self._turns[name]:
            if not any(entry.source.name == name for entry in self._repository.entries()):
                raise NotFound(f"Request for unknown model: '{short(name)}' is not found")
            self._replace(name, {})

    def _check_mode(self) -> None:
        if self._repository.settings.model_control != "explicit":
            raise Unavailable("explicit model load / unload is not allowed if polling is enabled")

    async def _define(self, name: str, config: str | None, files: Mapping[str, bytes] | None) -> Definition:
        unknown = f"failed to load '{short(name)}', failed to poll from model repository"
        if files and config is None:
            raise BadRequest(f"{unknown}: Load parameter 'config' must be specified for model file override")
        try:
            override = from_json(config, name) if config is not None else None
            if files:
                most = self._repository.settings.max_load_bytes
                return await detached("infera-files", partial(from_files, name, override, files, most))
            survey = await self._survey()
            if name in survey.problems:
                raise BadRequest(f"{unknown}: {survey.problems[name]}")
            sources = survey.of(name)
            if not sources:
                raise NotFound(unknown)
            return await detached("infera-define", partial(define, name, sources, override))
        except NoVersionError as error:
            raise BadRequest(f"load failed for model '{name}': {error}\n") from None
        except ConfigError as error:
            raise BadRequest(f"{unknown}: {error}") from None

    async def _survey(self) -> Survey:
        repository = self._repository
        if repository.rescan is None:
            return Survey(repository.sources, {})
        try:
            found = await detached("infera-survey", repository.rescan)
        except (DiscoveryError, OSError) as error:
            raise Unavailable(f"the model repository cannot be read: {error}") from None
        repository.sources = found.sources
        return found

    async def _open(self, definition: Definition) -> Mapping[Source, Model]:
        """All versions, or none of them. Raises BadRequest."""
        name, sources = definition.name, definition.sources
        post = asyncio.get_running_loop().call_soon_threadsafe
        opening = [partial(self._repository.loader.open, source, definition, post) for source in sources]
        results = await asyncio.gather(*(detached("infera-load", o) for o in opening), return_exceptions=True)
        failures = {s.version: reason_of(r) for s, r in zip(sources, results, strict=True) if isinstance(r, Exception)}
        models = {s: r for s, r in zip(sources, results, strict=True) if isinstance(r, Model)}
        if not failures:
            return models
        for model in models.values():
            self._start(self._let_go(model))
        others = {s.version: "another version could not be loaded" for s in models}
        self._repository.mark_failed(name, failures | others)
        reasons = "".join(f"version {v} is at UNAVAILABLE state: {reason};\n" for v, reason in failures.items())
        raise BadRequest(f"load failed for model '{name}': {reasons}")

    def _replace(self, name: str, models: Mapping[Source, Model]) -> None:
        for model in self._repository.put(name, models):
            self._start(self._let_go(model))

    async def _let_go(self, model: Model) -> None:
        """Wait for what a model has accepted, then give its memory back."""
        name, version = model.signature.name, model.signature.version
        model.drain()
        await detached("infera-unload", partial(self._repository.loader.close, model))
        self._repository.leaving.discard(model)
        del model
        await detached("infera-unload", return_memory)
        self._repository.mark_unloaded(name, version)
        log.info("unloaded model '%s' version %s", name, version)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
