"""Shared memory over gRPC: the regions that HTTP has, named by tensors of requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import grpc
import numpy as np
import pytest

from tests.server.grpc_cases import Reply, call
from tests.server.grpc_cases import request as message_of
from tests.server.grpc_support import channel, infer, request, status_of
from tests.server.support import Running, doubler, serving

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[grpc.Channel]:
    with channel(server) as made:
        yield made
        call(made, "SystemSharedMemoryUnregister", message_of("SystemSharedMemoryUnregisterRequest"))


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    made = SharedMemory(create=True, size=128)
    yield made
    made.close()
    made.unlink()


def register(client: grpc.Channel, memory: SharedMemory, **more: Any) -> Reply:
    members = {"name": "mine", "key": "/" + memory.name, "offset": 0, "byte_size": 128} | more
    return call(client, "SystemSharedMemoryRegister", message_of("SystemSharedMemoryRegisterRequest", **members))


def status(client: grpc.Channel) -> Any:
    return call(client, "SystemSharedMemoryStatus", message_of("SystemSharedMemoryStatusRequest")).message


def placed(offset: int, nbytes: int) -> dict[str, Any]:
    return {
        "shared_memory_region": {"string_param": "mine"},
        "shared_memory_offset": {"int64_param": offset},
        "shared_memory_byte_size": {"int64_param": nbytes},
    }


def in_memory(offset: int = 0, nbytes: int = 32, into: tuple[int, int] = (64, 32)) -> Any:
    entry = {"name": "x", "datatype": "FP32", "shape": [2, 4], "parameters": placed(offset, nbytes)}
    made = request("double", X, inputs=[entry], outputs=[{"name": "y", "parameters": placed(*into)}])
    del made.raw_input_contents[:]
    return made


def test_tensors_are_read_and_written_where_they_lie(client: grpc.Channel, memory: SharedMemory) -> None:
    assert register(client, memory).code == "OK"
    assert memory.buf is not None
    for number in range(2):  # the second one has a header that is known
        memory.buf[:32] = (X + number).tobytes()
        response = infer(client, in_memory())
        assert list(response.raw_output_contents) == [b""]
        assert list(response.outputs[0].shape) == [2, 4]
        assert np.array_equal(np.frombuffer(bytes(memory.buf[64:96]), np.float32), 2 * (X + number).ravel())


def test_http_has_the_same_regions(server: Running, client: grpc.Channel, memory: SharedMemory) -> None:
    register(client, memory, offset=32, byte_size=64)
    told = {"name": "mine", "key": "/" + memory.name, "offset": 32, "byte_size": 64}
    assert json.loads(server.request("GET", "/v2/systemsharedmemory/status")[2]) == [told]
    assert status(client) == {"regions": {"mine": told | {"offset": "32", "byte_size": "64"}}}
    server.request("POST", "/v2/systemsharedmemory/region/mine/unregister")
    assert status(client) == {}


SMALL = "shared memory size specified with the request for output 'y' (8 bytes) should be at least 32 bytes to hold the"
OUTSIDE = "Invalid offset + byte size for shared memory region: 'mine'"


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (in_memory(96, 64), OUTSIDE),
        (in_memory(-1), OUTSIDE),
        (in_memory(0, 28), "input byte size mismatch for input 'x' for model 'double'. Expected 32, got 28"),
        (in_memory(into=(128, 32)), "Invalid offset for shared memory region: 'mine'"),
        (in_memory(into=(0, 8)), f"{SMALL} results"),
    ],
)
def test_what_is_outside_is_refused(client: grpc.Channel, memory: SharedMemory, sent: Any, text: str) -> None:
    register(client, memory)
    with pytest.raises(grpc.RpcError) as error:
        infer(client, sent)
    assert status_of(error) == ("INVALID_ARGUMENT", text)


def test_a_name_that_is_taken_is_said_to_be_there_already(client: grpc.Channel, memory: SharedMemory) -> None:
    assert register(client, memory).code == "OK"
    assert register(client, memory) == Reply("ALREADY_EXISTS", "shared memory region 'mine' already in manager")


def test_what_is_unregistered_is_not_found_though_the_header_is_known(
    client: grpc.Channel, memory: SharedMemory
) -> None:
    register(client, memory)
    infer(client, in_memory())
    call(client, "SystemSharedMemoryUnregister", message_of("SystemSharedMemoryUnregisterRequest", name="mine"))
    with pytest.raises(grpc.RpcError) as error:
        infer(client, in_memory())
    assert status_of(error) == ("NOT_FOUND", "Unable to find shared memory region: 'mine'")
