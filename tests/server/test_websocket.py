"""Inference over a WebSocket, with the client of the library `websockets`."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from infera_server.access import Access, Key, make_key
from infera_server.http import websocket_protocol
from infera_server.http.websocket import MAX_UNDER_WAY, PREFIX
from infera_server.http.websocket_protocol import TRY_LATER
from infera_server.scheduling.rows import HostArray
from tests.server.support import (
    WAIT,
    FakeSession,
    Running,
    doubler,
    http_request,
    read_reply,
    request_of,
    serving,
    until,
)

SERVICE_RESTART = 1012
"""The code of a server that ends and may be back (IANA's registry of RFC 6455)."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}, max_body_bytes=1 << 20, max_json_bytes=4096, max_batch=1 << 14) as running:
        yield running


def stream(running: Running, path: str = "/v2/models/double/stream", **options: Any) -> ClientConnection:
    made: ClientConnection = connect(
        f"ws://{running.address}{path}", open_timeout=WAIT, close_timeout=WAIT, max_size=None, **options
    )
    return made


def rows(count: int, seed: int = 0) -> HostArray:
    return np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)


def binary(x: HostArray, **members: Any) -> bytes:
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    document = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}, **members}).encode()
    return len(document).to_bytes(PREFIX, "little") + document + x.tobytes()


def read(message: bytes | str) -> tuple[dict[str, Any], HostArray]:
    """The document and the one tensor of a response."""
    if isinstance(message, str):
        document = json.loads(message)
        return document, np.array(document["outputs"][0]["data"], np.float32).reshape(document["outputs"][0]["shape"])
    length = int.from_bytes(message[:PREFIX], "little")
    document = json.loads(message[PREFIX : PREFIX + length])
    return document, np.frombuffer(message[PREFIX + length :], np.float32).reshape(document["outputs"][0]["shape"])


def counts(running: Running) -> tuple[dict[int, int], dict[str, int]]:
    """Requests of "double" by status, and refused ones by reason."""
    found = running.host.repository.get("double").stats
    return dict(found.statuses), dict(found.refused)


def test_what_is_refused_while_it_is_read_is_counted() -> None:
    with serving({"double": doubler()}, max_json_bytes=4096) as running:
        with stream(running) as client:
            for sent in ("{", b"\x01", json.dumps(request_of(rows(2), outputs=[{"name": "z"}])), "1" * 4097):
                client.send(sent)
                assert "error" in json.loads(client.recv(10))
            client.send(json.dumps(request_of(rows(2))))
            read(client.recv(10))
        assert counts(running) == ({400: 3, 413: 1, 200: 1}, {"too_large": 1})


