"""Triton's shared memory extensions over REST.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from infera_server.errors import BadRequest
from infera_server.http.routes import Call, Route, document
from infera_server.protocols import members
from infera_server.shared_memory import CudaRegions, SystemRegions

SYSTEM, CUDA = "/v2/systemsharedmemory", "/v2/cudasharedmemory"

_TEXT, _NATURAL = {"type": "string"}, {"type": "integer", "minimum": 0}


def _system(call: Call) -> SystemRegions:
    return call.service.regions.system


def _cuda(call: Call) -> CudaRegions:
    return call.service.regions.cuda


def _register_system(call: Call) -> None:
    found = _registration(call, "key", "byte_size")
    offset, nbytes = (members.natural(found.get(key, 0), key) for key in ("offset", "byte_size"))
    _system(call).register(call.path["region"], members.text(found, "key"), offset, nbytes)


def _register_cuda(call: Call) -> None:
    found = _registration(call, "raw_handle", "device_id", "byte_size")
    text = members.text(members.object_of(found["raw_handle"], "raw_handle"), "b64")
    try:
        handle = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        handle = b""
    device, nbytes = (members.natural(found[key], key) for key in ("device_id", "byte_size"))
    _cuda(call).register(call.path["region"], handle, device, nbytes)


def _registration(call: Call, *required: str) -> dict[str, Any]:
    found = members.body(call.body)
    for key in required:
        if key not in found:
            raise BadRequest(f"Shared memory register request has no '{key}' field")
    return found


ROUTES = (
    Route("GET", f"{SYSTEM}/status", lambda c: _system(c).status(), "All regions of system shared memory"),
    Route(
        "GET",
        SYSTEM + "/region/{region}/status",
        lambda c: _system(c).status(c.path["region"]),
        "One region of system shared memory",
    ),
    Route(
        "POST",
        SYSTEM + "/region/{region}/register",
        _register_system,
        "Map a POSIX shared memory object",
        document(("key", "byte_size"), key=_TEXT, offset=_NATURAL, byte_size=_NATURAL),
    ),
    Route(
        "POST",
        SYSTEM + "/region/{region}/unregister",
        lambda c: _system(c).unregister(c.path["region"]),
        "Forget a region of system shared memory",
    ),
    Route(
        "POST", f"{SYSTEM}/unregister", lambda c: _system(c).unregister(), "Forget all regions of system shared memory"
    ),
    Route("GET", f"{CUDA}/status", lambda c: _cuda(c).status(), "All regions of CUDA shared memory"),
    Route(
        "GET",
        CUDA + "/region/{region}/status",
        lambda c: _cuda(c).status(c.path["region"]),
        "One region of CUDA shared memory",
    ),
    Route(
        "POST",
        CUDA + "/region/{region}/register",
        _register_cuda,
        "Open an allocation that another process shares by CUDA IPC",
        document(
            ("raw_handle", "device_id", "byte_size"),
            raw_handle=document(("b64",), b64=_TEXT),
            device_id=_NATURAL,
            byte_size=_NATURAL,
        ),
    ),
    Route(
        "POST",
        CUDA + "/region/{region}/unregister",
        lambda c: _cuda(c).unregister(c.path["region"]),
        "Forget a region of CUDA shared memory",
    ),
    Route("POST", f"{CUDA}/unregister", lambda c: _cuda(c).unregister(), "Forget all regions of CUDA shared memory"),
)
