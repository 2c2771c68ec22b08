"""WebSocket clients that break the rules, flood, or leave: their connection ends, others are served."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.server.malformed import BODY
from tests.server.support import Running, doubler, serving, until

HANDSHAKE = (
    b"GET /v2/models/double/stream HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
CONTINUED, TEXT, BINARY, CLOSE, PING = 0, 1, 2, 8, 9


def frame(opcode: int, payload: bytes, fin: bool = True, size: int | None = None, first: int = 0) -> bytes:
    """RFC 6455, section 5.2, with a mask of zeros; `size` is what is said, `first` are more bits of the first byte."""
    said = len(payload) if size is None else size
    head = bytes([opcode | (0x80 if fin else 0) | first])
    if said < 126:
        head += bytes([0x80 | said])
    else:
        head += bytes([0x80 | 126]) + struct.pack(">H", said) if said < 1 << 16 else b"\xff" + struct.pack(">Q", said)
    return head + bytes(4) + payload


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}, max_body_bytes=1 << 20, max_json_bytes=1 << 16) as running:
        yield running


@contextlib.contextmanager
def stream(server: Running) -> Iterator[socket.socket]:
    with server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        sock.sendall(HANDSHAKE)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        assert head.startswith(b"HTTP/1.1 101")
        yield sock


def is_right(server: Running) -> bool:
    with stream(server) as sock:
        sock.sendall(frame(TEXT, BODY))
        return bool(json.loads(sock.recv(4096)[2:])["outputs"][0]["data"] == [0, 2, 4, 6])


ENDS = {
    "no mask": (b"\x81\x02{}", 1002),
    "reserved bits": (frame(TEXT, BODY, first=0x20), 1002),
    "unknown opcode": (frame(3, b"x"), 1002),
    "no UTF-8": (frame(TEXT, b"\xff\xfe"), 1007),
    "larger than a body may be": (frame(BINARY, b"", size=2**40), 1009),
    "larger than any": (frame(BINARY, b"", size=2**63 - 1), 1009),
    "long ping": (frame(PING, b"x" * 200), 1002),
    "ping in fragments": (frame(PING, b"x", fin=False), 1002),
    "nothing to continue": (frame(CONTINUED, b"x"), 1002),
    "another message in one": (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), 1002),
    "half a status": (frame(CLOSE, b"x"), 1002),
    "no such status": (frame(CLOSE, b"\0\1"), 1002),
}


@pytest.mark.parametrize("name", ENDS)
def test_who_breaks_the_rules_is_told_and_left(server: Running, name: str) -> None:
    sent, code = ENDS[name]
    with stream(server) as sock:
        sock.sendall(sent)
        reply = sock.recv(4096)
        assert (reply[0], int.from_bytes(reply[2:4], "big")) == (0x80 | CLOSE, code)
        assert sock.recv(1) == b""
    assert is_right(server)
    until(lambda: server.host.service.streams == 0)


FLOODS = {
    "pings": frame(PING, b"x" * 125) * 2000,
    "empty fragments": frame(TEXT, b"", fin=False) + frame(CONTINUED, b"", fin=False) * 100_000,
    "small fragments": frame(TEXT, b"[", fin=False) + frame(CONTINUED, b" ", fin=False) * 100_000,
}


def is_cut_off(sock: socket.socket, sent: bytes) -> bool:
    try:
        sock.sendall(sent)
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("name", FLOODS)
def test_who_floods_is_cut_off_and_holds_nobody_up(server: Running, name: str) -> None:
    with stream(server) as sock:
        until(lambda: is_cut_off(sock, FLOODS[name]))
        assert is_right(server)
    until(lambda: server.host.service.streams == 0)


def test_pings_now_and_then_and_large_fragments_are_no_flood(server: Running) -> None:
    with stream(server) as sock:
        for _ in range(100):
            sock.sendall(frame(PING, b"x"))
            assert sock.recv(3) == b"\x8a\x01x"
        parts = [BODY[:40], b" " * 2000, BODY[40:]]
        sock.sendall(frame(TEXT, parts[0], fin=False) + frame(CONTINUED, parts[1], fin=False))
        sock.sendall(frame(CONTINUED, parts[2]))
        assert b'"model_name"' in sock.recv(4096)
