"""What a client may not do with a connection: wait, send without end, hold, half-speak."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from infera_server.codec import Buffer
from infera_server.errors import Overloaded
from infera_server.http import exchange, replying
from infera_server.http.connection import TURN, Connection
from infera_server.http.exchange import INLINE_CODED_BYTES
from tests.server.support import (
    WAIT,
    FakeSession,
    Running,
    any_width,
    doubler,
    http_request,
    read_reply,
    request_of,
    serving,
    until,
)

X = np.arange(4, dtype=np.float32).reshape(1, 4)
BODY = json.dumps(request_of(X)).encode()
GET = b"GET /v2/models/double HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
MANAGEMENT = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler(), "any": any_width()}, max_batch=8) as running:
        yield running


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    with serving({"double": doubler()}, request_timeout=0.3, drain_timeout=5) as running:
        yield running


def ask(server: Running, *pieces: bytes, replies: int = 1) -> list[tuple[int, dict[str, str], bytes]]:
    with server.connect() as sock, sock.makefile("rb") as stream:
        for piece in pieces:
            sock.sendall(piece)
        return [read_reply(stream) for _ in range(replies)]


# --- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"), [(b"", 0), (b"GET /v2/hea", 408), (GET[:-2], 408), (MANAGEMENT, 408), (MANAGEMENT + b"{", 408)]
)
def test_a_client_that_sends_no_more_is_not_waited_for(impatient: Running, sent: bytes, status: int) -> None:
    began = time.monotonic()
    (found,) = ask(impatient, sent)
    assert found[0] == status
    if status:
        assert "did not arrive in 0.3 s" in json.loads(found[2])["error"]
    assert time.monotonic() - began > 0.25


def test_a_client_that_is_kept_waiting_is_not_cut_off() -> None:
    session = doubler()
    with (
        serving({"double": session}, request_timeout=2.0, drain_timeout=5) as running,
        running.connect() as sock,
        sock.makefile("rb") as stream,
    ):
        session.block()
        sock.sendall(http_request(BODY) + GET[:-2])
        session.wait_entered()
        assert read_reply(stream)[0] == 504  # the run is over the limit, not the client
        sock.sendall(GET[-2:])
        assert read_reply(stream)[0] == 200
        session.gate.set()


def test_a_management_body_that_does_not_come_delays_no_exit(caplog: pytest.LogCaptureFixture) -> None:
    with serving({"double": doubler()}, drain_timeout=10 * WAIT) as running, running.connect() as sock:
        sock.sendall(MANAGEMENT)
        until(lambda: any(connection.in_body for connection in running.host.service.connections))
        running.host.server.should_exit = True
        with sock.makefile("rb") as stream:
            status, _, body = read_reply(stream)
        assert status == 503
        assert "shutting down" in json.loads(body)["error"]
    assert not [record for record in caplog.records if record.exc_info]


def test_a_client_that_leaves_in_a_management_body_is_not_worth_a_traceback(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with server.connect() as sock:
        sock.sendall(MANAGEMENT)
        until(lambda: bool(server.host.server.server_state.tasks))
    until(lambda: not server.host.server.server_state.tasks)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_client_that_leaves_with_more_on_its_way_is_not_worked_for(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the request at work that is cancelled, not only the last one that came."""
    session = server.sessions["double"]
    assert isinstance(session, FakeSession)
    session.block()
    model = server.host.repository.get("double")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.infer, "double", request_of(X))
        session.wait_entered()
        with server.connect() as sock:
            sock.sendall(
                http_request(b'{"x": [0, 1, 2, 3]}', path="/v2/models/double/generate") + GET + http_request(BODY)
            )
            until(lambda: model.queued == 1)
        until(lambda: model.queued == 0)
        session.gate.set()
        assert first.result(WAIT)[0] == 200
    until(lambda: server.host.service.intake.held == 0)
    assert not [record for record in caplog.records if record.exc_info]


# --- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endless", [CHUNKED + b"1\r\n{\r\n0\r\n" + b"a: b\r\n" * 100_000, CHUNKED + b"1;" + b"x" * 800_000]
)
def test_trailers_and_chunk_extensions_end(server: Running, endless: bytes) -> None:
    ((status, headers, _),) = ask(server, endless)
    assert (status, headers["connection"]) == (431, "close")


