"""Everything but inference: health, metadata, configuration, statistics, the index, metrics."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from infera_server import management
from infera_server.access import readable
from infera_server.codec import Buffer
from infera_server.errors import InternalError, RequestError, Unavailable, retry_after
from infera_server.http import coding, inference, reference
from infera_server.http.exchange import INLINE_BYTES, INLINE_CODED_BYTES
from infera_server.http.gate import key_of
from infera_server.http.intake import MAX_MANAGEMENT_BODY, Left, received
from infera_server.http.routes import Call, Route, document
from infera_server.management import server_version
from infera_server.metrics import Exposition, Extract
from infera_server.models.servable import Servable
from infera_server.models.versions import chosen
from infera_server.protocols import control, generate, members, regions, v2_rest
from infera_server.requests import Request as Asked
from infera_server.requests import check_again
from infera_server.scheduling.explanation import HEADER, explain, is_asked
from infera_server.service import Service

T = TypeVar("T")

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


class Json(Response):
    """A JSON reply made by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def create_app(service: Service, lifespan: Lifespan | None = None) -> FastAPI:
    """The management application over a service."""
    app = FastAPI(
        title="infera",
        version=server_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    repository = service.repository
    exposition = Exposition(repository, service.access)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        found = _error(error.status, str(error), retry_after(error))
        if error.trace or getattr(request.state, "trace", False):
            found.headers[HEADER] = explain(None, None, error)
        return found

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        """Starlette raises the exception again once this is sent, so that the log has it."""
        return _error(InternalError.status, "the server failed; its log says more")

    def read(path: str) -> Callable[..., Any]:
        def register(handler: Callable[..., Any]) -> Callable[..., Any]:
            _add_reading(app, path, handler)
            return handler

        return register

    def read_model(suffix: str) -> Callable[..., Any]:
        """Register under a model and under each of its versions."""

        def register(handler: Callable[..., Any]) -> Callable[..., Any]:
            for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
                _add_reading(app, path + suffix, handler)
            return handler

        return register

    def find(model: str, version: str | None) -> Servable:
        return management.find(repository, model, version)

    @read("/")
    async def alive() -> Response:
        return Json({"status": "alive"})

    @read("/v2")
    async def server() -> Response:
        return Json(management.server_metadata())

    @read("/v2/health/live")
    async def live() -> Response:
        return Json({"live": True})

    @read("/v2/health/ready")
    async def ready() -> Response:
        reason = service.why_not_ready
        return Json({"ready": False, "reason": reason}, 503) if reason else Json({"ready": True})

    @read("/v2/models")
    async def models(request: Request) -> Response:
        return Json({"models": management.names(repository, key_of(request.scope))})

    @read("/v2/models/stats")
    async def all_statistics(request: Request) -> Response:
        await repository.audience.counted()
        return Json(management.all_statistics(repository, key_of(request.scope)))

    @read_model("")
    async def metadata(model: str, version: str | None = None) -> Response:
        return Json(management.model_metadata(repository, find(model, version), version))

    @read_model("/ready")
    async def model_ready(model: str, version: str | None = None) -> Response:
        found = find(model, version)
        if service.draining:
            raise Unavailable("the server is shutting down")
        if found.lost:
            raise Unavailable(found.lost)
        return Json({"ready": True})

    @read_model("/config")
    async def configuration(model: str, version: str | None = None) -> Response:
        return Json(management.configuration(find(model, version)))

    @read_model("/stats")
    async def statistics(model: str, version: str | None = None) -> Response:
        await repository.audience.counted()
        return Json(management.model_statistics(repository, find(model, version), version))

    @app.post("/v2/repository/index")
    async def index(request: Request) -> Response:
        only_ready = _only_ready(await _body(request, service))
        await service.refresh()
        return Json(management.index(repository, only_ready, key_of(request.scope)))

    _add(app, service, (*control.ROUTES, *regions.ROUTES))

    @read("/metrics")
    async def metrics(request: Request) -> Response:
        await repository.audience.counted()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Extract(exposition, partial(readable, key_of(request.scope))))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def opened(request: Request) -> tuple[Servable, bytes]:
        """The model that a flat document is for, and the document. Raises RequestError."""
        request.state.trace = is_asked(request.headers.get(HEADER, "").encode("latin-1"))
        model = service.model(*_target(request))
        with inference.counted_if_refused(model):
            return model, await _body(request, service, service.settings.max_json_bytes)

    async def documents(request: Request, model: Servable, body: bytes) -> AsyncGenerator[tuple[bytes, str], None]:
        """The replies to a flat document, as many as the model gives, with what explains each. Raises RequestError."""
        most = service.settings.max_json_bytes
        sent: Buffer = body
        coded = coding.coding_of(request.headers.get("content-encoding", "").encode("latin-1"))
        if coded and len(sent) <= INLINE_CODED_BYTES:
            sent, coded = coding.opened(sent, coded, min(INLINE_BYTES, most))

        def read() -> tuple[Asked, int]:
            text = coding.decompress(sent, coded, most) if coded else bytes(sent)
            return generate.parse(text, model.signature), len(text)

        inline = coded is None and len(sent) <= INLINE_BYTES
        asked, size = read() if inline else await asyncio.get_running_loop().run_in_executor(None, read)
        request.state.trace = asked.trace = request.state.trace or asked.trace
        if model.retired:  # while the body came or another thread was at it
            model = service.model(*_target(request))
            check_again(asked, model.signature)
        if (key := key_of(request.scope)) is not None:
            asked.claim(key.name)
        model = chosen(model, asked)
        async with aclosing(inference.responses(model, asked, size, service.tracing)) as found:
            async for response in found:
                if response.outputs:
                    yield generate.respond(asked, response.outputs, model.signature), response.explained

    async def generated(request: Request) -> Response:
        model, body = await opened(request)
        answer = _unless_gone(request, inference.only(documents(request, model, body)))
        reply, explained = await inference.counted(model, answer)
        return Response(reply, headers={HEADER: explained} if explained else None, media_type="application/json")

    async def streamed(request: Request) -> Response:
        """Until the first event errors are replies of their own; then they are events."""
        model, body = await opened(request)
        found = inference.counted_each(model, documents(request, model, body))
        first = await _unless_gone(request, inference.first(found))

        async def events() -> AsyncGenerator[bytes, None]:
            async with aclosing(found):
                if first is not None:
                    yield generate.event(*first)
                try:
                    async for document, explained in found:
                        yield generate.event(document, explained)
                except RequestError as error:
                    explained = explain(None, None, error) if request.state.trace else ""
                    yield generate.event(v2_rest.error_body(str(error)), explained)

        return StreamingResponse(events(), media_type="text/event-stream")

    for path, handler in (("/generate", generated), ("/generate_stream", streamed)):
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            app.add_api_route(
                prefix + path,
                handler,
                methods=["POST"],
                summary="Inference with flat documents" + (", as server-sent events" if handler is streamed else ""),
                openapi_extra=_described(prefix + path, document()),
            )

    async def docs() -> Response:
        return Response(reference.page(app.openapi()), media_type="text/html")

    app.add_api_route("/docs", docs, include_in_schema=False)

    async def infer(request: Request) -> Response:
        """JSON as below, or JSON and then binary tensors, with its length in Inference-Header-Content-Length."""
        repository.get(*_target(request))  # what can be a model's is answered by `hotpath`: it says what is not
        return _error(404, "Not Found")

    for path in ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"):
        described = _described(path, v2_rest.SCHEMA)
        app.add_api_route(path, infer, methods=["POST"], summary="Inference", openapi_extra=described)
    return app


