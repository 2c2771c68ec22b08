"""Refusals of a full queue that are repeated without being made anew."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest

from infera_server.http import recalling, refusals
from infera_server.http.refusals import MAX_TARGETS, SECONDS, Refusals
from tests.server.support import Running, doubler, http_request, read_reply, serving, until

TARGET = "m", None
HEADERS = [(b"date", b"today")]


def ask(x: float = 1.0, more: str = "", **members: Any) -> bytes:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [x, 1, 2, 3]}
    return http_request(json.dumps({"inputs": [tensor], **members}).encode(), "/v2/models/double/infer", more)


@contextlib.contextmanager
def full(running: Running) -> Iterator[None]:
    """One request runs and one waits, which is all that may; both are answered in the end."""
    session: Any = running.sessions["double"]
    session.block()
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(contextlib.closing(running.connect())) for _ in range(2)]
        busy[0].sendall(ask())
        session.wait_entered()
        busy[1].sendall(ask())
        until(lambda: running.model("double").queued == 1)
        yield
        session.gate.set()
        for sock in busy:
            with sock.makefile("rb") as stream:
                assert read_reply(stream)[0] == 200


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The replies that were repeated, however slow the test is."""
    monkeypatch.setattr(refusals, "SECONDS", 60.0)
    sent: list[bytes] = []
    again = recalling.Recalling._refuse_again

    def spy(self: Any, model: Any, reply: bytes, now: float) -> None:
        sent.append(reply)
        again(self, model, reply, now)

    monkeypatch.setattr(recalling.Recalling, "_refuse_again", spy)
    return sent


def test_what_is_refused_again_is_answered_alike_and_counted(repeated: list[bytes]) -> None:
    with serving({"double": doubler()}, max_queue=1) as running:
        with full(running), contextlib.closing(running.connect()) as sock, sock.makefile("rb") as stream:
            found = []
            for _ in range(20):
                sock.sendall(ask())
                found.append(read_reply(stream))
        assert repeated
        assert {status for status, _, _ in found} == {429}
        assert all(int(headers["retry-after"]) >= 1 for _, headers, _ in found)
        assert {body for _, _, body in found} == {found[0][2]}
        with contextlib.closing(running.connect()) as sock, sock.makefile("rb") as stream:
            sock.sendall(ask(2.0))
            assert read_reply(stream)[0] == 200, "there is room again, and nobody is refused for what was"
        _, _, text = running.request("GET", "/metrics")
        assert b'infera_rejected_total{model="double",reason="queue_full",version="1"} 20.0' in text


def test_who_asks_for_a_trace_is_told_of_its_own(repeated: list[bytes]) -> None:
    with (
        serving({"double": doubler()}, max_queue=1) as running,
        full(running),
        contextlib.closing(running.connect()) as sock,
        sock.makefile("rb") as stream,
    ):
        for _ in range(4):
            sock.sendall(ask(more="infera-trace: 1\r\n"))
            assert "queue_full" in read_reply(stream)[1]["infera-trace"]
    assert not repeated


def test_a_refusal_after_the_head_is_nobody_elses(repeated: list[bytes]) -> None:
    """A deadline that cannot be met is one request's own, although its head is that of others."""
    with serving({"double": doubler()}, max_queue=8) as running:
        session: Any = running.sessions["double"]
        session.block()
        with contextlib.closing(running.connect()) as first, first.makefile("rb") as stream:
            first.sendall(ask())
            session.wait_entered()
            with contextlib.closing(running.connect()) as sock, sock.makefile("rb") as other:
                for _ in range(4):
                    sock.sendall(ask(parameters={"timeout": 1}))
                    assert read_reply(other)[0] in (429, 504)
                assert not repeated
                sock.sendall(ask())
                until(lambda: running.model("double").queued == 1)
                session.gate.set()
                assert read_reply(other)[0] == 200
            assert read_reply(stream)[0] == 200


# --- what is kept ----------------------------------------------------------------------------------------------------


class Queue(SimpleNamespace):
    """A model, as far as refusals look at it."""


def kept(queued: int = 3, size: int = 100) -> tuple[Refusals, Any]:
    made, model = Refusals(), Queue(queued=queued)
    made.keep(TARGET, model, size, 10.0, HEADERS, b"no")
    return made, model


def test_it_is_found_while_the_queue_is_no_shorter() -> None:
    made, model = kept()
    assert made.find(TARGET, model, 100, 10.0, HEADERS) == b"no"
    model.queued += 1
    assert made.find(TARGET, model, 100, 10.0, HEADERS) == b"no"
    model.queued -= 2
    assert made.find(TARGET, model, 100, 10.0, HEADERS) is None
    model.queued += 2
    assert made.find(TARGET, model, 100, 10.0, HEADERS) is None, "it is made anew"


def test_it_is_not_kept_where_nothing_waits() -> None:
    made, model = kept(queued=0)
    assert made.find(TARGET, model, 100, 10.0, HEADERS) is None


@pytest.mark.parametrize(
    ("size", "now", "headers", "is_same"),
    [
        (99, 10.0, HEADERS, True),
        (100, 10.0 + SECONDS, HEADERS, True),
        (100, 10.0, list(HEADERS), True),
        (100, 10.0, HEADERS, False),
    ],
    ids=["smaller", "later", "another date", "another model"],
)
def test_it_is_not_found_for_another(size: int, now: float, headers: Any, is_same: bool) -> None:
    made, model = kept()
    assert made.find(TARGET, model if is_same else Queue(queued=3), size, now, headers) is None
    assert made.find(("m", "1"), model, 100, 10.0, HEADERS) is None


def test_it_keeps_no_model_and_few_targets() -> None:
    made, model = kept()
    gone = ref(model)
    del model
    assert gone() is None
    assert made.find(TARGET, Queue(queued=3), 100, 10.0, HEADERS) is None
    other: Any = Queue(queued=1)
    for n in range(2 * MAX_TARGETS):
        made.keep((f"m{n}", None), other, 1, 10.0, HEADERS, b"no")
    assert len(made._known) <= MAX_TARGETS
