"""The gRPC calls about the server, its models and their memory; what they say is `management`'s."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from infera_server import management
from infera_server.access import Access, Key
from infera_server.codec import short
from infera_server.errors import BadRequest, NotFound, Unavailable, Unsupported, request_error
from infera_server.models.servable import Servable
from infera_server.protocols import wire
from infera_server.protocols.protos import message, pool
from infera_server.protocols.v2_grpc import look_up, version_of
from infera_server.rpc.calls import credentials, refuse
from infera_server.service import Service

OPEN = frozenset({"ServerLive", "ServerReady"})
MANAGING = frozenset(
    {
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryStatus",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryStatus",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
    }
)
SETTINGS = frozenset({"TraceSetting", "LogSettings"})
"""They read where they are given nothing to change."""

NAMING = {
    "ModelReady": "name",
    "ModelMetadata": "name",
    "ModelConfig": "name",
    "ModelStatistics": "name",
    "TraceSetting": "model_name",
}
"""Where requests that read have the name of a model; empty, they are about all or none."""

Method: TypeAlias = Callable[[Service, Any], Awaitable[dict[str, Any]]]
"""A request's message to the members of the response's. Raises RequestError."""

Listing: TypeAlias = Callable[[Service, Any, Key | None], Awaitable[dict[str, Any]]]
"""The same, of those models that a key reads."""

Elsewhere: TypeAlias = Callable[[str, bytes, Key | None], Awaitable[bytes]]
"""A method's name, its request and its key to its response, both as bytes. Raises RequestError."""


def handler(service: Service, name: str, elsewhere: Elsewhere | None) -> grpc.RpcMethodHandler:
    """The handler of a method, which may be answered `elsewhere`, for who may call it."""

    async def handle(data: bytes, context: Any) -> bytes:
        try:
            request = _read(name, data)
            key = _admit(service.access, name, request, context)
            if elsewhere is not None:
                return await elsewhere(name, data, key)
            return await _answer(service, name, request, key)
        except Exception as error:
            await refuse(context, request_error(error, ""))

    return grpc.unary_unary_rpc_method_handler(handle)


async def answered(service: Service, name: str, data: bytes, key: Key | None) -> bytes:
    """What a method's handler answers elsewhere, of a request that was let in. Raises RequestError."""
    try:
        return await _answer(service, name, _read(name, data), key)
    except Exception as error:
        raise request_error(error, "") from None


def _read(name: str, data: bytes) -> Any:
    try:
        return message(f"inference.{name}Request").FromString(data)
    except DecodeError:
        raise BadRequest(wire.UNREADABLE) from None


async def _answer(service: Service, name: str, request: Any, key: Key | None) -> bytes:
    listing = LISTINGS.get(name)
    members = await (METHODS[name](service, request) if listing is None else listing(service, request, key))
    made = message(f"inference.{name}Response")()
    return bytes(json_format.ParseDict(members, made, descriptor_pool=pool()).SerializeToString())


def _admit(access: Access, name: str, request: Any, context: Any) -> Key | None:
    """The key of a call. Health is open, reading takes one, the rest one for more. Raises Unauthorized or Forbidden."""
    if name in OPEN:
        return None
    if name in MANAGING or (name in SETTINGS and request.settings):
        return access.check_management(credentials(context))
    if access.is_open:
        return None
    about = getattr(request, NAMING[name]) if name in NAMING else ""
    return access.admit_reader(credentials(context), about or None)


def _find(service: Service, request: Any) -> Servable:
    return look_up(service.repository.get, request.name, version_of(request.version))


# --- health and metadata ---------------------------------------------------------------------------------------------


async def server_live(service: Service, request: Any) -> dict[str, Any]:
    return {"live": True}


async def server_ready(service: Service, request: Any) -> dict[str, Any]:
    return {"ready": service.ready}


async def model_ready(service: Service, request: Any) -> dict[str, Any]:
    """Triton says no more than no of a model that it does not know."""
    try:
        return {"ready": not _find(service, request).lost and not service.draining}
    except (NotFound, Unavailable):
        return {"ready": False}


async def server_metadata(service: Service, request: Any) -> dict[str, Any]:
    return management.server_metadata()


async def model_metadata(service: Service, request: Any) -> dict[str, Any]:
    return management.model_metadata(service.repository, _find(service, request), version_of(request.version))


async def model_config(service: Service, request: Any) -> dict[str, Any]:
    return {"config": management.configuration(_find(service, request))}


async def model_statistics(service: Service, request: Any, key: Key | None) -> dict[str, Any]:
    """Of one model, or of all."""
    repository = service.repository
    await repository.audience.counted()
    if not request.name:
        return management.all_statistics(repository, key)
    try:
        return management.model_statistics(repository, _find(service, request), version_of(request.version))
    except (NotFound, Unavailable):
        known = bool(repository.versions(request.name))
        which = (
            f"version is not available for model '{request.name}'"
            if known
            else f"'{short(request.name)}' is not available"
        )
        raise BadRequest(f"requested model {which}") from None


# --- the repository --------------------------------------------------------------------------------------------------


async def repository_index(service: Service, request: Any, key: Key | None) -> dict[str, Any]:
    _check_repository(request)
    return {"models": management.index(service.repository, request.ready, key)}


