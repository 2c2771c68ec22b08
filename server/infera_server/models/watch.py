"""Loads what changes on the disk, once it has stopped changing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from infera_server.errors import RequestError
from infera_server.models.background import detached
from infera_server.models.control import Control
from infera_server.models.definition import define
from infera_server.models.discovery import Source, Stamp, Survey, stamp
from infera_server.models.modelconfig import ConfigError
from infera_server.models.repository import Repository

log = logging.getLogger(__name__)


class Watch:
    """Looks at the repository's files again and again.

    A model whose files are as they were at the last look, and not as they were when it was loaded, is loaded; one that
    cannot be is served as before, and the index says why. A model that was gone at two looks is unloaded.
    """

    def __init__(self, repository: Repository, control: Control) -> None:
        self._repository, self._control = repository, control
        self._acted_on = _stamps(Survey(repository.sources, {}))
        self._seen: dict[str, Stamp] = {}
        self._missing: set[str] = set()
        self._unservable = {*repository.problems}

    async def run(self) -> None:
        """Look every `poll_interval` seconds; for ever."""
        while True:
            await asyncio.sleep(self._repository.settings.poll_interval)
            if self._repository.is_settled:
                try:
                    await self.look()
                except RequestError as error:
                    log.warning("%s", error)
                except Exception:
                    log.exception("the model repository could not be looked at; it is looked at again")

    async def look(self) -> None:
        """Act on what has changed since the last look but one. Raises Unavailable where nothing can be read."""
        survey = await self._control.survey()
        stamps = await detached("infera-watch", partial(_stamps, survey))
        for name, problem in survey.problems.items():
            known = self._repository.generation(name) is not None
            self._repository.note_problem(name, [] if known else [problem.source], problem.reason)
        for name in self._unservable - survey.problems.keys() - stamps.keys():
            self._repository.forget_failed(name)
        self._unservable = {*survey.problems}
        for name, now in stamps.items():
            if now != self._acted_on.get(name) and now == self._seen.get(name):
                self._acted_on[name] = now
                await self._load(name, survey.of(name))
        missing = self._acted_on.keys() - stamps.keys() - survey.problems.keys()
        for name in missing & self._missing:
            del self._acted_on[name]
            if not self._repository.settings.keep_deleted:
                log.info("model '%s' is no longer there", name)
                self._control.take_out(name)
        self._seen, self._missing = stamps, set(missing)

    async def _load(self, name: str, sources: Sequence[Source]) -> None:
        try:
            definition = await detached("infera-define", partial(define, name, sources))
            await self._control.load_changed(definition)
        except ConfigError as error:
            self._repository.note_problem(name, sources, str(error))
            self._tell(name, error)
        except RequestError as error:
            self._tell(name, error)

    def _tell(self, name: str, error: Exception) -> None:
        serves = self._repository.generation(name) is not None
        log.warning("model '%s' is not loaded%s: %s", name, ", what served goes on" if serves else "", error)


def _stamps(survey: Survey) -> dict[str, Stamp]:
    """The files of every model, by name."""
    found: dict[str, Stamp] = {}
    for source in survey.sources:
        files = stamp(source.path if source.folder is None else source.folder)
        found[source.name] = found.get(source.name, frozenset()) | files
    return found