def test_trailers_are_not_kept(server: Running) -> None:
    one = b"%x\r\n%s\r\n0\r\n%s\r\n" % (len(BODY), BODY, b"x: y\r\n" * 100)
    with server.connect() as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            sock.sendall(CHUNKED + one)
            assert read_reply(stream)[0] == 200
        (connection,) = server.host.service.connections
        assert [name for name, _ in connection.headers] == [b"host", b"transfer-encoding"]


def test_bodies_on_their_way_have_a_budget() -> None:
    with serving({"double": doubler()}, max_intake_bytes=100_000) as running, running.connect() as first:
        intake = running.host.service.intake
        first.sendall(http_request(bytes(60_000), length=80_000))
        until(lambda: intake.held == 60_000)
        with running.connect() as second, second.makefile("rb") as stream:
            second.sendall(http_request(b"", length=50_000, headers="Expect: 100-continue\r\n"))
            status, headers, _ = read_reply(stream)
            assert (status, headers["retry-after"]) == (429, "1")
        size = b"%x\r\n" % 50_000
        assert ask(running, CHUNKED, size, bytes(50_000), b"\r\n0\r\n\r\n")[0][0] == 429
        assert intake.held == 60_000
        assert ask(running, http_request(BODY))[0][0] == 200
        first.close()
        until(lambda: intake.held == 0)


@pytest.mark.parametrize("path", ["/v2/models/double/infer", "/v2/models/double/generate"])
def test_too_large_a_body_is_counted_however_it_comes(path: str) -> None:
    chunked = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n".encode() + bytes(1000)
    with serving({"double": doubler()}, max_body_bytes=999, max_json_bytes=999) as running:
        for sent in (
            http_request(bytes(1000), path=path),
            chunked,
            http_request(b"", path="/v2/models/nope/infer", length=1000),
        ):
            ((status, _, _),) = ask(running, sent)
            assert status == 413
        stats = running.host.repository.get("double").stats
        assert (dict(stats.statuses), dict(stats.refused)) == ({413: 2}, {"too_large": 2})


def test_json_has_a_limit_of_its_own() -> None:
    with serving({"double": doubler()}, max_json_bytes=1000) as running:
        ((status, _, body),) = ask(running, http_request(BODY + b" " * 1000))
        assert status == 413
        assert "send large tensors in binary" in json.loads(body)["error"]
        raw = http_request(bytes(4 * 4 * 80), headers="Inference-Header-Content-Length: 0\r\n")
        assert ask(running, raw)[0][0] == 400  # not 413: 80 rows are no raw request, but no JSON either


@pytest.mark.parametrize("pack", [None, gzip.compress])
def test_large_bodies_are_read_beside_the_event_loop(
    server: Running, monkeypatch: pytest.MonkeyPatch, pack: object
) -> None:
    """While one is read others are answered, and on its connection the order stays."""
    real, on_loop = exchange.decode, []

    def slow(body: Buffer, *rest: object) -> object:
        with contextlib.suppress(RuntimeError):
            on_loop.append(asyncio.get_running_loop())
        time.sleep(0.2)
        return real(body, *rest)  # type: ignore[arg-type]

    x = np.random.default_rng(0).standard_normal((1, 100_000)).astype(np.float32)
    document = {
        "inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
    body, headers = json.dumps(document).encode(), ""
    if callable(pack):
        body, headers = pack(body), "Content-Encoding: gzip\r\n"
    monkeypatch.setattr("infera_server.http.hotpath.decode", slow)
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(body, path="/v2/models/any/infer", headers=headers) + GET)
        status, found, reply = read_reply(stream)
        assert status == 200
        np.testing.assert_array_equal(
            np.frombuffer(reply[int(found["inference-header-content-length"]) :], np.float32), x.ravel() * 2
        )
        assert json.loads(read_reply(stream)[2])["name"] == "double"
    assert not on_loop
    assert server.host.service.intake.held == 0


