"""Requests find a version by label, by weight, and are copied to a shadow."""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from infera_server.models.discovery import Source, survey
from infera_server.models.modelconfig import ConfigError
from infera_server.models.repository import Repository
from infera_server.models.traffic import Shadow, Traffic, parse, read
from infera_server.requests import Request
from infera_server.scheduling.rows import Arrays
from infera_server.settings import Settings
from tests.server.grpc_support import channel, infer, request
from tests.server.support import FakeSession, Running, hosting, request_of, spec, until
from tests.text import parse as graph

X = np.ones((1, 4), np.float32)


@contextmanager
def versions(*names: str, width: dict[str, int] | None = None, **settings: Any) -> Iterator[Running]:
    """Model m, each of whose versions multiplies by its number."""
    sessions: dict[str, FakeSession] = {}

    def opener(path: Path, settings: Settings) -> FakeSession:
        def fn(feeds: Arrays) -> Arrays:
            return {"y": feeds["x"] * np.float32(path.stem)}

        columns = (width or {}).get(path.stem, 4)
        sessions[path.stem] = FakeSession({"x": spec("N", columns)}, {"y": spec("N", columns)}, fn)
        return sessions[path.stem]

    sources = [Source("m", name, Path(name)) for name in names]
    with hosting(Repository(Settings(**settings), sources, opener)) as running:
        running.sessions = sessions
        yield running


def traffic(running: Running, **document: Any) -> tuple[int, Any]:
    status, _, reply = running.request("POST", "/v2/repository/models/m/traffic", json.dumps(document))
    return status, json.loads(reply)


def ask(running: Running, path: str = "m", **more: Any) -> str:
    """The version that answered, by what it says and by what it computed."""
    status, reply = running.infer(path, request_of(X, **more))
    assert status == 200, reply
    assert reply["outputs"][0]["data"][0] == float(reply["model_version"])
    return str(reply["model_version"])


# --- labels --------------------------------------------------------------------------------------------------------


def test_a_label_is_a_version_in_requests() -> None:
    with versions("1", "2") as running:
        assert traffic(running, labels={"stable": 1, "canary": 2})[0] == 200
        assert ask(running, "m/versions/stable") == "1"
        assert ask(running, "m/versions/canary") == "2"
        assert ask(running) == "2"
        assert running.get("/v2/models/m/versions/stable/ready")[0] == 200
        for label in ("nope", "nope!"):
            unknown = {"error": f"Request for unknown model: 'm' has no version and no label '{label}'"}
            assert running.get(f"/v2/models/m/versions/{label}/ready") == (404, unknown)
            assert running.infer(f"m/versions/{label}", request_of(X)) == (404, unknown)
        traffic(running, labels={"stable": 2})
        assert ask(running, "m/versions/stable") == "2"
        assert running.get("/v2/models/m/versions/canary/ready")[0] == 404


