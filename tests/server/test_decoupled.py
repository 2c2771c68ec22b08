"""Models that give any number of responses to a request: over gRPC as a real tritonserver, as events, by WebSocket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from websockets.sync.client import connect

from tests.server.grpc_cases import call
from tests.server.grpc_stream_cases import ENDS, STREAMS, recorded, repeat, talk
from tests.server.grpc_support import channel, mlp, stream
from tests.server.repeat import Repeat, publish_repeat, repeat_session
from tests.server.support import WAIT, Running, http_request, serving, until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"repeat": repeat_session(), "mlp": mlp()}) as running:
        yield running


@pytest.fixture(scope="module")
def model(server: Running) -> Repeat:
    return publish_repeat(server)


@pytest.fixture(scope="module")
def client(server: Running, model: Repeat) -> Iterator[grpc.Channel]:
    with channel(server) as made:
        yield made


# --- gRPC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, sent in STREAMS.items() if sent[-1].model_name == "repeat"])
def test_streams_are_those_of_a_real_tritonserver(client: grpc.Channel, name: str) -> None:
    assert talk(client, STREAMS[name]) == recorded()[name]


def test_one_response_is_not_enough(client: grpc.Channel) -> None:
    reply = call(client, "ModelInfer", repeat([5]))
    assert (reply.code, reply.text) == (
        "UNIMPLEMENTED", "ModelInfer RPC doesn't support models with decoupled transaction policy",
    )  # fmt: skip


def test_responses_wait_for_no_other_request(model: Repeat, client: grpc.Channel) -> None:
    model.held = {"long": 0}
    responses = stream(client)(
        iter([repeat([1, 2], id="long"), repeat([1], id="short", parameters=ENDS)]), timeout=WAIT
    )
    order = [next(responses).infer_response.id for _ in range(2)]
    model.held = {}
    assert [*order, *(response.infer_response.id for response in responses)] == ["short", "short", "long", "long"]


def test_a_client_that_leaves_cancels(model: Repeat, client: grpc.Channel) -> None:
    model.cancelled.clear()
    model.held = {"b": 0}
    under_way = stream(client)(iter([repeat([1], id="b"), repeat([1], id="a")]), timeout=WAIT)
    assert next(under_way).infer_response.id == "a"
    under_way.cancel()
    until(lambda: len(model.cancelled) == 1)
    model.held = {}


def test_statistics_count_requests(server: Running, model: Repeat, client: grpc.Channel) -> None:
    before = model.stats.success.count, model.stats.fail.count
    talk(client, [repeat([1, 2, 3]), repeat([]), repeat([1, 2], 1)])
    assert (model.stats.success.count - before[0], model.stats.fail.count - before[1]) == (2, 1)


# --- HTTP ------------------------------------------------------------------------------------------------------------


def post(server: Running, suffix: str, document: Any) -> tuple[int, str, bytes]:
    status, headers, body = server.request("POST", f"/v2/models/repeat/{suffix}", json.dumps(document))
    return status, headers["content-type"], body


def events(body: bytes) -> list[Any]:
    return [json.loads(event.removeprefix(b"data: ")) for event in body.split(b"\n\n") if event]


def test_events(server: Running, model: Repeat) -> None:
    names = {"model_name": "repeat", "model_version": "1"}
    for values in ([5, 6, 7], [5], []):
        status, kind, body = post(server, "generate_stream", {"IN": values, "id": "q"})
        assert (status, kind) == (200, "text/event-stream; charset=utf-8")
        assert events(body) == [{"id": "q", **names, "OUT": v, "IDX": i} for i, v in enumerate(values)]
    status, _, body = post(server, "generate_stream", {"IN": [5, 6, 7], "FAIL": 1})
    assert (status, events(body)) == (200, [{**names, "OUT": 5, "IDX": 0}, {"error": "it failed"}])
    status, kind, body = post(server, "generate_stream", {"IN": [5], "FAIL": 0})
    assert (status, kind, json.loads(body)) == (400, "application/json", {"error": "it failed"})


def test_an_event_that_is_an_error_explains_itself_where_asked(server: Running, model: Repeat) -> None:
    _, _, body = server.request(
        "POST",
        "/v2/models/repeat/generate_stream",
        json.dumps({"IN": [5, 6], "FAIL": 1}),
        {"infera-trace": "1"},
    )
    assert events(body)[-1] == {"error": "it failed", "infera_trace": 'refused="no run"'}


def test_one_document_is_for_one_response(server: Running, model: Repeat) -> None:
    status, _, body = post(server, "generate", {"IN": [5]})
    assert (status, json.loads(body)["OUT"]) == (200, 5)
    for values in ([], [5, 6]):
        status, _, body = post(server, "generate", {"IN": values})
        text = "generate expects model to produce exactly 1 response, use generate stream for model that generates "
        assert (status, json.loads(body)) == (400, {"error": text + "various number of responses"})
    inputs = [{"name": "IN", "datatype": "INT32", "shape": [1], "data": [1]}]
    status, _, body = post(server, "infer", {"inputs": inputs})
    assert status == 501
    assert json.loads(body)["error"] == "HTTP end point doesn't support models with decoupled transaction policy"


def test_a_reader_of_events_that_leaves_cancels(server: Running, model: Repeat) -> None:
    model.asked, before = "", model.stats.success.count
    for place in (0, 1):  # before the first response, and after it
        model.held = {"b": place}
        model.cancelled.clear()
        with server.connect() as sock:
            sock.sendall(http_request(b'{"IN": [1, 2], "id": "b"}', "/v2/models/repeat/generate_stream"))
            if place:
                assert sock.recv(4096).startswith(b"HTTP/1.1 200 OK")
            else:
                until(lambda: model.asked == "b")
        until(lambda: len(model.cancelled) == 1)
    until(lambda: model.stats.success.count == before + 1)  # who has had a response was answered
    model.held = {}


def test_a_websocket(server: Running, model: Repeat) -> None:
    def asked(values: list[int], **more: Any) -> str:
        inputs = [{"name": "IN", "datatype": "INT32", "shape": [len(values)], "data": values}]
        return json.dumps({"inputs": inputs, **more})

    with connect(f"ws://{server.address}/v2/models/repeat/stream", open_timeout=WAIT) as client:
        client.send(asked([5, 6], id="a"))
        found = [json.loads(client.recv(WAIT)) for _ in range(3)]
        assert [f["parameters"]["triton_final_response"] for f in found] == [False, False, True]
        assert [[output["data"] for output in f["outputs"]] for f in found] == [[[5], [0]], [[6], [1]], []]
        assert {f["id"] for f in found} == {"a"}
        client.send(asked([5], id="b", parameters={"binary_data_output": True}))
        first, last = client.recv(WAIT), client.recv(WAIT)
        assert isinstance(first, bytes)
        length = int.from_bytes(first[:4], "little")
        assert json.loads(first[4 : 4 + length])["parameters"] == {"triton_final_response": False}
        assert first[4 + length :] == b"\x05\0\0\0\0\0\0\0"
        assert json.loads(last)["parameters"] == {"triton_final_response": True}
