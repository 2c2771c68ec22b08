"""What workers are told of a repository, and the repository that they make of it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import orjson

from infera_server.errors import BadRequest
from infera_server.models.definition import Definition
from infera_server.models.discovery import Source
from infera_server.models.evictions import Elsewhere
from infera_server.models.loaded import Loaded
from infera_server.models.repository import Entry, State
from infera_server.models.servable import Servable
from infera_server.models.traffic import Traffic
from infera_server.models.versions import Route
from infera_server.processes.front_wire import signature_out
from infera_server.processes.remote import Link, RemoteModel
from infera_server.service import Service

log = logging.getLogger(__name__)


class Numbers:
    """Numbers of models, and what is told of each. A number that is used no more stays unused."""

    def __init__(self) -> None:
        self.models: WeakValueDictionary[int, Servable] = WeakValueDictionary()
        self._known: WeakKeyDictionary[Servable, tuple[int, orjson.Fragment]] = WeakKeyDictionary()
        self._next = itertools.count(1)

    def of(self, model: Servable) -> tuple[int, orjson.Fragment]:
        """The model's number, from now on, and what it is."""
        if (found := self._known.get(model)) is None:
            found = self._known[model] = next(self._next), orjson.Fragment(orjson.dumps(_about(model)))
            self.models[found[0]] = model
        return found


def bulletin(service: Service, numbers: Numbers) -> dict[str, Any]:
    """What is served under which name, how far everything else is, and what else requests depend on."""
    repository = service.repository
    models: dict[int, orjson.Fragment] = {}

    def number_of(model: Servable) -> int:
        number, models[number] = found = numbers.of(model)
        return found[0]

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
    return {
        "entries": entries,
        "find": find,
        "models": list(models.items()),
        "labels": {
            name: dict(labels) for name in repository.definitions if (labels := repository.traffic_of(name).labels)
        },
        "evicted": service.control.evictions.told(),
        "regions": service.regions.told(),
        "tracing": service.tracing.on,
        "log": service.log_settings.settings(),
        "outage": service.why_not_ready,
    }


def _about(model: Servable) -> dict[str, Any]:
    config = model.config.SerializeToString(deterministic=True)
    return {
        "signature": signature_out(model.signature),
        "config": config.decode("latin-1"),
        "device": model.device,
    }


class Mirror:
    """Makes a service what the bulletins say. Models that none names any more are retired."""

    def __init__(self, service: Service, link: Link, evicted: Elsewhere) -> None:
        self._service, self._repository, self._link = service, service.repository, link
        self._evicted = evicted
        service.recall = evicted.recall
        self._models: dict[int, Loaded] = {}
        self._routes: dict[tuple[Sequence[int], Sequence[float]], Route] = {}
        self._log: Mapping[str, Any] = {}

    def read(self, told: Mapping[str, Any]) -> None:
        """This is so from now on."""
        service = self._service
        service.outage = told["outage"]
        self._evicted.told = told["evicted"]
        service.tracing.on = self._link.tells_runs = told["tracing"]
        try:
            service.regions.mirror(told["regions"])
        except BadRequest as error:
            log.warning("what is registered as shared memory is not to be had here: %s", error)
        if told["log"] != self._log:
            self._log = told["log"]
            service.log_settings.update({name: value for name, value in self._log.items() if name != "log_file"})
        self._read_models(told)

    def _read_models(self, told: Mapping[str, Any]) -> None:
        models = {number: self._models.get(number) or self._made(number, about) for number, about in told["models"]}
        gone = [loaded for number, loaded in self._models.items() if number not in models]
        for loaded in gone:
            loaded.front.retired = True
        entries = [
            Entry(Source(name, version, Path()), State(state), "", None if number is None else models[number])
            for name, version, state, number in told["entries"]
        ]
        find: dict[tuple[str, str | None], Servable] = {}
        routes: dict[tuple[Sequence[int], Sequence[float]], Route] = {}
        for name, version, numbers, weights in told["find"]:
            if not weights:
                find[name, version] = models[numbers[0]].front
                continue
            split = tuple(numbers), tuple(weights)
            if (route := self._routes.get(split)) is None:
                route = Route([models[n].front for n in numbers], weights)
            find[name, version] = routes[split] = route
        self._routes = routes
        leaving = {loaded for loaded in (*gone, *self._repository.leaving) if loaded.front.queued}
        self._models = models
        self._repository.traffic = {name: Traffic(labels) for name, labels in told["labels"].items()}
        self._repository.mirror(entries, find, leaving | set(models.values()))

    @property
    def fronts(self) -> Mapping[int, Servable]:
        """The models by number."""
        return {number: loaded.front for number, loaded in self._models.items()}

    def _made(self, number: int, about: Mapping[str, Any]) -> Loaded:
        model = RemoteModel(number, about, self._link)
        source = Source(model.signature.name, model.signature.version, Path())
        return Loaded(model, source, Definition(source.name, [source]))
