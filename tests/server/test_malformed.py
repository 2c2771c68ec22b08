"""Malformed HTTP/1.1: refused where it could mean two things, and never taken for another request."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from infera_server.http import hotpath
from infera_server.http.upload import LARGE
from tests.server.malformed import BODY, CASES, CHUNKED, LENGTH, LINE, LIVE, VALID, Case, Replies, connected, post
from tests.server.support import Running, doubler, serving, until

PAUSE = 0.002
"""Seconds after which what is sent arrives by itself."""

UNLOAD = b"POST /v2/repository/models/double/unload HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
"""What would fail all other tests if it were read."""


@pytest.fixture(scope="module", params=[LARGE, 1], ids=["parsed", "read by itself"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    """Bodies from so many bytes on are read past the parser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hotpath, "LARGE", request.param)
        with serving({"double": doubler()}, max_batch=4) as running:
            yield running
            until(lambda: not running.host.service.connections)
            assert running.host.service.intake.held == 0


def check(server: Running, case: Case, *pieces: bytes, before: int = 0, after: int = 0) -> None:
    """Send the pieces one by one: so many good requests, the case, so many good requests."""
    with connected(server) as sock:
        replies = Replies(sock, "HEAD" if case.head else "GET")
        for piece in pieces:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was refused before
                sock.sendall(piece)
            if len(pieces) > 1:
                time.sleep(PAUSE)
        assert [replies.status() for _ in range(before)] == [200] * before
        assert replies.status() == case.status
        if case.closes:
            assert replies.over
            assert replies.status() == 0
            return
        assert [replies.status() for _ in range(after)] == [200] * after
        sock.sendall(LIVE)
        assert replies.status() == 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(server: Running, case: Case) -> None:
    check(server, case, case.sent)
    if case.head:  # the replies of others have bodies
        return
    check(server, case, VALID + case.sent, before=1)
    check(server, case, LIVE + case.sent, before=1)
    lost = (ConnectionResetError,) if case.closes and case.status == 200 else ()  # it said itself that it was the last
    with contextlib.suppress(*lost):
        check(server, case, case.sent + (VALID + UNLOAD if case.closes else VALID + LIVE), after=2)
    check(server, case, VALID, case.sent, VALID, before=1, after=1)
    rng = random.Random(case.name)
    for _ in range(2):
        cuts = [0, *sorted(rng.sample(range(1, len(case.sent)), 2)), len(case.sent)]
        check(server, case, *(case.sent[a:b] for a, b in pairwise(cuts)))


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\r\n\r\n\r\n", 0),
        (b"GET /v2\r\n", 0),
        (VALID[:-1], 400),
        (post(CHUNKED, b"ffffffffffffffff\r\n" + BODY), 400),
        (post(CHUNKED, b"7fffffffffffffff\r\n" + BODY), 400),
        (post(CHUNKED, b"5\r\n" + BODY[:5] + b"\r\n"), 400),
    ],
)
def test_what_is_not_complete_is_waited_for_until_the_client_sends_no_more(
    server: Running, sent: bytes, status: int
) -> None:
    with connected(server) as sock:
        sock.sendall(sent)
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(10)
        sock.shutdown(socket.SHUT_WR)
        assert Replies(sock).status() == status


# --- heads that are known ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"",
        LINE[:-2],
        LINE + b"Host: x",
        LINE + b"Host: x\r\nContent-Length: ",
        LINE + b"Host: x\r\nContent-Length:",
        LINE + b"Host: x\r\nContent-Length: %d\r\nContent-Length: 1" % len(BODY),
        LINE + b"Host: x\r\nContent-Length: %d\r\nTransfer-Encoding: chunked" % len(BODY),
        LINE + b"Host: x\r\nX: y\r\n\r\nContent-Length: %d" % len(BODY),
        LINE + b"Host: x\r\nContent-Length: 9999999999999999999999",
        LINE.replace(b"POST", b"PUT") + b"Host: x\r\nContent-Length: %d" % len(BODY),
        LINE.replace(b"1.1", b"1.0") + b"Host: x\r\nContent-Length: %d" % len(BODY),
        b"X" + LINE + b"Host: x\r\nContent-Length: %d" % len(BODY),
    ],
)
@pytest.mark.parametrize("lead", [b"", b"\r\n", b"\r\n\r\n", b"\n\r\n\r\n"])
def test_no_request_makes_another_one_known(server: Running, head: bytes, lead: bytes) -> None:
    """What is answered is the same whether heads like it came before or none did."""
    sent = lead + head + b"\r\n\r\n" + BODY

    def answered() -> list[tuple[int, bytes]]:
        with connected(server) as sock:
            replies, found = Replies(sock), []
            sock.sendall(sent)
            if b"HTTP/1.0" not in sent:  # whose clients are not waited for once they send no more
                sock.shutdown(socket.SHUT_WR)
            while (reply := replies.reply())[0]:
                found.append(reply)
            return found

    server.call(forget(server))
    fresh = answered()
    for warm in (VALID, lead + VALID, b"\r\n\r\n" + VALID, post(b"X: y\r\n" + LENGTH), sent):
        with connected(server) as sock:
            sock.sendall(warm)
            Replies(sock).status()
    assert answered() == fresh


async def forget(server: Running) -> None:
    server.host.service.heads.forget()
