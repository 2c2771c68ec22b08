"""Clients of gRPC that leave, flood, or speak something else: what they asked for is forgotten, others are served."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from tests.server.grpc_support import METHOD, array_of, channel, infer, request, status_of, stream, unary
from tests.server.malformed import VALID
from tests.server.support import WAIT, FakeSession, Running, doubler, serving, until

X = np.arange(8, dtype=np.float32).reshape(2, 4)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """RFC 9113, section 4.1."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream_id) + payload


SETTINGS = frame(4, 0, 0, b"")
FLOODS = {
    "nothing": b"",
    "junk": bytes(range(256)) * 10,
    "HTTP/1.1": VALID,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    "half a preface": PREFACE[:10],
    "no frame": PREFACE + b"\xff" * 100,
    "a frame of 16 MB": PREFACE + SETTINGS + b"\xff\xff\xff\0\0\0\0\0\1",
    "data for no stream": PREFACE + SETTINGS + frame(0, 0, 5, b"x" * 100),
    "headers without end": PREFACE + SETTINGS + frame(1, 0, 1, b"\x82") + frame(9, 0, 1, b"\x82" * 1000) * 200,
    "headers that do not decode": PREFACE + SETTINGS + frame(1, 5, 1, b"\xff" * 50),
    "resets": PREFACE + SETTINGS + b"".join(frame(3, 0, i, b"\0\0\0\x08") for i in range(1, 4001, 2)),
    "pings": PREFACE + SETTINGS + frame(6, 0, 0, bytes(8)) * 2000,
    "settings": PREFACE + SETTINGS * 5000,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}, max_batch=4) as running:
        yield running


def is_right(server: Running) -> bool:
    with channel(server) as made:
        return bool(np.array_equal(array_of(infer(made, request("double", X))), 2 * X))


def tasks(server: Running) -> int:
    async def count() -> int:
        return len(asyncio.all_tasks())

    return server.call(count())


@pytest.mark.parametrize("flood", FLOODS)
def test_what_is_no_grpc(server: Running, flood: str) -> None:
    port = server.host.grpc_port
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT))
            with contextlib.suppress(OSError):
                sock.sendall(FLOODS[flood])
        assert is_right(server)


def test_calls_that_are_cancelled_at_any_time(server: Running) -> None:
    rng = random.Random(0)
    model = server.host.repository.get("double")
    before = tasks(server)
    with channel(server) as made:
        call = unary(made)
        for _ in range(20):
            calls = [call.future(request("double", X), timeout=WAIT) for _ in range(25)]
            for future in rng.sample(calls, 20):
                future.cancel()
            for future in calls:
                assert future.cancelled() or np.array_equal(array_of(future.result(WAIT)), 2 * X)
    until(lambda: model.queued == 0 and tasks(server) <= before)


def test_a_flood_of_streams_that_are_left_alone(server: Running) -> None:
    """Each with requests under way, by a client that does not read, and then is gone."""
    session = server.sessions["double"]
    assert isinstance(session, FakeSession)
    model = server.host.repository.get("double")
    before = tasks(server)
    session.block()
    gone = threading.Event()

    def requests() -> Iterator[Any]:
        yield request("double", X)
        gone.wait(WAIT)

    with channel(server) as made:
        streams = [stream(made)(requests(), timeout=WAIT) for _ in range(100)]
        until(lambda: model.queued >= 60)  # all but those of the run that waits, which may be many
        for each in streams[:50]:
            each.cancel()
        until(lambda: model.queued <= 50)
    gone.set()
    until(lambda: model.queued == 0)
    session.gate.set()
    until(lambda: tasks(server) <= before)
    assert is_right(server)


def test_streams_have_a_limit() -> None:
    with serving({"double": doubler()}, max_connections=2) as running, channel(running) as made:
        done = threading.Event()

        def requests() -> Iterator[Any]:
            yield request("double", X)
            done.wait(WAIT)

        streams = [stream(made)(requests(), timeout=WAIT) for _ in range(2)]
        for each in streams:
            next(each)
        with pytest.raises(grpc.RpcError) as error:
            next(stream(made)(requests(), timeout=WAIT))
        assert status_of(error) == ("UNAVAILABLE", "2 streams are open")
        assert np.array_equal(array_of(infer(made, request("double", X))), 2 * X)
        done.set()


def test_methods_given_what_is_no_message(server: Running) -> None:
    rng = random.Random(1)
    names = [
        "ModelInfer",
        "ModelMetadata",
        "ModelConfig",
        "RepositoryIndex",
        "TraceSetting",
        "SystemSharedMemoryStatus",
    ]
    with channel(server) as made:
        codes = [code_of(made, name, rng.randbytes(size)) for name in names for size in (1, 7, 50, 1000, 100_000) * 5]
    assert set(codes) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}


def code_of(made: grpc.Channel, method: str, data: bytes) -> str:
    try:
        made.unary_unary(METHOD + method)(data, timeout=WAIT)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
