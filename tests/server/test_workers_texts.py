"""What several workers serve of models that answer often, and of those that were evicted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.sync.client import connect

from infera_server.models import evictions
from infera_server.models.discovery import survey
from infera_server.models.repository import Repository
from infera_server.models.room import planned_bytes
from infera_server.settings import Settings
from tests.server.decoders import MASKED, attention_logits, put_decoder
from tests.server.grpc_stream_cases import talk
from tests.server.grpc_support import channel, stream
from tests.server.support import WAIT, Running, hosting, http_request, until
from tests.server.test_generator import DECOUPLED, MOST, PROMPT, ask, by_the_book, config, tokens_of
from tests.server.test_repository_memory import WEIGHTS, load, put
from tests.server.test_repository_memory import ask as infer

ROUNDS = 6
"""Connections, each of which is a coin's toss between workers."""

WANT = by_the_book(attention_logits, PROMPT)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Beside the decoder there is room for one of two models."""
    root = tmp_path_factory.mktemp("models")
    put_decoder(root, "texts", MASKED, config("input_ids", DECOUPLED))
    alone = Repository(Settings(), survey([root]).sources)
    alone.load(lambda fn, arg: fn(arg))
    (loaded,) = alone.loaded()
    assert loaded.model is not None
    limit = planned_bytes(loaded.model) + 3 * WEIGHTS // 2
    loaded.front.close()
    put(root, "a")
    settings = Settings(
        workers=2,
        max_load_bytes=200_000,
        max_body_bytes=20_000,
        memory_limit=f"{limit}B",
        evict=True,
        pinned=("texts",),
        keep_previous=0.0,
        max_batch=16,
    )
    with hosting(Repository(settings, survey([root]).sources, rescan=lambda: survey([root]))) as running:
        put(root, "b")
        yield running


def test_texts_over_grpc(served: Running) -> None:
    for _ in range(ROUNDS):
        with channel(served) as made:
            assert tokens_of(talk(made, [ask("texts", PROMPT)])) == WANT


def test_texts_as_events_and_over_websockets(served: Running) -> None:
    for _ in range(ROUNDS):
        status, _, body = served.request("POST", "/v2/models/texts/generate_stream", json.dumps({"input_ids": PROMPT}))
        assert status == 200
        assert [json.loads(e.removeprefix(b"data: "))["tokens"] for e in body.split(b"\n\n") if e] == WANT
    inputs = [{"name": "input_ids", "datatype": "INT64", "shape": [1, len(PROMPT)], "data": PROMPT}]
    with connect(f"ws://{served.address}/v2/models/texts/stream") as socket:
        socket.send(json.dumps({"inputs": inputs}))
        found: list[Any] = [json.loads(socket.recv(WAIT)) for _ in range(MOST)]
    assert [message["outputs"][0]["data"][0] for message in found] == WANT
    assert served.infer("texts", {"inputs": inputs})[0] == 501


def test_each_event_says_where_its_time_went(served: Running) -> None:
    _, _, body = served.request(
        "POST", "/v2/models/texts/generate_stream", json.dumps({"input_ids": PROMPT}), {"infera-trace": "1"}
    )
    told = [json.loads(event.removeprefix(b"data: "))["infera_trace"] for event in body.split(b"\n\n") if event]
    assert len(told) == MOST
    assert all("requests=1, rows=1, " in text for text in told)


def test_who_leaves_ends_its_text(served: Running) -> None:
    generator = served.host.repository.get("texts")
    for over in ("grpc", "http"):
        with served.model("texts").batcher.turns:  # nothing runs
            if over == "grpc":
                with channel(served) as made:
                    call = stream(made)(iter([ask("texts", PROMPT)]), timeout=WAIT)
                    until(lambda: generator.stats.sequences == (1, 0))
                    call.cancel()
            else:
                with served.connect() as sock:
                    body = json.dumps({"input_ids": PROMPT}).encode()
                    sock.sendall(http_request(body, "/v2/models/texts/generate_stream"))
                    until(lambda: generator.stats.sequences == (1, 0))
            until(lambda: generator.stats.sequences == (0, 0))


def test_a_load_may_be_as_large_as_its_files(served: Running) -> None:
    for size, status in ((100_000, 400), (400_000, 413)):
        files = {"config": "{}", "file:x": "A" * size}  # no version among them
        document = json.dumps({"parameters": files})
        assert served.request("POST", "/v2/repository/models/texts/load", document)[0] == status


def test_an_evicted_model_comes_back_whichever_worker_is_asked(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evictions, "BUSY", 0.0)
    assert infer(served, "a") == 200
    load(served, "b")
    for wanted in ("a", "b", "a", "b"):
        until(lambda name=wanted: infer(served, name) == 200)  # type: ignore[misc]
