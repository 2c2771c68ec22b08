"""Shared memory of clients: what is registered, what a request reads and writes there, how long it lives."""

from __future__ import annotations

import base64
import ctypes
import gc
import json
import os
import weakref
from collections.abc import Iterator
from multiprocessing import shared_memory as posix
from typing import Any

import numpy as np
import pytest

from infera_gpu.devices.ipc import HANDLE_BYTES
from infera_server import shared_memory
from infera_server.errors import BadRequest, NotFound
from infera_server.protocols import v2_rest
from infera_server.requests import Output, Region, Request
from infera_server.shared_memory import Regions
from tests import fake_cupy
from tests.descriptors import open_files
from tests.server.support import Running, doubler, serving

X = np.arange(8, dtype=np.float32).reshape(2, 4)
SYSTEM, CUDA = "/v2/systemsharedmemory", "/v2/cudasharedmemory"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}) as running:
        yield running


@pytest.fixture
def block() -> Iterator[posix.SharedMemory]:
    """4,096 bytes, the first of which are X's."""
    made = posix.SharedMemory(create=True, size=4096)
    contents(made)[: X.nbytes] = X.tobytes()
    yield made
    made.close()
    made.unlink()


def contents(block: posix.SharedMemory) -> memoryview:
    assert block.buf is not None
    return block.buf


def post(server: Running, path: str, document: Any = None) -> tuple[int, Any]:
    status, _, body = server.request("POST", path, None if document is None else json.dumps(document))
    return status, json.loads(body) if body else None


def infer(server: Running, parameters: dict[str, Any], **output: Any) -> tuple[int, Any]:
    document: dict[str, Any] = {
        "inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": parameters}]
    }
    if output:
        document["outputs"] = [{"name": "y", "parameters": output}]
    return server.infer("double", document)


def place(name: str, size: int = X.nbytes, offset: int = 0) -> dict[str, Any]:
    return {"shared_memory_region": name, "shared_memory_byte_size": size, "shared_memory_offset": offset}


def test_a_region_is_registered_used_and_forgotten(server: Running, block: posix.SharedMemory) -> None:
    registration = {"key": f"/{block.name}", "offset": 0, "byte_size": 4096}
    assert post(server, f"{SYSTEM}/region/r/register", registration) == (200, None)
    told = [{"name": "r", "key": f"/{block.name}", "offset": 0, "byte_size": 4096}]
    assert server.get(f"{SYSTEM}/status") == (200, told)
    assert server.get(f"{SYSTEM}/region/r/status") == (200, told)
    assert server.get(f"{CUDA}/status") == (200, [])
    status, reply = infer(server, place("r"), **place("r", offset=1000))
    assert (status, reply["outputs"]) == (200, [{"name": "y", "datatype": "FP32", "shape": [2, 4]}])
    assert (np.frombuffer(contents(block), np.float32, 8, 1000).reshape(2, 4) == 2 * X).all()
    assert post(server, f"{SYSTEM}/region/r/unregister") == (200, None)
    assert post(server, f"{SYSTEM}/region/r/unregister") == (200, None)
    assert server.get(f"{SYSTEM}/status") == (200, [])
    assert infer(server, place("r"))[0] == 404


def test_an_offset_need_not_be_one_of_a_page(block: posix.SharedMemory) -> None:
    regions = Regions(1 << 20)
    regions.system.register("r", block.name, 8, 64)
    assert bytes(regions.view(Region("r", 4, 8))) == X.tobytes()[12:20]