def _target(request: Request) -> tuple[str, str | None]:
    """The model and version of a path."""
    return request.path_params["model"], request.path_params.get("version")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; it is cancelled where the client leaves. The body must have been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Left("the client has left")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _add(app: FastAPI, service: Service, routes: Iterable[Route]) -> None:
    """Make endpoints of routes."""

    def endpoint(route: Route) -> Callable[..., Any]:
        async def answer(request: Request) -> Response:
            most = service.settings.max_load_body if route.large else MAX_MANAGEMENT_BODY
            body = await _body(request, service, most) if route.verb == "POST" else b""
            found = route.handler(Call(service, request.path_params, body))
            if inspect.isawaitable(found):
                found = await found
            return Response(media_type="application/json") if found is None else Json(found)

        return answer

    for route in routes:
        described: dict[str, Any] = {"summary": route.summary, "openapi_extra": _described(route.path, route.body)}
        if route.verb == "GET":
            _add_reading(app, route.path, endpoint(route), **described)
        else:
            app.add_api_route(route.path, endpoint(route), methods=[route.verb], **described)


def _add_reading(app: FastAPI, path: str, handler: Callable[..., Any], **described: Any) -> None:
    """Register for GET, and for HEAD, of which the documentation says nothing."""
    app.add_api_route(path, handler, methods=["GET"], **described)
    app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)


def _described(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What the OpenAPI document says of a route beyond its summary; `body` is a JSON Schema."""
    names = re.findall(r"{(\w+)}", path)
    found: dict[str, Any] = {
        "parameters": [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    }
    if body:
        found["requestBody"] = {"content": {"application/json": {"schema": body}}}
    return found


def _error(status: int, message: str, retry: int | None = None) -> Response:
    headers = None if retry is None else {"retry-after": str(retry)}
    return Response(v2_rest.error_body(message), status, headers, "application/json")


async def _body(request: Request, service: Service, most: int = MAX_MANAGEMENT_BODY) -> bytes:
    return await received(request.receive, service.intake, most)


def _only_ready(body: bytes) -> bool:
    return members.flag(members.body(body).get("ready", False), "ready") if body else False
