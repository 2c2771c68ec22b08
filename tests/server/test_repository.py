"""Models are loaded and unloaded while the server runs."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from websockets.sync.client import connect

from infera_gpu.errors import ModelError
from infera_server.cli import catalogued
from infera_server.errors import BadRequest, NotFound, Unavailable
from infera_server.http import websocket
from infera_server.models.discovery import Source, discover, survey
from infera_server.models.repository import Repository
from infera_server.protocols import v2_rest
from infera_server.protocols.protos import message
from infera_server.settings import Settings
from tests.server.grpc_support import METHOD, channel
from tests.server.support import (
    WAIT,
    FakeSession,
    Running,
    doubler,
    hosting,
    http_request,
    read_reply,
    request_of,
    serving,
    until,
)
from tests.text import parse

X = np.ones((2, 4), np.float32)


@dataclass
class Opened:
    """A repository's opener: every load makes a new session, kept here by file name; `broken` cannot be loaded."""

    sessions: dict[str, list[FakeSession]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    gate: threading.Event | None = None

    def __call__(self, path: Path, settings: Settings) -> FakeSession:
        if self.gate is not None:
            assert self.gate.wait(WAIT)
        if path.stem in self.broken:
            raise ModelError(f"{path.stem}: not a model")
        session = doubler()
        self.sessions.setdefault(path.stem, []).append(session)
        return session


@contextmanager
def models(*names: str, **settings: Any) -> Iterator[tuple[Running, Opened]]:
    opened = Opened()
    sources = [Source(name, "1", Path(f"{name}.onnx")) for name in names]
    with hosting(Repository(Settings(**{"inline_run": 0.0} | settings), sources, opened)) as running:
        yield running, opened


def test_an_unloaded_model_is_refused_in_tritons_words_and_comes_back() -> None:
    with models("a", "b") as (running, opened):
        running.call(running.host.service.unload_model("a"))
        until(lambda: running.index()["a/1"] != "UNLOADING")
        assert running.index() == {"a/1": "UNAVAILABLE: unloaded", "b/1": "READY"}
        assert opened.sessions["a"][0].closed
        for path, status, text in (
            ("/v2/models/a", 404, "Request for unknown model: 'a' has no available versions"),
            ("/v2/models/a/versions/1", 503, "Request for unknown model: 'a' version 1 is not at ready state"),
        ):
            assert running.get(path) == (status, {"error": text})
        assert running.infer("a", request_of(X))[0] == 404
        assert running.infer("b", request_of(X))[0] == 200
        assert running.get("/v2/health/ready")[0] == 200
        running.call(running.host.service.load_model("a"))
        assert running.index()["a/1"] == "READY"
        assert running.infer("a", request_of(X))[1]["outputs"][0]["data"] == [2.0] * 8
        assert len(opened.sessions["a"]) == 2


def test_a_server_whose_models_were_all_unloaded_is_not_ready_and_lives_on() -> None:
    with models("a") as (running, _):
        running.call(running.host.service.unload_model("a"))
        assert running.get("/v2/health/ready") == (503, {"ready": False, "reason": "every model was unloaded"})
        running.call(running.host.service.load_model("a"))
        assert running.get("/v2/health/ready")[0] == 200


def test_an_unknown_model_can_neither_be_loaded_nor_unloaded() -> None:
    with models("a") as (running, _):
        service = running.host.service
        with pytest.raises(NotFound, match=r"^failed to load 'nope', failed to poll from model repository$"):
            running.call(service.load_model("nope"))
        with pytest.raises(NotFound, match="unknown model: 'nope'"):
            running.call(service.unload_model("nope"))


def test_what_was_accepted_before_the_unload_is_answered() -> None:
    with models("a", max_batch=1) as (running, opened):
        (session,) = opened.sessions["a"]
        session.block()
        replies: list[int] = []
        clients = [
            threading.Thread(target=lambda: replies.append(running.infer("a", request_of(X))[0])) for _ in range(3)
        ]
        for client in clients:
            client.start()
        session.wait_entered()
        model = running.host.repository.get("a")
        until(lambda: model.queued == 2)
        running.call(running.host.service.unload_model("a"))
        assert running.index()["a/1"] == "UNLOADING"
        assert running.infer("a", request_of(X))[0] == 404
        assert not session.closed
        session.gate.set()
        for client in clients:
            client.join()
        assert replies == [200] * 3
        until(lambda: session.closed)
        until(lambda: running.index()["a/1"] == "UNAVAILABLE: unloaded")


def test_a_request_that_arrives_around_a_reload_is_answered_by_the_new_session() -> None:
    body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
    with (
        models("a", keep_previous=0) as (running, opened),
        running.connect() as connection,
        connection.makefile("rb") as replies,
    ):
        head, rest = http_request(body, "/v2/models/a/infer")[:-20], body[-20:]
        connection.sendall(head)
        until(lambda: any(c.cycle is not None for c in running.host.service.connections))
        running.call(running.host.service.load_model("a"))
        until(lambda: opened.sessions["a"][0].closed)
        opened.sessions["a"][1].batches.clear()
        connection.sendall(rest)
        assert read_reply(replies)[0] == 200
        assert opened.sessions["a"][1].batches == [1]


def test_a_message_that_is_read_around_a_reload_is_answered_by_the_new_session(monkeypatch: pytest.MonkeyPatch) -> None:
    with models("a", keep_previous=0) as (running, opened):
        parse = v2_rest.parse

        def slow(*arguments: Any) -> Any:
            """Meanwhile the model is loaded again, and what served is gone."""
            found = parse(*arguments)
            running.call(running.host.service.load_model("a"))
            until(lambda: opened.sessions["a"][0].closed)
            return found

        monkeypatch.setattr(websocket, "INLINE_BYTES", 0)
        monkeypatch.setattr(v2_rest, "parse", slow)
        with connect(f"ws://{running.address}/v2/models/a/stream") as client:
            client.send(json.dumps(request_of(X)))
            assert json.loads(client.recv(WAIT))["outputs"][0]["data"] == [2.0] * X.size


def test_a_request_that_arrives_around_an_unload_is_refused_as_unknown() -> None:
    body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
    with models("a") as (running, _), running.connect() as connection, connection.makefile("rb") as replies:
        connection.sendall(http_request(body, "/v2/models/a/infer")[:-20])
        until(lambda: any(c.cycle is not None for c in running.host.service.connections))
        running.call(running.host.service.unload_model("a"))
        connection.sendall(body[-20:])
        status, _, reply = read_reply(replies)
        assert (status, b"no available versions" in reply) == (404, True)


def test_a_load_that_fails_leaves_what_serves() -> None:
    with models("a") as (running, opened):
        opened.broken.add("a")
        with pytest.raises(BadRequest) as error:
            running.call(running.host.service.load_model("a"))
        assert str(error.value) == "load failed for model 'a': version 1 is at UNAVAILABLE state: a: not a model;\n"
        assert running.infer("a", request_of(X))[0] == 200
        assert running.index() == {"a/1": "READY: a: not a model"}
        opened.broken.clear()
        running.call(running.host.service.load_model("a"))
        assert running.index() == {"a/1": "READY"}


def test_a_load_goes_on_when_who_asked_for_it_leaves() -> None:
    """Else the model would be loading for ever, and what is loaded nobody's."""
    with models("a", load_models=(), grpc_port=0) as (running, opened):
        opened.gate = threading.Event()
        asked = message("inference.RepositoryModelLoadRequest")(model_name="a").SerializeToString()
        with channel(running) as made:
            load = made.unary_unary(f"{METHOD}RepositoryModelLoad")
            leaving = load.future(asked)
            until(lambda: running.index() == {"a/1": "LOADING"})
            leaving.cancel()
            made.unary_unary(f"{METHOD}ServerLive")(b"", timeout=WAIT)  # by now the server knows
            opened.gate.set()
            until(lambda: running.index() == {"a/1": "READY"})
            load(asked, timeout=WAIT)
        assert running.infer("a", request_of(X))[0] == 200


def test_of_several_versions_all_are_loaded_or_none() -> None:
    opened = Opened()
    sources = [Source("m", v, Path(f"{v}.onnx")) for v in ("1", "2")]
    with hosting(Repository(Settings(), sources, opened)) as running:
        running.call(running.host.service.unload_model("m"))
        until(lambda: set(running.index().values()) == {"UNAVAILABLE: unloaded"})
        opened.broken.add("2")
        with pytest.raises(BadRequest, match="version 2 is at UNAVAILABLE state: 2: not a model"):
            running.call(running.host.service.load_model("m"))
        assert running.index() == {
            "m/1": "UNAVAILABLE: another version could not be loaded",
            "m/2": "UNAVAILABLE: 2: not a model",
        }
        until(lambda: opened.sessions["1"][1].closed)


def test_nothing_is_kept_of_names_that_only_requests_know() -> None:
    with models("a") as (running, opened):
        opened.broken.add("model")
        service, control = running.host.service, running.host.service.control
        for i in range(3):
            with pytest.raises(NotFound):
                running.call(service.load_model(f"nowhere{i}"))
            with pytest.raises(BadRequest, match="not a model"):
                running.call(service.load_model(f"sent{i}", "{}", {"file:1/model.onnx": b"abc"}))
            with pytest.raises(NotFound):
                running.call(service.unload_model(f"nowhere{i}"))
        assert running.index() == {"a/1": "READY"}
        assert not control._turns


def test_without_model_control_nothing_is_loaded_or_unloaded() -> None:
    with models("a", model_control="none") as (running, _):
        for work in (running.host.service.load_model("a"), running.host.service.unload_model("a")):
            with pytest.raises(Unavailable, match="nothing may change after the start"):
                running.call(work)


def test_nothing_is_changed_while_the_server_drains() -> None:
    with serving({"double": doubler()}) as running:
        running.host.service.draining = True
        for work in (running.host.service.load_model("double"), running.host.service.unload_model("double")):
            with pytest.raises(Unavailable, match="shutting down"):
                running.call(work)


def test_a_model_that_was_put_there_meanwhile_can_be_loaded(tmp_path: Path) -> None:
    identity = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }")
    onnx.save(identity, tmp_path / "a.onnx")
    found = survey([tmp_path])
    with hosting(Repository(Settings(), found.sources, rescan=lambda: survey([tmp_path]))) as running:
        onnx.save(identity, tmp_path / "b.onnx")
        onnx.save(identity, tmp_path / "c.onnx")
        running.call(running.host.service.load_model("b"))
        assert running.index() == {"a/1": "READY", "b/1": "READY", "c/": ""}
        onnx.save(identity, tmp_path / "d.onnx")
        assert running.index()["d/"] == ""
        assert running.infer("b", request_of(X))[1]["outputs"][0]["data"] == [1.0] * 8


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def gave_back(full: int, nbytes: int) -> bool:
    """Whether nearly so many bytes are there no more; what ran last may still be looking at them for a moment."""
    return full - resident() > 0.9 * nbytes