def test_a_client_that_leaves_while_its_body_is_read_does_not_run(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, begun, left = server.sessions["any"], threading.Event(), threading.Event()
    assert isinstance(session, FakeSession)
    session.batches.clear()

    def slow(*arguments: object) -> object:
        begun.set()
        assert left.wait(WAIT)
        return exchange.decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("infera_server.http.hotpath.decode", slow)
    body = json.dumps(request_of(np.zeros((1, 100_000), np.float32))).encode()
    with server.connect() as sock:
        sock.sendall(http_request(body, path="/v2/models/any/infer"))
        assert begun.wait(WAIT)
        assert server.host.service.intake.held == len(body)
    until(lambda: not server.host.service.connections)
    left.set()
    until(lambda: server.host.service.intake.held == 0)
    assert server.infer("any", request_of(np.zeros((2, 4), np.float32)))[0] == 200  # behind it, if it ran
    assert session.batches == [2]


# --- turns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one", [GET, http_request(BODY), http_request(b"", path="/v2/models/nope/infer"), http_request(b"{")],
    ids=["metadata", "inference", "no such model", "no JSON"],
)  # fmt: skip
def test_a_client_that_sends_without_end_holds_nobody_up(server: Running, one: bytes) -> None:
    """Its requests wait in its socket, not in memory, and others have their turn."""
    until(lambda: not server.host.service.connections)
    done = threading.Event()
    with server.connect() as sock, ThreadPoolExecutor(2) as pool:
        until(lambda: len(server.host.service.connections) == 1)
        (flooded,) = server.host.service.connections

        def flood() -> None:
            with contextlib.suppress(OSError):
                while not done.is_set():
                    sock.sendall(one * 2000)

        def read() -> None:
            with contextlib.suppress(OSError):
                while sock.recv(1 << 20):
                    pass

        pool.submit(flood)
        pool.submit(read)
        until(lambda: flooded.begun > 3000)
        waiting = []
        for _ in range(5):
            assert server.infer("double", request_of(X))[0] == 200
            waiting.append(len(flooded.pipeline))
        most = server.call(most_in_a_turn(flooded, 1000))
        done.set()
        sock.shutdown(socket.SHUT_RDWR)
    assert max(waiting) < 4 * TURN
    assert most < 4 * TURN


async def most_in_a_turn(connection: Connection, requests: int) -> int:
    """Of so many requests of a connection, the most that begin before others have their turn."""
    most, until = 0, connection.begun + requests
    while (before := connection.begun) < until:
        await asyncio.sleep(0)
        most = max(most, connection.begun - before)
    return most


# --- number --------------------------------------------------------------------------------------------------------


def test_connections_have_a_limit_and_the_idlest_goes_first() -> None:
    with serving({"double": doubler()}, max_connections=3) as running, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(running.connect()) for _ in range(3)]
        until(lambda: len(running.host.service.connections) == 3)
        assert running.get("/v2/health/live")[0] == 200
        assert idle[0].recv(1) == b""
        until(lambda: len(running.host.service.connections) == 2)
        session = running.sessions["double"]
        assert isinstance(session, FakeSession)
        session.block()
        busy = [stack.enter_context(running.connect()) for _ in range(3)]
        for sock in busy:
            sock.sendall(http_request(BODY))
            if sock is busy[0]:
                session.wait_entered()
        until(lambda: running.host.repository.get("double").queued == 2)
        ((status, _, body),) = ask(running)
        assert status == 503
        assert "3 connections are open" in json.loads(body)["error"]
        session.gate.set()
        for sock in busy:
            with sock.makefile("rb") as stream:
                assert read_reply(stream)[0] == 200


def with_a_full_queue(running: Running, pool: ThreadPoolExecutor) -> tuple[FakeSession, list[Future[tuple[int, Any]]]]:
    """One request in a blocked run of "double" and one in its queue of one; the session, and their answers to come."""
    session = running.sessions["double"]
    assert isinstance(session, FakeSession)
    session.block()
    calls = [pool.submit(running.infer, "double", request_of(X))]
    session.wait_entered()
    calls.append(pool.submit(running.infer, "double", request_of(X)))
    until(lambda: running.host.repository.get("double").queued == 1)
    return session, calls


def test_a_full_queue_refuses_before_the_body_is_sent() -> None:
    with serving({"double": doubler()}, max_queue=1) as running, ThreadPoolExecutor(2) as pool:
        session, calls = with_a_full_queue(running, pool)
        ((status, _, _),) = ask(running, http_request(b"", length=100, headers="Expect: 100-continue\r\n"))
        assert status == 429
        session.gate.set()
        assert [call.result(WAIT)[0] for call in calls] == [200, 200]


