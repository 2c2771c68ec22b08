"""gRPC's own protocols: health checking (`grpc.health.v1`) and reflection.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md and server-reflection.md
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError
from google.protobuf.runtime_version import VersionError

from infera_server.errors import BadRequest, NotFound
from infera_server.protocols import wire
from infera_server.protocols.protos import message, pool
from infera_server.rpc.calls import refuse
from infera_server.service import Service

log = logging.getLogger(__name__)

SERVICE = "grpc.health.v1.Health"
REFLECTIONS = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")
"""Two names of one protocol."""

SERVED = frozenset({"", "inference.GRPCInferenceService"})
"""The services that can be asked about; "" is the whole server."""

PERIOD = 0.25
"""Seconds between looks at what is watched."""

CheckRequest = message("grpc.health.v1.HealthCheckRequest")
CheckResponse = message("grpc.health.v1.HealthCheckResponse")


class Health:
    """The handlers of Check and Watch. A service is serving while the server is ready."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """From now on nothing is serving; who watches is told."""
        self._stopped.set()

    def _status(self, name: str) -> str:
        if name not in SERVED:
            return "SERVICE_UNKNOWN"
        return "SERVING" if self._service.ready and not self._stopped.is_set() else "NOT_SERVING"

    async def check(self, data: bytes, context: Any) -> bytes:
        status = self._status(await _asked(data, context))
        if status == "SERVICE_UNKNOWN":
            await refuse(context, NotFound("unknown service"))
        return bytes(CheckResponse(status=status).SerializeToString())

    async def watch(self, data: bytes, context: Any) -> None:
        """The status now and whenever it is another, until the client leaves or the server does."""
        name, told = await _asked(data, context), ""
        while True:
            stopped = self._stopped.is_set()
            if (status := self._status(name)) != told:
                await context.write(bytes(CheckResponse(status=status).SerializeToString()))
                told = status
            if stopped:
                return
            try:
                await asyncio.wait_for(self._stopped.wait(), PERIOD)
            except TimeoutError:
                continue


async def _asked(data: bytes, context: Any) -> str:
    try:
        return str(CheckRequest.FromString(data).service)
    except DecodeError:
        await refuse(context, BadRequest(wire.UNREADABLE))


def reflection() -> grpc.RpcMethodHandler | None:
    """The handler of reflection's one method; None where protobuf is older than what grpcio-reflection was made for.

    `tritonclient[grpc]` installs such a one.
    """
    try:
        from grpc_reflection.v1alpha import reflection_pb2
        from grpc_reflection.v1alpha.reflection import aio
    except (ImportError, VersionError) as error:
        log.warning("gRPC goes without reflection: %s; a newer protobuf helps: pip install -U protobuf", error)
        return None
    own = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(own)
    pool().Add(own)
    servicer = aio.ReflectionServicer([*SERVED - {""}, SERVICE, REFLECTIONS[0]], pool=pool())
    return grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
