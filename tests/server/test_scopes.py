"""What a key that is for some models is told of them and of the others, by the server itself and by its workers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from infera_server.access import Access, Key, make_key
from tests.server.grpc_cases import call
from tests.server.grpc_cases import request as message_of
from tests.server.grpc_support import channel
from tests.server.support import Running, doubler, serving

MODELS = ("mine", "mine-too", "theirs")
KEYS: dict[str, dict[str, Any]] = {
    "some": {"models": ("mine*",)},
    "all": {},
    "admin": {"models": (), "management": True},
}
SEEN = {"some": ["mine", "mine-too"], "all": [*MODELS], "admin": [*MODELS]}
REFUSAL = "key 'some' is not for model '{}'"


@pytest.fixture(scope="module", params=[0, 2], ids=["alone", "workers"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Running, dict[str, str]]]:
    made = {name: make_key(name) for name in KEYS}
    keys = {name: Key(name, bytes.fromhex(made[name][1].split('"')[1]), **more) for name, more in KEYS.items()}
    with serving({name: doubler() for name in MODELS}, access=Access(keys), workers=request.param) as running:
        yield running, {name: f"Bearer {key}" for name, (key, _) in made.items()}


def ask(served: tuple[Running, dict[str, str]], key: str, path: str, method: str = "GET") -> tuple[int, Any]:
    running, keys = served
    body = b"{}" if method == "POST" else None
    status, headers, reply = running.request(method, path, body, {"Authorization": keys[key]})
    return status, json.loads(reply) if reply and "json" in headers["content-type"] else reply.decode()


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/{}",
        "/v2/models/{}/versions/1",
        "/v2/models/{}/ready",
        "/v2/models/{}/versions/1/ready",
        "/v2/models/{}/config",
        "/v2/models/{}/stats",
        "/v2/models/{}/trace/setting",
        "/v2/repository/models/{}/traffic",
    ],
)
def test_a_model_is_read_with_a_key_for_it(served: tuple[Running, dict[str, str]], path: str) -> None:
    for key, seen in SEEN.items():
        for model in MODELS:
            status, reply = ask(served, key, path.format(model))
            assert status == (200 if model in seen else 403), (key, model, reply)
    for written, model in {"theirs": "theirs", "%74heirs": "theirs", "nowhere": "nowhere"}.items():
        assert ask(served, "some", path.format(written)) == (403, {"error": REFUSAL.format(model)})
    assert ask(served, "some", path.format("mine-not"))[0] == 404
    assert served[0].request("HEAD", path.format("theirs"), headers={"Authorization": served[1]["some"]})[0] == 403


@pytest.mark.parametrize("path", ["infer", "generate", "generate_stream", "versions/1/infer"])
def test_nothing_else_is_inferred(served: tuple[Running, dict[str, str]], path: str) -> None:
    assert ask(served, "some", f"/v2/models/theirs/{path}", "POST") == (403, {"error": REFUSAL.format("theirs")})
    assert ask(served, "some", f"/v2/models/mine/{path}", "POST")[0] == 400


def test_no_stream_of_another_model_is_opened(served: tuple[Running, dict[str, str]]) -> None:
    running, keys = served
    address, headers = f"ws://127.0.0.1:{running.port}/v2/models", {"Authorization": keys["some"]}
    with connect(f"{address}/mine/stream", additional_headers=headers):
        pass
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{address}/theirs/stream", additional_headers=headers)
    assert refused.value.response.status_code == 403
    assert json.loads(refused.value.response.body or b"") == {"error": REFUSAL.format("theirs")}


@pytest.mark.parametrize("key", KEYS)
def test_lists_leave_others_out(served: tuple[Running, dict[str, str]], key: str) -> None:
    seen = SEEN[key]
    assert ask(served, key, "/v2/models") == (200, {"models": seen})
    assert names(ask(served, key, "/v2/models/stats")[1]["model_stats"]) == seen
    assert names(ask(served, key, "/v2/repository/index", "POST")[1]) == seen
    status, metrics = ask(served, key, "/metrics")
    assert status == 200
    assert [model for model in MODELS if f'model="{model}"' in metrics] == seen
    assert "# HELP infera_queue_depth Requests waiting for a run." in metrics
    for path in ("/v2", "/v2/trace/setting", "/v2/logging", "/openapi.json"):
        assert ask(served, key, path)[0] == 200


def names(entries: Sequence[dict[str, Any]]) -> list[str]:
    return [entry["name"] for entry in entries]


@pytest.mark.parametrize("key", KEYS)
def test_grpc_tells_as_much(served: tuple[Running, dict[str, str]], key: str) -> None:
    running, keys = served
    metadata, seen = [("authorization", keys[key])], SEEN[key]
    with channel(running) as made:
        for method, member in (
            ("ModelReady", "name"),
            ("ModelMetadata", "name"),
            ("ModelConfig", "name"),
            ("ModelStatistics", "name"),
            ("TraceSetting", "model_name"),
        ):
            for model in MODELS:
                reply = call(made, method, message_of(f"{method}Request", **{member: model}), metadata)
                if model in seen:
                    assert reply.code == "OK", reply
                else:
                    assert (reply.code, reply.text) == ("PERMISSION_DENIED", REFUSAL.format(model))
        found = call(made, "RepositoryIndex", message_of("RepositoryIndexRequest"), metadata)
        assert names(found.message["models"]) == seen
        found = call(made, "ModelStatistics", message_of("ModelStatisticsRequest"), metadata)
        assert names(found.message["model_stats"]) == seen
        for method in ("ServerMetadata", "TraceSetting", "LogSettings"):
            assert call(made, method, message_of(f"{method}Request"), metadata).code == "OK"
        nowhere = call(made, "ModelReady", message_of("ModelReadyRequest", name="nowhere"), metadata)
        assert nowhere.code == ("PERMISSION_DENIED" if key == "some" else "OK")


def refusals(served: tuple[Running, dict[str, str]]) -> dict[str, float]:
    _, text = ask(served, "all", "/metrics")
    found = re.findall(r'^infera_access_refused_total\{reason="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {reason: float(count) for reason, count in found}


def test_who_is_not_let_in_is_counted(served: tuple[Running, dict[str, str]]) -> None:
    running, keys = served
    before = refusals(served)
    infer = "/v2/models/theirs/infer"
    asked = {
        "scope": (3, infer, keys["some"], 403),
        "no_key": (2, infer, "", 401),
        "unknown_key": (4, infer, "Bearer infera_some_guess", 401),
        "management": (1, "/v2/repository/models/theirs/load", keys["some"], 403),
    }
    for times, path, key, status in asked.values():
        for _ in range(times):
            assert running.request("POST", path, b"{}", {"Authorization": key})[0] == status
    after = refusals(served)
    assert {reason: after[reason] - before.get(reason, 0) for reason in after} == {
        reason: times for reason, (times, *_) in asked.items()
    }
