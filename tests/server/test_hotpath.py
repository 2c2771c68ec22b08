"""Inference over sockets: framing, order, limits, overload, leaving clients."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from infera_server.http import hotpath
from infera_server.http.exchange import Exchange, infer_target
from infera_server.http.hotpath import HotPathProtocol
from infera_server.http.upload import LARGE
from tests.server.support import (
    WAIT,
    FakeSession,
    Running,
    any_width,
    doubler,
    flat,
    http_request,
    read_reply,
    request_of,
    serving,
    spec,
    until,
)

LIMIT = 100_000
X = np.arange(4, dtype=np.float32).reshape(1, 4)
BODY = json.dumps(request_of(X)).encode()
REFUSED = (403, 404)
"""What there is not, or is not for a page of another host."""


@pytest.fixture(scope="module", params=[LARGE, 1], ids=["parsed", "read by itself"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    """Bodies from so many bytes on are read past the parser."""
    with pytest.MonkeyPatch.context() as patch, serving_from(request.param, patch) as running:
        yield running


@contextlib.contextmanager
def serving_from(large: int, patch: pytest.MonkeyPatch) -> Iterator[Running]:
    patch.setattr(hotpath, "LARGE", large)
    with serving({"double": doubler(), "any": any_width()}, max_body_bytes=LIMIT, max_batch=8) as running:
        yield running


@contextlib.contextmanager
def blocked(running: Running, name: str = "double") -> Iterator[FakeSession]:
    """The model does not answer inside; one request is in its run."""
    session = running.sessions[name]
    assert isinstance(session, FakeSession)
    session.block()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.infer, name, request_of(X))
        session.wait_entered()
        try:
            yield session
        finally:
            session.gate.set()
            assert first.result(WAIT)[0] == 200


def queued(running: Running, name: str = "double") -> int:
    return running.host.repository.get(name).queued


def outputs(document: bytes) -> list[float]:
    found: list[float] = json.loads(document)["outputs"][0]["data"]
    return found


@pytest.mark.parametrize(
    ("url", "target"),
    [
        (b"/v2/models/m/infer", ("m", None)),
        (b"/v2/models/m/infer?x=/infer", ("m", None)),
        (b"/v2/models/m/versions/12/infer", ("m", "12")),
        (b"/v2/models/m%6C/infer", ("ml", None)),
        (b"/v2/models/..%2F..%2Fetc/infer", ("../../etc", None)),
        (b"/v2/models/%FF/infer", ("\ufffd", None)),
        (b"http://host:1/v2/models/m/infer", ("m", None)),
        (b"/v2/models/infer", None),
        (b"/v2/models//infer", None),
        (b"/v2/models/m/versions/canary/infer", ("m", "canary")),
        (b"/v2/models/m/versions/-1/infer", None),
        (b"/v2/models/m/versions/1x/infer", None),
        (b"/v2/models/m/versions//infer", None),
        (b"/v2/models/m/n/infer", None),
        (b"/v1/models/m/infer", None),
        (b"/v2/models/m/infer/", None),
        (b"infer", None),
    ],
)
def test_urls(url: bytes, target: tuple[str, str | None] | None) -> None:
    assert infer_target(url) == target


# --- framing -------------------------------------------------------------------------------------------------------


def test_keep_alive_serves_many_requests_on_one_connection(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        for _ in range(5):
            sock.sendall(http_request(BODY))
            status, headers, body = read_reply(stream)
            assert status == 200
            assert "connection" not in headers
            assert outputs(body) == [0, 2, 4, 6]


def test_connection_close_and_http_1_0_are_honoured(server: Running) -> None:
    old = http_request(BODY).replace(b"HTTP/1.1", b"HTTP/1.0")
    for request in (http_request(BODY, headers="Connection: close\r\n"), old):
        with server.connect() as sock, sock.makefile("rb") as stream:
            sock.sendall(request)
            status, headers, _ = read_reply(stream)
            assert (status, headers["connection"]) == (200, "close")
            assert stream.read() == b""


def test_pipelined_requests_of_both_kinds_are_answered_in_order(server: Running) -> None:
    bad = http_request(b"{bad")
    get = b"GET /v2/models/double HTTP/1.1\r\nHost: x\r\n\r\n"
    other = http_request(BODY, path="/v2/models/any/infer")
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(BODY) + get + bad + http_request(BODY) + get + get + other)
        replies = [read_reply(stream) for _ in range(7)]
    assert [status for status, _, _ in replies] == [200, 200, 400, 200, 200, 200, 200]
    assert [next(iter(json.loads(body))) for _, _, body in replies] == [
        "model_name", "name", "error", "model_name", "name", "name", "model_name",
    ]  # fmt: skip


def test_a_long_pipeline_of_refusals(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        slow = b"GET /v2/models/double HTTP/1.1\r\nHost: x\r\n\r\n"  # an ASGI task, so that the others queue up
        sock.sendall(slow + http_request(b"", path="/v2/models/nope/infer") * 3000)
        assert read_reply(stream)[0] == 200
        assert {read_reply(stream)[0] for _ in range(3000)} == {404}


def test_a_request_may_come_byte_by_byte(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in http_request(BODY):
            sock.sendall(bytes([byte]))
        assert outputs(read_reply(stream)[2]) == [0, 2, 4, 6]


def test_chunked_bodies(server: Running) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:1], BODY[1:30], BODY[30:]))
    head = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(head + chunks + b"0\r\n\r\n" + head + b"zz\r\n")
        assert outputs(read_reply(stream)[2]) == [0, 2, 4, 6]
        status, headers, body = read_reply(stream)
        assert (status, headers["connection"]) == (400, "close")
        assert "Invalid HTTP request" in json.loads(body)["error"]


def test_expect_100_continue(server: Running) -> None:
    head, body = http_request(BODY, headers="Expect: 100-continue\r\n").split(b"\r\n\r\n", 1)
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(head + b"\r\n\r\n")
        assert read_reply(stream)[0] == 100
        sock.sendall(body)
        assert read_reply(stream)[0] == 200


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (http_request(b"", path="/v2/models/nope/infer", headers="Expect: 100-continue\r\n", length=10), 404),
        (http_request(b"", headers="Expect: 100-continue\r\n", length=LIMIT + 1), 413),
        (http_request(b"", headers="Expect: 100-continue\r\nContent-Encoding: br\r\n", length=10), 415),
    ],
)
def test_expect_100_continue_is_refused_before_the_body(server: Running, request_head: bytes, status: int) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(request_head)
        found, headers, _ = read_reply(stream)
        assert (found, headers["connection"]) == (status, "close")


@pytest.mark.parametrize(
    "path", ["/nope", "/v2/models/nope/generate", "/v2/models/double/infr", "/v2/repository/models/nope/bogus"]
)
def test_expect_100_continue_that_another_route_refuses_ends_the_connection(server: Running, path: str) -> None:
    """Else the client's next request, since it keeps the body to itself, would be taken for that."""
    head = http_request(b"", path=path, headers="Expect: 100-continue\r\n", length=3000)
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(head)
        found, headers, _ = read_reply(stream)
        assert (found in REFUSED, headers["connection"]) == (True, "close")
        sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(stream)[0] == 0
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(head + bytes(3000) + http_request(BODY))
        assert read_reply(stream)[0] in REFUSED
        assert read_reply(stream)[0] == 200, "the body was not waited for"
    with server.connect() as sock, sock.makefile("rb") as stream:
        body = b'{"x": [0, 1, 2, 3]}'
        path = "/v2/models/double/generate"
        sock.sendall(http_request(b"", path=path, headers="Expect: 100-continue\r\n", length=len(body)))
        assert read_reply(stream)[0] == 100
        sock.sendall(body + http_request(BODY))
        assert [read_reply(stream)[0] for _ in range(2)] == [200, 200]


