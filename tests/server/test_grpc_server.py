"""The gRPC server's life, health and reflection."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2

from infera_server.listening import listen
from infera_server.models.repository import Repository
from infera_server.protocols.protos import message
from infera_server.rpc.health import REFLECTIONS
from infera_server.server import Host
from infera_server.settings import Settings
from tests.server.grpc_cases import SERVICE
from tests.server.grpc_support import METHOD, array_of, channel, infer, request, status_of, unary
from tests.server.support import WAIT, Running, doubler, serving, until

X = np.arange(8, dtype=np.float32).reshape(2, 4)
HEALTH = "/grpc.health.v1.Health/"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}) as running:
        yield running


def health(made: grpc.Channel, kind: str) -> Any:
    return getattr(made, kind)(
        HEALTH + {"unary_unary": "Check", "unary_stream": "Watch"}[kind],
        lambda name: message("grpc.health.v1.HealthCheckRequest")(service=name).SerializeToString(),
        message("grpc.health.v1.HealthCheckResponse").FromString,
    )


SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


def test_without_reflection_where_protobuf_is_too_old(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "grpc_reflection.v1alpha.reflection", None)
    with serving({"double": doubler()}) as running, channel(running) as made:
        assert health(made, "unary_unary")("", timeout=WAIT).status == SERVING
        with pytest.raises(grpc.RpcError) as error:
            made.unary_unary(f"/{REFLECTIONS[0]}/ServerReflectionInfo")(b"", timeout=WAIT)
        assert status_of(error)[0] == "UNIMPLEMENTED"
    assert "gRPC goes without reflection" in caplog.text


@pytest.mark.parametrize("name", ["", SERVICE])
def test_health(server: Running, name: str) -> None:
    with channel(server) as made:
        assert health(made, "unary_unary")(name, timeout=WAIT).status == SERVING


def test_health_of_what_is_not_served(server: Running) -> None:
    with channel(server) as made:
        with pytest.raises(grpc.RpcError) as error:
            health(made, "unary_unary")("nope", timeout=WAIT)
        assert status_of(error) == ("NOT_FOUND", "unknown service")
        watched = health(made, "unary_stream")("nope", timeout=WAIT)
        assert next(watched).status == SERVICE_UNKNOWN
        watched.cancel()


def test_a_drain_is_told_who_watches_and_calls_are_refused() -> None:
    session = doubler()
    with serving({"double": session}) as running, channel(running) as made:
        watched = health(made, "unary_stream")("", timeout=WAIT)
        assert next(watched).status == SERVING
        session.block()
        accepted = unary(made).future(request("double", X))
        session.wait_entered()
        running.host.server.should_exit = True
        until(lambda: running.host.service.draining)
        assert next(watched).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            infer(made, request("double", X))
        assert status_of(error) == ("UNAVAILABLE", "the server is shutting down; send the request to another one")
        ready = made.unary_unary(METHOD + "ServerReady", None, message("inference.ServerReadyResponse").FromString)
        assert not ready(b"", timeout=WAIT).ready
        session.gate.set()
        assert np.array_equal(array_of(accepted.result(WAIT)), 2 * X)
        assert list(watched) == []


def test_reflection_tells_the_methods(server: Running) -> None:
    with channel(server) as made:
        for version in ("v1alpha", "v1"):
            ask = made.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                reflection_pb2.ServerReflectionRequest.SerializeToString,
                reflection_pb2.ServerReflectionResponse.FromString,
            )
            asked = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health"),
            ]
            services, ours, theirs = ask(iter(asked), timeout=WAIT)
            names = {entry.name for entry in services.list_services_response.service}
            assert {SERVICE, "grpc.health.v1.Health"} < names
            assert "ModelStreamInfer" in methods(ours)
            assert methods(theirs) == {"Check", "Watch"}


def methods(response: Any) -> set[str]:
    """Of the services in the files of a response."""
    files = response.file_descriptor_response.file_descriptor_proto
    found = [descriptor_pb2.FileDescriptorProto.FromString(data) for data in files]
    return {method.name for file in found for service in file.service for method in service.method}


def test_unknown_methods(server: Running) -> None:
    with channel(server) as made, pytest.raises(grpc.RpcError) as error:
        made.unary_unary(METHOD + "Nope")(b"", timeout=WAIT)
    assert status_of(error)[0] == "UNIMPLEMENTED"


# --- ports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "port"),
    [
        ({}, 8001),
        ({"port": 0}, 0),
        ({"port": 9000}, 9001),
        ({"port": 65535}, 0),
        ({"port": 0, "grpc_port": "9002"}, 9002),
        ({"grpc_port": 0}, 0),
        ({"grpc_port": "off"}, None),
    ],
)
def test_which_port(settings: dict[str, Any], port: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFERA_GRPC_PORT")
    assert Settings(**settings).listen_grpc == port


def test_off_is_off() -> None:
    with serving({"double": doubler()}, grpc_port="off") as running:
        assert running.host.grpc_port is None
        assert running.get("/v2/health/ready") == (200, {"ready": True})


def test_a_port_that_is_taken_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(port=0, grpc_port=taken.getsockname()[1])
        host = Host(Repository(settings, []), listen("127.0.0.1", 0))
        status: list[int] = []
        thread = threading.Thread(target=lambda: status.append(host.run()))
        thread.start()
        thread.join(WAIT)
    assert status == [1]
    assert "choose another --grpc-port, or off" in caplog.text
