"""Thousands of requests that are nearly right: none is the server's fault, and nothing stays of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import h11
import pytest

from infera_server.http import hotpath
from infera_server.http.connection import CONTINUE
from infera_server.http.upload import LARGE
from tests.descriptors import open_files
from tests.server.malformed import statuses
from tests.server.mutations import INFERENCE, SEEDS, mutated
from tests.server.support import WAIT, FakeSession, Running, doubler, serving, until

AT_A_TIME = 32
PATIENCE, LONG_PATIENCE = 0.01, 0.2
"""Seconds without a reply after which the client says that it sends no more."""

SPOKEN = (501, 505)
"""What is the client's fault though its status says 5xx: what is not spoken here."""


def double() -> FakeSession:
    """Without the values that are an error of the server."""
    plain = doubler()
    return FakeSession(plain.inputs, plain.outputs, lambda feeds: {"y": feeds["x"] * 2})


@pytest.fixture(params=[LARGE, 1], ids=["parsed", "read by itself"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(hotpath, "LARGE", request.param)
    with serving({"double": double()}, max_batch=4) as running:
        yield running


async def ask(port: int, sent: bytes, patience: float) -> bytes:
    """All that is answered until the connection ends, without interim replies."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        found = b""
        with contextlib.suppress(TimeoutError):
            while not found and not reader.at_eof():
                found = (await asyncio.wait_for(reader.read(1 << 16), patience)).replace(CONTINUE, b"")
        writer.write_eof()
        return found + (await asyncio.wait_for(reader.read(), WAIT)).replace(CONTINUE, b"")
    except OSError:
        return b""
    finally:
        writer.close()


def ask_all(
    port: int, requests: Iterable[bytes], look: Callable[[bytes, bytes], None], patience: float = PATIENCE
) -> None:
    """Send many, some at a time, and look at what is answered to each."""
    waiting = iter(requests)

    async def one_by_one() -> None:
        for sent in waiting:
            look(sent, await ask(port, sent, patience))

    async def work() -> None:
        await asyncio.gather(*(one_by_one() for _ in range(AT_A_TIME)))

    asyncio.run(work())


def footprint(server: Running) -> dict[str, int]:
    """What a request could leave behind."""

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    service = server.host.service
    return {
        "connections": len(service.connections),
        "known to uvicorn": len(server.host.server.server_state.connections),
        "streams": service.streams,
        "held": service.intake.held,
        "queued": server.host.repository.get("double").queued,
        "files": open_files(),
        "threads": threading.active_count(),
        "tasks": server.call(tasks()),
    }


def resident() -> int:
    """Bytes in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fuzz(server: Running, seed: int, count: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    found: Counter[int] = Counter()

    def look(sent: bytes, answered: bytes) -> None:
        try:
            replies = statuses(answered)
        except h11.RemoteProtocolError as error:
            pytest.fail(f"{sent!r} was answered with {answered!r}: {error}")
        found.update(replies)
        assert all(status < 500 or status in SPOKEN for status in replies), (sent, answered)

    ask_all(server.port, SEEDS * AT_A_TIME, look)  # threads are started, caches are filled
    until(lambda: not server.host.service.connections and not server.host.service.streams)
    before = footprint(server)
    ask_all(server.port, (mutated(rng) for _ in range(count)), look)
    with contextlib.suppress(AssertionError):
        until(lambda: footprint(server) == before)
    assert footprint(server) == before
    assert {200, 400, 404} <= set(found), found
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert server.infer("double", SEEDS[0].partition(b"\r\n\r\n")[2])[0] == 200


def test_a_thousand_requests_that_are_nearly_right(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    fuzz(server, 1, 500, caplog)


@pytest.mark.large
def test_ten_thousand_requests_that_are_nearly_right(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    fuzz(server, 2, 1000, caplog)
    gc.collect()
    before = resident()
    for seed in range(3, 7):
        fuzz(server, seed, 1000, caplog)
    gc.collect()
    assert resident() - before < 8 << 20


def test_what_came_before_changes_no_answer(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known heads and documents save reading, and mean the same."""
    rng = random.Random(0)
    requests = [mutated(rng, 2, INFERENCE) for _ in range(200)]

    def answers() -> dict[bytes, tuple[int, bytes]]:
        found: dict[bytes, tuple[int, bytes]] = {}

        def look(sent: bytes, answered: bytes) -> None:
            found[sent] = first_reply(answered)

        ask_all(server.port, requests, look, LONG_PATIENCE)
        return found

    with monkeypatch.context() as patch:
        for name in ("heads", "templates"):
            patch.setattr(server.host.service, name, Forgetful())
        fresh = answers()
    ask_all(server.port, INFERENCE * 3, lambda sent, answered: None)
    assert answers() == fresh
    assert answers() == fresh


class Forgetful:
    """Knows nothing."""

    def find(self, *arguments: object) -> None:
        return None

    def keep(self, *arguments: object) -> None:
        return None

    def forget(self) -> None:
        return None


def first_reply(answered: bytes) -> tuple[int, bytes]:
    """Status and body; those after it may be lost, where the client sends no more."""
    body = answered.partition(b"\r\n\r\n")[2].partition(b"HTTP/1.1 ")[0]
    return next(iter(statuses(answered)), 0), body