def test_a_label_of_a_version_that_is_not_served_says_which(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    onnx.save(graph("g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }"), tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / "infera.toml").write_text("[labels]\nstable = 9\n")
    text = "Request for unknown model: 'm' label 'stable' names version 9, which is not served"
    for workers in (0, 1):
        with hosting(Repository(Settings(workers=workers), survey([tmp_path]).sources)) as running:
            assert running.index()["m/1"].endswith("infera.toml: it names version 9, which is not served")
            assert running.infer("m/versions/stable", request_of(X)) == (404, {"error": text})


def test_labels_stay_over_a_reload_and_name_what_is_served() -> None:
    with versions("1", "2") as running:
        traffic(running, labels={"stable": 1})
        running.call(running.host.service.load_model("m"))
        assert ask(running, "m/versions/stable") == "1"
        assert running.get("/v2/repository/models/m/traffic")[1]["labels"] == {"stable": "1"}


# --- split ---------------------------------------------------------------------------------------------------------


def test_requests_are_spread_by_weight_and_of_one_id_go_one_way() -> None:
    with versions("1", "2") as running:
        traffic(running, labels={"canary": 2}, split={"1": 3, "canary": 1})
        by_id = {f"r{index}": ask(running, id=f"r{index}") for index in range(200)}
        assert 30 <= Counter(by_id.values())["2"] <= 70
        assert all(ask(running, id=key) == version for key, version in list(by_id.items())[:10])
        at_random = Counter(ask(running) for _ in range(200))
        assert 30 <= at_random["2"] <= 70
        assert ask(running, "m/versions/1", id="r1") == "1"
        stats = {m["version"]: m["inference_count"] for m in running.get("/v2/models/stats")[1]["model_stats"]}
        assert stats["2"] == Counter(by_id.values())["2"] + at_random["2"] + sum(
            by_id[key] == "2" for key in list(by_id)[:10]
        )
        assert traffic(running)[1]["split"] == {}
        assert {ask(running) for _ in range(10)} == {"2"}


def test_every_dialect_says_which_version_answered() -> None:
    with versions("1", "2") as running, channel(running) as made:
        traffic(running, split={"1": 1, "2": 1})
        seen = set()
        for index in range(40):
            reply = infer(made, request("m", X, id=f"r{index}"))
            assert np.frombuffer(reply.raw_output_contents[0], np.float32)[0] == float(reply.model_version)
            assert reply.model_version == ask(running, id=f"r{index}")
            document = json.dumps({"id": f"r{index}", "x": [1, 1, 1, 1]})
            status, _, body = running.request("POST", "/v2/models/m/generate", document)
            assert status == 200, body
            assert json.loads(body)["model_version"] == reply.model_version
            seen.add(reply.model_version)
        assert seen == {"1", "2"}


def test_binary_requests_that_are_all_alike_say_which_version_answered() -> None:
    x = np.ones((1, 4), np.float32)
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    document = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(document))}
    with versions("1", "2") as running:
        traffic(running, split={"1": 1, "2": 1})
        seen = set()
        for _ in range(40):
            _, fields, body = running.request("POST", "/v2/models/m/infer", document + x.tobytes(), headers)
            size = int(fields["inference-header-content-length"])
            version = json.loads(body[:size])["model_version"]
            assert np.frombuffer(body[size:], np.float32)[0] == float(version)
            seen.add(version)
        assert seen == {"1", "2"}


def test_a_weight_of_nothing_gets_nothing() -> None:
    with versions("1", "2") as running:
        traffic(running, split={"1": 1, "2": 0})
        assert {ask(running) for _ in range(20)} == {"1"}


def test_a_version_with_other_tensors_shares_no_requests() -> None:
    with versions("1", "2", width={"2": 5}) as running:
        assert traffic(running, split={"1": 1, "2": 1})[0] == 200
        assert {ask(running) for _ in range(20)} == {"1"}


def test_a_split_goes_on_with_what_is_left_after_a_reload() -> None:
    with versions("1", "2") as running:
        traffic(running, split={"1": 1, "2": 1})
        running.host.repository.sources = [Source("m", "1", Path("1"))]
        running.call(running.host.service.load_model("m"))
        assert {ask(running) for _ in range(20)} == {"1"}


# --- shadow --------------------------------------------------------------------------------------------------------


def shadowed(running: Running) -> dict[str, Any]:
    (found,) = running.get("/v2/repository/models/m/traffic")[1]["shadowed"]
    return dict(found)


def test_a_shadow_gets_copies_that_are_compared() -> None:
    with versions("1", "2") as running:
        assert traffic(running, split={"1": 1}, shadow={"version": "2", "share": 1})[0] == 200
        for _ in range(10):
            assert ask(running) == "1"
            until(lambda: shadowed(running)["sent"] == shadowed(running)["different"] + shadowed(running)["equal"])
        found = shadowed(running)
        assert (found["sent"], found["different"]) == (10, 10)
        assert "output 'y' differs by 1" in found["last_difference"]
        traffic(running, split={"1": 1}, shadow={"version": "2", "tolerance": 2})
        ask(running)
        until(lambda: shadowed(running)["equal"] == 1)


