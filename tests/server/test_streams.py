"""Streams through real recurrent models, over HTTP and gRPC, equal the loop by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import infera_gpu
from bench.inputs import EXAMPLES
from bench.models import path_of
from infera_gpu.errors import UnreachableError
from infera_server.models.discovery import survey
from infera_server.models.model import Model
from infera_server.models.repository import Repository
from infera_server.pipelines.recurrence import find
from infera_server.pipelines.sequence_model import SequenceModel
from infera_server.protocols.protos import message
from infera_server.runtime import LocalSession
from infera_server.scheduling.batching import derive
from infera_server.scheduling.rows import HostArray
from infera_server.settings import Settings
from tests.server.grpc_support import array_of, channel, stream
from tests.server.support import WAIT, Running, hosting, until

pytestmark = pytest.mark.models


def fetched(name: str) -> Path:
    """A model's file; skips where it is out of reach."""
    try:
        return path_of(name)
    except UnreachableError as error:
        pytest.skip(str(error))


STATES = {
    "silero-vad": {"state": "stateN"},
    "silero-vad-v6-fw": {"h": "hn", "c": "cn"},
    "flashvad": {"recurrent": "next_recurrent"} | {f"cache_{i}": f"next_cache_{i}" for i in range(4)},
    "name-romanizer-decoder": {"hidden": "hidden_out"},
    "name-romanizer-encoder": {},
    "paraphrase-minilm-l3": {},
    "yunet": {},
}
"""What a model carries from step to step."""


@pytest.mark.parametrize("name", STATES)
def test_states_of_real_models_are_found_and_no_others(name: str) -> None:
    session = LocalSession(infera_gpu.load(fetched(name), device="cpu"))
    batching = derive(session, 2)
    states, _ = find(session, batching.layout, batching.sizes)
    assert {state.input: state.output for state in states} == STATES[name]


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
    path = fetched("silero-vad")
    repository = Repository(Settings(), survey([path], {path: "silero-vad"}).sources)
    with hosting(repository) as running:
        yield running


def test_streams_of_a_real_model_equal_the_loop_by_hand(silero: Running) -> None:
    """Eight streams at a time, at two rates, with nothing configured."""
    session = infera_gpu.load(fetched("silero-vad"), device="cpu")
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
    session = infera_gpu.load(fetched("silero-vad"), device="cpu")
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
    want = infera_gpu.load(fetched("silero-vad"), device="cpu").run(feeds)
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
    session = infera_gpu.load(fetched("silero-vad"), device="cpu")
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
    session = infera_gpu.load(fetched("silero-vad"), device="cpu")
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