def test_both_forms(server: Running) -> None:
    with stream(server) as client:
        for sent in (
            json.dumps(request_of(rows(2), id="t")),
            binary(rows(2), id="b"),
            binary(rows(30_000 // 4, 1), id="l"),
        ):
            client.send(sent)
            message = client.recv(10)
            document, y = read(message)
            assert document["id"] == ("t" if isinstance(sent, str) else "l" if len(sent) > 1000 else "b")
            assert isinstance(message, str) == isinstance(sent, str)
            np.testing.assert_allclose(y, 2 * rows(len(y), int(document["id"] == "l")), rtol=1e-6)


def test_versions_have_streams_too(server: Running) -> None:
    with stream(server, "/v2/models/double/versions/1/stream") as client:
        client.send(json.dumps(request_of(rows(1))))
        assert read(client.recv(10))[0]["model_version"] == "1"


def test_many_are_under_way_and_answers_say_whose_they_are(server: Running) -> None:
    count = 3 * MAX_UNDER_WAY
    with stream(server) as client:
        for i in range(count):
            client.send(binary(rows(1, i), id=str(i)))
        found = [read(client.recv(10)) for _ in range(count)]
    assert sorted(int(document["id"]) for document, _ in found) == list(range(count))
    for document, y in found:
        np.testing.assert_array_equal(y, 2 * rows(1, int(document["id"])))


@pytest.mark.parametrize(
    ("sent", "status", "text"),
    [
        ("{", 400, "failed to parse"),
        ("[]", 400, "inputs"),
        (b"", 400, "begins with the length"),
        (b"\x00\x00\x00\x00{}", 400, "begins with the length"),
        (b"\xff\xff\xff\xff{}", 400, "begins with the length"),
        ("x" * 5000, 413, "at most 4,096"),
        ((5000).to_bytes(4, "little") + bytes(6000), 413, "at most 4,096"),
        (json.dumps({"id": "i", "inputs": []}), 400, "expected 1 inputs but got 0"),
        (json.dumps({"id": "i"}), 400, "inputs"),
        (json.dumps(request_of(np.full((1, 4), -1, np.float32), id="i")), 400, "row cannot be used"),
        (json.dumps(request_of(np.full((1, 4), 666, np.float32), id="i")), 500, "failed"),
    ],
)
def test_what_is_wrong_is_said_and_the_stream_goes_on(server: Running, sent: Any, status: int, text: str) -> None:
    with stream(server) as client:
        client.send(sent)
        answer = json.loads(client.recv(10))
        assert answer["status"] == status
        assert text in answer["error"]
        assert answer.get("id", "") == ("i" if '"id": "i"' in str(sent) else "")
        client.send(json.dumps(request_of(rows(1))))
        np.testing.assert_allclose(read(client.recv(10))[1], 2 * rows(1), rtol=1e-6)


def test_a_response_explains_itself_where_asked(server: Running) -> None:
    asks = {"infera_trace": True}
    with stream(server) as client:
        for sent in (
            json.dumps(request_of(rows(2), parameters=asks)),
            binary(rows(2), parameters=asks | {"binary_data_output": True}),
        ):
            client.send(sent)
            document, y = read(client.recv(10))
            assert "requests=1, rows=2, " in document["parameters"]["infera_trace"]
            np.testing.assert_allclose(y, 2 * rows(2), rtol=1e-6)
        bad = np.full((1, 4), -1, np.float32)
        client.send(json.dumps(request_of(bad, id="i", parameters=asks)))
        answer = json.loads(client.recv(10))
        assert (answer["status"], answer["parameters"]) == (400, {"infera_trace": 'refused="no run"'})
        client.send(json.dumps(request_of(rows(1))))
        assert "parameters" not in read(client.recv(10))[0]


def test_too_large_a_message_ends_the_stream(server: Running) -> None:
    with stream(server) as client:
        client.send(bytes((1 << 20) + 1))
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


def offered(sock: socket.socket) -> None:
    """Has a stream over the socket."""
    address, port = sock.getpeername()
    key = f"Sec-WebSocket-Key: {'A' * 22}==\r\nSec-WebSocket-Version: 13"
    head = f"Host: {address}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}"
    sock.sendall(f"GET /v2/models/double/stream HTTP/1.1\r\n{head}\r\n\r\n".encode())
    reply = b""
    while not reply.endswith(b"\r\n\r\n"):
        reply += sock.recv(1)
    assert reply.startswith(b"HTTP/1.1 101 ")


TOO_LARGE = b"\x82\xff" + (4 << 20).to_bytes(8, "big") + bytes(4)
"""The head of a frame."""


def test_who_sends_too_much_is_read_from_until_it_sees_why(server: Running) -> None:
    """A reset, which what is sent to a closed socket is met by, could come before the close frame is read."""
    with server.connect() as sock:
        offered(sock)
        sock.sendall(TOO_LARGE)
        frame = sock.recv(4, socket.MSG_WAITALL)
        assert frame[0] == 0x88
        assert int.from_bytes(frame[2:4], "big") == 1009
        for _ in range(64):
            sock.sendall(bytes(1 << 16))
        while sock.recv(1 << 10):  # the reason, and the end
            pass


def test_who_goes_on_sending_too_much_is_cut_off(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_protocol, "LINGER_SECONDS", 0.1)
    with server.connect() as sock:
        offered(sock)
        sock.sendall(TOO_LARGE)

        def is_reset() -> bool:
            try:
                sock.sendall(b"\0")
            except ConnectionError:
                return True
            return False

        until(is_reset)


def refusal(running: Running, path: str, **options: Any) -> tuple[int, str]:
    """What a WebSocket that is not opened is answered with: (status, error)."""
    with pytest.raises(InvalidStatus) as refused, stream(running, path, **options):
        pass
    response = refused.value.response
    return response.status_code, json.loads(response.body or b"{}").get("error", "")


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/v2/models/none/stream", 404, "Request for unknown model: 'none' is not found"),
        ("/v2/models/double/versions/9/stream", 404, "'double' version 9 is not found"),
        ("/elsewhere", 404, ""),
    ],
)
def test_there_are_no_others(
    server: Running, path: str, status: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    found, error = refusal(server, path)
    assert found == status
    assert text in error
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], "a refusal is no fault of the server's"