async def repository_model_load(service: Service, request: Any) -> dict[str, Any]:
    _check_repository(request)
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, value in request.parameters.items():
        if key == "config":
            config = _typed(key, value, "string_param")
        elif key.startswith("file:"):
            files[key.removeprefix("file:")] = _typed(key, value, "bytes_param")
        else:
            raise BadRequest(f"unrecognized load parameter '{key}'.")
    await service.load_model(request.model_name, config, files)
    return {}


async def repository_model_unload(service: Service, request: Any) -> dict[str, Any]:
    _check_repository(request)
    dependents = False
    if "unload_dependents" in request.parameters:
        value = request.parameters["unload_dependents"]
        if value.WhichOneof("parameter_choice") != "bool_param":
            raise BadRequest("invalid value type for 'unload_dependents' parameter, expected bool_param.")
        dependents = value.bool_param
    await service.unload_model(request.model_name, dependents)
    return {}


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise Unsupported("'repository_name' specification is not supported")


def _typed(key: str, value: Any, kind: str) -> Any:
    if value.WhichOneof("parameter_choice") != kind:
        raise BadRequest(f"invalid value type for load parameter '{key}', expected {kind}.")
    return getattr(value, kind)


# --- shared memory ---------------------------------------------------------------------------------------------------


async def system_memory_status(service: Service, request: Any) -> dict[str, Any]:
    return _by_name(service.regions.system.status(request.name or None))


async def system_memory_register(service: Service, request: Any) -> dict[str, Any]:
    service.regions.system.register(request.name, request.key, request.offset, request.byte_size)
    return {}


async def system_memory_unregister(service: Service, request: Any) -> dict[str, Any]:
    service.regions.system.unregister(request.name or None)
    return {}


async def cuda_memory_status(service: Service, request: Any) -> dict[str, Any]:
    return _by_name(service.regions.cuda.status(request.name or None))


async def cuda_memory_register(service: Service, request: Any) -> dict[str, Any]:
    service.regions.cuda.register(request.name, request.raw_handle, request.device_id, request.byte_size)
    return {}


async def cuda_memory_unregister(service: Service, request: Any) -> dict[str, Any]:
    service.regions.cuda.unregister(request.name or None)
    return {}


def _by_name(regions: list[dict[str, Any]]) -> dict[str, Any]:
    return {"regions": {region["name"]: region for region in regions}}


# --- traces and the log ----------------------------------------------------------------------------------------------


async def trace_setting(service: Service, request: Any) -> dict[str, Any]:
    """A setting has a list of texts; an empty one clears it."""
    model = request.model_name or None
    if model is not None and not service.repository.versions(model):
        raise BadRequest(f"Request for unknown model : {short(model)}")
    changes = {name: _setting(name, list(given.value)) for name, given in request.settings.items()}
    tracing = service.tracing
    found = tracing.update(changes, model) if changes else tracing.settings(model)
    return {"settings": {k: {"value": v if isinstance(v, list) else [v]} for k, v in found.items()}}


def _setting(name: str, values: list[str]) -> list[str] | str | None:
    if not values:
        return None
    if name == "trace_level":
        return values
    if len(values) > 1:
        raise BadRequest(f"expect only 1 value for '{short(name)}'")
    return values[0]


_FLAG, _NUMBER, _TEXT = ("bool_param", "boolean"), ("uint32_param", "int32"), ("string_param", "string")
_LOG = {
    "log_info": _FLAG,
    "log_warning": _FLAG,
    "log_error": _FLAG,
    "log_verbose_level": _NUMBER,
    "log_format": _TEXT,
    "log_file": _TEXT,
}


async def log_settings(service: Service, request: Any) -> dict[str, Any]:
    """What is not known is left out, as in Triton."""
    changes: dict[str, Any] = {}
    for name in _LOG.keys() & request.settings.keys():
        given, (kind, told) = request.settings[name], _LOG[name]
        if given.WhichOneof("parameter_choice") != kind:
            raise BadRequest(f"expect {told} for '{name}'")
        changes[name] = getattr(given, kind)
    found = service.log_settings.update(changes) if changes else service.log_settings.settings()
    return {"settings": {name: {_LOG[name][0]: value} for name, value in found.items()}}


METHODS: dict[str, Method] = {
    "ServerLive": server_live,
    "ServerReady": server_ready,
    "ModelReady": model_ready,
    "ServerMetadata": server_metadata,
    "ModelMetadata": model_metadata,
    "ModelConfig": model_config,
    "RepositoryModelLoad": repository_model_load,
    "RepositoryModelUnload": repository_model_unload,
    "SystemSharedMemoryStatus": system_memory_status,
    "SystemSharedMemoryRegister": system_memory_register,
    "SystemSharedMemoryUnregister": system_memory_unregister,
    "CudaSharedMemoryStatus": cuda_memory_status,
    "CudaSharedMemoryRegister": cuda_memory_register,
    "CudaSharedMemoryUnregister": cuda_memory_unregister,
    "TraceSetting": trace_setting,
    "LogSettings": log_settings,
}

LISTINGS: dict[str, Listing] = {"ModelStatistics": model_statistics, "RepositoryIndex": repository_index}

NAMES = METHODS.keys() | LISTINGS.keys()

READING_METHODS = NAMES - MANAGING - SETTINGS