def test_an_upgrade_offer_is_ignored(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(BODY, headers="Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"))
        assert outputs(read_reply(stream)[2]) == [0, 2, 4, 6]


# --- limits --------------------------------------------------------------------------------------------------------


def test_too_large_a_body_is_refused_while_it_is_sent(server: Running) -> None:
    """The client sends all of it before it reads, as most do: it must find a reply, not a reset."""
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(bytes(200 * LIMIT)))
        status, headers, body = read_reply(stream)
        assert (status, headers["connection"]) == (413, "close")
        assert "at most 100,000 are accepted" in json.loads(body)["error"]


@pytest.mark.parametrize("path", ["/v2/models/double/infr", "/v2/models/double/generate", "/v2/models/nope/generate"])
def test_a_body_that_another_route_refuses_is_read_to_its_end(server: Running, path: str) -> None:
    """As above, of a client that is to send no other request, and does not look at the reply before."""
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(bytes(400 * LIMIT), path=path, headers="Connection: close\r\n"))
        status, headers, body = read_reply(stream)
        assert status == 413 if path.endswith("double/generate") else status in REFUSED
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]
        assert stream.read() == b""


def send_for_ever(sock: socket.socket) -> None:
    while True:
        sock.sendall(bytes(1 << 16))


def test_a_body_of_another_route_that_never_ends_is_not_read_for_ever(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(b"1", path="/nope", headers="Connection: close\r\n", length=1 << 40))
        assert read_reply(stream)[0] in REFUSED
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_for_ever(sock)


