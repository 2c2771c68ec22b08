"""What the parts of a running server share."""

from __future__ import annotations

import asyncio
import itertools
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from infera_server.access import Access, Key
from infera_server.errors import BadRequest, NotFound, Unavailable
from infera_server.http.intake import Intake
from infera_server.http.recall import Heads
from infera_server.http.refusals import Refusals
from infera_server.http.templates import Templates
from infera_server.http.upload import Room, room
from infera_server.log_settings import LogSettings
from infera_server.models.control import Control
from infera_server.models.modelconfig import ConfigError
from infera_server.models.repository import Repository
from infera_server.models.servable import Servable
from infera_server.models.traffic import parse
from infera_server.settings import Settings
from infera_server.shared_memory import CLOSED_REGIONS, Regions
from infera_server.tracing import Tracing

if TYPE_CHECKING:
    from infera_server.http.connection import Connection

EXPIRY_PERIOD = 0.05
"""Seconds between looks for waiting requests whose deadline has passed."""

CONNECTION_TICKS = 4
"""Of these looks, every how manieth is at the connections too."""

SPARE_FILES = 64
"""File descriptors that are kept from connections: sockets that listen, models, libraries."""

DRAIN_PERIOD = 0.02
"""Seconds between looks for engine threads that have ended."""


@dataclass(eq=False)
class Service:
    """The repository behind the sockets, and whether it takes requests. Lives in one event loop."""

    settings: Settings
    repository: Repository
    access: Access = field(default_factory=Access)
    draining: bool = False
    connections: set[Connection] = field(default_factory=set, init=False)
    control: Control = field(init=False)
    recall: Callable[[str], Unavailable | None] = field(init=False)
    """Has a model loaded again that was evicted, and says what to tell who asks for it; None for others."""
    intake: Intake = field(init=False)
    log_settings: LogSettings = field(default_factory=LogSettings, init=False)
    regions: Regions = field(init=False)
    tracing: Tracing = field(init=False)
    max_connections: int = field(init=False)
    heads: Heads = field(default_factory=Heads, init=False)
    refusals: Refusals = field(default_factory=Refusals, init=False)
    templates: Templates = field(default_factory=Templates, init=False)
    streams: int = field(default=0, init=False)
    """WebSockets that are open."""
    room: Room = field(default_factory=lambda: room, init=False)
    """Where large bodies are received."""

    room_share: float = field(default=0.0, init=False)
    """The part of a large body that has to be there before `room` is asked for all of it."""

    outage: str = field(default="", init=False)
    """In a worker: why the engine is not ready; empty while it is."""

    metrics_port: int | None = field(default=None, init=False)
    """Where nothing but metrics is told."""

    def __post_init__(self) -> None:
        self.control = Control(self.repository)
        self.recall = self.control.evictions.recall
        self.intake = Intake(self.settings.max_intake_bytes)
        self.tracing = Tracing(self.settings.trace_file)
        self.regions = Regions(self.settings.max_region_bytes)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        spare = files // 2 if files < 2 * SPARE_FILES else files - SPARE_FILES
        self.max_connections = min(self.settings.max_connections, max(1, spare))

    def regions_for(self, key: Key | None) -> Regions:
        """The shared memory that a request may name which came with this key, or None where none are asked for."""
        return self.regions if key is None or key.management else CLOSED_REGIONS

    def model(self, name: str, version: str | None) -> Servable:
        """A model to send a request to. Raises NotFound, or Unavailable while loading or draining.

        One that was evicted is loaded again.
        """
        self._refuse_draining()
        try:
            return self.repository.get(name, version)
        except (NotFound, Unavailable) as error:
            raise self.recall(name) or error from None

    async def load_model(self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Load a model, or load it again, as its folder is now. What is served goes on until the new one can run.

        `config`, a ModelConfig in JSON, replaces the folder's; `files`, by path in the folder, replace all files.
        Raises NotFound, BadRequest with the reason where it cannot be loaded, or Unavailable.
        """
        self._refuse_draining()
        await self.control.load(name, config, files)
        await self.repository.audience.informed()

    async def refresh(self) -> None:
        """Look for models that were put there since: the index names those too."""
        with suppress(Unavailable):
            await self.control.survey()

    async def roll_back(self, name: str) -> None:
        """Serve what served before the last load of a model. Raises BadRequest where nothing is kept; Unavailable."""
        self._refuse_draining()
        await self.control.roll_back(name)
        await self.repository.audience.informed()

    def traffic(self, name: str) -> dict[str, Any]:
        """How requests for a model find a version, and what its shadow answered. Raises NotFound."""
        self.repository.get(name)
        shadows = [shadow.as_dict() for shadow in self.repository.serving.shadows(name)]
        return {**self.repository.traffic_of(name).as_dict(), "shadowed": shadows}

    def set_traffic(self, name: str, document: object) -> dict[str, Any]:
        """Set labels, split and shadow of a model, until the server ends.

        Raises NotFound, BadRequest, or Unavailable where nothing may change.
        """
        self._refuse_draining()
        self.control.check_changing()
        self.repository.get(name)
        try:
            traffic = parse(document)
        except ConfigError as error:
            raise BadRequest(str(error)) from None
        if missing := traffic.missing(self.repository.versions(name)):
            raise BadRequest(f"model '{name}' version {missing[0]} is not served")
        self.repository.set_traffic(name, traffic)
        return self.traffic(name)

    async def unload_model(self, name: str, dependents: bool = False) -> None:
        """Take a model out of service; what it has accepted is finished later. Raises NotFound or Unavailable.

        Ensembles that it is part of go with it; with `dependents` so do the models that it is made of.
        """
        self._refuse_draining()
        await self.control.unload(name, dependents)
        await self.repository.audience.informed()

    def _refuse_draining(self) -> None:
        if self.draining:
            raise Unavailable("the server is shutting down; send the request to another one")

    @property
    def ready(self) -> bool:
        return not self.why_not_ready

    @property
    def why_not_ready(self) -> str:
        """Empty where requests are taken, every model that could be loaded is, one at least was, and devices work."""
        if self.draining:
            return "the server is shutting down"
        if self.outage:
            return self.outage
        if not self.repository.is_settled:
            return "models are being loaded"
        if not any(self.repository.ready()) and any(self.repository.entries()):
            return "no model could be loaded" if self.repository.has_failed else "every model was unloaded"
        if self.repository.is_stuck:
            return "a run has kept a device for longer than a request may wait"
        return self.repository.lost

    async def expire(self) -> None:
        """Answer requests whose time is up while another batch runs, and end what clients let lie; for ever."""
        for tick in itertools.count():
            await asyncio.sleep(EXPIRY_PERIOD)
            self._expire_waiting()
            self.control.expire()
            if tick % CONNECTION_TICKS == 0:
                now = time.monotonic()
                for connection in list(self.connections):
                    connection.check_time(now)

    def _expire_waiting(self) -> None:
        for model in self.repository.working():  # not in `expire`, which would keep the last one from being freed
            model.expire()

    async def drain(self, deadline: float, forced: Callable[[], bool] = lambda: False) -> bool:
        """Refuse new requests and finish the accepted ones, at most until `deadline` or until `forced()`.

        Returns whether all were finished; those that were not are answered with Unavailable.
        """
        self.draining = True
        models = list(self.repository.working())
        while (
            any(model.queued for model in self.repository.ensembles()) and not forced() and time.monotonic() < deadline
        ):
            await asyncio.sleep(DRAIN_PERIOD)
        for model in models:
            model.drain()
        while not (finished := all(model.join(0) for model in models)):
            if forced() or time.monotonic() >= deadline:
                break
            await asyncio.sleep(DRAIN_PERIOD)
        for model in models:
            model.give_up(Unavailable("the server shut down before the run ended"))
        self.tracing.finish()
        await asyncio.sleep(0)  # replies were posted from other threads: let them be written
        return finished
