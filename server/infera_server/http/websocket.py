"""Inference over a WebSocket, at `/v2/models/M[/versions/V]/stream`: many requests under way on one connection.

A text message is an inference request as JSON. A binary one is four bytes, little-endian, that say how long the JSON is
which follows, and then the tensors, as over HTTP. Responses are sent when they are ready, in the same two forms: binary
where an output is. `id` tells which request one answers; what went wrong is `{"id", "error", "status"}`, and the
connection goes on. A decoupled model gives any number of responses to a request: each says in its parameters whether it
is the last one, which may have no outputs. With the parameter `infera_trace` responses say in theirs where their time
went. A client with as many requests under way as it may have, or that does not read, is not read from.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Any

from infera_server.access import Key
from infera_server.codec import Buffer
from infera_server.errors import BadRequest, RequestError, TooLarge, Unavailable, request_error
from infera_server.http.exchange import INLINE_BYTES
from infera_server.http.gate import STREAM, App, Message, Receive, Send, key_of, refuse
from infera_server.http.inference import counted, counted_if_refused, responses
from infera_server.models.servable import Servable
from infera_server.models.versions import chosen
from infera_server.protocols import v2_rest
from infera_server.requests import FINAL, Parameter, Request, check_again
from infera_server.scheduling.explanation import PARAMETER, explain
from infera_server.service import Service

PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/stream")
MAX_UNDER_WAY = 64
"""Requests of one connection that are not answered yet."""

PREFIX = 4


class Streams:
    """An ASGI application before another: it takes the WebSockets of models, and no others."""

    def __init__(self, app: App, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        found = PATH.fullmatch(scope["path"]) if scope["type"] == "websocket" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        service = self._service
        await receive()  # that it wants to connect
        try:
            if service.streams >= service.max_connections:
                raise Unavailable(f"{service.max_connections} streams are open")
            service.model(found[1], found[2])
        except RequestError as error:
            await refuse(send, error, STREAM)
            return
        await send({"type": "websocket.accept"})
        service.streams += 1
        try:
            await _Stream(service, (found[1], found[2]), key_of(scope), send).serve(receive)
        finally:
            service.streams -= 1


class _Stream:
    """One connection."""

    def __init__(self, service: Service, target: tuple[str, str | None], key: Key | None, send: Send) -> None:
        self._service, self._target, self._key, self._send = service, target, key, send
        self._room = asyncio.Semaphore(MAX_UNDER_WAY)
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, receive: Receive) -> None:
        """Until the client leaves, which cancels what it has asked for."""
        try:
            while True:
                await self._room.acquire()
                message = await receive()
                if message["type"] == "websocket.disconnect":
                    return
                task = asyncio.create_task(self._answer(message))
                self._tasks.add(task)
                task.add_done_callback(self._answered)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()

    async def _answer(self, message: Message) -> None:
        """Send the response to one message, or what is wrong with it."""
        name, asked = self._target[0], None
        try:
            if self._key is not None:
                self._service.access.spend(self._key, time.monotonic())
            model = self._service.model(*self._target)
            with counted_if_refused(model):
                asked, nbytes = await self._read(message, model)
            if model.retired:  # while another thread was at it
                model = self._service.model(*self._target)
                with counted_if_refused(model):
                    check_again(asked, model.signature)
            if self._key is not None:
                asked.claim(self._key.name)
            await counted(model, self._reply(chosen(model, asked), asked, nbytes))
        except Exception as error:
            refusal = request_error(error, name)
            identity, trace = await self._about(message) if asked is None else (asked.id, asked.trace)
            document: dict[str, Any] = {"id": identity} if identity else {}
            document |= {"error": str(refusal), "status": refusal.status}
            if trace:
                document["parameters"] = {PARAMETER: explain(None, None, refusal)}
            await self._write({"type": "websocket.send", "text": json.dumps(document)})

    async def _read(self, message: Message, model: Servable) -> tuple[Request, int]:
        """The request in a message, and the bytes that it keeps in memory. Raises RequestError."""
        body, header = self._parts(message)
        nbytes = len(body)
        arguments = body, header, model.signature, self._service.regions_for(self._key)
        with self._service.intake.holding(nbytes):
            if nbytes <= INLINE_BYTES:
                return v2_rest.parse(*arguments), nbytes
            model.check_room(nbytes)
            return await asyncio.get_running_loop().run_in_executor(None, v2_rest.parse, *arguments), nbytes

    async def _about(self, message: Message) -> tuple[str, bool]:
        """The id of a message that cannot be used, and whether it asks where its time went, as far as that is told."""
        with suppress(RequestError):
            body, header = self._parts(message)
            text = memoryview(body)[:header]
            if len(text) <= INLINE_BYTES:
                return v2_rest.about(text)
            return await asyncio.get_running_loop().run_in_executor(None, v2_rest.about, text)
        return "", False

    async def _reply(self, model: Servable, request: Request, nbytes: int) -> None:
        signature = model.signature
        async with aclosing(responses(model, request, nbytes, self._service.tracing)) as found:
            async for response in found:
                parameters: dict[str, Parameter] = {}
                if signature.decoupled:
                    parameters[FINAL] = response.is_last
                if response.explained:
                    parameters[PARAMETER] = response.explained
                if response.outputs:
                    document, tail = v2_rest.respond(request, response.outputs, signature, self._service.regions)
                else:
                    document, tail = v2_rest.ended(request, signature), []
                await self._write(_message(v2_rest.with_parameters(document, parameters), tail))

    def _parts(self, message: Message) -> tuple[Buffer, int | None]:
        """The body and how much of it is JSON. Raises BadRequest or TooLarge."""
        text, most = message.get("text"), self._service.settings.max_json_bytes
        if text is not None:
            body = text.encode()
            if len(body) > most:
                raise TooLarge(f"the message has {len(body):,} bytes of JSON, at most {most:,} are accepted")
            return body, None
        data = message["bytes"]
        header = int.from_bytes(data[:PREFIX], "little")
        if len(data) < PREFIX or not 0 < header <= len(data) - PREFIX:
            raise BadRequest(
                f"a binary message begins with the length of its JSON in 4 bytes, little-endian: {header} is none "
                f"for a message of {len(data):,} bytes"
            )
        if header > most:
            raise TooLarge(f"the message has {header:,} bytes of JSON, at most {most:,} are accepted")
        return memoryview(data)[PREFIX:], header

    async def _write(self, message: Message) -> None:
        async with self._sending:
            await self._send(message)


def _message(document: bytes, tail: Sequence[Buffer] = ()) -> Message:
    if not tail:
        return {"type": "websocket.send", "text": document.decode()}
    return {"type": "websocket.send", "bytes": b"".join([len(document).to_bytes(PREFIX, "little"), document, *tail])}
