"""Requests whose head and document came before, and bodies that are read past the parser."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from infera_server.http import hotpath
from infera_server.http.recall import MAX_DOCUMENTS, MAX_HEAD, MAX_HEADS, Head, Heads
from infera_server.http.upload import ALIGNMENT, LARGE
from infera_server.models.model import Model
from infera_server.scheduling.rows import HostArray
from tests.server.support import (
    FakeSession,
    Running,
    any_width,
    doubler,
    http_request,
    read_reply,
    request_of,
    serving,
    spec,
    until,
)


def binary(x: HostArray, headers: str = "", **members: Any) -> bytes:
    """A binary inference request that asks for binary outputs."""
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    document = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}, **members}).encode()
    headers = f"Inference-Header-Content-Length: {len(document)}\r\n{headers}"
    return http_request(document + x.tobytes(), f"/v2/models/{'double' if x.shape[1] == 4 else 'any'}/infer", headers)


def result(headers: dict[str, str], body: bytes) -> HostArray:
    document = json.loads(body[: int(headers["inference-header-content-length"])])
    (out,) = document["outputs"]
    assert out["parameters"]["binary_data_size"] == len(body) - int(headers["inference-header-content-length"])
    return np.frombuffer(body[-out["parameters"]["binary_data_size"] :], np.float32).reshape(out["shape"])


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler(), "any": any_width()}) as running:
        yield running


def rows(count: int, width: int = 4, seed: int = 0) -> HostArray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read in full, as it is read: "head" and "document"."""
    seen: list[str] = []

    def spied(name: str, what: str, owner: Any) -> None:
        original = getattr(owner, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append(what)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    spied("_admit", "head", hotpath.HotPathProtocol)
    spied("decode", "document", hotpath)
    return seen


def test_what_came_before_is_not_read_again(server: Running, parsed: list[str]) -> None:
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        for seed in range(5):
            x = rows(3, seed=seed)
            sock.sendall(binary(x))
            status, headers, body = read_reply(stream)
            assert status == 200
            np.testing.assert_array_equal(result(headers, body), 2 * x)
    assert parsed == ["head", "document"]
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        sock.sendall(binary(rows(3)))
        assert read_reply(stream)[0] == 200
    assert parsed == ["head", "document"], "another connection knows it too"


def test_documents_of_one_head_are_told_apart(server: Running, parsed: list[str]) -> None:
    """Same length, other shape or parameters."""
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            for identity in ("a", "b"):
                for shape in ((2, 6), (3, 4), (6, 2)):
                    x = np.arange(12, dtype=np.float32).reshape(shape)
                    sock.sendall(binary(x, id=identity).replace(b"/double/", b"/any/"))
                    status, headers, body = read_reply(stream)
                    assert status == 200
                    assert json.loads(body[: int(headers["inference-header-content-length"])])["id"] == identity
                    np.testing.assert_array_equal(result(headers, body), 2 * x)
    assert parsed.count("document") == 6


def test_a_known_request_is_refused_as_a_new_one(server: Running) -> None:
    """By the queue, by the model's values, and once the model is gone."""
    x = rows(1)
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        for value, status in ((1.0, 200), (1.0, 200), (-1.0, 400), (666.0, 500), (2.0, 200)):
            x[0, 0] = value
            sock.sendall(binary(x))
            assert read_reply(stream)[0] == status
        server.host.service.draining = True
        try:
            sock.sendall(binary(x))
            status, headers, _ = read_reply(stream)
            assert (status, headers["connection"]) == (503, "close")
        finally:
            server.host.service.draining = False


@pytest.mark.parametrize("cut", [1, 30, 200, 420])
def test_a_known_request_may_come_in_pieces(server: Running, cut: int) -> None:
    x = rows(3)
    sent = binary(x)
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        sock.sendall(sent)
        assert read_reply(stream)[0] == 200
        for part in (sent[:cut], sent[cut:]):
            sock.sendall(part)
            time.sleep(0.01)  # so that it arrives by itself
        assert read_reply(stream)[0] == 200
        sock.sendall(sent + sent[:cut])
        assert read_reply(stream)[0] == 200
        sock.sendall(sent[cut:] + sent + sent)
        for _ in range(3):
            status, headers, body = read_reply(stream)
            assert status == 200
            np.testing.assert_array_equal(result(headers, body), 2 * x)


def test_json_and_codings_of_a_known_head(server: Running, parsed: list[str]) -> None:
    body = json.dumps(request_of(rows(1))).encode()
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        for _ in range(3):
            sock.sendall(http_request(body))
            assert read_reply(stream)[0] == 200
        for _ in range(2):
            sock.sendall(http_request(body, headers="Accept-Encoding: gzip\r\n"))
            status, headers, _ = read_reply(stream)
            assert (status, headers["content-encoding"]) == (200, "gzip")
    assert parsed == ["head", "document", "head"], "the reply's coding is no matter of the document"


@pytest.mark.parametrize("ids", [["", "", "a"], ["a", "b", "", "c"], ["", "a", ""]])
def test_an_id_may_come_and_go(server: Running, ids: list[str]) -> None:
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        for number, identity in enumerate(ids):
            x = rows(1, seed=number)
            sock.sendall(http_request(json.dumps({"id": identity, **request_of(x)}).encode()))
            status, _, body = read_reply(stream)
            reply = json.loads(body)
            assert (status, reply.get("id", "")) == (200, identity)
            np.testing.assert_array_equal(np.float32(reply["outputs"][0]["data"]), 2 * x.ravel())


def test_a_known_head_may_have_another_size(server: Running, parsed: list[str]) -> None:
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        for count in range(1, 4):
            sock.sendall(http_request(json.dumps(request_of(rows(count))).encode()))
            status, _, body = read_reply(stream)
            assert (status, json.loads(body)["outputs"][0]["shape"]) == (200, [count, 4])
        x = rows(2)
        sent = binary(x)
        sock.sendall(sent)
        assert read_reply(stream)[0] == 200
        size = len(sent.partition(b"\r\n\r\n")[2])
        for more in (-8, 8):  # the same document, too few bytes and too many
            changed = sent.replace(b"Content-Length: %d\r\n" % size, b"Content-Length: %d\r\n" % (size + more), 1)
            sock.sendall(changed[:more] if more < 0 else changed + bytes(more))
            assert read_reply(stream)[0] == 400
        sock.sendall(sent)
        status, headers, body = read_reply(stream)
        assert status == 200
        np.testing.assert_array_equal(result(headers, body), 2 * x)
    assert parsed.count("head") <= 2, "one of JSON, one of binary"


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\nContent-Length: 0\r\nA: b\n\nC: d\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 0\nA: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 0\r\nA: " + b"x" * MAX_HEAD + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 0\r\nA: b\r\n",
        b"POST / HTTP/1.1\r\nA: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 0\r\nCONTENT-LENGTH: 0\r\n\r\n",
        b"POST / HTTP/1.1\r\nCONTENT-LENGTH: 0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: +0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 0 \r\n\r\n",
    ],
)
def test_heads_that_are_not_kept(head: bytes) -> None:
    heads = Heads()
    heads.keep(head, Head(("m", None), 0, None, b"", None))
    assert heads.find(head) is None


