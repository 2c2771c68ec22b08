"""What gRPC refuses: messages that are too large, that are none, that come without a key."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from infera_server.access import Access, Key, make_key
from infera_server.codec import to_bytes
from infera_server.protocols import wire
from infera_server.protocols.protos import message
from tests.server.grpc_cases import SERVICE, call
from tests.server.grpc_cases import infer as mlp_request
from tests.server.grpc_cases import request as message_of
from tests.server.grpc_support import (
    METHOD,
    array_of,
    channel,
    echoes,
    infer,
    request,
    status_of,
    stream,
    typed,
    unary,
    values,
)
from tests.server.support import WAIT, doubler, serving, until

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def client() -> Iterator[grpc.Channel]:
    with serving({"double": doubler(), **echoes()}, max_batch=4) as running, channel(running) as made:
        yield made


# --- limits ----------------------------------------------------------------------------------------------------------


def test_messages_count_as_bodies_being_received() -> None:
    with serving({"double": doubler()}, max_intake_bytes=100_000) as running, channel(running) as made:
        intake = running.host.service.intake
        intake.held += 90_000  # by others
        x = np.zeros((4000, 4), np.float32)
        assert array_of(infer(made, request("double", X))).size == X.size
        with pytest.raises(grpc.RpcError) as error:
            infer(made, request("double", x))
        assert status_of(error) == (
            "RESOURCE_EXHAUSTED",
            "90,000 bytes of request bodies are being received, at most 100,000 are held; send the request again later",
        )
        told, right = stream(made)(iter([request("double", x), request("double", X)]))
        assert (told.error_message, right.error_message) == (error.value.details(), "")
        assert intake.held == 90_000


def test_messages_over_the_limit_are_refused() -> None:
    with (
        serving({"double": doubler()}, max_body_bytes=1000, max_json_bytes=400_000) as running,
        channel(running) as made,
    ):
        with pytest.raises(grpc.RpcError) as error:
            infer(made, request("double", np.zeros((20_000, 4), np.float32)))
        assert status_of(error)[0] == "RESOURCE_EXHAUSTED"
        assert np.array_equal(array_of(infer(made, request("double", X))), 2 * X)


def test_what_is_not_raw_has_a_limit_of_its_own() -> None:
    with serving({"FP32": echoes()["FP32"]}, max_json_bytes=300_000) as running, channel(running) as made:
        with pytest.raises(grpc.RpcError) as error:
            infer(made, typed("FP32", [0.0] * 80_000))
        code, text = status_of(error)
        assert code == "RESOURCE_EXHAUSTED"
        assert "at most 300,000 are accepted; send large tensors in raw_input_contents" in text


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests_and_responses(compression: grpc.Compression) -> None:
    with serving({"double": doubler()}, grpc_compression="gzip") as running, channel(running) as made:
        x = np.zeros((64, 4), np.float32)
        assert np.array_equal(array_of(infer(made, request("double", x), compression=compression)), x)


def test_refusals_are_counted_by_reason() -> None:
    """As those over HTTP are: for a queue that is full, and for a deadline that passed there."""
    session = doubler()
    with serving({"double": session}, max_batch=1, max_queue=1) as running, channel(running) as made:
        session.block()
        first = unary(made).future(request("double", X[:1]), timeout=WAIT)
        session.wait_entered()
        late = unary(made).future(request("double", X[:1], parameters={"timeout": {"int64_param": "1"}}), timeout=WAIT)
        until(lambda: late.done())
        waiting = unary(made).future(request("double", X[:1]), timeout=WAIT)
        until(lambda: running.model("double").queued == 1)
        (answer,) = stream(made)(iter([request("double", X[:1])]), timeout=WAIT)
        assert "1 requests" in answer.error_message
        with pytest.raises(grpc.RpcError):
            infer(made, request("double", X[:1]))
        session.gate.set()
        assert first.result() is not None
        assert waiting.result() is not None
        metrics = running.request("GET", "/metrics")[2].decode()
    refused = dict(re.findall(r'infera_rejected_total{model="double",reason="(\w+)",version="1"} ([\d.]+)', metrics))
    assert refused.pop("queue_full") == "2.0"
    assert refused in ({"deadline": "1.0"}, {"would_expire": "1.0"})


# --- who may ---------------------------------------------------------------------------------------------------------


def test_keys_are_asked_for() -> None:
    token, table = make_key("mobile")
    digest = bytes.fromhex(table.split('"')[1])
    access = Access({"mobile": Key("mobile", digest, models=("double",))}, open_management=False)
    with serving({"double": doubler(), "other": doubler()}, access=access) as running, channel(running) as made:
        bearer = [("authorization", f"Bearer {token}")]
        assert np.array_equal(array_of(infer(made, request("double", X), metadata=bearer)), 2 * X)
        for sent, metadata, code in (
            (request("double", X), [], "UNAUTHENTICATED"),
            (request("double", X), [("x-api-key", token + "x")], "UNAUTHENTICATED"),
            (request("other", X), bearer, "PERMISSION_DENIED"),
        ):
            with pytest.raises(grpc.RpcError) as error:
                infer(made, sent, metadata=metadata)
            assert status_of(error)[0] == code
        assert call(made, "ServerLive", message_of("ServerLiveRequest")).code == "OK"
        assert call(made, "ModelMetadata", message_of("ModelMetadataRequest", name="double")).code == "UNAUTHENTICATED"
        unload = message_of("RepositoryModelUnloadRequest", model_name="double")
        assert call(made, "RepositoryModelUnload", unload).code == "UNAUTHENTICATED"


# --- what clients get wrong ------------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut out, or said twice."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(found) + 1)
        match rng.randrange(4):
            case 0:
                found[start : start + 1] = rng.randbytes(1)
            case 1:
                found[start : start + rng.randrange(9)] = b""
            case 2:
                found[start:start] = found[start : start + rng.randrange(9)]
            case _:
                found[start : start + 1] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF])])
    return bytes(found)


def test_no_mutation_of_a_message_is_the_server_s_mistake(client: grpc.Channel) -> None:
    rng = random.Random(0)
    parameters = {"sequence_id": {"int64_param": "0"}, "priority": {"uint64_param": "1"}, "mine": {"string_param": "x"}}
    outputs = [{"name": "y", "parameters": {"classification": {"int64_param": 2}}}]
    originals = [
        (METHOD + "ModelInfer", request("FP32", X[:, :3], id="id", outputs=outputs, parameters=parameters)),
        (METHOD + "ModelInfer", typed("INT16", [1, 2, 3, 4, 5, 6])),
        (METHOD + "ModelInfer", request("BYTES", values("BYTES"), "BYTES", bytes(to_bytes(values("BYTES"))))),
        (METHOD + "ModelConfig", message_of("ModelConfigRequest", name="double", version="1")),
        (METHOD + "RepositoryIndex", message_of("RepositoryIndexRequest", ready=True)),
        ("/grpc.health.v1.Health/Check", message("grpc.health.v1.HealthCheckRequest")(service=SERVICE)),
    ]
    calls = []
    for _ in range(1000):
        method, original = rng.choice(originals)
        calls.append(client.unary_unary(method).future(mutated(rng, original.SerializeToString()), timeout=WAIT))
        if len(calls) % 2 == 0:
            calls[-2].exception()  # no more than the queue holds
    codes = {error.code().name for made in calls if (error := made.exception())}
    assert codes <= {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"}
    assert "INVALID_ARGUMENT" in codes
    assert np.array_equal(array_of(infer(client, request("double", X))), 2 * X)


def test_fields_are_cut_out_as_they_were_put_in() -> None:
    made = mlp_request(raw=[b"", b"a" * 200, b"b" * 20_000], id="x" * 130)
    data = made.SerializeToString()
    raw: list[memoryview] = []
    rest = wire.cut(data, {7: raw})
    assert [bytes(r) for r in raw] == list(made.raw_input_contents)
    del made.raw_input_contents[:]
    assert rest == made.SerializeToString()
    assert wire.head(7, 20_000) + b"b" * 20_000 == data[-20_004:]


def test_a_message_of_empty_fields_is_not_read_to_its_end(client: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as error:
        client.unary_unary(METHOD + "ModelInfer")(b"\x3a\x00" * 100_000, timeout=WAIT)
    assert status_of(error) == ("INVALID_ARGUMENT", "the request has more than 16,384 fields")
