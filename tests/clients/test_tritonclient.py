"""tritonclient's four clients: http, http.aio, grpc, grpc.aio."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import queue
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.server.grpc_support import echoes
from tests.server.repeat import publish_repeat, repeat_session
from tests.server.support import WAIT, Running, doubler, serving

pytest.importorskip("tritonclient.http", reason="tritonclient is in the test extra")

import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

X = np.arange(8, dtype=np.float32).reshape(2, 4)
MODULES = {
    "http": tritonclient.http,
    "http.aio": tritonclient.http.aio,
    "grpc": tritonclient.grpc,
    "grpc.aio": tritonclient.grpc.aio,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler(), "BYTES": echoes()["BYTES"], "spare": doubler()}) as running:
        yield running


class Client:
    """One client of the four, called without awaiting."""

    def __init__(self, name: str, server: Running) -> None:
        self.name, self.module = name, MODULES[name]
        self.is_grpc = name.startswith("grpc")
        self._loop = asyncio.new_event_loop()
        url = f"127.0.0.1:{server.host.grpc_port}" if self.is_grpc else server.address
        self._client = self.run(self._opened, url)

    async def _opened(self, url: str) -> Any:
        return self.module.InferenceServerClient(url)

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function returns, sooner or later."""

        async def wait() -> Any:
            found = fn(*args, **kwargs)
            return await found if inspect.isawaitable(found) else found

        return self._loop.run_until_complete(wait())

    def __getattr__(self, name: str) -> Any:
        return partial(self.run, getattr(self._client, name))

    def input(self, name: str, datatype: str, array: Any, **options: Any) -> Any:
        made = self.module.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array, **options)
        return made

    def closed(self) -> None:
        """Close it; what is left of it is collected here, since gevent minds in which thread that is."""
        self.close()
        self._loop.close()
        self._client = None
        gc.collect()

    def members(self, reply: Any) -> Any:
        """A reply of either protocol as JSON."""
        if not self.is_grpc:
            return reply
        from google.protobuf.json_format import MessageToJson

        return json.loads(MessageToJson(reply, preserving_proto_field_name=True))


@pytest.fixture(params=MODULES)
def client(request: pytest.FixtureRequest, server: Running) -> Iterator[Client]:
    made = Client(request.param, server)
    yield made
    made.closed()


def test_health(client: Client) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert not client.is_model_ready("nope")


def test_what_is_told(client: Client) -> None:
    assert client.members(client.get_server_metadata())["name"] == "infera"
    metadata = client.members(client.get_model_metadata("double"))
    assert metadata["inputs"][0]["name"] == "x"
    assert [int(d) for d in metadata["inputs"][0]["shape"]] == [-1, 4]
    config = client.members(client.get_model_config("double"))
    config = config["config"] if client.is_grpc else config
    assert (config["name"], config["max_batch_size"]) == ("double", 64)
    index = client.members(client.get_model_repository_index())
    models = index["models"] if client.is_grpc else index
    assert [m["state"] for m in models if m["name"] == "double"] == ["READY"]


def test_statistics(client: Client) -> None:
    def count() -> int:
        reply = client.members(client.get_inference_statistics("double"))
        return int(reply["model_stats"][0].get("inference_count", 0))

    before = count()
    client.infer("double", [client.input("x", "FP32", X)])
    assert count() == before + 2


def test_inference(client: Client) -> None:
    outputs = [client.module.InferRequestedOutput("y")]
    result = client.infer("double", [client.input("x", "FP32", X)], outputs=outputs, request_id="7")
    assert np.array_equal(result.as_numpy("y"), 2 * X)
    reply = result.get_response()
    assert (reply.id if client.is_grpc else reply["id"]) == "7"
    assert np.array_equal(client.infer("double", [client.input("x", "FP32", X)]).as_numpy("y"), 2 * X)


def test_classes(client: Client) -> None:
    outputs = [client.module.InferRequestedOutput("y", class_count=1)]
    result = client.infer("double", [client.input("x", "FP32", X)], outputs=outputs)
    assert result.as_numpy("y").tolist() == [[b"6.000000:3"], [b"14.000000:3"]]


def test_texts(client: Client) -> None:
    words = np.array([["a", "", "ä€"]], object)
    result = client.infer("BYTES", [client.input("x", "BYTES", words)])
    assert [item.decode() for item in result.as_numpy("y").ravel()] == ["a", "", "ä€"]