def test_what_is_kept_is_bounded(server: Running) -> None:
    heads = Heads()
    for i in range(3 * MAX_HEADS):
        head = b"POST /%d HTTP/1.1\r\nContent-Length: 0\r\n\r\n" % i
        heads.keep(head, Head(("m", None), 0, None, b"", None))
        assert heads.find(head) is not None
    assert len(heads._known) <= MAX_HEADS
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        for i in range(3 * MAX_DOCUMENTS):
            sock.sendall(binary(rows(1), id=f"{i:04}"))
            assert read_reply(stream)[0] == 200
    kept = [len(head.requests) for head in server.host.service.heads._known.values()]
    assert 0 < max(kept) <= MAX_DOCUMENTS


@pytest.mark.parametrize("width", [LARGE // 4, 3 * LARGE // 4 + 1])
def test_a_large_tensor_is_not_copied(width: int) -> None:
    """From the socket to the model: the array that runs lies in the buffer that was received, and is aligned."""
    session = any_width()
    seen: list[HostArray] = []
    compute = session.fn

    def fn(feeds: Any) -> Any:
        seen.append(feeds["x"])
        return compute(feeds)

    session.fn = fn
    with serving({"any": session}, max_batch=1) as running:
        x = rows(1, width)
        seen.clear()  # what was run to measure it
        with contextlib.closing(running.connect()) as sock, sock.makefile("rb") as stream:
            for _ in range(3):
                sock.sendall(binary(x))
                status, headers, body = read_reply(stream)
                assert status == 200
                np.testing.assert_array_equal(result(headers, body), 2 * x)
                (array,) = seen
                assert array.ctypes.data % ALIGNMENT == 0
                assert not array.flags.owndata
                assert not array.flags.writeable
                seen.clear()
            sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_reply(stream)[0] == 200


def test_a_client_that_leaves_in_a_large_body_leaves_nothing(server: Running) -> None:
    sent = binary(rows(1, LARGE))
    with contextlib.closing(server.connect()) as sock:
        sock.sendall(sent[: LARGE * 2])
        until(lambda: server.host.service.intake.held > LARGE)
    until(lambda: server.host.service.intake.held == 0)


def test_large_bodies_are_bounded_together() -> None:
    with serving({"any": any_width()}, max_intake_bytes=3 * LARGE) as running:
        sent = binary(rows(1, LARGE // 2))
        with contextlib.closing(running.connect()) as one, contextlib.closing(running.connect()) as two:
            one.sendall(sent[:-1])
            until(lambda: running.host.service.intake.held > LARGE)
            two.sendall(sent)
            with two.makefile("rb") as stream:
                assert read_reply(stream)[0] == 429
            one.sendall(sent[-1:])
            with one.makefile("rb") as stream:
                assert read_reply(stream)[0] == 200
        until(lambda: running.host.service.intake.held == 0)


def test_rows_are_counted_once_for_a_document(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    original = Model._rows

    def spy(self: Model, feeds: Any) -> Any:
        nonlocal counted
        counted += 1
        return original(self, feeds)

    monkeypatch.setattr(Model, "_rows", spy)
    with contextlib.closing(server.connect()) as sock, sock.makefile("rb") as stream:
        for name in ("double", "any"):
            width = 4 if name == "double" else 5
            for _ in range(4):
                for count in (7, 6):
                    x = rows(count, width)
                    sock.sendall(binary(x, "x-test: rows\r\n"))
                    status, headers, body = read_reply(stream)
                    assert status == 200
                    np.testing.assert_array_equal(result(headers, body), 2 * x)
    assert counted == 4, "two documents for each of two models"


def test_values_that_a_batch_shares_are_looked_at_in_every_request() -> None:
    """The document is the same, and requests with other values must not run together."""
    session = FakeSession(
        {"x": spec("N", 4), "k": spec(1)}, {"y": spec("N", 4)}, lambda feeds: {"y": feeds["x"] * feeds["k"]}
    )

    def asked(k: float) -> bytes:
        named = {"x": np.ones((1, 4), np.float32), "k": np.array([k], np.float32)}
        tensors = [
            {"name": n, "shape": a.shape, "datatype": "FP32", "parameters": {"binary_data_size": a.nbytes}}
            for n, a in named.items()
        ]
        document = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
        headers = f"Inference-Header-Content-Length: {len(document)}\r\n"
        return http_request(
            document + b"".join(a.tobytes() for a in named.values()), "/v2/models/scaled/infer", headers
        )

    with serving({"scaled": session}, max_batch=8) as running, contextlib.ExitStack() as stack:
        layout = running.model("scaled").signature.layout
        assert layout is not None
        assert layout.shared == ("k",)
        socks = [stack.enter_context(contextlib.closing(running.connect())) for _ in range(5)]
        for _ in range(2):  # the first time each document is read in full
            session.block()
            for k, sock in enumerate(socks):
                sock.sendall(asked(k))
                if not k:
                    session.wait_entered()
            until(lambda: running.model("scaled").queued == len(socks) - 1)
            session.gate.set()
            for k, sock in enumerate(socks):
                with sock.makefile("rb") as stream:
                    status, headers, body = read_reply(stream)
                assert status == 200
                np.testing.assert_array_equal(result(headers, body), np.full((1, 4), k, np.float32))