@pytest.mark.parametrize("known", [False, True], ids=["new heads", "a head that came before"])
def test_nothing_is_left_of_refused_requests(known: bool) -> None:
    """A traceback holds the request, which must not hold the error: only the garbage collection would free them."""
    with serving({"double": doubler()}, max_queue=1) as running, ThreadPoolExecutor(2) as pool:
        session, calls = with_a_full_queue(running, pool)
        gc.collect()
        gc.disable()
        try:
            with running.connect() as sock, sock.makefile("rb") as stream:
                for i in range(20):
                    sock.sendall(http_request(BODY, headers="" if known else f"X-Number: {i}\r\n"))
                    assert read_reply(stream)[0] == 429
                left = sum(type(found) is Overloaded for found in gc.get_objects())
        finally:
            gc.enable()
        assert left <= 1, "the last one may be on its way"
        session.gate.set()
        assert [call.result(WAIT)[0] for call in calls] == [200, 200]


# --- speech --------------------------------------------------------------------------------------------------------


def test_thousands_of_upgrade_offers_in_one_piece(server: Running) -> None:
    offer = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert {status for status, _, _ in ask(server, offer * 4000, replies=4000)} == {200}


def test_an_upgrade_offer_takes_no_other_token_with_it(server: Running) -> None:
    offer = http_request(BODY, headers="Connection: close, Upgrade\r\nUpgrade: h2c\r\n")
    (first, second) = ask(server, offer + b"and what follows the end", replies=2)
    assert (first[0], first[1]["connection"], second[0]) == (200, "close", 0)


def test_what_does_not_parse_waits_for_the_replies_before_it(server: Running) -> None:
    found = ask(server, GET + b"junk junk junk\r\n\r\n", replies=3)
    assert [status for status, _, _ in found] == [200, 400, 0]
    assert "error" in json.loads(found[1][2])


def test_a_management_body_that_does_not_parse_is_refused_in_json(server: Running) -> None:
    head = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for before in (b"", GET):
        found = ask(server, before + head + b"zz\r\n", replies=2 if before else 1)
        status, headers, body = found[-1]
        assert (status, headers["content-type"]) == (400, "application/json")
        assert "error" in json.loads(body)


