"""One model on several devices: who gets a request, and what they have in common."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infera_server.models.discovery import survey
from infera_server.models.placement import Place
from infera_server.models.replicas import Replicas
from infera_server.models.repository import Repository
from infera_server.settings import Settings
from tests.server.support import FakeDevice, FakeSession, Running, doubler, hosting, http_request, request_of, until
from tests.server.test_modelconfig import IO, put

X = np.ones((1, 4), np.float32)
GPUS = "max_batch_size: 4 instance_group [ { kind: KIND_GPU gpus: [0, 1] } ]" + IO


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeSession]:
    """By device, of what is loaded from now on."""
    made: dict[str, FakeSession] = {}

    def opened(path: Path, settings: Settings, *, place: Place) -> FakeSession:
        made[place.device] = session = doubler()
        session.device = FakeDevice(place.device)
        return session

    monkeypatch.setattr("infera_server.models.loader.open_session", opened)
    monkeypatch.setattr("infera_server.models.definition.gpu_count", lambda: 2)
    return made


@pytest.fixture
def running(tmp_path: Path, sessions: dict[str, FakeSession]) -> Iterator[Running]:
    put(tmp_path, "m", GPUS)
    with hosting(Repository(Settings(inline_run=0.0), survey([tmp_path]).sources)) as found:
        yield found


def ask(running: Running, statuses: list[int], **more: Any) -> threading.Thread:
    thread = threading.Thread(target=lambda: statuses.append(running.infer("m", request_of(X, **more))[0]))
    thread.start()
    return thread


def test_requests_go_to_who_has_the_least_to_do(running: Running, sessions: dict[str, FakeSession]) -> None:
    model = running.host.repository.get("m")
    assert isinstance(model, Replicas)
    assert (model.device, running.index()) == ("cuda:0, cuda:1", {"m/1": "READY"})
    one, other = sessions["cuda:0"], sessions["cuda:1"]
    one.block()
    other.block()
    statuses: list[int] = []
    threads = [ask(running, statuses), ask(running, statuses)]
    one.wait_entered()
    other.wait_entered()
    other.gate.set()
    until(lambda: len(statuses) == 1)
    for _ in range(4):
        assert running.infer("m", request_of(X))[0] == 200
    assert len(one.batches) == 1, "it is busy, and the other one is not"
    one.gate.set()
    for thread in threads:
        thread.join()
    for _ in range(4):
        assert running.infer("m", request_of(X))[0] == 200
    assert len(one.batches) > 1, "both are idle, and take turns"
    assert running.get("/v2/models/m/stats")[1]["model_stats"][0]["inference_stats"]["success"]["count"] == 10


def test_who_leaves_is_counted_no_more(running: Running, sessions: dict[str, FakeSession]) -> None:
    model = running.host.repository.get("m")
    assert isinstance(model, Replicas)
    for session in sessions.values():
        session.block()
    body = json.dumps(request_of(X)).encode()
    with ExitStack() as stack:
        for count in (1, 2, 3):
            stack.enter_context(running.connect()).sendall(http_request(body, "/v2/models/m/infer"))
            until(lambda c=count: sum(model._under_way) == c)  # type: ignore[misc]
        with running.connect() as leaving:
            leaving.sendall(http_request(body, "/v2/models/m/infer"))
            until(lambda: sum(model._under_way) == 4)
            assert model._under_way == [2, 2]
        until(lambda: sum(model._under_way) == 3)
        for session in sessions.values():
            session.gate.set()
        until(lambda: sum(model._under_way) == 0)
    assert not model._held


def test_an_unload_closes_all_of_them(running: Running, sessions: dict[str, FakeSession]) -> None:
    running.call(running.host.service.unload_model("m"))
    until(lambda: all(session.closed for session in sessions.values()))
    until(lambda: running.index() == {"m/1": "UNAVAILABLE: unloaded"})


def test_where_one_cannot_be_loaded_none_is(
    tmp_path: Path, sessions: dict[str, FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path, settings: Settings, *, place: Place) -> FakeSession:
        if place.device == "cuda:1":
            raise ValueError("no such thing")
        made = sessions[place.device] = doubler()
        return made

    monkeypatch.setattr("infera_server.models.loader.open_session", opened)
    put(tmp_path, "m", GPUS)
    repository = Repository(Settings(), survey([tmp_path]).sources)
    repository.load(lambda fn, arg: fn(arg))
    (entry,) = repository.entries()
    assert "no such thing" in entry.reason
    assert sessions["cuda:0"].closed
    assert set(repository.loader._placement._bytes.values()) == {0}