def test_too_large_a_chunked_body_is_refused_when_it_is(server: Running) -> None:
    head = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(head)
        for _ in range(12):
            sock.sendall(b"%x\r\n%s\r\n" % (10_000, bytes(10_000)))
        assert read_reply(stream)[0] == 413


def test_a_body_that_decodes_to_too_much_is_refused(server: Running) -> None:
    status, _, body = server.request(
        "POST", "/v2/models/double/infer", gzip.compress(bytes(10 * LIMIT)), {"Content-Encoding": "gzip"}
    )
    assert status == 413
    assert "after gzip decoding" in json.loads(body)["error"]


def test_a_refused_body_within_the_limit_keeps_the_connection(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(bytes(50_000), path="/v2/models/nope/infer") + http_request(BODY))
        assert read_reply(stream)[0] == 404
        assert read_reply(stream)[0] == 200


def test_a_body_that_ends_early_is_refused(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(BODY[:50], length=len(BODY)))
        sock.shutdown(socket.SHUT_WR)
        status, _, body = read_reply(stream)
        assert status == 400
        assert "ends after 50 bytes" in json.loads(body)["error"]


@pytest.mark.parametrize("start", [b"GET /", b"POST /v2/models/double/infer HTTP/1.1\r\nX: "])
def test_an_endless_head_is_refused(server: Running, start: bytes) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(start + b"a" * 1_000_000)
        status, headers, body = read_reply(stream)
        assert (status, headers["connection"]) == (431, "close")
        assert "over the limit of 65,536" in json.loads(body)["error"]


def test_an_idle_connection_keeps_no_arrays(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(BODY))
        assert read_reply(stream)[0] == 200
        (connection,) = server.host.server.server_state.connections
        assert isinstance(connection, HotPathProtocol)
        exchange = connection.cycle
        assert isinstance(exchange, Exchange)
        assert (exchange.job, exchange.request, exchange.body) == (None, None, [])


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with serving({"double": doubler()}, request_timeout=0.3) as running:
        with running.connect() as sock, sock.makefile("rb") as stream:
            sock.sendall(http_request(BODY[:50], length=len(BODY)))
            status, headers, _ = read_reply(stream)
            assert (status, headers["connection"]) == (408, "close")
        until(lambda: running.infer("double", request_of(X))[0] == 200)


