"""What the client of one API key has is out of reach of another's: sequences, shared memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
from websockets.sync.client import connect

from infera_server.access import Access, Key, make_key
from infera_server.processes.front_wire import request_in, request_out
from infera_server.requests import Correlation, Request
from tests.server.grpc_cases import call
from tests.server.grpc_cases import request as message_of
from tests.server.grpc_support import channel, infer, request, stream
from tests.server.support import WAIT, FakeSession, Running, doubler, serving, spec

X = np.ones((1, 4), np.float32)
ENTRY = {"name": "x", "shape": [1, 4], "datatype": "FP32"}
MEMORY = "/v2/systemsharedmemory"

Ask: TypeAlias = Callable[[Running, str, dict[str, Any]], float | None]
"""A step with these parameters, for a key's holder: how many steps of ones there were; None where it is refused."""


def counter() -> FakeSession:
    """x [N, 4], sum [N, 4] -> y [N, 4], the sum so far."""

    def fn(feeds: Any) -> Any:
        total = feeds["sum"] + feeds["x"]
        return {"y": total, "sum_out": total.copy()}

    return FakeSession({"x": spec("N", 4), "sum": spec("N", 4)}, {"y": spec("N", 4), "sum_out": spec("N", 4)}, fn)


@contextmanager
def keyed(**tables: dict[str, Any]) -> Iterator[tuple[Running, dict[str, str]]]:
    made = {name: make_key(name) for name in tables}
    keys = {name: Key(name, bytes.fromhex(made[name][1].split('"')[1]), **more) for name, more in tables.items()}
    with serving({"count": counter(), "double": doubler()}, access=Access(keys)) as running:
        yield running, {name: key for name, (key, _) in made.items()}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def by_json(running: Running, key: str, parameters: dict[str, Any]) -> float | None:
    document = {"inputs": [{**ENTRY, "data": X.ravel().tolist()}], "parameters": parameters}
    status, reply = running.infer("count", document, **bearer(key))
    return float(reply["outputs"][0]["data"][0]) if status == 200 else None


def by_bytes(running: Running, key: str, parameters: dict[str, Any]) -> float | None:
    head = json.dumps(
        {"inputs": [{**ENTRY, "parameters": {"binary_data_size": X.nbytes}}], "parameters": parameters}
    ).encode()
    headers = {**bearer(key), "Inference-Header-Content-Length": str(len(head))}
    status, _, body = running.request("POST", "/v2/models/count/infer", head + X.tobytes(), headers)
    return float(json.loads(body)["outputs"][0]["data"][0]) if status == 200 else None


def by_websocket(running: Running, key: str, parameters: dict[str, Any]) -> float | None:
    document = {"inputs": [{**ENTRY, "data": X.ravel().tolist()}], "parameters": parameters}
    with connect(f"ws://{running.address}/v2/models/count/stream", additional_headers=bearer(key)) as client:
        client.send(json.dumps(document))
        reply = json.loads(client.recv(timeout=WAIT))
    return float(reply["outputs"][0]["data"][0]) if "outputs" in reply else None


def _sent(parameters: dict[str, Any]) -> Any:
    kinds = {name: {"int64_param" if name == "sequence_id" else "bool_param": v} for name, v in parameters.items()}
    return request("count", X, parameters=kinds)


def by_grpc(running: Running, key: str, parameters: dict[str, Any]) -> float | None:
    with channel(running) as made:
        try:
            found = infer(made, _sent(parameters), metadata=[("authorization", f"Bearer {key}")])
        except grpc.RpcError:
            return None
    return float(np.frombuffer(found.raw_output_contents[0], np.float32)[0])


def by_grpc_stream(running: Running, key: str, parameters: dict[str, Any]) -> float | None:
    with channel(running) as made:
        metadata = [("authorization", f"Bearer {key}")]
        (found,) = stream(made)(iter([_sent(parameters)]), timeout=WAIT, metadata=metadata)
    if found.error_message:
        return None
    return float(np.frombuffer(found.infer_response.raw_output_contents[0], np.float32)[0])


def by_generate(running: Running, key: str, parameters: dict[str, Any]) -> float | None:
    body = json.dumps({"x": X.ravel().tolist(), **parameters})
    status, _, reply = running.request("POST", "/v2/models/count/generate", body, bearer(key))
    return float(json.loads(reply)["y"][0]) if status == 200 else None


