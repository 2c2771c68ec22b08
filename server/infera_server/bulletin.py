"""What workers are told of a repository, and the repository that they make of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from infera_server.definition import Definition
from infera_server.discovery import Source
from infera_server.front_wire import signature_out
from infera_server.loaded import Loaded
from infera_server.remote import Link, RemoteModel
from infera_server.repository import Entry, Repository, State
from infera_server.servable import Servable
from infera_server.versions import Route


class Numbers:
    """Numbers of models. One that is used no more stays unused."""

    def __init__(self) -> None:
        self.models: WeakValueDictionary[int, Servable] = WeakValueDictionary()
        self._numbers: WeakKeyDictionary[Servable, int] = WeakKeyDictionary()
        self._next = itertools.count(1)

    def of(self, model: Servable) -> int:
        """The model's number, from now on."""
        if (number := self._numbers.get(model)) is None:
            number = self._numbers[model] = next(self._next)
            self.models[number] = model
        return number


def bulletin(repository: Repository, numbers: Numbers) -> dict[str, Any]:
    """What is served under which name, and how far everything else is."""
    models: dict[int, Servable] = {}

    def number_of(model: Servable) -> int:
        models[number := numbers.of(model)] = model
        return number

    entries = [
        [e.source.name, e.source.version, e.state.value, number_of(e.loaded.front) if e.loaded is not None else None]
        for e in repository.entries()
    ]
    find = [
        [name, version, [number_of(m) for m in model.models], list(model.weights)]
        if isinstance(model, Route)
        else [name, version, [number_of(model)], []]
        for (name, version), model in list(repository.serving.find.items())
    ]
    return {"entries": entries, "find": find, "models": [[n, _about(m)] for n, m in models.items()]}


def _about(model: Servable) -> dict[str, Any]:
    config = model.config.SerializeToString(deterministic=True)
    return {
        "signature": signature_out(model.signature),
        "config": config.decode("latin-1"),
        "device": model.device,
    }


class Mirror:
    """Makes a repository what the bulletins say. Models that none names any more are retired."""

    def __init__(self, repository: Repository, link: Link) -> None:
        self._repository, self._link = repository, link
        self._models: dict[int, Loaded] = {}

    def read(self, told: Mapping[str, Any]) -> None:
        """This is so from now on."""
        models = {number: self._models.get(number) or self._made(number, about) for number, about in told["models"]}
        gone = [loaded for number, loaded in self._models.items() if number not in models]
        for loaded in gone:
            loaded.front.retired = True
        entries = [
            Entry(Source(name, version, Path()), State(state), "", None if number is None else models[number])
            for name, version, state, number in told["entries"]
        ]
        find: dict[tuple[str, str | None], Servable] = {
            (name, version): Route([models[n].front for n in numbers], weights) if weights else models[numbers[0]].front
            for name, version, numbers, weights in told["find"]
        }
        leaving = {loaded for loaded in (*gone, *self._repository.leaving) if loaded.front.queued}
        self._models = models
        self._repository.mirror(entries, find, leaving | set(models.values()))

    @property
    def fronts(self) -> Mapping[int, Servable]:
        """The models by number."""
        return {number: loaded.front for number, loaded in self._models.items()}

    def _made(self, number: int, about: Mapping[str, Any]) -> Loaded:
        model = RemoteModel(number, about, self._link)
        source = Source(model.signature.name, model.signature.version, Path())
        return Loaded(model, source, Definition(source.name, [source]))