@pytest.mark.parametrize("lengths", [("5", "6"), ("-1",), ("x",), ("99999999999999999999999",)])
def test_nonsense_lengths_are_refused(server: Running, lengths: tuple[str, ...]) -> None:
    fields = "".join(f"Content-Length: {n}\r\n" for n in lengths)
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(f"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
        status, _, body = read_reply(stream)
        assert status == 400
        assert "error" in json.loads(body)


def test_garbage_after_a_request_waits_its_turn(server: Running) -> None:
    with server.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(http_request(BODY) + b"\x16\x03\x01 what is this\r\n\r\n")
        assert read_reply(stream)[0] == 200
        assert read_reply(stream)[0] == 400
        assert stream.read() == b""


# --- codings -------------------------------------------------------------------------------------------------------


CODECS: list[tuple[str, object, object]] = [
    ("gzip", gzip.compress, gzip.decompress),
    ("deflate", zlib.compress, zlib.decompress),
]


@pytest.mark.parametrize(("name", "pack", "unpack"), CODECS)
def test_content_codings_both_ways(server: Running, name: str, pack: object, unpack: object) -> None:
    assert callable(pack)
    assert callable(unpack)
    status, headers, body = server.request(
        "POST", "/v2/models/double/infer", pack(BODY), {"Content-Encoding": name, "Accept-Encoding": name}
    )
    assert (status, headers["content-encoding"]) == (200, name)
    assert outputs(unpack(body)) == [0, 2, 4, 6]


# --- many callers --------------------------------------------------------------------------------------------------


def test_what_waits_is_batched_and_everyone_gets_their_own(server: Running) -> None:
    xs = [np.random.default_rng(i).random((i % 3 + 1, 4)).astype(np.float32) for i in range(20)]
    flat(server.model("double").batcher, seconds=1e-6)
    with blocked(server) as session, ThreadPoolExecutor(len(xs)) as pool:
        calls = [pool.submit(server.infer, "double", request_of(x)) for x in xs]
        until(lambda: queued(server) == len(xs))
        session.gate.set()
        for x, call in zip(xs, calls, strict=True):
            status, document = call.result(WAIT)
            assert status == 200
            np.testing.assert_allclose(document["outputs"][0]["data"], (x * 2).ravel(), rtol=1e-6)
    assert len(session.batches) < len(xs)
    assert max(session.batches) > 4


def test_one_bad_row_fails_only_its_own_request(server: Running) -> None:
    good, bad, fire = request_of(X), request_of(X * 0 - 1), request_of(X * 0 + 666)
    with blocked(server) as session, ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(server.infer, "double", document) for document in (good, bad, good, fire, good)]
        until(lambda: queued(server) == 5)
        session.gate.set()
        replies = [call.result(WAIT) for call in calls]
    assert [status for status, _ in replies] == [200, 400, 200, 500, 200]
    assert replies[1][1] == {"error": "model 'double' cannot run on this input: row cannot be used"}
    assert "RuntimeError" in replies[3][1]["error"]
    assert "fire" not in replies[3][1]["error"]


def test_a_client_that_leaves_does_not_run(server: Running) -> None:
    with blocked(server) as session, ThreadPoolExecutor(1) as pool:
        gone = server.connect()
        gone.sendall(http_request(json.dumps(request_of(X + 500)).encode()))
        until(lambda: queued(server) == 1)
        stays = pool.submit(server.infer, "double", request_of(X))
        until(lambda: queued(server) == 2)
        gone.close()
        until(lambda: queued(server) == 1)
        session.gate.set()
        assert stays.result(WAIT)[0] == 200
        assert session.batches == [1, 1]


def test_a_client_that_leaves_during_the_run_disturbs_nobody(server: Running) -> None:
    session = server.sessions["double"]
    assert isinstance(session, FakeSession)
    session.block()
    gone = server.connect()
    gone.sendall(http_request(BODY))
    session.wait_entered()
    gone.close()
    time.sleep(0.02)
    session.gate.set()
    assert server.infer("double", request_of(X))[0] == 200


def test_a_request_that_runs_out_of_time_in_the_queue(server: Running) -> None:
    with blocked(server):
        status, document = server.infer("double", request_of(X, parameters={"timeout": 1000}))
        assert status == 504
        assert "time was up" in document["error"]