@pytest.mark.parametrize("ask", [by_json, by_bytes, by_websocket, by_grpc, by_grpc_stream, by_generate])
def test_a_sequence_is_of_the_key_that_began_it(ask: Ask) -> None:
    first, then = {"sequence_id": 7, "sequence_start": True}, {"sequence_id": 7}
    with keyed(one={}, other={}) as (running, keys):
        assert [ask(running, keys["one"], step) for step in (first, then, then)] == [1, 2, 3]
        assert ask(running, keys["other"], then) is None
        assert [ask(running, keys["other"], step) for step in (first, then)] == [1, 2]
        assert ask(running, keys["one"], then) == 4


def test_the_engine_is_told_whose_a_sequence_is() -> None:
    asked = Request("", {"x": X}, [], correlation=Correlation(7))
    asked.claim("one")
    assert request_in(json.loads(json.dumps(request_out(asked))), {}, None).correlation == Correlation(7, owner="one")


# --- shared memory ---------------------------------------------------------------------------------------------------

PLACE = {"shared_memory_region": "mine", "shared_memory_byte_size": 16}
PLACED = {"shared_memory_region": {"string_param": "mine"}, "shared_memory_byte_size": {"int64_param": 16}}
VALUES = {"data": X.ravel().tolist()}


def _status_by_http(running: Running, key: str, document: dict[str, Any]) -> int:
    return running.infer("double", document, **bearer(key))[0]


def _status_by_websocket(running: Running, key: str, document: dict[str, Any]) -> int:
    with connect(f"ws://{running.address}/v2/models/double/stream", additional_headers=bearer(key)) as client:
        client.send(json.dumps(document))
        return int(json.loads(client.recv(timeout=WAIT)).get("status", 200))


def _status_by_grpc(running: Running, key: str, document: dict[str, Any]) -> int:
    reads, outputs = "data" not in document["inputs"][0], document.get("outputs", [])
    more: dict[str, Any] = {"inputs": [{**ENTRY, "parameters": PLACED}]} if reads else {}
    sent = request("double", X, outputs=[{"name": "y", "parameters": PLACED} for _ in outputs], **more)
    if reads:
        del sent.raw_input_contents[:]
    with channel(running) as made:
        try:
            infer(made, sent, metadata=[("authorization", f"Bearer {key}")])
        except grpc.RpcError as error:
            return {"PERMISSION_DENIED": 403}[error.code().name]
    return 200


@pytest.mark.parametrize("ask", [_status_by_http, _status_by_websocket, _status_by_grpc])
def test_shared_memory_is_for_who_may_register_it(ask: Callable[[Running, str, dict[str, Any]], int]) -> None:
    reads = {"inputs": [{**ENTRY, "parameters": PLACE}]}
    writes = {"inputs": [{**ENTRY, **VALUES}], "outputs": [{"name": "y", "parameters": PLACE}]}
    block = SharedMemory(create=True, size=16)
    try:
        assert block.buf is not None
        block.buf[:] = X.tobytes()
        with keyed(plain={}, admin={"management": True}) as (running, keys):
            admin, plain = keys["admin"], keys["plain"]
            body = json.dumps({"key": block.name, "byte_size": 16})
            assert running.request("POST", f"{MEMORY}/region/mine/register", body, bearer(admin))[0] == 200
            for document in (reads, writes, reads):
                assert ask(running, admin, document) == 200
                block.buf[:] = X.tobytes()
                assert ask(running, plain, document) == 403
                assert bytes(block.buf) == X.tobytes()
    finally:
        block.close()
        block.unlink()


def test_what_is_registered_is_told_to_management() -> None:
    with keyed(plain={}, admin={"management": True}) as (running, keys), channel(running) as made:
        for name, status, code in (("plain", 403, "PERMISSION_DENIED"), ("admin", 200, "OK")):
            for kind in ("system", "cuda"):
                path = f"/v2/{kind}sharedmemory/status"
                assert running.request("GET", path, None, bearer(keys[name]))[0] == status
                method = f"{kind.title()}SharedMemoryStatus"
                metadata = [("authorization", f"Bearer {keys[name]}")]
                assert call(made, method, message_of(f"{method}Request"), metadata).code == code
