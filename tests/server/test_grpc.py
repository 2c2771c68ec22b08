"""ModelInfer and the calls about models: replies as a real tritonserver's, every datatype, refusals, limits."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from infera_server.codec import DATATYPES, to_bytes
from infera_server.protocols.protos import message
from tests.server.grpc_cases import CASES, UNLIKE, Case, Reply, call, recorded
from tests.server.grpc_cases import request as message_of
from tests.server.grpc_stream_cases import STREAMS, talk
from tests.server.grpc_stream_cases import recorded as recorded_streams
from tests.server.grpc_support import (
    FIELDS,
    array_of,
    channel,
    echoes,
    infer,
    mlp,
    request,
    status_of,
    typed,
    unary,
    values,
)
from tests.server.support import WAIT, FakeSession, Running, doubler, serving, until
from tests.server.test_repository_traffic import traffic, versions

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def triton_like() -> Iterator[grpc.Channel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.root, "level", logging.INFO)  # as both servers start
        with serving({"mlp": mlp()}) as running, channel(running) as made:
            yield made


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler(), **echoes()}, max_batch=4, max_queue=2) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[grpc.Channel]:
    with channel(server) as made:
        yield made


# --- as Triton -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_replies_are_those_of_a_real_tritonserver(triton_like: grpc.Channel, case: Case) -> None:
    want = UNLIKE.get(case.name) or recorded()[case.name]
    if case.name == "metadata":
        want = Reply("OK", message=want.message | {"platform": "onnx_infera"})
    assert call(triton_like, case.method, case.request) == want


@pytest.mark.parametrize("name", [name for name, sent in STREAMS.items() if sent[-1].model_name == "mlp"])
def test_streams_are_those_of_a_real_tritonserver(triton_like: grpc.Channel, name: str) -> None:
    assert talk(triton_like, STREAMS[name]) == recorded_streams()[name]


def test_only_what_differs_is_listed_as_different() -> None:
    replies = recorded()
    assert {case.name for case in CASES} == set(replies)
    assert all(replies[name] != reply for name, reply in UNLIKE.items())


# --- datatypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", DATATYPES)
def test_raw_tensors_come_back_bit_for_bit(client: grpc.Channel, datatype: str) -> None:
    array = values(datatype)
    raw = bytes(to_bytes(array))
    response = infer(client, request(datatype, array, datatype, raw, id="7"))
    assert (response.id, response.model_name, response.model_version) == ("7", datatype, "1")
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", datatype, [2, 3])
    assert list(response.raw_output_contents) == [raw]


@pytest.mark.parametrize("datatype", FIELDS)
def test_typed_tensors_come_back_as_raw_ones(client: grpc.Channel, datatype: str) -> None:
    array = values(datatype)
    items = [item.encode() for item in array.flat] if datatype == "BYTES" else array.ravel().tolist()
    assert infer(client, typed(datatype, items)).raw_output_contents[0] == bytes(to_bytes(array))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_has_no_typed_field(client: grpc.Channel, datatype: str) -> None:
    made = message("inference.ModelInferRequest")(model_name=datatype)
    made.inputs.add(name="x", datatype=datatype, shape=[2, 3]).contents.fp32_contents.extend([1.0] * 6)
    with pytest.raises(grpc.RpcError) as error:
        infer(client, made)
    where = f"input tensor 'x' for model '{datatype}' of type 'FP32'"
    text = f"unexpected explicit tensor data for {where}, expected datatype '{datatype}'"
    assert status_of(error) == ("INVALID_ARGUMENT", text)


@pytest.mark.parametrize(("datatype", "item"), [("INT8", 128), ("INT16", -40000), ("UINT8", 256), ("UINT16", 70000)])
def test_numbers_that_do_not_fit_are_refused_and_not_cut(client: grpc.Channel, datatype: str, item: int) -> None:
    with pytest.raises(grpc.RpcError) as error:
        infer(client, typed(datatype, [item] * 6))
    assert status_of(error) == (
        "INVALID_ARGUMENT", f"input tensor 'x' for model '{datatype}': a number does not fit in {datatype}",
    )  # fmt: skip


def test_texts_that_are_cut_short_are_refused(client: grpc.Channel) -> None:
    for raw in (b"", b"\x01", struct.pack("<I", 2**32 - 1) * 6, struct.pack("<I", 0) * 7):
        with pytest.raises(grpc.RpcError) as error:
            infer(client, request("BYTES", values("BYTES"), "BYTES", raw))
        assert status_of(error)[0] == "INVALID_ARGUMENT"


def test_large_messages_are_read_without_the_loop() -> None:
    """More texts, and more typed values, than are read at once."""
    words = np.full((20_000, 3), "word", object)
    raw = bytes(to_bytes(words))
    floats = np.arange(120_000, dtype=np.float32).reshape(-1, 3)
    sent = message("inference.ModelInferRequest")(model_name="floats")
    entry = sent.inputs.add(name="x", datatype="FP32", shape=floats.shape)
    entry.contents.fp32_contents.extend(floats.ravel().tolist())
    models = {"words": echoes()["BYTES"], "floats": echoes()["FP32"]}
    with serving(models, max_batch=40_000) as running, channel(running) as made:
        assert infer(made, request("words", words, "BYTES", raw)).raw_output_contents[0] == raw
        assert np.array_equal(array_of(infer(made, sent)), floats)


# --- what a request may ask ------------------------------------------------------------------------------------------


def test_classification(client: grpc.Channel) -> None:
    wanted = [{"name": "y", "parameters": {"classification": {"int64_param": 2}}}]
    response = infer(client, request("double", X, outputs=wanted))
    assert response.outputs[0].datatype == "BYTES"
    assert list(response.outputs[0].shape) == [2, 2]
    items = [b"6.000000:3", b"4.000000:2", b"14.000000:3", b"12.000000:2"]
    assert response.raw_output_contents[0] == b"".join(struct.pack("<I", len(i)) + i for i in items)


def test_a_reply_explains_itself_where_asked(client: grpc.Channel) -> None:
    response = infer(client, request("double", X, parameters={"infera_trace": {"bool_param": True}}))
    assert "rows=2" in response.parameters["infera_trace"].string_param
    assert not infer(client, request("double", X)).parameters


def test_the_same_header_with_other_tensors_is_another_request(client: grpc.Channel) -> None:
    for number in range(5):
        response = infer(client, request("double", X + number, id=str(number)))
        assert response.id == str(number)
        assert np.array_equal(array_of(response), 2 * (X + number))
    with pytest.raises(grpc.RpcError) as error:
        infer(client, request("double", X, raw=X.tobytes()[1:]))
    assert status_of(error)[1].endswith("Expected 32, got 31")


def test_errors_of_the_run(client: grpc.Channel) -> None:
    for first, code in ((-1, "INVALID_ARGUMENT"), (666, "INTERNAL")):
        with pytest.raises(grpc.RpcError) as error:
            infer(client, request("double", np.full((1, 4), first, np.float32)))
        assert status_of(error)[0] == code


# --- time ------------------------------------------------------------------------------------------------------------


def blocked(server: Running) -> FakeSession:
    """The doubler, whose next run waits."""
    session = server.sessions["double"]
    assert isinstance(session, FakeSession)
    session.block()
    return session


def test_a_call_that_is_cancelled_is_not_run(server: Running, client: grpc.Channel) -> None:
    session = blocked(server)
    running = unary(client).future(request("double", X))
    session.wait_entered()
    model = server.host.repository.get("double")
    waiting = unary(client).future(request("double", X))
    until(lambda: model.queued == 1)
    waiting.cancel()
    until(lambda: model.queued == 0)
    session.gate.set()
    assert np.array_equal(array_of(running.result(WAIT)), 2 * X)
    assert session.batches == [2]


def test_the_deadline_of_a_call_is_the_request_s(server: Running, client: grpc.Channel) -> None:
    session = blocked(server)
    running = unary(client).future(request("double", X))
    session.wait_entered()
    for sent, timeout in (
        (request("double", X), 0.05),
        (request("double", X, parameters={"timeout": {"int64_param": "50000"}}), WAIT),
    ):
        with pytest.raises(grpc.RpcError) as error:
            infer(client, sent, timeout)
        assert status_of(error)[0] == "DEADLINE_EXCEEDED"
    session.gate.set()
    running.result(WAIT)
    assert session.batches == [2]


def test_a_full_queue_says_when_to_come_back(server: Running, client: grpc.Channel) -> None:
    session = blocked(server)
    calls = [unary(client).future(request("double", X))]
    session.wait_entered()
    model = server.host.repository.get("double")
    for waiting in (1, 2):
        calls.append(unary(client).future(request("double", X)))
        until(lambda waiting=waiting: model.queued == waiting)  # type: ignore[misc]
    with pytest.raises(grpc.RpcError) as error:
        infer(client, request("double", X))
    assert status_of(error)[0] == "RESOURCE_EXHAUSTED"
    assert int(dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1
    session.gate.set()
    for made in calls:
        assert np.array_equal(array_of(made.result(WAIT)), 2 * X)


# --- versions --------------------------------------------------------------------------------------------------------


def test_a_label_is_a_version_and_may_be_another_later() -> None:
    """Headers that are known follow it, and so does a label that was one."""
    with versions("1", "2") as running, channel(running) as made:
        sent = request("m", X, model_version="canary")
        for version in ("1", "2"):
            traffic(running, labels={"canary": int(version)})
            response = infer(made, sent)
            assert response.model_version == version
            assert np.array_equal(array_of(response), X * int(version))
            ready = call(made, "ModelReady", message_of("ModelReadyRequest", name="m", version="canary"))
            assert ready.message == {"ready": True}
        traffic(running, labels={})
        with pytest.raises(grpc.RpcError) as error:
            infer(made, sent)
        assert status_of(error)[0] == "INVALID_ARGUMENT"