def test_other_shapes_do_not_wait_for_each_other() -> None:
    with serving({"any": any_width()}, max_batch=4) as running, blocked(running, "any") as session:
        wide = np.zeros((1, 9), np.float32)
        with ThreadPoolExecutor(9) as pool:
            calls = [pool.submit(running.infer, "any", request_of(x)) for x in (X, X, wide, X, X, X, wide)]
            until(lambda: queued(running, "any") == 7)
            session.gate.set()
            assert [call.result(WAIT)[0] for call in calls] == [200] * 7


def test_a_full_queue_answers_429_and_says_when() -> None:
    with serving({"double": doubler()}, max_queue=2, max_batch=2) as running:
        assert running.infer("double", request_of(X))[0] == 200
        with blocked(running), ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(running.infer, "double", request_of(X)) for _ in range(2)]
            until(lambda: queued(running) == 2)
            status, headers, body = running.request("POST", "/v2/models/double/infer", BODY)
            assert status == 429
            assert int(headers["retry-after"]) >= 1
            assert "2 requests" in json.loads(body)["error"]
            running.sessions["double"].gate.set()  # type: ignore[attr-defined]
            assert [call.result(WAIT)[0] for call in waiting] == [200, 200]
        _, _, metrics = running.request("GET", "/metrics")
        assert b'infera_rejected_total{model="double",reason="queue_full",version="1"} 1.0' in metrics


@pytest.mark.parametrize("pipelined", [True, False])
def test_a_client_that_does_not_read_is_not_served(pipelined: bool) -> None:
    """Replies of 400 kB, none read: the server must stop, hold little, and go on when the client reads."""
    width, total = 100_000, 60
    wide = FakeSession(
        {"x": spec("N", 1)}, {"y": spec("N", width)}, lambda feeds: {"y": np.repeat(feeds["x"], width, axis=1)}
    )
    one = http_request(json.dumps({
        "inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }).encode(), path="/v2/models/wide/infer")  # fmt: skip
    with serving({"wide": wide}, max_batch=2) as running, running.connect() as sock, sock.makefile("rb") as stream:
        stats = running.host.repository.get("wide").stats
        connections = running.host.server.server_state.connections
        until(lambda: len(connections) == 1)
        (connection,) = connections
        assert isinstance(connection, HotPathProtocol)
        for sent in range(1, total + 1):
            sock.sendall(one)
            if not pipelined:
                deadline = time.monotonic() + 0.1
                while stats.statuses[200] < sent and time.monotonic() < deadline:
                    time.sleep(0.001)
        until(lambda: connection.flow.write_paused)
        time.sleep(0.1)
        assert stats.statuses[200] < total
        assert connection.transport.get_write_buffer_size() < 2 * 4 * width
        assert [read_reply(stream)[0] for _ in range(total)] == [200] * total


def test_a_mistake_of_the_server_is_not_called_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: object) -> None:
        raise TypeError("the server's mistake")

    with serving({"double": doubler()}) as running, contextlib.closing(running.connect()) as sock:
        monkeypatch.setattr("infera_server.http.hotpath.HotPathProtocol._announced", mistaken)
        with sock.makefile("rb") as stream:
            sock.sendall(http_request(json.dumps(request_of(np.ones((1, 4), np.float32))).encode()))
            status, headers, _ = read_reply(stream)
            assert (status, headers["connection"]) == (500, "close")


@pytest.mark.parametrize("at", ["parse", "respond"])
@pytest.mark.parametrize("kind", [ValueError, IndexError])
def test_what_a_kernel_may_say_is_the_servers_mistake_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str, kind: type[Exception]
) -> None:
    def mistaken(*_: object) -> None:
        raise kind("private")

    with serving({"double": doubler()}) as running:
        monkeypatch.setattr(f"infera_server.protocols.v2_rest.{at}", mistaken)
        status, document = running.infer("double", request_of(X))
    assert (status, document) == (
        500,
        {"error": f"model 'double' failed: {kind.__name__}; the server's log says more"},
    )
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [kind]