def test_mistakes(client: Client) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found"):
        client.infer("nope", [client.input("x", "FP32", X)])
    with pytest.raises(InferenceServerException, match=r"Expected \[-1,4\], got \[2,3\]"):
        client.infer("double", [client.input("x", "FP32", X[:, :3].copy())])


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compression(client: Client, coding: str) -> None:
    if client.is_grpc:
        options = {"compression_algorithm": coding}
    else:
        options = {"response_compression_algorithm": coding}
        if client.name == "http":  # that of http.aio misses an import
            options["request_compression_algorithm"] = coding
    result = client.infer("double", [client.input("x", "FP32", X)], **options)
    assert np.array_equal(result.as_numpy("y"), 2 * X)


def test_loading(client: Client) -> None:
    client.unload_model("spare")
    assert not client.is_model_ready("spare")
    client.load_model("spare")
    assert client.is_model_ready("spare")


def test_parameters_and_time(client: Client) -> None:
    options: dict[str, Any] = {"priority": 1, "timeout": 10_000_000, "parameters": {"mine": "x"}}
    assert np.array_equal(client.infer("double", [client.input("x", "FP32", X)], **options).as_numpy("y"), 2 * X)


# --- grpc alone ------------------------------------------------------------------------------------------------------


def test_callbacks(server: Running) -> None:
    made = Client("grpc", server)
    found: queue.Queue[Any] = queue.Queue()
    made.async_infer("double", [made.input("x", "FP32", X)], lambda result, error: found.put((result, error)))
    result, error = found.get(timeout=WAIT)
    assert error is None
    assert np.array_equal(result.as_numpy("y"), 2 * X)
    made.closed()


def test_a_stream(server: Running) -> None:
    made = Client("grpc", server)
    found: queue.Queue[Any] = queue.Queue()
    made.start_stream(lambda result, error: found.put((result, error)))
    for number in range(8):
        made.async_stream_infer("double", [made.input("x", "FP32", X + number)], request_id=str(number))
    made.async_stream_infer("nope", [made.input("x", "FP32", X)])
    for number in range(8):
        result, error = found.get(timeout=WAIT)
        assert error is None
        assert result.get_response().id == str(number)
        assert result.get_response().parameters["triton_final_response"].bool_param
        assert np.array_equal(result.as_numpy("y"), 2 * (X + number))
    result, error = found.get(timeout=WAIT)
    assert "Request for unknown model: 'nope' is not found" in str(error)
    made.stop_stream()
    made.closed()


def test_a_decoupled_model_answers_as_often_as_it_likes() -> None:
    """An end without outputs tells the client when to stop waiting."""
    with serving({"repeat": repeat_session()}) as running:
        publish_repeat(running)
        made = Client("grpc", running)
        found: queue.Queue[Any] = queue.Queue()
        made.start_stream(lambda result, error: found.put((result, error)))
        for values in ([5, 6, 7], []):
            entry = made.input("IN", "INT32", np.array(values, np.int32))
            made.async_stream_infer("repeat", [entry], enable_empty_final_response=True)
            told = []
            while True:
                result, error = found.get(timeout=WAIT)
                assert error is None
                if result.get_response().parameters["triton_final_response"].bool_param:
                    break
                told.append(int(result.as_numpy("OUT")[0]))
            assert told == values
        entry = made.input("IN", "INT32", np.array([1], np.int32))
        with pytest.raises(InferenceServerException, match="decoupled transaction policy"):
            made.infer("repeat", [entry])
        made.stop_stream()
        made.closed()


def test_an_asynchronous_stream(server: Running) -> None:
    async def run() -> list[Any]:
        async with tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{server.host.grpc_port}") as client:
            entry = tritonclient.grpc.aio.InferInput("x", [2, 4], "FP32")

            async def requests() -> Any:
                for number in range(4):
                    entry.set_data_from_numpy(X + number)
                    yield {"model_name": "double", "inputs": [entry], "request_id": str(number)}

            return [(result.get_response().id, error) async for result, error in client.stream_infer(requests())]

    assert asyncio.run(run()) == [(str(n), None) for n in range(4)]


def test_system_shared_memory(server: Running, client: Client) -> None:
    from tritonclient.utils import shared_memory

    handle = shared_memory.create_shared_memory_region("both", f"/infera-{client.name}", 64)
    try:
        shared_memory.set_shared_memory_region(handle, [X])
        client.register_system_shared_memory("both", f"/infera-{client.name}", 64)
        entry = client.module.InferInput("x", [2, 4], "FP32")
        entry.set_shared_memory("both", 32)
        wanted = client.module.InferRequestedOutput("y")
        wanted.set_shared_memory("both", 32, offset=32)
        client.infer("double", [entry], outputs=[wanted])
        assert np.array_equal(shared_memory.get_contents_as_numpy(handle, np.float32, [2, 4], 32), 2 * X)
        client.unregister_system_shared_memory("both")
    finally:
        shared_memory.destroy_shared_memory_region(handle)