@pytest.mark.parametrize(
    "last",
    [
        http_request(BODY, headers="Connection: close\r\n"),
        http_request(BODY, path="/v2/models/nope/infer", headers="Connection: close\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        CHUNKED.replace(b": chunked", b": gzip, chunked") + b"1\r\n{\r\n0\r\n\r\n",
        CHUNKED[:-2] + b"Expect: 100-continue\r\nContent-Encoding: br\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_follows_the_last_request_is_not_read(server: Running, last: bytes) -> None:
    """Though it came in one piece with it: no model is unloaded, and of the bodies nothing is held."""
    unload = b"POST /v2/repository/models/any/unload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n"
    first, second = ask(server, last + http_request(BODY) * 3 + unload, replies=2)
    assert (first[1]["connection"], second[0]) == ("close", 0)
    assert server.infer("any", request_of(X))[0] == 200
    until(lambda: server.host.service.intake.held == 0)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (CHUNKED.replace(b": chunked", b": gzip, chunked") + b"1\r\n{\r\n0\r\n\r\n", 501),
        (http_request(BODY).replace(b"HTTP/1.1", b"HTTP/2.0"), 505),
        (GET.replace(b"HTTP/1.1", b"HTTP/2.0"), 505),
    ],
)
def test_what_is_not_spoken_here_is_refused(server: Running, request_: bytes, status: int) -> None:
    found = ask(server, request_, replies=2)
    assert [reply[0] for reply in found] == [status, 0]
    assert "error" in json.loads(found[0][2])


def test_a_client_that_sends_no_more_gets_its_answer(server: Running) -> None:
    session = server.sessions["double"]
    assert isinstance(session, FakeSession)
    session.block()
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(BODY))
        sock.shutdown(socket.SHUT_WR)
        session.wait_entered()
        assert read_reply(stream)[0] == 100
        time.sleep(0.3)  # past a look at the connections
        session.gate.set()
        assert read_reply(stream)[0] == 200
        assert stream.read() == b""


LONG = np.zeros((1, 200_000), np.float32)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("accept", ["gzip", "identity"])
def test_large_replies_are_written_in_another_thread(
    server: Running, monkeypatch: pytest.MonkeyPatch, binary: bool, accept: str
) -> None:
    """What is sent as it lies needs none; nor does what is small."""
    loops: list[bool] = []
    real = replying.written

    def spied(*arguments: Any) -> replying.Written:
        loops.append(threading.current_thread() is own)
        return real(*arguments)

    own = server.call(_thread())
    monkeypatch.setattr(replying, "written", spied)
    outputs = [{"name": "y", "parameters": {"binary_data": binary}}]
    for x in (LONG, LONG[:, :4]):
        document = {
            "inputs": [
                {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
            ],
            "outputs": outputs,
        }
        head = json.dumps(document).encode()
        headers = {"Inference-Header-Content-Length": str(len(head)), "Accept-Encoding": accept}
        status, found, body = server.request("POST", "/v2/models/any/infer", head + x.tobytes(), headers)
        assert (status, found["content-encoding"]) == (200, None if accept == "identity" else accept)
        body = gzip.decompress(body) if accept == "gzip" else body
        if binary:
            assert body.endswith(x.tobytes())
        else:
            assert json.loads(body)["outputs"][0]["data"] == x.ravel().tolist()
    assert loops == [binary and accept == "identity", True]


async def _thread() -> threading.Thread:
    return threading.current_thread()


def test_a_client_that_leaves_while_its_reply_is_written(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, done, real = threading.Event(), threading.Event(), replying.written

    def slow(*arguments: Any) -> replying.Written:
        begun.set()
        time.sleep(0.1)
        done.set()
        return real(*arguments)

    monkeypatch.setattr(replying, "written", slow)
    body = json.dumps(request_of(LONG)).encode()
    with server.connect() as sock:
        sock.sendall(http_request(body, path="/v2/models/any/infer"))
        assert begun.wait(WAIT)
    assert done.wait(WAIT)
    assert server.infer("any", request_of(LONG[:, :4]))[0] == 200


def test_what_a_small_body_makes_of_much_is_read_in_another_thread(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def spied(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return exchange.decode(*arguments)

    monkeypatch.setattr("infera_server.http.hotpath.decode", spied)
    for width in (LONG.size, 4):
        body = gzip.compress(json.dumps(request_of(LONG[:, :width])).encode())
        assert len(body) < INLINE_CODED_BYTES
        assert server.request("POST", "/v2/models/any/infer", body, {"Content-Encoding": "gzip"})[0] == 200
    own = server.call(_thread())
    assert [thread is own for thread in threads] == [False, True]


def test_connections_that_come_at_once_are_taken_in_a_few_turns_of_a_busy_event_loop(server: Running) -> None:
    """libuv takes one of each listener in a turn: the last would wait for as many turns as there are connections."""
    count, turns, busy = 48, 0, threading.Event()
    busy.set()

    def turn() -> None:
        nonlocal turns
        if busy.is_set():
            time.sleep(0.005)
            turns += 1
            server.loop.call_soon(turn)

    server.loop.call_soon_threadsafe(turn)
    try:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(server.connect()) for _ in range(count)]
            before = turns
            for connection in connections:
                connection.sendall(GET)
            for connection in connections:
                assert read_reply(stack.enter_context(connection.makefile("rb")))[0] == 200
            assert turns - before < count
    finally:
        busy.clear()


def test_many_connections_over_the_limit_at_once_let_as_many_go() -> None:
    with serving({"double": doubler()}, max_connections=6) as running, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(running.connect()) for _ in range(6)]
        until(lambda: len(running.host.service.connections) == 6)
        entered, go_on = threading.Event(), threading.Event()

        def stand_still() -> None:
            entered.set()
            assert go_on.wait(WAIT)

        running.loop.call_soon_threadsafe(stand_still)
        assert entered.wait(WAIT)
        new = [stack.enter_context(running.connect()) for _ in range(5)]  # all taken in one turn of the event loop
        go_on.set()
        for sock in idle[:5]:
            assert sock.recv(1) == b""
        for sock in (idle[5], *new):
            sock.sendall(GET)
            with sock.makefile("rb") as stream:
                assert read_reply(stream)[0] == 200