def test_an_unload_gives_the_memory_back_to_the_system(tmp_path: Path) -> None:
    wide = 1 << 12
    weights = onnx.numpy_helper.from_array(np.ones((wide, wide), np.float32), "w")
    model = parse(f"g (float[N, {wide}] x) => (float[N, {wide}] y) {{ y = MatMul(x, w) }}")
    model.graph.initializer.append(weights)
    onnx.save(model, tmp_path / "big.onnx")
    del model, weights
    found = survey([tmp_path])
    with hosting(Repository(Settings(), found.sources)) as running:
        document = request_of(np.ones((1, wide), np.float32))
        for _ in range(3):
            assert running.infer("big", document)[1]["outputs"][0]["data"][0] == wide
            full = resident()
            running.call(running.host.service.unload_model("big"))
            until(lambda: running.index()["big/1"] == "UNAVAILABLE: unloaded")
            until(partial(gave_back, full, 4 * wide * wide))
            running.call(running.host.service.load_model("big"))


def test_a_name_of_the_catalogue_is_served_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(parse("g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }"), tmp_path / "model.onnx")
    monkeypatch.setattr("infera_server.cli.locate", lambda name: tmp_path / "model.onnx")
    assert catalogued([Path("magika"), tmp_path, Path("nope")]) == {Path("magika"): tmp_path / "model.onnx"}
    (source,) = discover([tmp_path / "model.onnx"], {tmp_path / "model.onnx": "magika"}).sources
    assert (source.name, source.path) == ("magika", tmp_path / "model.onnx")


def test_only_the_models_that_are_named_are_loaded_at_start(tmp_path: Path) -> None:
    for name in ("a", "b"):
        onnx.save(parse("g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }"), tmp_path / f"{name}.onnx")
    for wanted, states in ((("a",), {"a/1": "READY", "b/": ""}), ((), {"a/": "", "b/": ""})):
        repository = Repository(Settings(load_models=wanted), survey([tmp_path]).sources)
        with hosting(repository) as running:
            assert running.index() == states
            assert running.get("/v2/health/ready")[0] == 200
            running.call(running.host.service.load_model("b"))
            assert running.index()["b/1"] == "READY"
