"""Everything but inference, and which files make which models."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infera_gpu.errors import DeviceLostError, ModelError, PlanError
from infera_server import metrics
from infera_server.errors import NotFound, Unavailable
from infera_server.metrics import ModelStats
from infera_server.models.discovery import DiscoveryError, Source, discover
from infera_server.models.repository import Entry, Repository, State
from infera_server.runtime import Session
from infera_server.settings import Settings
from tests.server.support import (
    WAIT,
    FakeDevice,
    FakeSession,
    Running,
    doubler,
    hosting,
    request_of,
    serving,
    spec,
    until,
)
from tests.text import parse

X = np.ones((2, 4), np.float32)


def words() -> FakeSession:
    """s [2] -> t = s, strings, no batch."""
    return FakeSession({"s": spec(2, dtype=object)}, {"t": spec(2, dtype=object)}, lambda feeds: {"t": feeds["s"]})


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler(), "words": words()}, max_batch=4) as running:
        yield running


# --- replies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("/", {"status": "alive"}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/double/ready", {"ready": True}),
        ("/v2/models", {"models": ["double", "words"]}),
        (
            "/v2/models/double/versions/1",
            {
                "name": "double",
                "versions": ["1"],
                "platform": "onnx_infera",
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
            },
        ),
    ],
)
def test_documents(server: Running, path: str, want: object) -> None:
    assert server.get(path) == (200, want)


@pytest.mark.parametrize(
    ("verb", "path", "status", "text"),
    [
        ("GET", "/v2/models/nope", 404, "Request for unknown model: 'nope' is not found"),
        ("GET", "/v2/models/double/versions/9", 404, "Request for unknown model: 'double' version 9 is not found"),
        ("GET", "/v2/models/double/versions/x", 404, "no version and no label 'x'"),
        ("GET", "/v2/models/..%2f..%2fetc%2fpasswd", 404, "Not Found"),
        ("GET", "/v2/", 404, "Not Found"),
        ("GET", "/nope", 404, "Not Found"),
        ("GET", "/v2/models/double/infer", 405, "Method Not Allowed"),
        ("POST", "/v2/models/double", 405, "Method Not Allowed"),
        ("POST", "/v2/models/double/versions/x/infer", 404, "no version and no label 'x'"),
        ("POST", "/v2/models/nope/infer", 404, "Request for unknown model: 'nope' is not found"),
        ("POST", "/v2/models/..%2f..%2fetc%2fpasswd/infer", 404, "unknown model: '../../etc/passwd'"),
    ],
)
def test_errors_are_json(server: Running, verb: str, path: str, status: int, text: str) -> None:
    found, headers, body = server.request(verb, path)
    assert (found, headers["content-type"]) == (status, "application/json")
    assert text in json.loads(body)["error"]


def test_head_is_answered_where_get_is(server: Running) -> None:
    status, _, body = server.request("HEAD", "/v2/health/live")
    assert (status, body) == (200, b"")


def test_configuration_has_what_clients_read(server: Running) -> None:
    status, config = server.get("/v2/models/double/config")
    assert status == 200
    assert config["max_batch_size"] == 4
    assert config["version_policy"] == {"all": {}}
    (tensor,) = config["input"]
    assert (tensor["name"], tensor["data_type"], tensor["dims"]) == ("x", "TYPE_FP32", [4])
    config = server.get("/v2/models/words/config")[1]
    assert config["max_batch_size"] == 0
    (tensor,) = config["output"]
    assert (tensor["name"], tensor["data_type"], tensor["dims"]) == ("t", "TYPE_STRING", [2])


def test_the_index_filters(server: Running) -> None:
    for body, status in ((b"", 200), (b"{}", 200), (b'{"ready": true}', 200), (b"{bad", 400), (b'{"ready": "x"}', 400)):
        found, _, reply = server.request("POST", "/v2/repository/index", body)
        assert found == status
        if status == 200:
            assert [m["state"] for m in json.loads(reply)] == ["READY", "READY"]


def test_a_management_body_has_a_limit(server: Running) -> None:
    status, _, body = server.request("POST", "/v2/repository/index", b" " * 100_000)
    assert status == 413
    assert "65,536 bytes" in json.loads(body)["error"]


def test_what_breaks_in_management_is_json(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.host.repository, "versions", lambda name: 1 / 0)
    status, headers, body = server.request("GET", "/v2/models/double")
    assert (status, headers["content-type"]) == (500, "application/json")
    assert "its log says more" in json.loads(body)["error"]


def test_strings_are_served(server: Running) -> None:
    document = {"inputs": [{"name": "s", "shape": [2], "datatype": "BYTES", "data": ["é", ""]}]}
    status, reply = server.infer("words", document)
    assert (status, reply["outputs"][0]["data"]) == (200, ["é", ""])


def test_statistics_have_the_cache_and_the_memory_of_gpus() -> None:
    session = doubler()
    session.device = FakeDevice("cuda:1")
    with serving({"double": session}) as server:
        stats = server.host.repository.get("double").stats
        stats.cache_hit.add(1, 0.001)
        (found,) = server.get("/v2/models/double/stats")[1]["model_stats"]
        assert found["inference_stats"]["cache_hit"] == {"count": 1, "ns": 1_000_000}
        assert found["inference_stats"]["cache_miss"] == {"count": 0, "ns": 0}
        assert found["memory_usage"] == [{"type": "GPU", "id": 1, "byte_size": 0}]


def test_statistics_and_metrics_count_what_happened(server: Running) -> None:
    def samples() -> dict[str, float]:
        _, _, text = server.request("GET", "/metrics")
        return {
            s.name + "".join(f"|{v}" for k, v in sorted(s.labels.items()) if k != "le"): s.value
            for family in text_string_to_metric_families(text.decode())
            for s in family.samples
            if s.labels.get("model") == "double"
        }

    def statistics() -> dict[str, int]:
        (found,) = server.get("/v2/models/double/stats")[1]["model_stats"]
        return {"rows": found["inference_count"], "runs": found["execution_count"], **{
            name: value["count"] for name, value in found["inference_stats"].items()
        }}  # fmt: skip

    before, stats_before = samples(), statistics()
    assert server.infer("double", request_of(np.ones((3, 4), np.float32)))[0] == 200
    assert server.infer("double", b"{bad")[0] == 400
    after, stats_after = samples(), statistics()

    def grew(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grew("infera_requests_total|200|double|1") == 1
    assert grew("infera_requests_total|400|double|1") == 1
    assert grew("infera_batch_rows_sum|double|1") == 3
    assert grew("infera_padding_rows_total|double|1") == 1
    for name in ("request_duration", "queue_duration", "execution_duration"):
        assert grew(f"infera_{name}_seconds_count|double|1") == (2 if name == "request_duration" else 1)
    assert after["infera_queue_depth|double|1"] == 0
    grown = {name: stats_after[name] - stats_before[name] for name in stats_after}
    assert grown == {
        "rows": 3, "runs": 1, "success": 1, "fail": 1, "queue": 1, "compute_input": 1, "compute_infer": 1,
        "compute_output": 1, "cache_hit": 0, "cache_miss": 0,
    }  # fmt: skip


def test_histogram_buckets_are_cumulative_and_inclusive() -> None:
    stats = ModelStats()
    for seconds in (0.0005, 0.0006, 100.0):
        stats.duration.observe(seconds)
    found = dict(stats.duration.cumulative())
    assert (found["0.0005"], found["0.001"], found["30.0"], found["+Inf"]) == (1, 2, 2, 3)


# --- which files make which models ---------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found_in(*paths: Path) -> set[tuple[str, str, str]]:
    return {(s.name, s.version, s.path.name) for s in discover(paths).sources}


def test_a_file_is_served_under_its_stem(tmp_path: Path) -> None:
    touch(tmp_path, "resnet.v1.onnx")
    assert found_in(tmp_path / "resnet.v1.onnx") == {("resnet.v1", "1", "resnet.v1.onnx")}


def test_folders_of_files_and_of_versions(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a.onnx",
        "b/1/model.onnx",
        "b/10/model.onnx",
        "b/x/model.onnx",
        "c/2/any.onnx",
        "b/config.pbtxt",
        "t.txt",
    )
    both = {("a", "1", "a.onnx"), ("b", "1", "model.onnx"), ("b", "10", "model.onnx"), ("c", "2", "any.onnx")}
    assert found_in(tmp_path) == both
    assert found_in(tmp_path / "b", tmp_path / "a.onnx") == {s for s in both if s[0] != "c"}


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    touch(tmp_path, "empty/readme.txt", "two/1/a.onnx", "two/1/b.onnx", "x/m.onnx", "y/m.onnx")
    touch(tmp_path, "models/flat/model.onnx")
    for paths, text in (
        ([tmp_path / "nope"], "does not exist"),
        ([tmp_path / "empty"], "holds no model"),
        ([tmp_path / "two"], "none of them named model.onnx"),
        ([tmp_path / "models"], "flat/.*onnx is in no version's folder: move it to .*flat/1/"),
        ([tmp_path / "x", tmp_path / "y"], "would both be served as m version 1"),
    ):
        with pytest.raises(DiscoveryError, match=text):
            discover(paths)


def test_names_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / os.fsdecode(b"bad\xff.onnx")).touch()
    touch(tmp_path, "s/stats.onnx", "v/stats/1/model.onnx", "d/...onnx")
    for folder, text in (
        ("n", r"bad\\udcff.onnx' is not named in UTF-8"),
        ("s", "taken"),
        ("v", "taken"),
        ("d", "/v2/models/.., which is taken"),
    ):
        with pytest.raises(DiscoveryError, match=text):
            discover([tmp_path / folder])


def test_what_cannot_be_served_beside_what_can_stops_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "good/1/model.onnx", "stats/3/model.onnx", "two/1/a.onnx", "two/1/b.onnx", "flat/model.onnx")
    touch(tmp_path, "both.onnx", "both/1/model.onnx")
    (tmp_path / os.fsdecode(b"bad\xff.onnx")).touch()
    (tmp_path / os.fsdecode(b"folder\xff")).mkdir()
    (tmp_path / os.fsdecode(b"folder\xff") / "model.onnx").touch()
    found = discover([tmp_path])
    assert [str(source) for source in found.sources] == ["good version 1"]
    assert {str(problem.source) for problem in found.problems.values()} == {
        "stats version 3", "two version 1", "flat version 1", "both version 1", "bad\ufffd version 1",
        "folder\ufffd version 1",
    }  # fmt: skip
    sessions = {"good": doubler()}
    repository = Repository(
        Settings(inline_run=0.0),
        found.sources,
        opener=lambda path, _: sessions[path.parts[-3]],
        problems=found.problems,
    )
    with hosting(repository) as server:
        index = server.index()
        assert index.pop("good/1") == "READY"
        assert {name: text.split(": ")[0] for name, text in index.items()} == dict.fromkeys(
            ("stats/3", "two/1", "flat/1", "both/1", "bad\ufffd/1", "folder\ufffd/1"), "UNAVAILABLE"
        )
        assert index["stats/3"].endswith("would be served at /v2/models/stats, which is taken; rename it")
        assert server.get("/v2/models/stats")[0] == 200
        assert server.get("/v2/models/two")[0] in (400, 404)
        assert server.get("/v2/health/ready")[0] == 200
    only = Repository(Settings(load_models=("good",)), found.sources, problems=found.problems)
    assert [entry.source.name for entry in only.entries()] == ["good"]


def test_the_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    touch(tmp_path, "UP.ONNX", "v/1/MODEL.Onnx")
    assert found_in(tmp_path) == {("UP", "1", "UP.ONNX"), ("v", "1", "MODEL.Onnx")}


def test_the_newest_version_serves_and_a_failure_stops_no_other() -> None:
    sessions: dict[str, FakeSession] = {}

    def opener(path: Path, settings: Settings) -> Session:
        if path.name == "bad":
            raise ModelError("bad: not a model")
        return sessions.setdefault(path.name, doubler())

    sources = [Source("m", v, Path(p)) for v, p in (("2", "two"), ("10", "ten"), ("11", "bad"))]
    repository = Repository(Settings(max_batch=2), [*sources, Source("n", "1", Path("bad"))], opener=opener)
    with pytest.raises(Unavailable, match="still loading"):
        repository.get("m")
    seen: list[Entry] = []
    repository.load(lambda fn, arg: fn(arg), seen.append)
    assert len(seen) == 4
    assert repository.is_settled
    assert repository.get("m").signature.version == "10"
    assert repository.get("m", "2").signature.version == "2"
    assert repository.versions("m") == ["2", "10"]
    with pytest.raises(Unavailable, match="'m' version 11 is not at ready state"):
        repository.get("m", "11")
    with pytest.raises(NotFound, match="'n' has no available versions"):
        repository.get("n")
    assert {e.source.version: e.state for e in repository.entries() if e.source.name == "m"} == {
        "2": State.READY, "10": State.READY, "11": State.UNAVAILABLE,
    }  # fmt: skip
    for model in repository.ready():
        model.close()
    assert all(s.closed for s in sessions.values())


def test_no_older_version_stands_in_while_a_newer_one_loads() -> None:
    release, seen = threading.Event(), threading.Event()

    def opener(path: Path, settings: Settings) -> Session:
        if path.name == "2":
            seen.set()
            assert release.wait(WAIT)
            raise ModelError("2: not a model")
        return doubler()

    repository = Repository(Settings(max_batch=1), [Source("m", v, Path(v)) for v in ("1", "2")], opener=opener)
    loading = threading.Thread(target=repository.load, args=(lambda fn, arg: fn(arg),))
    loading.start()
    assert seen.wait(WAIT)
    until(lambda: repository.versions("m") == ["1"])
    assert repository.get("m", "1").signature.version == "1"
    with pytest.raises(Unavailable, match="still loading"):
        repository.get("m")
    release.set()
    loading.join()
    assert repository.get("m").signature.version == "1"
    repository.get("m").close()


def test_a_model_that_can_never_run_is_unavailable() -> None:
    class Unplannable(FakeSession):
        def plan_for(self, shapes: Any) -> Any:
            raise PlanError("'s' is a string tensor computed at run time, which is not supported")

    session = Unplannable({"x": spec("N", 4)}, {"y": spec("N", 4)}, lambda feeds: {"y": feeds["x"]})
    repository = Repository(Settings(), [Source("m", "1", Path("m"))], opener=lambda path, settings: session)
    repository.load(lambda fn, arg: fn(arg))
    (entry,) = repository.entries()
    assert (entry.state, entry.reason) == (
        State.UNAVAILABLE,
        "'s' is a string tensor computed at run time, which is not supported",
    )


def test_a_model_that_the_protocol_cannot_carry_is_refused() -> None:
    session = FakeSession(
        {"x": spec("N", dtype=np.complex64)}, {"y": spec("N", dtype=np.complex64)}, lambda f: {"y": f["x"]}
    )
    repository = Repository(Settings(), [Source("m", "1", Path("m"))], opener=lambda path, settings: session)
    repository.load(lambda fn, arg: fn(arg))
    (entry,) = repository.entries()
    assert "'x' is complex64, which the V2 protocol cannot carry" in entry.reason
    assert session.closed


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERA_MAX_BATCH", "7")
    assert (Settings().max_batch, Settings(max_batch=3).max_batch) == (7, 3)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Settings(max_batch=0)
    with pytest.raises(ValueError, match="at least 1 character"):
        Settings(host="")


def test_a_lost_device_turns_the_server_not_ready_and_says_that_only_a_restart_helps() -> None:
    session, healthy = doubler(), doubler()
    with serving({"double": session, "other": healthy}) as running:
        assert running.get("/v2/health/ready") == (200, {"ready": True})
        lost = "cuda:0 is lost to this process: restart the process"

        def fault(feeds: Any) -> Any:
            session.device = FakeDevice("cuda:0", lost)
            raise DeviceLostError(lost)

        session.fn = fault
        status, body = running.infer("double", request_of(np.ones((1, 4), np.float32)))
        assert (status, lost in body["error"]) == (503, True)
        assert running.get("/v2/health/ready") == (503, {"ready": False, "reason": lost})
        assert running.get("/v2/models/double/ready") == (503, {"error": lost})
        assert running.get("/v2/health/live")[0] == 200
        assert running.get("/v2/models/other/ready")[0] == 200
        assert running.infer("other", request_of(np.ones((1, 4), np.float32)))[0] == 200


def test_all_models_share_the_gpu_memory_that_is_set(tmp_path: Path) -> None:
    ones = ", ".join(["1"] * 256)
    model = parse(f"g (float[N, 16] x) => (float[N, 16] y) <float[16, 16] w = {{{ones}}}> {{ y = MatMul(x, w) }}")
    for name in ("a.onnx", "b.onnx"):
        onnx.save(model, tmp_path / name)
    repository = Repository(Settings(device="recording", vram_limit="2100B"), discover([tmp_path]).sources)
    repository.load(lambda fn, arg: fn(arg))
    states = {e.source.name: (e.state, e.reason) for e in repository.entries()}
    assert sorted(state.value for state, _ in states.values()) == ["READY", "UNAVAILABLE"]
    assert any("of a vram_limit of 2,100" in reason for _, reason in states.values())
    with pytest.raises(ValueError, match="no amount of memory"):
        Settings(vram_limit="4 Gigs")


def test_the_documents_name_all_metrics() -> None:
    named = set(re.findall(r'"(infera_[a-z_]+)"', Path(metrics.__file__).read_text()))
    assert len(named) > 15
    page = (Path(__file__).parents[2] / "docs" / "rest.md").read_text()
    assert not [name for name in named if not re.search(rf"`{name}(_total|_info)?`", page)]
