"""What a worker makes of what the engine tells."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson

from infera_server.models.discovery import Source
from infera_server.models.evictions import Elsewhere
from infera_server.models.repository import Repository
from infera_server.models.traffic import Traffic
from infera_server.processes.bulletin import Mirror, Numbers, bulletin
from infera_server.processes.remote import Link
from infera_server.service import Service
from infera_server.settings import Settings
from tests.server.support import doubler, hosting


async def told_by(service: Service) -> Any:
    return orjson.loads(orjson.dumps(bulletin(service, Numbers())))


def test_a_split_stays_the_same_until_it_is_another() -> None:
    """Its random numbers go on, and documents that are known for it stay known."""
    sources = [Source("m", version, Path("m.onnx")) for version in "12"]
    with hosting(Repository(Settings(), sources, opener=lambda path, _: doubler())) as running:
        running.host.repository.set_traffic("m", Traffic(split={"1": 0.5, "2": 0.5}))
        told = running.call(told_by(running.host.service))
    service = Service(Settings(), Repository(Settings(), []))
    mirror = Mirror(service, cast(Link, SimpleNamespace(tells_runs=False)), Elsewhere(lambda name: None))
    mirror.read(told)
    route = service.repository.get("m")
    mirror.read(copy.deepcopy(told))
    assert service.repository.get("m") is route
    other = copy.deepcopy(told)
    (split,) = (found for found in other["find"] if found[3])
    split[3] = [0.9, 0.1]
    mirror.read(other)
    assert service.repository.get("m") is not route