def test_all_are_forgotten_of_one_kind(server: Running, block: posix.SharedMemory) -> None:
    for name in "ab":
        assert post(server, f"{SYSTEM}/region/{name}/register", {"key": block.name, "byte_size": 64})[0] == 200
    post(server, f"{CUDA}/unregister")
    assert [r["name"] for r in server.get(f"{SYSTEM}/status")[1]] == ["a", "b"]
    post(server, f"{SYSTEM}/unregister")
    assert server.get(f"{SYSTEM}/status") == (200, [])


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({}, "Shared memory register request has no 'key' field"),
        ([], "Shared memory register request has no 'key' field"),
        ({"key": "/x"}, "Shared memory register request has no 'byte_size' field"),
        ({"key": 3, "byte_size": 8}, "attempt to access JSON non-string as string"),
        ({"key": "/x", "byte_size": -1}, "non-unsigned-integer as unsigned-integer"),
        ({"key": "/x", "byte_size": 8, "offset": "1"}, "non-unsigned-integer as unsigned-integer"),
        ({"key": "/x", "byte_size": 2**62}, "bytes altogether may be registered"),
        ({"key": "/none", "byte_size": 8}, "Unable to open shared memory region: '/none'"),
        ({"key": "../etc/passwd", "byte_size": 8}, "Unable to open shared memory region"),
        ({"key": "/../etc/passwd", "byte_size": 8}, "Unable to open shared memory region"),
        ({"key": "//etc/passwd", "byte_size": 8}, "Unable to open shared memory region"),
        ({"key": "..", "byte_size": 8}, "Unable to open shared memory region"),
        ({"key": ".", "byte_size": 8}, "Unable to open shared memory region"),
        ({"key": "", "byte_size": 8}, "Unable to open shared memory region"),
        ({"key": "a\0b", "byte_size": 8}, "Unable to open shared memory region"),
        ({"key": "a" * 256, "byte_size": 8}, "Unable to open shared memory region"),
    ],
)
def test_what_cannot_be_registered(server: Running, document: Any, text: str) -> None:
    status, reply = post(server, f"{SYSTEM}/region/bad/register", document)
    assert status == 400
    assert text in reply["error"]
    assert server.get(f"{SYSTEM}/status") == (200, [])