def test_who_leaves_is_forgotten() -> None:
    session = doubler()
    assert isinstance(session, FakeSession)
    with serving({"double": session}) as running:
        session.block()
        with stream(running) as client:
            client.send(binary(rows(1)))
            session.wait_entered()
            for _ in range(4):
                client.send(binary(rows(1)))
            until(lambda: running.model("double").queued == 4)
            client.socket.close()
        until(lambda: running.model("double").queued == 0)
        session.gate.set()
        until(lambda: running.host.service.streams == 0)
        assert running.infer("double", request_of(rows(1)))[0] == 200


def test_a_client_that_asks_for_more_than_it_may_is_not_read_from() -> None:
    session = doubler()
    with serving({"double": session}, max_queue=1000) as running:
        session.block()
        with stream(running) as client:
            client.send(binary(rows(1)))
            session.wait_entered()
            for _ in range(2 * MAX_UNDER_WAY - 1):
                client.send(binary(rows(1)))
            until(lambda: running.model("double").queued >= MAX_UNDER_WAY - 1)
            assert running.model("double").queued <= MAX_UNDER_WAY
            session.gate.set()
            for _ in range(2 * MAX_UNDER_WAY):
                client.recv(10)


def test_keys_and_their_rates() -> None:
    made, table = make_key("one")
    key = Key("one", bytes.fromhex(table.split('"')[1]), rate=1.0)
    with serving({"double": doubler()}, access=Access({"one": key})) as running:
        status, error = refusal(running, "/v2/models/double/stream")
        assert status == 401
        assert "an API key is needed" in error
        with stream(running, additional_headers={"Authorization": f"Bearer {made}"}) as client:
            found = []
            for _ in range(3):
                client.send(json.dumps(request_of(rows(1))))
                found.append(json.loads(client.recv(10)).get("status", 200))
            assert found[-1] == 429


def test_an_offer_elsewhere_is_ignored(server: Running) -> None:
    """HTTP goes on where there is no stream."""
    offer = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    )
    with server.connect() as sock, sock.makefile("rb") as file:
        sock.sendall(http_request(json.dumps(request_of(rows(1))).encode(), headers=offer))
        assert read_reply(file)[0] == 200


def test_what_has_arrived_of_messages_counts_as_bodies_do() -> None:
    half = bytes(600_000)
    with serving({"double": doubler()}, max_intake_bytes=1_000_000, max_batch=1 << 16) as running:
        intake = running.host.service.intake
        for pieces in (half, iter([half[:500_000], half[500_000:]])):  # a frame, and two fragments
            with stream(running) as slow, stream(running) as client:
                slow.socket.sendall(b"\x82\xff" + (2 * len(half)).to_bytes(8, "big") + bytes(4) + half)
                until(lambda: intake.held >= len(half))
                with contextlib.suppress(ConnectionClosed):  # before all of it was sent
                    client.send(pieces)
                with pytest.raises(ConnectionClosed) as refused:
                    client.recv()
                assert refused.value.rcvd is not None
                assert refused.value.rcvd.code == TRY_LATER
                assert "bytes of request bodies are being received" in refused.value.rcvd.reason
                slow.socket.close()
            until(lambda: intake.held == 0)
        with stream(running) as client:
            client.send(binary(rows(30_000)))
            assert read(client.recv())[1].shape == (30_000, 4)
        until(lambda: intake.held == 0)


def test_at_the_end_what_was_accepted_is_answered_and_streams_are_closed() -> None:
    session = doubler()
    with serving({"double": session}) as running, stream(running) as idle, stream(running) as busy:
        session.block()
        busy.send(binary(rows(1), id="accepted"))
        session.wait_entered()
        running.host.server.should_exit = True
        until(lambda: running.host.service.draining)
        busy.send(binary(rows(1), id="late"))
        assert json.loads(busy.recv(WAIT))["status"] == 503
        session.gate.set()
        document, y = read(busy.recv(WAIT))
        assert document["id"] == "accepted"
        np.testing.assert_array_equal(y, 2 * rows(1))
        for client in (idle, busy):
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(WAIT)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == SERVICE_RESTART


def test_a_client_that_does_not_close_its_stream_does_not_hold_the_end_up() -> None:
    """It answers no close frame: the end comes once replies had their time to leave."""
    with serving({"double": doubler()}, drain_timeout=1.0) as running, contextlib.closing(running.connect()) as sock:
        offered(sock)
        until(lambda: running.host.service.streams == 1)
        running.host.server.should_exit = True
        until(lambda: running.loop.is_closed())
