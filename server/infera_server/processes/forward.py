"""Requests about the server and its models, which a worker passes on to the engine: all that are no inference."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from infera_server.access import Key
from infera_server.errors import RequestError, request_error
from infera_server.http.gate import INFERENCE, READING, App, Message, Receive, Send, key_of, refuse
from infera_server.http.intake import MAX_MANAGEMENT_BODY, received
from infera_server.processes.channel import Channel, Content, Handler
from infera_server.processes.front_wire import run_in
from infera_server.protocols import control
from infera_server.scheduling.jobs import Job
from infera_server.service import Service

log = logging.getLogger(__name__)

HTTP, GRPC, TRACE, RECALL = "http", "grpc", "trace", "recall"
"""What the engine is asked, or told."""

_LARGE = re.compile("|".join(re.sub(r"{\w+}", "[^/]+", route.path) for route in control.ROUTES if route.large))
"""The paths where bodies may hold the files of a load."""


class Forward:
    """An ASGI application before another, which is left with inference."""

    def __init__(self, app: App, service: Service, engine: Channel) -> None:
        self._app, self._service, self._engine = app, service, engine

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or INFERENCE.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            large = _LARGE.fullmatch(scope["path"]) is not None
            most = self._service.settings.max_load_body if large else MAX_MANAGEMENT_BODY
            body = await received(receive, self._service.intake, most)
            asked = {name: scope[name] for name in ("method", "path", "scheme", "http_version")}
            asked["query"] = scope["query_string"].decode("latin-1")
            asked["key"] = None if (key := key_of(scope)) is None else key.name
            asked["headers"] = [[n.decode("latin-1"), v.decode("latin-1")] for n, v in scope["headers"]]
            told, content = await self._engine.ask(HTTP, asked, body)
        except RequestError as error:
            await refuse(send, error)
            return
        headers = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in told["headers"]]
        await send({"type": "http.response.start", "status": told["status"], "headers": headers})
        await send({"type": "http.response.body", "body": content})


class Answering:
    """The engine's side: an application, and the methods of gRPC, answer what was passed on.

    Either answers once every worker knows of what has changed by it.
    """

    def __init__(self, service: Service, app: App) -> None:
        self._service, self._app = service, app
        self.handlers: Mapping[str, Handler] = {
            HTTP: self._respond,
            GRPC: self._call,
            TRACE: self._trace,
            RECALL: self._recall,
        }

    def _key(self, name: str | None) -> Key | None:
        """The key that a worker has let a request in with."""
        return None if name is None else self._service.access.keys[name]

    async def _call(self, told: Any, body: bytes) -> Content:
        from infera_server.rpc.management import READING_METHODS, answered  # grpc takes a while to import

        method, key = told
        reply = await answered(self._service, method, body, self._key(key))
        if method not in READING_METHODS:
            await self._service.repository.audience.informed()
        return None, reply

    async def _recall(self, name: Any, body: bytes) -> Content:
        """A worker was asked for a model that was evicted."""
        self._service.recall(name)
        return None, b""

    async def _trace(self, told: Any, body: bytes) -> Content:
        """A request that a worker has answered."""
        model, version, identity, began, ended, run = told
        job = Job({}, lambda result, batch: None)
        batch = run_in(run, job)
        self._service.tracing.keep(model, version, identity, began, ended, job, batch)
        return None, b""

    async def _respond(self, asked: Any, body: bytes) -> Content:
        scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": asked["http_version"],
            "method": asked["method"],
            "scheme": asked["scheme"],
            "path": asked["path"],
            "raw_path": asked["path"].encode(),
            "query_string": asked["query"].encode("latin-1"),
            "root_path": "",
            "headers": [(n.encode("latin-1"), v.encode("latin-1")) for n, v in asked["headers"]],
            "client": None,
            "server": None,
            "state": {"key": self._key(asked["key"])},
        }
        waiting = [body]
        told: dict[str, Any] = {}
        parts: list[bytes] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": waiting.pop()} if waiting else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [[n.decode("latin-1"), v.decode("latin-1")] for n, v in message["headers"]]
                told.update(status=message["status"], headers=headers)
            else:
                parts.append(message.get("body", b""))

        try:
            await self._app(scope, receive, send)
        except Exception as error:
            refusal = request_error(error, "")
            if not told:
                raise refusal from None
        if asked["method"] not in READING:
            await self._service.repository.audience.informed()
        return told, b"".join(parts)