def test_keys_that_are_no_memory_are_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, block: posix.SharedMemory
) -> None:
    """A link, a folder and a pipe in the folder of shared memory."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for key in ("link", "folder", "pipe"):
        with pytest.raises(BadRequest, match="Unable to open"):
            Regions(1 << 20).system.register("r", key, 0, 8)


def test_refused_registrations_keep_no_file_open(block: posix.SharedMemory) -> None:
    regions = Regions(1 << 20)
    before = open_files()
    for size in (4097, 0):
        with pytest.raises(BadRequest, match="Invalid shared memory region"):
            regions.system.register("r", block.name, 0, size)
    assert open_files() == before


def test_a_name_is_given_once_and_sizes_add_up(block: posix.SharedMemory) -> None:
    regions = Regions(100)
    regions.system.register("r", block.name, 0, 60)
    with pytest.raises(BadRequest, match="shared memory region 'r' already in manager"):
        regions.system.register("r", block.name, 0, 8)
    with pytest.raises(BadRequest, match="100 bytes altogether"):
        regions.system.register("s", block.name, 0, 60)
    regions.system.unregister("r")
    regions.system.register("s", block.name, 0, 60)


@pytest.mark.parametrize("binary", [True, False])
def test_a_request_that_came_before_finds_no_region_that_was_forgotten(
    server: Running, block: posix.SharedMemory, binary: bool
) -> None:
    tensor: dict[str, Any] = {"name": "x", "shape": X.shape, "datatype": "FP32"}
    tensor |= {"parameters": {"binary_data_size": X.nbytes}} if binary else {"data": X.ravel().tolist()}
    document = json.dumps({"inputs": [tensor], "outputs": [{"name": "y", "parameters": place("r")}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(document))} if binary else {}
    body = document + X.tobytes() if binary else document
    assert post(server, f"{SYSTEM}/region/r/register", {"key": block.name, "byte_size": 64})[0] == 200
    for _ in range(3):
        assert server.request("POST", "/v2/models/double/infer", body, headers)[0] == 200
    assert post(server, f"{SYSTEM}/region/r/unregister")[0] == 200
    assert server.request("POST", "/v2/models/double/infer", body, headers)[0] == 404


@pytest.mark.parametrize(
    ("parameters", "output", "status", "text"),
    [
        (place("none"), {}, 404, "Unable to find shared memory region: 'none'"),
        (place("r", 31), {}, 400, "input byte size mismatch for input 'x' for model 'double'. Expected 32, got 31"),
        (place("r", 65), {}, 400, "Invalid offset + byte size for shared memory region: 'r'"),
        (place("r", 32, 40), {}, 400, "Invalid offset + byte size for shared memory region: 'r'"),
        (place("r", 32, 64), {}, 400, "Invalid offset for shared memory region: 'r'"),
        (place("r", 2**62, 0), {}, 400, "Invalid offset + byte size for shared memory region: 'r'"),
        ({"shared_memory_region": "r"}, {}, 400, "Invalid offset + byte size for shared memory region: 'r'"),
        ({"shared_memory_region": 1}, {}, 400, "non-string as string"),
        (place("r") | {"shared_memory_byte_size": "x"}, {}, 400, "non-unsigned-integer"),
        (place("r") | {"binary_data_size": 32}, {}, 400, "But set 'binary_data_size' 'shared_memory_region'"),
        (place("r"), place("none"), 404, "Unable to find shared memory region: 'none'"),
        (place("r"), place("r", 31), 400, "(31 bytes) should be at least 32 bytes to hold the results"),
        (place("r"), place("r") | {"classification": 1}, 400, "can't set both 'shared_memory_region' and 'classif"),
        (place("r"), place("r") | {"binary_data": True}, 400, "can't set both 'shared_memory_region' and 'binary_"),
    ],
)
def test_what_a_request_cannot_use(
    server: Running, block: posix.SharedMemory, parameters: Any, output: Any, status: int, text: str
) -> None:
    post(server, f"{SYSTEM}/region/r/register", {"key": block.name, "byte_size": 64})
    try:
        found, reply = infer(server, parameters, **output)
        assert found == status
        assert text in reply["error"]
    finally:
        post(server, f"{SYSTEM}/unregister")


def test_a_request_keeps_what_it_uses(server: Running, block: posix.SharedMemory) -> None:
    """Unregistered between reading a request and answering it: the reply is still written."""
    regions = Regions(1 << 20)
    regions.system.register("r", block.name, 0, 4096)
    signature = server.host.repository.get("double").signature
    document = {
        "inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": place("r")}],
        "outputs": [{"name": "y", "parameters": place("r", offset=64)}],
    }
    request = v2_rest.parse(json.dumps(document).encode(), None, signature, regions)
    gone = weakref.ref(regions.hold(Region("r", 0, 8)).memory)
    regions.system.unregister()
    assert (request.feeds["x"] == X).all()
    assert not request.feeds["x"].flags.owndata, "it was copied"
    v2_rest.respond(request, {"y": X + 1}, signature, regions)
    assert (np.frombuffer(contents(block), np.float32, 8, 64).reshape(2, 4) == X + 1).all()
    del request
    gc.collect()
    assert gone() is None, "it is still mapped"


def test_memory_that_has_shrunk_is_refused(block: posix.SharedMemory) -> None:
    regions = Regions(1 << 20)
    regions.system.register("r", block.name, 0, 4096)
    os.truncate(shared_memory.FOLDER / block.name, 16)
    with pytest.raises(BadRequest, match="has become smaller"):
        regions.view(Region("r", 0, 8))
    os.truncate(shared_memory.FOLDER / block.name, 4096)


# --- CUDA ----------------------------------------------------------------------------------------------------------


class Ipc:
    """Allocations of another process, by handle, as CUDA's runtime shows them."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error
        self.allocations: dict[bytes, np.ndarray[Any, Any]] = {}
        self.opened: list[int] = []
        self._under_way: list[tuple[int, int, int]] = []

    def open(self, handle: bytes, flags: int) -> int:
        if handle not in self.allocations:
            raise self.error(1)
        self.opened.append(self.allocations[handle].ctypes.data)
        return self.opened[-1]

    def copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        device = source if kind == 2 else target
        if not any(
            a.ctypes.data <= device and device + nbytes <= a.ctypes.data + a.nbytes for a in self.allocations.values()
        ):
            raise self.error(1)
        if kind == 2:
            ctypes.memmove(target, source, nbytes)
        else:  # what is uploaded may be on its way when the call returns
            self._under_way.append((target, source, nbytes))

    def synchronize(self, stream: int) -> None:
        assert stream == 0
        while self._under_way:
            ctypes.memmove(*self._under_way.pop(0))


