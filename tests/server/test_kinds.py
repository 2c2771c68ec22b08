"""Ensembles, sequences and caches as a repository's folders ask for them, over HTTP."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.parser
import pytest

from infera_server.errors import BadRequest
from infera_server.models.discovery import survey
from infera_server.models.repository import Repository
from infera_server.pipelines.sequence_model import SequenceModel
from infera_server.report import lines
from infera_server.scheduling.rows import HostArray
from infera_server.settings import Settings
from tests.server.support import hosting, until

ENSEMBLE = """
platform: "ensemble" max_batch_size: 8
input { name: "source" data_type: TYPE_FP32 dims: [4] }
output { name: "out" data_type: TYPE_FP32 dims: [4] }
ensemble_scheduling {
  step { model_name: "double" model_version: -1
         input_map { key: "x" value: "source" } output_map { key: "y" value: "d" } }
  step { model_name: "square" model_version: -1
         input_map { key: "x" value: "d" } output_map { key: "y" value: "out" } }
}
"""

OUTER = """
platform: "ensemble" max_batch_size: 8
input { name: "source" data_type: TYPE_FP32 dims: [4] }
output { name: "out" data_type: TYPE_FP32 dims: [4] }
ensemble_scheduling { step { model_name: "ens" model_version: -1
  input_map { key: "source" value: "source" } output_map { key: "out" value: "out" } } }
"""


def add(root: Path, name: str, text: str = "", config: str | None = None) -> None:
    """A model's folder, with a model where there is a text of one."""
    folder = root / name / "1"
    folder.mkdir(parents=True)
    if text:
        onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}'), folder / "model.onnx")
    if config is not None:
        (folder.parent / "config.pbtxt").write_text(config)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add(tmp_path, "a_first", config=OUTER)  # named and found before what it is made of
    add(tmp_path, "ens", config=ENSEMBLE)
    add(tmp_path, "double", "(float[N, 4] x) => (float[N, 4] y) { y = Add(x, x) }")
    add(tmp_path, "square", "(float[N, 4] x) => (float[N, 4] y) { y = Mul(x, x) }")
    return tmp_path


def serve(root: Path, **settings: Any) -> Any:
    return hosting(Repository(Settings(**settings), survey([root]).sources, rescan=lambda: survey([root])))


def document(name: str, array: HostArray, **parameters: Any) -> dict[str, Any]:
    entry = {"name": name, "shape": array.shape, "datatype": "FP32", "data": array.ravel().tolist()}
    return {"inputs": [entry], "parameters": parameters}


ONES = np.ones((1, 4), np.float32)


def test_ensembles_are_loaded_after_what_they_are_made_of(root: Path) -> None:
    with serve(root) as running:
        for name in ("ens", "a_first"):
            status, reply = running.infer(name, document("source", 3 * ONES))
            assert status == 200, reply
            assert reply["outputs"][0]["data"] == [36] * 4
        status, told = running.get("/v2/models/ens")
        assert (told["platform"], told["versions"]) == ("ensemble", ["1"])
        assert told["inputs"] == [{"name": "source", "datatype": "FP32", "shape": [-1, 4]}]
        _, config = running.get("/v2/models/ens/config")
        assert [s["model_name"] for s in config["ensemble_scheduling"]["step"]] == ["double", "square"]
        _, stats = running.get("/v2/models/ens/stats")
        assert stats["model_stats"][0]["inference_stats"]["success"]["count"] == 2  # one for a_first
        assert stats["model_stats"][0]["execution_count"] == 2
        assert b'infera_requests_total{code="200",model="ens",version="1"} 1.0' in running.request("GET", "/metrics")[2]


def test_classes_of_an_ensemble_have_the_labels_of_the_model_that_makes_them_or_its_own(root: Path) -> None:
    listed = ENSEMBLE.partition("ensemble_scheduling")[0].partition("\n")[2].partition("\n")[2]
    names = listed.replace('"source"', '"x"').replace('"out"', '"y" label_filename: "labels.txt"')
    (root / "square" / "config.pbtxt").write_text(f"max_batch_size: 8 {names}")
    (root / "square" / "labels.txt").write_text("cat\ndog\n")
    (root / "a_first" / "config.pbtxt").write_text(OUTER.replace('"out" data', '"out" label_filename: "mine.txt" data'))
    (root / "a_first" / "mine.txt").write_text("Katze\nHund\n")
    best = [{"name": "out", "parameters": {"classification": 1}}]
    with serve(root) as running:
        for name, label in (("ens", "dog"), ("a_first", "Hund")):
            asked = document("source", np.array([[0, 1, 0, 0]], np.float32)) | {"outputs": best}
            assert running.infer(name, asked)[1]["outputs"][0]["data"] == [f"4.000000:1:{label}"]


