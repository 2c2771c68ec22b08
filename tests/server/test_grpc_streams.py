"""ModelStreamInfer: order, errors, back-pressure, leaving."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format

from infera_server.protocols.protos import pool
from infera_server.rpc.calls import Inference
from tests.server.grpc_support import METHOD, array_of, channel, request, status_of, stream
from tests.server.support import WAIT, FakeDevice, FakeSession, Running, doubler, flat, serving, until

X = np.arange(8, dtype=np.float32).reshape(2, 4)
BAD = np.full((1, 4), -1, np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    other = doubler()
    other.device = FakeDevice("cpu:1")  # where its runs wait for nobody
    with serving({"double": doubler(), "other": other}, max_batch=4, max_queue=4) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[grpc.Channel]:
    with channel(server) as made:
        yield made


def session_of(server: Running, name: str) -> FakeSession:
    session = server.sessions[name]
    assert isinstance(session, FakeSession)
    return session


class Talk:
    """A stream on which the test speaks when it wants to."""

    def __init__(self, made: grpc.Channel, **more: Any) -> None:
        self._sent: queue.Queue[Any] = queue.Queue()
        self.call = stream(made)(iter(self._sent.get, None), timeout=WAIT, **more)

    def send(self, message: Any) -> None:
        self._sent.put(message)

    def end(self) -> None:
        self._sent.put(None)


def as_dict(response: Any) -> Any:
    return json_format.MessageToDict(response, preserving_proto_field_name=True, descriptor_pool=pool())


def test_responses_and_errors_are_as_triton_s(client: grpc.Channel) -> None:
    sent = [
        request("double", X, id="a"),
        request("double", X[:, :3], id="shape"),
        request("nope", X, id="model"),
        request("double", BAD, id="run"),
        request("double", X, id="b", parameters={"triton_enable_empty_final_response": {"bool_param": True}}),
    ]
    call = stream(client)(iter(sent), timeout=WAIT)
    responses = list(call)
    assert call.code() is grpc.StatusCode.OK
    final = {"triton_final_response": {"bool_param": True}}
    for response, name in ((responses[0], "a"), (responses[4], "b")):
        assert np.array_equal(array_of(response.infer_response), 2 * X)
        assert response.infer_response.id == name
        assert as_dict(response)["infer_response"]["parameters"] == final
        assert not response.error_message
    assert [as_dict(response) for response in responses[1:4]] == [
        {
            "error_message": "unexpected shape for input 'x' for model 'double'. Expected [-1,4], got [2,3].",
            "infer_response": {"id": "shape"},
        },
        {
            "error_message": "Request for unknown model: 'nope' is not found",
            "infer_response": {"id": "model"},
        },
        {
            "error_message": "model 'double' cannot run on this input: row cannot be used",
            "infer_response": {"model_name": "double", "id": "run", "parameters": final},
        },
    ]


def test_responses_and_refusals_explain_themselves_where_asked(server: Running, client: grpc.Channel) -> None:
    asks = {"infera_trace": {"bool_param": True}}
    session = session_of(server, "double")
    session.block()
    talk = Talk(client)
    talk.send(request("double", X, parameters=asks))
    session.wait_entered()
    with channel(server) as other:  # a stream has at most as many requests as a queue
        waiting = [Talk(other) for _ in range(4)]
        for number, one in enumerate(waiting, 1):
            one.send(request("double", X))
            one.end()
            until(lambda number=number: server.model("double").queued == number)  # type: ignore[misc]
        talk.send(request("double", X, parameters=asks))
        talk.send(request("double", BAD[:, :3], parameters=asks))
        talk.send(request("nope", X, parameters=asks))
        talk.end()
        until(lambda: server.model("double").stats.refused["queue_full"] > 0)
        session.gate.set()
        found = [
            response.infer_response.parameters["infera_trace"].string_param
            if "infera_trace" in response.infer_response.parameters
            else ""
            for response in talk.call
        ]
        assert [len(list(one.call)) for one in waiting] == [1] * 4
    assert "requests=1, rows=2, " in found[0]
    assert found[1].startswith('refused="queue_full", retry-after=')
    assert found[2:] == ['refused="no run"'] * 2


def test_what_is_refused_while_it_is_read_explains_itself_where_asked(server: Running, client: grpc.Channel) -> None:
    asks = {"infera_trace": {"bool_param": True}}
    known: list[Any] = [request("double", X, parameters=asks), request("double", X)]
    for entry in known:
        entry.raw_input_contents[0] = b"short"  # of a header that came before, the second time
    bad = [*known, *known, request("double", BAD[:, :3], parameters=asks), request("double", BAD[:, :3])]
    bad += [request("nope", X, parameters=asks), request("double", X, parameters={"infera_trace": {"int64_param": 1}})]
    found = [
        "infera_trace" in response.infer_response.parameters for response in stream(client)(iter(bad), timeout=WAIT)
    ]
    assert found == [True, False, True, False, True, False, True, False]


def test_what_is_no_message_is_answered_and_the_stream_goes_on(client: grpc.Channel) -> None:
    call = client.stream_stream(METHOD + "ModelStreamInfer")(
        iter([b"\xff\xff", request("double", X).SerializeToString()])
    )
    assert len(list(call)) == 2


def test_an_empty_stream(client: grpc.Channel) -> None:
    call = stream(client)(iter([]), timeout=WAIT)
    assert list(call) == []
    assert call.code() is grpc.StatusCode.OK


def test_responses_keep_the_order_of_requests_whatever_ends_first(server: Running, client: grpc.Channel) -> None:
    slow = session_of(server, "double")
    slow.block()
    talk = Talk(client)
    talk.send(request("double", X, id="slow"))
    slow.wait_entered()
    done = session_of(server, "other").batches
    done.clear()
    talk.send(request("other", X, id="fast"))
    talk.send(request("nope", X, id="bad"))
    talk.end()
    until(lambda: bool(done))
    slow.gate.set()
    assert [response.infer_response.id for response in talk.call] == ["slow", "fast", "bad"]


def test_requests_on_one_stream_share_batches(server: Running, client: grpc.Channel) -> None:
    session = session_of(server, "double")
    flat(server.model("double").batcher)
    session.block()
    talk = Talk(client)
    talk.send(request("double", X[:1]))
    session.wait_entered()
    for number in range(1, 4):
        talk.send(request("double", X[:1] + number))
    until(lambda: server.host.repository.get("double").queued == 3)
    session.gate.set()
    talk.end()
    assert [array_of(r.infer_response)[0, 0] for r in talk.call] == [0, 2, 4, 6]
    assert session.batches == [1, 4]  # the three, padded


def test_no_more_is_read_than_may_wait(server: Running, client: grpc.Channel) -> None:
    """A stream has as many requests under way as a model may have waiting; those beyond are read later."""
    session = session_of(server, "double")
    session.block()
    talk = Talk(client)
    for number in range(20):
        talk.send(request("double", X[:1] + number))
    talk.end()
    session.wait_entered()
    session.gate.set()
    assert [array_of(r.infer_response)[0, 0] for r in talk.call] == [2 * n for n in range(20)]


def test_a_client_that_leaves_takes_its_requests_along(server: Running, client: grpc.Channel) -> None:
    session, model = session_of(server, "double"), server.host.repository.get("double")
    session.block()
    talk = Talk(client)
    talk.send(request("double", X))
    session.wait_entered()
    for _ in range(2):
        talk.send(request("double", X))
    until(lambda: model.queued == 2)
    talk.call.cancel()
    until(lambda: model.queued == 0)
    session.gate.set()
    assert session.batches == [2]


def test_a_drain_answers_what_was_read_and_ends_the_stream() -> None:
    session = doubler()
    with serving({"double": session}) as running, channel(running) as made:
        talk = Talk(made)
        session.block()
        talk.send(request("double", X, id="accepted"))
        session.wait_entered()
        running.host.server.should_exit = True
        until(lambda: running.host.service.draining)
        talk.send(request("double", X, id="late"))
        late = next_answers(talk, session)
        assert [(r.infer_response.id, r.error_message) for r in late] == [
            ("accepted", ""),
            ("late", "the server is shutting down; send the request to another one"),
        ]
        with pytest.raises(grpc.RpcError) as error:
            next(talk.call)
        assert status_of(error) == ("UNAVAILABLE", "the server is shutting down; send the request to another one")


def test_what_is_being_read_at_the_end_is_refused_and_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    async def endless(*arguments: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Inference, "prepare", endless)
    with serving({"double": doubler()}) as running, channel(running) as made:
        talk = Talk(made)
        talk.send(request("double", X, id="half"))
        assert begun.wait(WAIT)
        running.host.server.should_exit = True
        refused = next(talk.call)
        text = "the server is shutting down; send the request to another one"
        assert (refused.infer_response.id, refused.error_message) == ("half", text)
        with pytest.raises(grpc.RpcError) as error:
            next(talk.call)
        assert status_of(error) == ("UNAVAILABLE", text)


def next_answers(talk: Talk, session: FakeSession) -> list[Any]:
    """Two responses; the run of the first goes on once the second waits behind it."""
    session.gate.set()
    return [next(talk.call), next(talk.call)]