@pytest.fixture
def ipc(monkeypatch: pytest.MonkeyPatch) -> Ipc:
    fake: Any = fake_cupy.install(monkeypatch)
    runtime = fake.cuda.runtime
    made = Ipc(runtime.CUDARuntimeError)
    runtime.ipcOpenMemHandle, runtime.memcpy, runtime.ipcCloseMemHandle = made.open, made.copy, made.opened.remove
    runtime.streamSynchronize = made.synchronize
    return made


def test_memory_of_a_gpu_is_read_and_written(ipc: Ipc) -> None:
    handle = bytes(range(HANDLE_BYTES))
    ipc.allocations[handle] = memory = np.zeros(256, np.uint8)
    regions = Regions(1 << 20)
    regions.cuda.register("g", handle, 0, 256)
    assert regions.cuda.status("g") == [{"name": "g", "device_id": 0, "byte_size": 256}]
    with pytest.raises(NotFound, match="'g' is registered as CUDA shared memory, not system shared memory"):
        regions.system.status("g")
    regions.write(Region("g", 100, 40), X.tobytes(), "y")
    assert bytes(regions.view(Region("g", 100, 32))) == memory[100:132].tobytes() == X.tobytes()
    assert len(ipc.opened) == 1
    regions.cuda.unregister("g")
    gc.collect()
    assert ipc.opened == []


@pytest.mark.parametrize(
    ("handle", "device", "size", "text"),
    [
        (b"x" * HANDLE_BYTES, 0, 8, "cuda:0 cannot open the shared memory"),
        (bytes(HANDLE_BYTES), 0, 300, "failed to register CUDA shared memory region 'g'"),
        (bytes(HANDLE_BYTES), 1, 8, "cuda:1 does not exist"),
        (b"short", 0, 8, "'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t"),
    ],
)
def test_what_a_gpu_refuses(ipc: Ipc, handle: bytes, device: int, size: int, text: str) -> None:
    ipc.allocations[bytes(HANDLE_BYTES)] = np.zeros(256, np.uint8)
    with pytest.raises(BadRequest, match=text):
        Regions(1 << 20).cuda.register("g", handle, device, size)
    gc.collect()
    assert ipc.opened == []


def test_an_output_that_another_dialect_placed_is_looked_up(ipc: Ipc, server: Running) -> None:
    ipc.allocations[bytes(HANDLE_BYTES)] = memory = np.zeros(32, np.uint8)
    regions = Regions(1 << 20)
    regions.cuda.register("g", bytes(HANDLE_BYTES), 0, 32)
    signature = server.host.repository.get("double").signature
    v2_rest.respond(Request("", {}, [Output("y", False, 0, Region("g", 0, 32))]), {"y": X}, signature, regions)
    assert memory.tobytes() == X.tobytes()


def test_handles_come_as_base64(server: Running) -> None:
    def register(handle: Any) -> tuple[int, Any]:
        return post(server, f"{CUDA}/region/g/register", {"raw_handle": handle, "device_id": 0, "byte_size": 8})

    for text in ("AAAA", "A-!AA", "é"):
        assert register({"b64": text}) == (
            400,
            {"error": "'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t"},
        )
    strange: tuple[Any, ...] = ({}, "AAAA", {"b64": 1})
    for handle in strange:
        assert register(handle)[0] == 400
    status, reply = register({"b64": base64.b64encode(bytes(HANDLE_BYTES)).decode()})
    assert status == 400
    assert "failed to register CUDA shared memory region 'g'" in reply["error"]