def test_an_ensemble_goes_with_a_model_that_it_is_made_of(root: Path) -> None:
    """As tritonserver does: it is unavailable, and not loaded again by itself."""
    with serve(root) as running:
        running.call(running.host.service.unload_model("square"))
        until(lambda: running.index()["a_first/1"] == "UNAVAILABLE: unloaded")
        until(lambda: running.index()["ens/1"] == "UNAVAILABLE: unloaded")
        assert running.infer("ens", document("source", ONES))[0] == 404
        assert running.infer("double", document("x", ONES))[0] == 200
        running.call(running.host.service.load_model("a_first"))
        assert running.index()["square/1"] == "READY"
        assert running.infer("a_first", document("source", ONES))[1]["outputs"][0]["data"] == [4] * 4


def test_what_an_ensemble_is_made_of_goes_with_it_if_asked(root: Path) -> None:
    with serve(root) as running:
        running.call(running.host.service.unload_model("ens", dependents=True))
        until(lambda: set(running.index().values()) == {"UNAVAILABLE: unloaded"})


def test_an_ensemble_that_cannot_be_says_why(root: Path) -> None:
    add(root, "wide", "(float[N, 5] x) => (float[N, 5] y) { y = Add(x, x) }")
    add(root, "broken", config=ENSEMBLE.replace('"square"', '"wide"'))
    add(root, "lost", config=ENSEMBLE.replace('"square"', '"nowhere"'))
    with serve(root) as running:
        assert running.index()["broken/1"].startswith("UNAVAILABLE: in ensemble broken, ensemble tensor ")
        assert running.index()["lost/1"] == (
            "UNAVAILABLE: ensemble lost contains models that are not available or ambiguous: nowhere"
        )
        path = "/v2/repository/models/lost/load"
        status, _, reply = running.request("POST", path)
        assert status == 400
        assert "are not available or ambiguous: nowhere" in json.loads(reply)["error"]


def test_a_model_of_an_ensemble_is_loaded_again_without_a_gap(root: Path) -> None:
    with serve(root) as running:
        stop = threading.Event()
        replies: list[int] = []

        def ask() -> None:
            while not stop.is_set():
                replies.append(running.infer("ens", document("source", ONES))[0])

        client = threading.Thread(target=ask)
        client.start()
        until(lambda: len(replies) > 3)
        for _ in range(3):
            running.call(running.host.service.load_model("square"))
        stop.set()
        client.join()
        assert set(replies) == {200}


@pytest.mark.parametrize("settings", [{}, {"golden_requests": 4, "golden_tolerance": 10}])
def test_an_ensemble_with_a_cache_answers_with_what_its_models_are_now(root: Path, settings: dict[str, Any]) -> None:
    shutil.rmtree(root / "ens")
    add(root, "ens", config=ENSEMBLE + "response_cache { enable: true }")
    with serve(root, **settings) as running:
        service = running.host.service
        assert running.infer("ens", document("source", 3 * ONES))[1]["outputs"][0]["data"] == [36] * 4
        shutil.rmtree(root / "square")
        add(root, "square", "(float[N, 4] x) => (float[N, 4] y) { y = Neg(x) }")
        running.call(service.load_model("square"))
        assert running.infer("ens", document("source", 3 * ONES))[1]["outputs"][0]["data"] == [-6] * 4
        (root / "ens" / "config.pbtxt").write_text(OUTER.replace('"ens"', '"a_first"'))
        with pytest.raises(BadRequest, match=r"circular dependency between ensembles: ens -> \.\.\. -> ens"):
            running.call(service.load_model("ens"))


def test_an_ensembles_requests_are_finished_before_the_server_ends(root: Path) -> None:
    with serve(root) as running, ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(running.infer, "a_first", document("source", ONES)) for _ in range(8)]
        until(lambda: any(reply.done() for reply in replies))
        running.host.server.should_exit = True
        answered = [reply.result()[0] for reply in replies if not isinstance(reply.exception(), OSError)]
    assert set(answered) <= {200, 503}
    assert 200 in answered