def test_a_shadow_that_is_busy_or_fails_disturbs_nobody() -> None:
    with versions("1", "2", max_batch=1) as running:
        session = running.sessions["2"]
        assert isinstance(session, FakeSession)
        traffic(running, split={"1": 1}, shadow={"version": "2"})

        def broken(feeds: Arrays) -> Arrays:
            raise RuntimeError("broken")

        session.fn = broken
        assert ask(running) == "1"
        until(lambda: shadowed(running)["failed"] == 1)
        model = running.host.repository.get("m", "2")
        running.host.repository.serving.shadows("m")[0].shadow = type("Busy", (), {"queued": 1, "retired": False})()
        assert ask(running) == "1"
        assert shadowed(running)["dropped"] == 1
        assert model.queued == 0


def test_what_a_client_may_change_meanwhile_is_not_copied() -> None:
    with versions("1", "2") as running:
        traffic(running, split={"1": 1}, shadow={"version": "2"})
        memory = mmap.mmap(-1, X.nbytes)
        memory[:] = X.tobytes()
        shared = np.frombuffer(memoryview(memory), np.float32).reshape(X.shape)
        model = running.host.repository.get("m")
        answered: list[Any] = []

        async def submit() -> None:
            model.submit(Request("", {"x": shared}, []), X.nbytes, lambda result, batch: answered.append(result))

        running.call(submit())
        until(lambda: bool(answered))
        assert answered[0]["y"].tolist() == X.tolist()
        assert (shadowed(running)["sent"], shadowed(running)["dropped"]) == (0, 1)


def test_a_share_of_requests_is_copied() -> None:
    with versions("1", "2") as running:
        traffic(running, split={"1": 1}, shadow={"version": "2", "share": 0.25})
        for _ in range(100):
            ask(running)
        found = shadowed(running)
        assert 10 <= found["sent"] + found["dropped"] <= 40


# --- what is said --------------------------------------------------------------------------------------------------

