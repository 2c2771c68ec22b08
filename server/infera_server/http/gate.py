"""What is asked of a request before the management application sees it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeAlias

from infera_server.access import Access, Key
from infera_server.errors import NotFound, RequestError, Unauthorized, retry_after
from infera_server.http.origin import check_origin
from infera_server.models.discovery import RESERVED

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
"""The headers that may hold a key."""

INFERENCE = re.compile(r"/v2/models/([^/]+)(?:/versions/[^/]+)?/(?:infer|generate|generate_stream|stream)")
ABOUT = re.compile(r"/v2/(?:repository/)?models/([^/]+)(?:/.*)?", re.DOTALL)
"""What is read of one model."""

OPEN = re.compile(r"/|/v2/health/(?:live|ready)")
READING = frozenset({"GET", "HEAD", "OPTIONS"})
METRICS = "/metrics"
INDEX = "/v2/repository/index"
MEMORY = ("/v2/systemsharedmemory/", "/v2/cudasharedmemory/")
"""Where also reading is for who may change: it tells the names of memory."""

STREAM = "websocket.http.response"
"""What begins the types of messages that answer a WebSocket's handshake as a request (an extension of ASGI)."""


def credentials(headers: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]]) -> str:
    """What headers of lower-case names bring as a key; empty where they bring none."""
    found = dict(headers)
    return (found.get(b"authorization") or found.get(b"x-api-key") or b"").decode("latin-1")


class Gate:
    """An ASGI application before another: health is open, reading and inference take a key, the rest one for more."""

    def __init__(self, app: App, access: Access, metrics_port: int | None = None, *, local: bool = False) -> None:
        """On `metrics_port` there is nothing but metrics. A `local` server listens on a loopback address only."""
        self._app = app
        self._access = access
        self._metrics_port = metrics_port
        self._local = local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._check(scope)
            except RequestError as error:
                await self._refuse(scope, send, error)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Message) -> None:
        """Raises RequestError."""
        path, method = scope["path"], scope.get("method", "GET")
        if self._metrics_port is not None and scope["server"][1] == self._metrics_port and path != METRICS:
            raise NotFound("Not Found")
        if OPEN.fullmatch(path):
            return
        reads = (method in READING or path == INDEX) and not path.startswith(MEMORY)
        manages = not reads and INFERENCE.fullmatch(path) is None
        if self._access.is_open and (manages or scope["type"] == "websocket"):
            check_origin(scope["headers"], self._local)
        given = credentials(scope["headers"])
        if (found := INFERENCE.fullmatch(path)) is not None:
            key = self._access.admit(given, found[1], time.monotonic())
        elif manages:
            key = self._access.check_management(given)
        else:
            about = ABOUT.fullmatch(path)
            key = self._access.admit_reader(given, about[1] if about and about[1] not in RESERVED else None)
        scope.setdefault("state", {})["key"] = key

    async def _refuse(self, scope: Message, send: Send, error: RequestError) -> None:
        await refuse(send, error, STREAM if scope["type"] == "websocket" else "http.response")


def key_of(scope: Message) -> Key | None:
    """The key that a request was let in with; None where none are asked for."""
    found: Key | None = scope.get("state", {}).get("key")
    return found


async def refuse(send: Send, error: RequestError, kind: str = "http.response") -> None:
    """Answer a request, or a WebSocket's handshake with STREAM, with an error."""
    body = json.dumps({"error": str(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if (seconds := retry_after(error)) is not None:
        headers.append((b"retry-after", b"%d" % seconds))
    await send({"type": f"{kind}.start", "status": error.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