def test_answers_are_kept_where_the_configuration_asks(tmp_path: Path) -> None:
    text = "(float[N, 4] x) => (float[N, 4] y) { y = Add(x, x) }"
    add(tmp_path, "kept", text, "response_cache { enable: true }")
    add(tmp_path, "other", text)
    with serve(tmp_path) as running:
        for name in ("kept", "other"):
            for _ in range(3):
                assert running.infer(name, document("x", ONES))[1]["outputs"][0]["data"] == [2] * 4
        stats = {
            entry["name"]: (entry["inference_stats"]["cache_hit"]["count"], entry["execution_count"])
            for entry in running.get("/v2/models/stats")[1]["model_stats"]
        }
        assert stats == {"kept": (2, 1), "other": (0, 3)}
        body = json.dumps(document("x", ONES))
        _, headers, _ = running.request("POST", "/v2/models/kept/infer", body, {"infera-trace": "1"})
        assert headers["infera-trace"] == "cached"
        assert (
            b'infera_response_cache_total{model="kept",result="hit",version="1"} 3.0'
            in (running.request("GET", "/metrics")[2])
        )
        (entry,) = (e for e in running.host.repository.entries() if e.source.name == "kept")
        assert "kept version 1: cache: equal requests are answered once" in lines(entry, Settings())
    with serve(tmp_path, response_cache_bytes=0) as running:
        running.infer("kept", document("x", ONES))
        assert running.get("/v2/models/kept/stats")[1]["model_stats"][0]["inference_stats"]["cache_miss"]["count"] == 0


def test_a_model_of_which_no_request_could_be_planned_warns(tmp_path: Path) -> None:
    add(tmp_path, "wrong", "(float[N, 4] x) => (float[N, 4] y) { y = Softmax <axis: int = 7> (x) }")
    with serve(tmp_path) as running:
        (entry,) = running.host.repository.entries()
        (warning,) = (line for line in lines(entry, Settings()) if "warning" in line)
        assert warning.startswith("wrong version 1: warning: no request that was tried can be run: ")
        assert "axis 7 out of range" in warning
        assert running.infer("wrong", document("x", ONES))[0] >= 400


COUNTER = (
    "(float[N, 2] x, float[N, 2] total) => (float[N, 2] y, float[N, 2] sum) { sum = Add(x, total) y = Add(sum, x) }"
)

SEQUENCES = """
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [2] }
output { name: "y" data_type: TYPE_FP32 dims: [2] }
sequence_batching { max_sequence_idle_microseconds: 300000 state {
  input_name: "total" output_name: "sum" data_type: TYPE_FP32 dims: [2]
  initial_state { name: "start" data_type: TYPE_FP32 dims: [2] data_file: "start" } } }
"""


def test_sequences_are_kept_as_the_configuration_says(tmp_path: Path) -> None:
    add(tmp_path, "counter", COUNTER, SEQUENCES)
    (tmp_path / "counter" / "initial_state").mkdir()
    (tmp_path / "counter" / "initial_state" / "start").write_bytes(np.array([10, 20], np.float32).tobytes())
    with serve(tmp_path) as running:
        step = np.ones((1, 2), np.float32)
        assert running.get("/v2/models/counter")[1]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
        _, config = running.get("/v2/models/counter/config")
        assert [entry["name"] for entry in config["input"]] == ["x"]
        assert config["sequence_batching"]["state"][0]["input_name"] == "total"
        assert b'infera_sequences{model="counter",version="1"} 0.0' in running.request("GET", "/metrics")[2]
        first = running.infer("counter", document("x", step, sequence_id="a", sequence_start=True))[1]
        assert first["outputs"][0]["data"] == [12, 22]
        assert running.infer("counter", document("x", step, sequence_id="a"))[1]["outputs"][0]["data"] == [13, 23]
        status, refused = running.infer("counter", document("x", step))
        assert (status, refused["error"]) == (
            400,
            "inference request to model 'counter' must specify a non-zero or non-empty correlation ID",
        )

        model = cast(SequenceModel, running.host.repository.get("counter"))
        until(lambda: model.sequences == 0)
        assert running.infer("counter", document("x", step, sequence_id="a"))[0] == 400


def test_an_initial_state_stays_in_the_models_folder(tmp_path: Path) -> None:
    add(tmp_path, "counter", COUNTER, SEQUENCES.replace('"start" }', '"../config.pbtxt" }'))
    with serve(tmp_path) as running:
        assert "initial state '../config.pbtxt' leads outside the model's folder" in running.index()["counter/1"]


def test_a_cache_and_sequences_exclude_each_other(tmp_path: Path) -> None:
    add(tmp_path, "counter", COUNTER, "sequence_batching {} response_cache { enable: true }")
    with serve(tmp_path) as running:
        assert "Response Cache does not currently support model counter with sequence" in running.index()["counter/1"]
