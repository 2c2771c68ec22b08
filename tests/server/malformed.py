"""HTTP/1.1 that is not as it should be, what it is answered with, and a client that believes only what it has parsed.

Replies are read by h11, which is strict: what it does not accept is a fault of the server.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h11
import numpy as np

from tests.server.support import WAIT, Running, request_of

BODY = json.dumps(request_of(np.arange(4, dtype=np.float32).reshape(1, 4))).encode()
LINE = b"POST /v2/models/double/infer HTTP/1.1\r\n"
HOST = b"Host: x\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADE = b"Connection: upgrade\r\nUpgrade: websocket\r\n"


def post(headers: bytes = LENGTH, body: bytes = BODY, line: bytes = LINE, host: bytes = HOST) -> bytes:
    """An inference request."""
    return line + host + headers + b"\r\n" + body


def put(line: bytes, *changes: tuple[bytes, bytes]) -> bytes:
    """A good request with another request line."""
    for old, new in changes:
        line = line.replace(old, new)
    return post(line=line)


def chunked(data: bytes) -> bytes:
    return post(CHUNKED, data)


VALID = post()


@dataclass(frozen=True)
class Case:
    """What is sent, the status of its reply, and whether the connection is over then; `head`: the reply has no body."""

    name: str
    sent: bytes
    status: int
    closes: bool
    head: bool = False


def _cases(status: int, closes: bool, **sent: bytes) -> list[Case]:
    return [Case(name, data, status, closes) for name, data in sent.items()]


N = len(BODY)

CASES: Sequence[Case] = [
    # Where a body ends is told twice, or in words that others may read otherwise (RFC 9112, sections 6 and 11.2).
    *_cases(
        400, True,
        length_and_chunked=post(LENGTH + CHUNKED, CHUNKS),
        chunked_and_length=post(CHUNKED + LENGTH, CHUNKS),
        no_length_and_chunked=post(b"Content-Length: 0\r\n" + CHUNKED, CHUNKS),
        length_twice=post(LENGTH + LENGTH),
        two_lengths=post(LENGTH + b"Content-Length: 1\r\n"),
        lengths_in_a_list=post(b"Content-Length: %d, %d\r\n" % (N, N)),
        length_with_a_sign=post(b"Content-Length: +%d\r\n" % N),
        negative_length=post(b"Content-Length: -1\r\n"),
        hexadecimal_length=post(b"Content-Length: 0x10\r\n"),
        length_in_two_words=post(b"Content-Length: 9 4\r\n"),
        empty_length=post(b"Content-Length:\r\n"),
        length_of_67_bits=post(b"Content-Length: 99999999999999999999\r\n"),
        length_before_a_space=post(b"Content-Length : %d\r\n" % N),
        folded_length=post(b"Content-Length:\r\n %d\r\n" % N),
        chunked_twice=post(CHUNKED + CHUNKED, CHUNKS),
        chunked_twice_in_a_list=post(b"Transfer-Encoding: chunked, chunked\r\n", CHUNKS),
        chunked_first=post(b"Transfer-Encoding: chunked, gzip\r\n", CHUNKS),
        identity=post(b"Transfer-Encoding: identity\r\n" + LENGTH),
        empty_coding=post(b"Transfer-Encoding:\r\n" + LENGTH),
        coding_after_a_tab=post(b"Transfer-Encoding: \x0bchunked\r\n", CHUNKS),
        coding_and_nul=post(b"Transfer-Encoding: chunked\0\r\n", CHUNKS),
        coding_before_a_space=post(b"Transfer-Encoding : chunked\r\n", CHUNKS),
        folded_coding=post(b"Transfer-Encoding:\r\n chunked\r\n", CHUNKS),
        coding_after_a_bare_newline=post(b"X: y\nTransfer-Encoding: chunked\r\n" + LENGTH, CHUNKS),
    ),
    *_cases(413, True, length_of_64_bits=post(b"Content-Length: 18446744073709551615\r\n")),
    *_cases(
        501, True,
        two_codings=post(b"Transfer-Encoding: gzip, chunked\r\n", CHUNKS),
        unknown_coding=post(b"Transfer-Encoding: xchunked\r\n", CHUNKS),
        quoted_coding=post(b'Transfer-Encoding: "chunked"\r\n', CHUNKS),
    ),
    *_cases(
        200, False,
        tabs_around_a_length=post(b"Content-Length:\t%d\t\r\n" % N),
        zeros_before_a_length=post(b"Content-Length: 000%d\r\n" % N),
        another_field=post(b"Content_Length: 5\r\n" + LENGTH),
        coding_in_capitals=post(b"TRANSFER-ENCODING: CHUNKED\r\n", CHUNKS),
    ),
    # Chunks.
    *_cases(
        400, True,
        newline_in_an_extension=chunked(b"%x;a\nb\r\n%s\r\n0\r\n\r\n" % (N, BODY)),
        return_in_an_extension=chunked(b"%x;a\rb\r\n%s\r\n0\r\n\r\n" % (N, BODY)),
        newline_after_a_size=chunked(b"%x\n%s\r\n0\r\n\r\n" % (N, BODY)),
        prefix_before_a_size=chunked(b"0x%x\r\n%s\r\n0\r\n\r\n" % (N, BODY)),
        negative_size=chunked(b"-1\r\n%s\r\n0\r\n\r\n" % BODY),
        size_with_a_sign=chunked(b"+%x\r\n%s\r\n0\r\n\r\n" % (N, BODY)),
        space_after_a_size=chunked(b"%x \r\n%s\r\n0\r\n\r\n" % (N, BODY)),
        space_before_a_size=chunked(b" %x\r\n%s\r\n0\r\n\r\n" % (N, BODY)),
        no_size=chunked(b"\r\n%s\r\n0\r\n\r\n" % BODY),
        size_of_68_bits=chunked(b"fffffffffffffffff\r\n%s\r\n0\r\n\r\n" % BODY),
        longer_than_its_size=chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (N - 1, BODY)),
        shorter_than_its_size=chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (N + 1, BODY)),
        nothing_after_a_chunk=chunked(b"%x\r\n%s0\r\n\r\n" % (N, BODY)),
        newline_after_a_chunk=chunked(b"%x\r\n%s\n0\r\n\r\n" % (N, BODY)),
        length_in_a_trailer=chunked(CHUNKS[:-2] + b"Content-Length: 5\r\n\r\n"),
        coding_in_a_trailer=chunked(CHUNKS[:-2] + CHUNKED + b"\r\n"),
        no_colon_in_a_trailer=chunked(CHUNKS[:-2] + b"X y\r\n\r\n"),
    ),
    *_cases(
        200, False,
        extensions=chunked(b"%x;a=b\r\n%s\r\n0;c\r\n\r\n" % (N, BODY)),
        zeros_before_a_size=chunked(b"0000000000%x\r\n%s\r\n0\r\n\r\n" % (N, BODY)),
        trailer=chunked(CHUNKS[:-2] + b"X: y\r\n\r\n"),
    ),
    # Fields.
    *_cases(
        400, True,
        folded=post(b"X: y\r\n z\r\n" + LENGTH),
        folded_first_field=post(host=b" Host: x\r\n"),
        newlines_alone=VALID.replace(b"\r\n", b"\n"),
        returns_alone=VALID.replace(b"\r\n", b"\r"),
        return_in_a_value=post(b"X: a\rb\r\n" + LENGTH),
        two_returns=post(b"X: a\r\r\n" + LENGTH),
        newline_ends_the_head=LINE + HOST + LENGTH + b"\n" + BODY,
        space_before_a_colon=post(b"X : a\r\n" + LENGTH),
        no_colon=post(b"X\r\n" + LENGTH),
        no_name=post(b": a\r\n" + LENGTH),
        nul_in_a_name=post(b"X\0: a\r\n" + LENGTH),
        nul_in_a_value=post(b"X: a\0b\r\n" + LENGTH),
        control_in_a_value=post(b"X: a\1b\r\n" + LENGTH),
        no_ascii_in_a_name=post(b"\xff: a\r\n" + LENGTH),
        parenthesis_in_a_name=post(b"X(: a\r\n" + LENGTH),
        two_hosts=post(b"Host: y\r\n" + LENGTH),
    ),
    *_cases(
        431, True,
        long_field=post(b"X: " + b"y" * 70_000 + b"\r\n" + LENGTH),
        long_url=put(LINE, (b"double", b"d" * 70_000)),
        many_fields=post(b"".join(b"X%d: y\r\n" % i for i in range(300)) + LENGTH),
        many_fields_of_no_inference=LIVE[:-2] + b"A: b\r\n" * 9000 + b"\r\n",
    ),
    *_cases(
        200, False,
        no_ascii_in_a_value=post(b"X: \xff\xfe\r\n" + LENGTH),
        no_host=post(host=b""),
        another_host=post(host=b"Host: a b/\r\n"),
        other_expectation=post(b"Expect: 200-maybe\r\n" + LENGTH),
        expectation=post(b"Expect: 100-continue\r\n" + LENGTH),
        likes_that_are_none=post(b"Accept-Encoding: gzip;q=;;=,;,gzip;q=nan,\xff;q=1e999\r\n" + LENGTH),
        upgrade=post(UPGRADE + LENGTH),
        upgrade_to_another=post(b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + LENGTH),
    ),
    *_cases(
        400, False,
        no_header_length=post(b"Inference-Header-Content-Length: x\r\n" + LENGTH),
        negative_header_length=post(b"Inference-Header-Content-Length: -5\r\n" + LENGTH),
        huge_header_length=post(b"Inference-Header-Content-Length: 99999999999999999999999\r\n" + LENGTH),
        no_body=post(b"", b""),
        empty_body=post(b"Content-Length: 0\r\n", b""),
    ),
    *_cases(415, False, list_of_codings=post(b"Content-Encoding: gzip, gzip\r\n" + LENGTH)),
    # The request line.
    *_cases(
        400, True,
        authority=put(b"POST other:80 HTTP/1.1\r\n"),
        proxy=b"CONNECT other:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        http_2=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        tls=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        version_1_2=put(LINE, (b"1.1", b"1.2")),
        half_a_version=put(LINE, (b"1.1", b"1.")),
        version_11=put(LINE, (b"1.1", b"11")),
        protocol_in_small_letters=put(LINE, (b"HTTP", b"http")),
        method_in_small_letters=put(LINE, (b"POST", b"post")),
        unknown_method=put(LINE, (b"POST", b"FROB")),
        tabs=put(LINE, (b" ", b"\t")),
        space_in_a_url=put(LINE, (b"double", b"dou ble")),
        nul_in_a_url=put(LINE, (b"double", b"dou\0ble")),
        no_ascii_in_a_url=put(LINE, (b"double", b"dou\xffble")),
        space_before_all=b" " + VALID,
        junk=b"\0\1\2\3\r\n\r\n",
    ),
    *_cases(
        505, True,
        version_0_9=put(LINE, (b"1.1", b"0.9")),
        version_2=put(LINE, (b"1.1", b"2.0")),
        no_version=b"GET /v2\r\n\r\n",
    ),
    *_cases(
        404, False,
        any_url=b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        long_version=put(LINE, (b"double", b"double/versions/" + b"9" * 5000)),
        way_out=put(LINE, (b"double", b"..%2f..%2fetc%2fpasswd")),
    ),
    *_cases(
        200, False,
        absolute_url=put(LINE, (b" /", b" http://other/")),
        two_spaces=put(LINE, (b" ", b"  ")),
        empty_line_before_all=b"\r\n" + VALID,
        empty_lines_before_all=b"\r\n\r\n" + VALID,
        body_of_a_get=LIVE[:-2] + LENGTH + b"\r\n" + BODY,
    ),
    Case("no_such_reading", put(LINE, (b"POST", b"HEAD")), 405, False, head=True),
    # The end of a connection.
    *_cases(
        200, True,
        close=post(b"Connection: close\r\n" + LENGTH),
        close_and_keep_alive=post(b"Connection: close, keep-alive\r\n" + LENGTH),
        version_1_0=put(LINE, (b"1.1", b"1.0")),
        version_1_0_that_stays=post(b"Connection: keep-alive\r\n" + LENGTH, line=LINE.replace(b"1.1", b"1.0")),
        version_1_0_in_chunks=post(CHUNKED, CHUNKS, LINE.replace(b"1.1", b"1.0")),
        version_1_0_that_expects=post(b"Expect: 100-continue\r\n" + LENGTH, line=LINE.replace(b"1.1", b"1.0")),
    ),
]  # fmt: skip


class Replies:
    """What a server sends on a connection, read by h11 as replies to requests of one method."""

    def __init__(self, sock: socket.socket, method: str = "GET") -> None:
        self._sock = sock
        self._method = method
        self._http = h11.Connection(h11.CLIENT)
        self.over = False
        """Whether the last reply said that no other follows."""

    def status(self) -> int:
        """Of the next reply that is final; 0 where the connection ends instead."""
        return self.reply()[0]

    def reply(self) -> tuple[int, bytes]:
        """Status and body of the next reply that is final; 0 where the connection ends instead."""
        if self.over:
            with suppress(ConnectionResetError):  # where the server had not read all that was sent
                assert self._sock.recv(1) == b"", "more follows the last reply"
            return 0, b""
        self._http.send(h11.Request(method=self._method, target="/", headers=[("Host", "x")]))
        self._http.send(h11.EndOfMessage())
        status, body = 0, b""
        while True:
            event: Any = self._http.next_event()
            if event is h11.NEED_DATA:
                data = self._sock.recv(1 << 16)
                if not data and self._http.trailing_data[0] == b"" and not status:
                    return 0, b""
                self._http.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.over = self._http.their_state is not h11.DONE
                if not self.over:
                    self._http.start_next_cycle()
                return status, body


def connected(server: Running) -> socket.socket:
    """A connection on which every `sendall` leaves at once."""
    sock = server.connect()
    sock.settimeout(WAIT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


SWITCHED = 101
_OFFER = [("Host", "x"), ("Connection", "upgrade"), ("Upgrade", "websocket")]


def statuses(answered: bytes) -> list[int]:
    """Of all final replies in what came on a connection until its end. Raises h11.RemoteProtocolError."""
    http, found = h11.Connection(h11.CLIENT), list[int]()
    http.receive_data(answered)
    http.receive_data(b"")
    while http.trailing_data[0]:
        http.send(h11.Request(method="GET", target="/", headers=_OFFER))
        http.send(h11.EndOfMessage())
        event: Any = None
        while event is not h11.PAUSED and not isinstance(event, h11.EndOfMessage):
            event = http.next_event()
            if isinstance(event, h11.Response) or getattr(event, "status_code", 0) == SWITCHED:
                found.append(event.status_code)
        if http.their_state is h11.SWITCHED_PROTOCOL:
            return found
        if http.their_state is not h11.DONE:
            break
        http.start_next_cycle()
    if http.trailing_data[0]:
        raise h11.RemoteProtocolError("more follows the last reply")
    return found
