"""All models have a budget of memory together: what does not fit is refused with the figures, or evicts another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest

from infera_gpu.errors import OutOfMemoryError
from infera_server.errors import BadRequest
from infera_server.models import evictions
from infera_server.models.discovery import survey
from infera_server.models.evictions import PAUSE
from infera_server.models.repository import Repository
from infera_server.models.room import NoRoomError
from infera_server.settings import Settings
from tests.server.grpc_support import array_of, channel, infer, request, status_of
from tests.server.support import Running, hosting, request_of, until
from tests.text import parse

WIDE = 64
WEIGHTS = 4 * WIDE * WIDE


def put(root: Path, *names: str, wide: int = WIDE) -> None:
    """Models with `wide` squared weights."""
    for name in names:
        model = parse(f"g (float[N, {wide}] x) => (float[N, {wide}] y) {{ y = MatMul(x, w) }}")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((wide, wide), np.float32), "w"))
        onnx.save(model, root / f"{name}.onnx")


@contextmanager
def served(root: Path, **settings: Any) -> Iterator[Running]:
    chosen = Settings(**{"max_batch": 1, "keep_previous": 0.0, **settings})
    with hosting(Repository(chosen, survey([root]).sources, rescan=lambda: survey([root]))) as running:
        yield running


@contextmanager
def monkeypatched(**constants: float) -> Iterator[None]:
    """With other constants of `evictions`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(evictions, name, value)
        yield


def load(running: Running, name: str) -> None:
    running.call(running.host.service.load_model(name))


def ask(running: Running, name: str, wide: int = WIDE) -> int:
    return running.infer(name, request_of(np.ones((1, wide), np.float32)))[0]


def test_a_load_that_does_not_fit_is_refused_with_the_figures(tmp_path: Path) -> None:
    put(tmp_path, "a")
    with served(tmp_path, memory_limit=f"{3 * WEIGHTS // 2}B") as running:
        put(tmp_path, "b")
        with pytest.raises(
            BadRequest, match=r"model 'b', with a memory_limit of 24,576, needs 16,\d+ bytes, 7,\d+ are"
        ):
            load(running, "b")
        assert ask(running, "a") == 200
        running.call(running.host.service.unload_model("a"))
        until(lambda: running.index()["a/1"] == "UNAVAILABLE: unloaded")
        load(running, "b")
        assert ask(running, "b") == 200


def test_the_least_recently_used_model_goes_unless_it_is_pinned(tmp_path: Path) -> None:
    put(tmp_path, "a", "b", "c")
    with served(tmp_path, memory_limit=f"{7 * WEIGHTS // 2}B", evict=True, pinned=("a",)) as running:
        assert ask(running, "a") == 200
        until(lambda: ask(running, "c") == 200 and running.host.repository.get("c").stats.last_inference > 0)
        last = running.host.repository.get("c").stats
        until(
            lambda: (
                ask(running, "b") == 200 and running.host.repository.get("b").stats.last_inference > last.last_inference
            )
        )
        put(tmp_path, "d")
        load(running, "d")
        assert running.index() == {
            "a/1": "READY",
            "b/1": "READY",
            "c/1": "UNAVAILABLE: unloaded: evicted to make room for 'd'",
            "d/1": "READY",
        }
        assert running.get("/v2/health/ready")[0] == 200
        load(running, "c")
        assert running.index()["b/1"] == "UNAVAILABLE: unloaded: evicted to make room for 'c'"


def test_an_evicted_model_comes_back_when_it_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "infera_server")
    put(tmp_path, "a")
    with served(tmp_path, memory_limit=f"{3 * WEIGHTS // 2}B", evict=True) as running, channel(running) as made:
        put(tmp_path, "b")
        load(running, "b")
        assert running.index() == {"a/1": "UNAVAILABLE: unloaded: evicted to make room for 'b'", "b/1": "READY"}
        assert re.search(
            r"'a', last used [\d.]+ s ago, is unloaded to make room: .* needs 16,\d+ bytes, 7,", caplog.text
        )
        for path in ("", "/ready", "/config"):  # which asks for no inference
            assert running.get(f"/v2/models/a{path}")[0] == 404
        assert "a/1" in running.index()

        body = json.dumps(request_of(np.ones((1, WIDE), np.float32)))
        status, headers, reply = running.request("POST", "/v2/models/a/infer", body)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(reply)["error"] == (
            "model 'a' was unloaded to make room for others, and is being loaded again"
        )
        until(lambda: "'a' was asked for, and cannot be loaded" in caplog.text)
        status, headers, reply = running.request("POST", "/v2/models/a/infer", body)
        assert (status, 0 < int(headers["retry-after"]) <= PAUSE) == (503, True)
        assert b"needs 16," in reply
        assert ask(running, "b") == 200, "it was used just now, and stays"

        running.host.service.control.evictions._gone["a"].not_before = 0.0
        with monkeypatched(BUSY=0.0):
            until(lambda: ask(running, "a") == 200)
            assert running.index()["b/1"] == "UNAVAILABLE: unloaded: evicted to make room for 'a'"
            assert re.search(r"'a' was asked for, and is back after [\d.]+ s", caplog.text)
            call = request("b", np.ones((1, WIDE), np.float32))
            with pytest.raises(grpc.RpcError) as error:
                infer(made, call)
            assert status_of(error)[0] == "UNAVAILABLE"
            until(lambda: running.index()["b/1"] == "READY")
            assert array_of(infer(made, call)).shape == (1, WIDE)


