"""Triton's extensions that change a running server, over REST: models, traces, the log.

https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

import base64
import binascii
from functools import partial
from typing import Any

from infera_server import management
from infera_server.codec import short
from infera_server.errors import BadRequest
from infera_server.http.routes import Call, Route, document
from infera_server.models.background import detached
from infera_server.protocols import members

_TEXT = {"type": ["string", "null"]}
_TRACE = document(
    trace_level={"type": ["array", "null"], "items": {"type": "string"}},
    trace_rate=_TEXT,
    trace_count=_TEXT,
    log_frequency=_TEXT,
)
_TRAFFIC = document(
    labels={"type": "object", "additionalProperties": {"type": ["string", "integer"]}},
    split={"type": "object", "additionalProperties": {"type": "number"}},
    shadow={"type": "object"},
    golden=document(requests={"type": "integer", "minimum": 0}, tolerance={"type": "number", "minimum": 0}),
    pinned={"type": "boolean"},
)
_LOG = document(
    log_info={"type": "boolean"},
    log_warning={"type": "boolean"},
    log_error={"type": "boolean"},
    log_verbose_level={"type": "integer", "minimum": 0},
    log_format={"type": "string", "enum": ["default", "ISO8601"]},
)


INLINE_BYTES = 1 << 18
"""Of a load's document, which holds the files: a larger one is read in a thread of its own."""


async def _load(call: Call) -> None:
    read = partial(_loaded, call)
    config, files = read() if len(call.body) <= INLINE_BYTES else await detached("infera-files", read)
    await call.service.load_model(call.path["model"], config, files)


def _loaded(call: Call) -> tuple[str | None, dict[str, bytes]]:
    """The configuration and the files that a load brings. Raises BadRequest."""
    config: str | None = None
    files: dict[str, bytes] = {}
    for name, value in _parameters(call).items():
        if name == "config":
            config = _string(value, name)
        elif name.startswith("file:"):
            try:
                files[name.removeprefix("file:")] = base64.b64decode(_string(value, name), validate=True)
            except (binascii.Error, ValueError):
                raise BadRequest(f"parameter '{short(name)}' must hold a file in base64") from None
        else:
            raise BadRequest(f"unexpected parameter '{short(name)}': a load takes 'config' and 'file:PATH'")
    return config, files


async def _unload(call: Call) -> None:
    dependents = members.flag(_parameters(call).get("unload_dependents", False), "unload_dependents")
    await call.service.unload_model(call.path["model"], dependents)


async def _roll_back(call: Call) -> dict[str, Any]:
    await call.service.roll_back(call.path["model"])
    return {"versions": call.service.repository.versions(call.path["model"])}


def _set_traffic(call: Call) -> Any:
    return call.service.set_traffic(call.path["model"], members.body(call.body))


def _parameters(call: Call) -> dict[str, Any]:
    """The parameters of a request that may have no body."""
    found = members.body(call.body) if call.body else {}
    return members.object_of(found.get("parameters", {}), "request params")


def _string(value: object, name: str) -> str:
    if type(value) is not str:
        raise BadRequest(f"Unable to parse '{short(name)}': attempt to access JSON non-string as string")
    return value


def _model(call: Call) -> str:
    """The model of a path, which must be served."""
    return management.find(call.service.repository, call.path["model"], None).signature.name


_LOADING = document(
    parameters={
        "type": "object",
        "properties": {"config": {"type": "string"}},
        "additionalProperties": {"type": "string", "contentEncoding": "base64"},
    }
)

ROUTES = (
    Route("POST", "/v2/repository/models/{model}/load", _load, "Load a model, or load it again", _LOADING, large=True),
    Route(
        "POST",
        "/v2/repository/models/{model}/unload",
        _unload,
        "Take a model out of service",
        document(parameters=document(unload_dependents={"type": "boolean"})),
    ),
    Route("POST", "/v2/repository/models/{model}/rollback", _roll_back, "Serve again what the last reload replaced"),
    Route(
        "GET",
        "/v2/repository/models/{model}/traffic",
        lambda c: c.service.traffic(c.path["model"]),
        "Labels, split and shadow of a model's versions",
    ),
    Route(
        "POST",
        "/v2/repository/models/{model}/traffic",
        _set_traffic,
        "Set labels, split and shadow of a model's versions",
        _TRAFFIC,
    ),
    Route("GET", "/v2/trace/setting", lambda c: c.service.tracing.settings(), "Trace settings of all models"),
    Route(
        "POST",
        "/v2/trace/setting",
        lambda c: c.service.tracing.update(members.body(c.body)),
        "Change the trace settings of all models; null clears one",
        _TRACE,
    ),
    Route(
        "GET",
        "/v2/models/{model}/trace/setting",
        lambda c: c.service.tracing.settings(_model(c)),
        "Trace settings of a model",
    ),
    Route(
        "POST",
        "/v2/models/{model}/trace/setting",
        lambda c: c.service.tracing.update(members.body(c.body), _model(c)),
        "Change the trace settings of a model; null clears one",
        _TRACE,
    ),
    Route("GET", "/v2/logging", lambda c: c.service.log_settings.settings(), "What is logged"),
    Route(
        "POST",
        "/v2/logging",
        lambda c: c.service.log_settings.update(members.body(c.body)),
        "Change what is logged",
        _LOG,
    ),
)
