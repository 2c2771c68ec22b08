"""The generate extension: flat documents in and out, and as events."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from infera_server.protocols import generate
from infera_server.requests import Correlation, Request, all_outputs
from infera_server.scheduling.rows import Arrays
from tests.server.support import FakeSession, Running, doubler, http_request, serving, spec, until


def greeter() -> FakeSession:
    """text [1] and n [1] -> greeting [1] and length [1]."""

    def fn(feeds: Arrays) -> Arrays:
        text = f"hello {feeds['text'][0]}"
        return {"greeting": np.array([text], object), "length": np.array([len(text)]) * feeds["n"]}

    return FakeSession(
        {"text": spec(1, dtype=object), "n": spec(1, dtype=np.int64)},
        {"greeting": spec(1, dtype=object), "length": spec(1, dtype=np.int64)},
        fn,
    )


def halves() -> FakeSession:
    """h [N, 2] -> h, which JSON cannot carry."""
    tensor = spec("N", 2, dtype=np.float16)
    return FakeSession({"h": tensor}, {"g": tensor}, lambda feeds: {"g": feeds["h"]})


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler(), "greet": greeter(), "halves": halves()}, max_batch=4) as running:
        yield running


def ask(server: Running, model: str, document: Any, suffix: str = "generate") -> tuple[int, Any]:
    body = document if isinstance(document, bytes) else json.dumps(document)
    status, _, reply = server.request("POST", f"/v2/models/{model}/{suffix}", body)
    return status, json.loads(reply)


def test_values_fill_the_shape_from_the_right(server: Running) -> None:
    named = {"model_name": "double", "model_version": "1"}
    assert ask(server, "double", {"id": "7", "x": [1, 2, 3, 4]}) == (200, {"id": "7", **named, "y": [2, 4, 6, 8]})
    assert ask(server, "double", {"x": list(range(8))}) == (200, {**named, "y": list(range(0, 16, 2))})


def test_scalars_are_scalars(server: Running) -> None:
    want = {"model_name": "greet", "model_version": "1", "greeting": "hello you", "length": 18}
    assert ask(server, "greet", {"text": "you", "n": 2}) == (200, want)
    assert ask(server, "greet", {"n": [2], "parameters": {"text": "you", "stop": True}}) == (200, want)


def test_parameters_mean_what_they_do_elsewhere(server: Running) -> None:
    document = {
        "x": [1, 2, 3, 4], "id": "7", "timeout": 2_000_000, "priority": 3, "sequence_id": 5, "other": 0.5,
        "parameters": {"sequence_start": True},
    }  # fmt: skip
    asked = generate.parse(json.dumps(document).encode(), server.model("double").signature)
    assert (asked.timeout, asked.priority, asked.parameters) == (2.0, 3, {"other": 0.5})
    assert asked.correlation == Correlation(5, start=True)
    status, reply = ask(server, "double", {"x": [1, 2, 3, 4], "timeout": -1})
    assert (status, "Unable to parse 'timeout'" in reply["error"]) == (400, True)


def test_a_stream_has_events(server: Running) -> None:
    for path in ("/v2/models/double/generate_stream", "/v2/models/double/versions/1/generate_stream"):
        status, headers, body = server.request("POST", path, b'{"x": [1, 1, 1, 1], "id": "e"}')
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert body.startswith(b'data: {"id":"e",')
        assert body.endswith(b"\n\n")
        assert json.loads(body[6:])["y"] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("model", "document", "status", "text"),
    [
        ("double", {}, 400, "expected 1 inputs but got 0 inputs for model 'double'"),
        ("double", [], 400, "expected 1 inputs but got 0 inputs for model 'double'"),
        ("double", b"", 400, "The document is empty"),
        ("double", b"{bad", 400, "failed to parse the request JSON buffer"),
        ("double", {"x": 1}, 400, "The schema can not convert input 'x' to tensor with proper shape"),
        ("double", {"x": [1, 2, 3, 4, 5]}, 400, "The schema can not convert input 'x' to tensor with proper shape"),
        ("double", {"x": [[1, 2, 3, 4]]}, 400, "The schema can not convert input 'x' to tensor with proper shape"),
        ("double", {"x": None}, 400, "The schema can not convert input 'x' to tensor with proper shape"),
        ("double", {"x": []}, 400, "batch-size must be at least 1"),
        ("double", {"x": [0] * 20}, 400, "batch-size must be <= 4"),
        ("double", {"x": ["a"] * 4}, 400, "attempt to access JSON non-number as double"),
        ("double", {"x": [0] * 4, "id": 3}, 400, "Unable to parse 'id'"),
        ("double", {"x": [0] * 4, "z": {}}, 400, "parameter 'z' has invalid type"),
        ("double", {"x": [0] * 4, "z": None}, 400, "parameter 'z' has invalid type"),
        ("double", {"x": [0] * 4, "parameters": 3}, 400, "Expected JSON object for keyword: 'parameters'"),
        ("double", {"x": [0] * 4, "parameters": {"z": []}}, 400, "Converting keyword: 'parameters': parameter 'z'"),
        ("double", {"x": [-1, 0, 0, 0]}, 400, "row cannot be used"),
        ("double", {"x": [666, 0, 0, 0]}, 500, "log says more"),
        ("greet", {"text": {}, "n": 1}, 400, "attempt to access JSON non-string as string"),
        ("greet", {"text": "a", "n": 1.5}, 400, "attempt to access JSON non-signed-integer"),
        ("halves", {"h": [1, 2]}, 400, "receiving FP16 data via JSON is not supported"),
        ("nope", {"x": [1]}, 404, "Request for unknown model: 'nope' is not found"),
        ("double/versions/9", {"x": [1]}, 404, "'double' version 9 is not found"),
        ("double/versions/x", {"x": [1]}, 404, "no version and no label 'x'"),
    ],
)
@pytest.mark.parametrize("suffix", ["generate", "generate_stream"])
def test_refusals(server: Running, model: str, document: Any, status: int, text: str, suffix: str) -> None:
    found, reply = ask(server, model, document, suffix)
    assert found == status
    assert text in reply["error"]


def test_a_reply_explains_itself_where_asked(server: Running) -> None:
    path, body, header = "/v2/models/double/generate", b'{"x": [1, 2, 3, 4, 5, 6, 7, 8]}', {"infera-trace": "1"}
    _, plain, document = server.request("POST", path, body)
    _, headers, same = server.request("POST", path, body, header)
    assert "infera-trace" not in plain
    assert "requests=1, rows=2, " in headers["infera-trace"]
    assert same == document
    _, headers, _ = server.request("POST", path, b'{"x": [1, 2, 3, 4], "infera_trace": true}')
    assert "rows=1, " in headers["infera-trace"]
    _, _, stream = server.request("POST", path + "_stream", body, header)
    event = json.loads(stream.removeprefix(b"data: "))
    assert "rows=2, " in event.pop("infera_trace")
    assert event == json.loads(document)


@pytest.mark.parametrize("suffix", ["generate", "generate_stream"])
def test_a_refusal_explains_itself_too(server: Running, suffix: str) -> None:
    for model in ("double", "nope"):
        asked = f"/v2/models/{model}/{suffix}", b'{"x": [-1, 0, 0, 0]}'
        status, headers, _ = server.request("POST", *asked, {"infera-trace": "1"})
        assert (status // 100, headers["infera-trace"]) == (4, 'refused="no run"')
        assert "infera-trace" not in server.request("POST", *asked)[1]


@pytest.mark.parametrize("suffix", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("document", "asks"),
    [
        ({"infera_trace": True}, True),
        ({"x": [1] * 4, "infera_trace": True, "z": None}, True),
        ({"x": "a", "parameters": {"infera_trace": True}}, True),
        ({"infera_trace": True, "parameters": 3}, True),
        ({"id": 3, "infera_trace": True}, True),
        ({"infera_trace": True, "parameters": {"infera_trace": False}}, False),
        ({"infera_trace": 1, "x": [1] * 4}, False),
        ({"x": [1]}, False),
    ],
)
def test_a_document_that_is_wrong_is_explained_where_it_asks(
    server: Running, document: Any, asks: bool, suffix: str
) -> None:
    status, headers, _ = server.request("POST", f"/v2/models/double/{suffix}", json.dumps(document))
    assert (status, headers.get("infera-trace")) == (400, 'refused="no run"' if asks else None)


def test_other_verbs(server: Running) -> None:
    for verb in ("GET", "HEAD", "PUT"):
        assert server.request(verb, "/v2/models/double/generate")[0] == 405


def test_bodies_may_be_compressed_and_have_limits(server: Running) -> None:
    def post(body: bytes, coding: str) -> int:
        return server.request("POST", "/v2/models/double/generate", body, {"Content-Encoding": coding})[0]

    assert post(gzip.compress(b'{"x": [1, 2, 3, 4]}'), "gzip") == 200
    assert post(b"{bad", "gzip") == 400
    assert post(b"{}", "br") == 415
    assert post(gzip.compress(bytes(1 << 25)), "gzip") == 413
    assert post(b" " * ((16 << 20) + 1), "identity") == 413
    assert post(json.dumps({"x": [1, 2, 3, 4], "pad": "x" * (1 << 19)}).encode(), "identity") == 200


def test_statistics_count_it(server: Running) -> None:
    def counts() -> tuple[int, int]:
        (found,) = server.get("/v2/models/double/stats")[1]["model_stats"]
        return found["inference_stats"]["success"]["count"], found["inference_stats"]["fail"]["count"]

    success, fail = counts()
    ask(server, "double", {"x": [1, 2, 3, 4]})
    ask(server, "double", {"x": 1})
    assert counts() == (success + 1, fail + 1)


def test_a_client_that_leaves_is_forgotten() -> None:
    session = doubler()
    with serving({"double": session}) as server:
        session.block()
        body = b'{"x": [1, 2, 3, 4]}'
        running, waiting = server.connect(), server.connect()
        running.sendall(http_request(body, "/v2/models/double/generate"))
        session.wait_entered()
        waiting.sendall(http_request(body, "/v2/models/double/generate"))
        model = server.host.repository.get("double")
        until(lambda: model.queued == 1)
        waiting.close()
        until(lambda: model.queued == 0)
        session.gate.set()
        assert running.recv(1000).startswith(b"HTTP/1.1 200")
        running.close()
        assert session.batches == [1]


def test_refusals_are_counted_by_their_reason() -> None:
    session = doubler()
    with serving({"double": session}, max_queue=1) as server:
        session.block()
        body = b'{"x": [1, 2, 3, 4]}'
        running, waiting = server.connect(), server.connect()
        running.sendall(http_request(body, "/v2/models/double/generate"))
        session.wait_entered()
        waiting.sendall(http_request(body, "/v2/models/double/generate"))
        model = server.host.repository.get("double")
        until(lambda: model.queued == 1)
        status, headers, _ = server.request("POST", "/v2/models/double/generate", body, {"infera-trace": "1"})
        assert (status, int(headers["retry-after"]) >= 1) == (429, True)
        assert headers["infera-trace"].startswith('refused="queue_full", retry-after=')
        assert list(model.stats.refused.values()) == [1]
        session.gate.set()
        for connection in (running, waiting):
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            connection.close()


def test_numbers_that_json_lacks(server: Running) -> None:
    signature = server.host.repository.get("double").signature
    request = Request("", {}, all_outputs(signature, binary=False))
    reply = json.loads(generate.respond(request, {"y": np.array([[math.nan]], np.float32)}, signature))
    assert math.isnan(reply["y"])
    reply = json.loads(generate.respond(request, {"y": np.array([[1, math.inf]], np.float32)}, signature))
    assert reply["y"] == [1, math.inf]
