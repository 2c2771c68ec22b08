"""Ensembles, sequences and caches as a repository's folders ask for them, over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.parser
import pytest

import infera_gpu
from bench.inputs import EXAMPLES
from bench.models import path_of
from infera_server.discovery import survey
from infera_server.model import Model
from infera_server.protocols.protos import message
from infera_server.report import lines
from infera_server.repository import Repository
from infera_server.rows import HostArray
from infera_server.sequence_model import SequenceModel
from infera_server.settings import Settings
from tests.server.grpc_support import array_of, channel, stream
from tests.server.support import WAIT, Running, hosting, until

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
        assert stats["model_stats"][0]["inference_stats"]["success"]["count"] == 1
        assert stats["model_stats"][0]["execution_count"] == 2  # one for a_first
        assert b'infera_requests_total{code="200",model="ens",version="1"} 1.0' in running.request("GET", "/metrics")[2]


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


# --- a real recurrent model ------------------------------------------------------------------------------------------


def chunks(seed: int, count: int) -> list[HostArray]:
    """Windows of speech, each with the end of the one before."""
    return [EXAMPLES["silero-vad"][0].feeds(seed * 100 + i)["input"] for i in range(count)]


def infer_chunk(running: Running, chunk: HostArray, rate: int, **parameters: Any) -> Mapping[str, HostArray]:
    """One step over the wire, in binary both ways."""
    arrays = {"input": chunk, "sr": np.array(rate, np.int64)}
    entries = [
        {
            "name": name,
            "shape": array.shape,
            "datatype": "FP32" if name == "input" else "INT64",
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in arrays.items()
    ]
    head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True, **parameters}}).encode()
    body = head + b"".join(array.tobytes() for array in arrays.values())
    length = {"Inference-Header-Content-Length": str(len(head))}
    status, headers, reply = running.request("POST", "/v2/models/silero-vad/infer", body, length)
    assert status == 200, reply
    size = int(headers["Inference-Header-Content-Length"])
    found, offset = {}, size
    for entry in json.loads(reply[:size])["outputs"]:
        stop = offset + entry["parameters"]["binary_data_size"]
        found[entry["name"]] = np.frombuffer(reply[offset:stop], np.float32).reshape(entry["shape"])
        offset = stop
    return found


def by_hand(session: infera_gpu.Session, steps: Sequence[HostArray], rate: int) -> list[HostArray]:
    """The loop that a client without sequences writes."""
    state, found = np.zeros((2, 1, 128), np.float32), []
    for chunk in steps:
        outputs = session.run({"input": chunk, "state": state, "sr": np.array(rate, np.int64)})
        state = outputs["stateN"]
        found.append(outputs["output"])
    return found


@pytest.fixture(scope="module")
def silero() -> Iterator[Running]:
    path = path_of("silero-vad")
    repository = Repository(Settings(), survey([path], {path: "silero-vad"}).sources)
    with hosting(repository) as running:
        yield running


def test_streams_of_a_real_model_equal_the_loop_by_hand(silero: Running) -> None:
    """Eight streams at a time, at two rates, with nothing configured."""
    session = infera_gpu.load(path_of("silero-vad"), device="cpu")
    streams = {
        identity: ([c[:, : 576 if rate == 16000 else 288] for c in chunks(identity, 6)], rate)
        for identity, rate in zip(range(1, 9), [16000] * 6 + [8000] * 2, strict=True)
    }

    def stream(identity: int) -> list[HostArray]:
        steps, rate = streams[identity]
        return [
            infer_chunk(
                silero, chunk, rate, sequence_id=identity, sequence_start=i == 0, sequence_end=i == len(steps) - 1
            )["output"]
            for i, chunk in enumerate(steps)
        ]

    with ThreadPoolExecutor(len(streams)) as pool:
        answers = dict(zip(streams, pool.map(stream, streams), strict=True))
    for identity, (steps, rate) in streams.items():
        want = by_hand(session, steps, rate)
        assert len({float(w[0, 0]) for w in want}) > 1
        np.testing.assert_allclose(np.concatenate(answers[identity]), np.concatenate(want), rtol=1e-4, atol=1e-5)
    stats = silero.get("/v2/models/silero-vad/stats")[1]["model_stats"][0]
    assert stats["inference_count"] == 48
    assert stats["execution_count"] <= 48


def test_steps_of_streams_share_batches(silero: Running) -> None:
    """What waits while a run goes on runs together, each with a state of its own."""
    session = infera_gpu.load(path_of("silero-vad"), device="cpu")
    model = cast(SequenceModel, silero.host.repository.get("silero-vad"))
    turns = cast(Model, model.model).batcher.turns
    steps = {identity: chunks(identity, 2) for identity in range(11, 17)}
    with ThreadPoolExecutor(len(steps)) as pool:

        def send(i: int) -> None:
            def one(identity: int) -> HostArray:
                found = infer_chunk(silero, steps[identity][i], 16000, sequence_id=identity, sequence_start=i == 0)
                return found["output"]

            with turns:  # somebody else has the device
                waiting = {identity: pool.submit(one, identity) for identity in steps}
                until(lambda: model.queued == len(steps))
            for identity, reply in waiting.items():
                want = by_hand(session, steps[identity][: i + 1], 16000)[-1]
                np.testing.assert_allclose(reply.result(), want, rtol=1e-4, atol=1e-5)

        send(0)
        send(1)
    stats = silero.get("/v2/models/silero-vad/stats")[1]["model_stats"][0]
    assert max(entry["batch_size"] for entry in stats["batch_stats"]) > 1


def test_a_plain_request_to_it_needs_no_sequence(silero: Running) -> None:
    feeds = EXAMPLES["silero-vad"][0].feeds()
    entries = [
        {"name": n, "shape": a.shape, "datatype": "INT64" if n == "sr" else "FP32", "data": a.ravel().tolist()}
        for n, a in feeds.items()
    ]
    status, reply = silero.infer("silero-vad", {"inputs": entries})
    assert status == 200
    want = infera_gpu.load(path_of("silero-vad"), device="cpu").run(feeds)
    for output in reply["outputs"]:
        got = np.array(output["data"], np.float32).reshape(output["shape"])
        np.testing.assert_allclose(got, want[output["name"]], rtol=1e-4, atol=1e-5)
    status, refused = silero.infer("silero-vad", {"inputs": [e for e in entries if e["name"] != "state"]})
    assert status == 400
    assert "missing required input(s) ['state']" in refused["error"]


def grpc_chunk(chunk: HostArray, rate: int, sequence: str, start: bool, end: bool) -> Any:
    """One step as a ModelInferRequest."""
    made = message("inference.ModelInferRequest")(model_name="silero-vad")
    made.inputs.add(name="input", datatype="FP32", shape=chunk.shape)
    made.inputs.add(name="sr", datatype="INT64", shape=[])
    made.raw_input_contents.extend([chunk.tobytes(), np.array(rate, np.int64).tobytes()])
    made.parameters["sequence_id"].string_param = sequence
    made.parameters["sequence_start"].bool_param = start
    made.parameters["sequence_end"].bool_param = end
    return made


def test_a_grpc_stream_sends_steps_without_waiting(silero: Running) -> None:
    """Two sequences on one stream, by names; the answers of each in order."""
    session = infera_gpu.load(path_of("silero-vad"), device="cpu")
    steps = {name: chunks(seed, 5) for name, seed in (("a", 21), ("b", 22))}
    requests = [grpc_chunk(steps[name][i], 16000, name, i == 0, i == 4) for i in range(5) for name in steps]
    for number, sent in enumerate(requests):
        sent.id = str(number)
    with channel(silero) as made:
        replies = {reply.infer_response.id: reply for reply in stream(made)(iter(requests), timeout=WAIT)}
    assert not any(reply.error_message for reply in replies.values())
    for offset, name in enumerate(steps):
        got = [array_of(replies[str(2 * i + offset)].infer_response) for i in range(5)]
        want = by_hand(session, steps[name], 16000)
        np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), rtol=1e-4, atol=1e-5)


def test_tritonclient_keeps_a_sequence(silero: Running) -> None:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is in the test extra")
    session = infera_gpu.load(path_of("silero-vad"), device="cpu")
    steps = chunks(31, 4)
    found = []
    with http.InferenceServerClient(silero.address) as client:
        for i, chunk in enumerate(steps):
            inputs = [http.InferInput("input", chunk.shape, "FP32"), http.InferInput("sr", [], "INT64")]
            inputs[0].set_data_from_numpy(chunk)
            inputs[1].set_data_from_numpy(np.array(16000, np.int64))
            reply = client.infer("silero-vad", inputs, sequence_id=31, sequence_start=i == 0, sequence_end=i == 3)
            found.append(reply.as_numpy("output"))
    np.testing.assert_allclose(
        np.concatenate(found), np.concatenate(by_hand(session, steps, 16000)), rtol=1e-4, atol=1e-5
    )
