"""The gRPC server: in the event loop that HTTP is served in, over the same service.

Messages come and go as bytes; what is made of them, and what is copied, is decided in `protocols.v2_grpc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from grpc import aio

from infera_server.errors import Unavailable
from infera_server.rpc import health as grpc_health
from infera_server.rpc.calls import Inference, ModelInfer
from infera_server.rpc.health import Health
from infera_server.rpc.management import NAMES, Elsewhere, handler
from infera_server.rpc.stream import ModelStreamInfer
from infera_server.scheduling.arrivals import arrivals
from infera_server.service import Service
from infera_server.settings import Settings

SERVICE = "inference.GRPCInferenceService"

ENVELOPE_BYTES = 1 << 16
"""What a message may have beside a tensor of the largest size."""

MAX_MESSAGE = (1 << 31) - 1
"""Bytes: neither gRPC nor protobuf has room for more, however large a body may be over HTTP."""

MAX_CALLS = 1024
"""Calls at a time on one connection; clients queue those beyond."""

OPTIONS: Mapping[str, int] = {
    "grpc.max_concurrent_streams": MAX_CALLS,
    "grpc.max_metadata_size": 1 << 14,
    "grpc.max_send_message_length": -1,
    "grpc.keepalive_time_ms": 60_000,  # calls of a client that is gone without a word end after 80 s
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,  # how often clients may ping
    "grpc.http2.max_ping_strikes": 10,
}

COMPRESSIONS = {
    "none": grpc.Compression.NoCompression,
    "deflate": grpc.Compression.Deflate,
    "gzip": grpc.Compression.Gzip,
}


class GrpcServer:
    """Listens on a port of its own from `start` to `stop`. Used from the event loop's thread.

    With workers all of them listen there, and what is no inference is answered `elsewhere`.
    """

    def __init__(self, service: Service, elsewhere: Elsewhere | None = None) -> None:
        self._service, self._elsewhere = service, elsewhere
        self._health = Health(service)
        inference = Inference(service)
        self._infer = ModelInfer(inference)
        self._streams = ModelStreamInfer(inference, service.settings, service.max_connections)
        self._server: aio.Server | None = None

    async def start(self, port: int) -> int:
        """Listen on a port, 0 for a free one, and return which. Raises OSError where it cannot be had."""
        settings = self._service.settings
        limits = {
            "grpc.so_reuseport": int(settings.workers > 0),  # else a port that is taken is an error
            "grpc.max_receive_message_length": min(settings.max_body_bytes + ENVELOPE_BYTES, MAX_MESSAGE),
            "grpc.max_allowed_incoming_connections": self._service.max_connections,
        }
        server = aio.server(
            options=tuple({**OPTIONS, **limits}.items()), compression=COMPRESSIONS[settings.grpc_compression]
        )
        server.add_generic_rpc_handlers((_Routes(self._routes()),))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            found = _listen(server, f"{host}:{port}", settings)
        except RuntimeError as error:
            raise OSError(str(error)) from None
        await server.start()
        self._server = server
        return found

    def _routes(self) -> dict[str, grpc.RpcMethodHandler]:
        reflection = grpc_health.reflection()
        return {
            **{f"/{SERVICE}/{name}": handler(self._service, name, self._elsewhere) for name in NAMES},
            f"/{SERVICE}/ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer.handle),
            f"/{SERVICE}/ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._streams.handle),
            f"/{grpc_health.SERVICE}/Check": grpc.unary_unary_rpc_method_handler(self._health.check),
            f"/{grpc_health.SERVICE}/Watch": grpc.unary_stream_rpc_method_handler(self._health.watch),
            **{f"/{name}/ServerReflectionInfo": reflection for name in grpc_health.REFLECTIONS if reflection},
        }

    async def stop(self, timeout: float) -> None:
        """Finish what was accepted and close, after `timeout` seconds in any case."""
        self._health.stop()
        self._streams.stop(Unavailable("the server is shutting down; send the request to another one"))
        if self._server is not None:
            await self._server.stop(timeout)


def _listen(server: aio.Server, address: str, settings: Settings) -> int:
    """With TLS where a certificate is set. Raises OSError and RuntimeError."""
    if settings.tls_cert is None:
        return int(server.add_insecure_port(address))
    certificate = settings.tls_cert.read_bytes()
    key = certificate if settings.tls_key is None else settings.tls_key.read_bytes()
    clients = None if settings.tls_client_ca is None else settings.tls_client_ca.read_bytes()
    credentials = grpc.ssl_server_credentials([(key, certificate)], clients, require_client_auth=clients is not None)
    return int(server.add_secure_port(address, credentials))


class _Routes(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Handlers by their methods' paths."""

    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self._handlers = handlers

    def service(self, details: Any) -> grpc.RpcMethodHandler | None:
        arrivals.noted()  # a call: its message comes some turns later
        return self._handlers.get(details.method)