def test_what_was_unloaded_by_wish_does_not_come_back(tmp_path: Path) -> None:
    put(tmp_path, "a")
    with served(tmp_path, memory_limit=f"{3 * WEIGHTS // 2}B", evict=True) as running, monkeypatched(BUSY=0.0):
        put(tmp_path, "b")
        load(running, "b")
        for name in ("a", "b"):
            running.call(running.host.service.unload_model(name))
            assert ask(running, name) == 404


def test_an_ensemble_comes_back_with_its_models(tmp_path: Path) -> None:
    put(tmp_path, "a")
    folder = tmp_path / "both"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(
        f"""platform: "ensemble"
        input {{ name: "x" data_type: TYPE_FP32 dims: [-1, {WIDE}] }}
        output {{ name: "y" data_type: TYPE_FP32 dims: [-1, {WIDE}] }}
        ensemble_scheduling {{ step {{ model_name: "a" model_version: -1
          input_map {{ key: "x" value: "x" }} output_map {{ key: "y" value: "y" }} }} }}"""
    )
    with served(tmp_path, memory_limit=f"{3 * WEIGHTS // 2}B", evict=True) as running, monkeypatched(BUSY=0.0):
        assert ask(running, "both") == 200
        put(tmp_path, "b")
        load(running, "b")
        assert {state.partition(":")[0] for state in running.index().values()} == {"READY", "UNAVAILABLE"}
        assert ask(running, "both") == 503
        until(lambda: ask(running, "both") == 200)
        assert ask(running, "a") == 200


def test_what_would_not_fit_alone_evicts_nobody(tmp_path: Path) -> None:
    put(tmp_path, "a")
    with served(tmp_path, memory_limit=f"{2 * WEIGHTS}B", evict=True) as running:
        put(tmp_path, "big", wide=2 * WIDE)
        with pytest.raises(BadRequest, match="needs 6"):
            load(running, "big")
        assert running.index()["a/1"] == "READY"


def test_what_is_kept_for_a_rollback_goes_first(tmp_path: Path) -> None:
    put(tmp_path, "a")
    with served(tmp_path, memory_limit=f"{5 * WEIGHTS // 2}B", keep_previous=600.0) as running:
        load(running, "a")
        put(tmp_path, "b")
        load(running, "b")
        assert running.index() == {"a/1": "READY", "b/1": "READY"}
        with pytest.raises(BadRequest, match="nothing to go back to"):
            running.call(running.host.service.roll_back("a"))


def test_the_memory_of_a_gpu_is_shared_in_the_same_way(tmp_path: Path) -> None:
    put(tmp_path, "a")
    with served(tmp_path, device="recording", vram_limit="40000B", evict=True) as running:
        assert running.index() == {"a/1": "READY"}
        put(tmp_path, "b", "c")
        load(running, "b")
        load(running, "c")
        states = running.index()
        assert states["c/1"] == "READY"
        assert sorted(state.partition(":")[0] for state in states.values()) == ["READY", "READY", "UNAVAILABLE"]


def test_a_model_in_its_folder_says_that_it_stays(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "1"
    folder.mkdir(parents=True)
    put(folder, "model")
    (tmp_path / "a" / "infera.toml").write_text("pinned = true")
    with served(tmp_path, memory_limit=f"{3 * WEIGHTS // 2}B", evict=True) as running:
        put(tmp_path, "b")
        with pytest.raises(BadRequest, match="are available"):
            load(running, "b")
        assert running.index()["a/1"] == "READY"


def test_where_room_is_needed_is_told() -> None:
    class Placed:
        def __init__(self, device: str) -> None:
            self.device = device

    error = OutOfMemoryError("x", needed=10, available=5, limit=20)
    models: list[Any] = [Placed("cpu"), Placed("cuda:0"), Placed("cuda:1")]
    for device, concerned in (("auto", 3), ("cpu", 1), ("cuda:1", 1), ("cuda", 2)):
        refusal = NoRoomError(error, device)
        assert sum(map(refusal.concerns, models)) == concerned
        assert not refusal.hopeless
    assert NoRoomError(error, "cpu", limit=9).hopeless
    assert not NoRoomError(OutOfMemoryError("x", needed=10, available=5), "cpu").hopeless