HUGE = 10**400
"""No float holds it."""


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ([], "expected an object"),
        ({"label": {}}, "'label' is unknown"),
        ({"labels": {"1": 1}}, "'1' is no label"),
        ({"labels": {"a b": 1}}, "'a b' is no label"),
        ({"labels": {"a": "b"}}, "'b' is no version"),
        ({"labels": []}, "labels must be a table"),
        ({"split": {"x": 1}}, "'x' is no version, and no label in these settings, which have none"),
        ({"labels": {"a": 1, "b": 2}, "shadow": {"version": "c"}}, "'c' is no version, .*, which have a, b$"),
        ({"split": {"1": -1}}, r"split\.1 must be a number from 0"),
        ({"split": {"1": True}}, r"split\.1 must be a number"),
        ({"split": {"1": 0}}, "split needs a weight above 0"),
        ({"split": {"1": math.nan}}, r"split\.1 must be a number from 0"),
        ({"split": {"1": math.inf}}, r"split\.1 must be a number from 0"),
        ({"split": {"1": HUGE}}, r"split\.1 must be a number from 0"),
        ({"split": {"1": 1, "01": 2}}, "split names version 1 twice, as '1' and '01': give it one weight"),
        ({"labels": {"a": 1}, "split": {"a": 9, "1": 1}}, "split names version 1 twice, as 'a' and '1'"),
        ({"labels": {"a": 2, "b": 2}, "split": {"a": 0, "b": 1}}, "split names version 2 twice, as 'a' and 'b'"),
        ({"labels": {"a": HUGE}}, "a number is no version: an integer from 0 to 9223372036854775807"),
        ({"labels": {"a": 16**5000}}, "a number is no version"),
        ({"labels": {"a": -1}}, "a number is no version"),
        ({"labels": {"a": "9" * 5000}}, "'9{64}' is no version"),
        ({"labels": {"a": 1 << 63}}, "a number is no version"),
        ({"labels": {"a": str(1 << 63)}}, "is no version"),
        ({"labels": {"a": True}}, "bool is no version"),
        ({"labels": {"a": 1.0}}, "float is no version"),
        ({"shadow": {"version": "1", "share": math.nan}}, r"shadow\.share must be a number from 0 to 1"),
        ({"shadow": {"version": "1", "share": HUGE}}, r"shadow\.share must be a number from 0 to 1"),
        ({"shadow": {"version": "1", "tolerance": math.inf}}, r"shadow\.tolerance must be a number from 0"),
        ({"shadow": {"version": HUGE}}, "a number is no version"),
        ({"golden": {"requests": HUGE}}, "golden.requests must be an integer from 0 to 1024"),
        ({"golden": {"tolerance": HUGE}}, "golden.tolerance must be a number from 0"),
        ({"golden": {"tolerance": math.nan}}, "golden.tolerance must be a number from 0"),
        ({"shadow": {"share": 1}}, "'' is no version"),
        ({"shadow": {"version": "1", "share": 2}}, r"shadow\.share must be a number from 0 to 1"),
        ({"shadow": {"version": "1", "what": 2}}, r"'shadow\.what' is unknown"),
        ({"pinned": 1}, "pinned must be true or false"),
        ({"golden": {"requests": 1.5}}, "golden.requests must be an integer from 0 to 1024"),
        ({"golden": {"requests": 1025}}, "golden.requests must be an integer from 0 to 1024"),
        ({"golden": {"tolerance": -1}}, "golden.tolerance must be a number from 0"),
        ({"golden": {"x": 1}}, "'golden.x' is unknown; there are requests and tolerance"),
    ],
)
def test_what_is_not_understood_is_refused(document: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse(document)


def test_what_is_not_served_can_get_no_requests() -> None:
    with versions("1") as running:
        for document in ({"labels": {"a": 2}}, {"split": {"2": 1}}, {"shadow": {"version": "2"}}):
            assert traffic(running, **document) == (400, {"error": "model 'm' version 2 is not served"})
        status, _, _ = running.request("POST", "/v2/repository/models/nope/traffic", "{}")
        assert status == 404
        status, _, _ = running.request("POST", "/v2/repository/models/m/traffic", "{bad")
        assert status == 400


def test_the_models_folder_says_it(tmp_path: Path) -> None:
    for version in ("1", "2"):
        (tmp_path / "m" / version).mkdir(parents=True)
        text = f"g (float[N, 4] x) => (float[N, 4] y) <float f = {{{version}}}> {{ y = Mul(x, f) }}"
        onnx.save(graph(text), tmp_path / "m" / version / "model.onnx")
    file = tmp_path / "m" / "infera.toml"
    file.write_text('[labels]\nstable = 1\n[split]\nstable = 1\n[shadow]\nversion = "2"\nshare = 0.5\n')
    with hosting(Repository(Settings(), survey([tmp_path]).sources)) as running:
        assert ask(running) == ask(running, "m/versions/stable") == "1"
        assert running.get("/v2/repository/models/m/traffic")[1]["shadow"]["share"] == 0.5
    assert read(tmp_path / "m") == Traffic({"stable": "1"}, {"stable": 1.0}, Shadow("2", 0.5))
    assert parse(read(tmp_path / "m").as_dict()) == read(tmp_path / "m")
    assert parse({"labels": {"a": "0" * 40 + "7"}}).labels == {"a": "7"}
    for content, says in {
        "[labels": "infera.toml cannot be read: ",
        "\xff": "infera.toml cannot be read: ",
        "x = 1": "infera.toml: 'x' is unknown",
        f"[golden]\nrequests = {HUGE}": "infera.toml: golden.requests must be an integer from 0 to 1024",
        f"[golden]\nrequests = 1{'0' * 5000}": "infera.toml cannot be read: .*5001 digits",
        f"[labels]\na = 0x1{'0' * 5000}": "infera.toml: a number is no version",
        "[split]\n1 = nan": "infera.toml: split.1 must be a number from 0",
        "[split]\n1 = 1e999": "infera.toml: split.1 must be a number from 0",
        "#" * 65537: "infera.toml has over 65,536 bytes",
    }.items():
        file.write_text(content, encoding="latin-1")
        with pytest.raises(ConfigError, match=says):
            read(tmp_path / "m")
    file.unlink()
    file.symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match="leads outside"):
        read(tmp_path / "m")
    assert read(None) == Traffic()


def test_a_rollback_is_asked_for_over_http() -> None:
    with versions("1") as running:
        assert running.request("POST", "/v2/repository/models/m/rollback")[0] == 400
        running.call(running.host.service.load_model("m"))
        status, _, reply = running.request("POST", "/v2/repository/models/m/rollback")
        assert (status, json.loads(reply)) == (200, {"versions": ["1"]})
