"""Clients that have sent all that they will, and wait for their replies: every request is answered, in its order."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from infera_server.http.connection import PIECE, TURN
from infera_server.http.upload import LARGE
from tests.server.support import (
    WAIT,
    FakeSession,
    Running,
    any_width,
    http_request,
    read_reply,
    request_of,
    serving,
    until,
)

X = np.arange(4, dtype=np.float32).reshape(1, 4)
BODY = json.dumps(request_of(X)).encode()
PATH = "/v2/models/any/infer"
LOOKED_UP = b"GET /v2/models/any HTTP/1.1\r\nHost: x\r\n\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
POSTED = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
MIX = [
    (http_request(BODY, PATH), 200), (LOOKED_UP, 200), (http_request(BODY, "/v2/models/nope/infer"), 404),
    (http_request(b"{", PATH), 400), (POSTED, 200), (LIVE, 200), (http_request(BODY, PATH), 200),
    (b"GET /v2/nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"any": any_width()}, max_batch=8) as running:
        yield running


def statuses(stream: Any) -> list[int]:
    """Of all replies until the connection ends, without interim ones."""
    found = []
    while status := read_reply(stream)[0]:
        if status != 100:
            found.append(status)
    return found


def send(sock: socket.socket, sent: bytes, size: int) -> None:
    for start in range(0, len(sent), size):
        sock.sendall(sent[start : start + size])
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("size", [1, 7, 100, PIECE - 1, PIECE, PIECE + 1, 1 << 30])
@pytest.mark.parametrize("count", [1, 2, TURN, 5 * TURN + 3])
def test_what_was_sent_before_the_end_is_answered(server: Running, count: int, size: int) -> None:
    wanted = [MIX[i % len(MIX)] for i in range(count if size > 7 else min(count, TURN))]
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender = threading.Thread(target=send, args=(sock, b"".join(sent for sent, _ in wanted), size))
        sender.start()
        assert statuses(stream) == [status for _, status in wanted]
        sender.join()


@pytest.mark.parametrize("one", [sent for sent, _ in MIX], ids=range(len(MIX)))
def test_many_of_a_kind_before_the_end(server: Running, one: bytes) -> None:
    status = dict(MIX)[one]
    with server.connect() as sock, sock.makefile("rb") as stream:
        sender = threading.Thread(target=send, args=(sock, one * (4 * TURN), 1 << 30))
        sender.start()
        assert statuses(stream) == [status] * (4 * TURN)
        sender.join()


@pytest.mark.parametrize(("part", "last"), [
    (LIVE[:-3], []), (http_request(BODY, PATH)[:-3], [400]), (POSTED[:-1], [400]), (b"what is this\r\n\r\n", [400]),
    (http_request(b"x", PATH, length=LARGE), [400]),
], ids=["a head", "a body", "a body of management", "what does not parse", "a large body"])  # fmt: skip
@pytest.mark.parametrize("before", [0, 1, len(MIX), 3 * TURN])
def test_a_message_that_ends_too_early_is_refused_after_the_replies_before_it(
    server: Running, before: int, part: bytes, last: list[int]
) -> None:
    wanted = [MIX[i % len(MIX)] for i in range(before)]
    with server.connect() as sock, sock.makefile("rb") as stream:
        send(sock, b"".join(sent for sent, _ in wanted) + part, 1 << 30)
        assert statuses(stream) == [status for _, status in wanted] + last


def test_what_was_refused_before_its_body_ended_stays_refused_so(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(BODY, PATH, length=1 << 40))
        sock.shutdown(socket.SHUT_WR)
        assert read_reply(stream)[0] == 413


@pytest.mark.parametrize("ends", [True, False], ids=["half-closed", "open"])
@pytest.mark.parametrize("pause", [0.0, 0.02], ids=["reading", "reading slowly"])
def test_a_slow_reader_of_many_replies_gets_them_all(server: Running, pause: float, ends: bool) -> None:
    """Writing is paused and resumed while requests wait in the pipeline, unparsed, and in the socket."""
    wide = http_request(json.dumps(request_of(np.zeros((1, 5000), np.float32))).encode(), PATH)
    wanted = [*MIX, (wide, 200)] * 40
    with contextlib.closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(WAIT)
        sock.connect(("127.0.0.1", server.port))
        sent = b"".join(sent for sent, _ in wanted)
        sender = threading.Thread(target=send if ends else lambda s, b, _: s.sendall(b), args=(sock, sent, 1 << 30))
        sender.start()
        with sock.makefile("rb") as stream:
            found: list[int] = []
            while len(found) < len(wanted):
                status = read_reply(stream)[0]
                assert status
                found += [status] if status != 100 else []
                if not len(found) % 20:
                    time.sleep(pause)
            assert found == [status for _, status in wanted]
            sender.join()
            if ends:
                assert stream.read() == b""


def test_who_is_gone_is_not_answered(server: Running) -> None:
    """Its end looks like that of one who waits, until the interim response is met by a reset."""
    session, model = server.sessions["any"], server.host.repository.get("any")
    assert isinstance(session, FakeSession)
    session.block()
    with server.connect() as stays, stays.makefile("rb") as stream:
        stays.sendall(http_request(BODY, PATH))
        session.wait_entered()
        with server.connect() as gone:
            gone.sendall(http_request(BODY, PATH))
            until(lambda: model.queued == 1)
        until(lambda: model.queued == 0)
        stays.shutdown(socket.SHUT_WR)
        session.gate.set()
        assert statuses(stream) == [200]
    assert session.batches == [1]
