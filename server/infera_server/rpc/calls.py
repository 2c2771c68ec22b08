"""An inference request that came over gRPC, from its bytes to its reply's; and ModelInfer, which has one of each."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc

from infera_server.access import Key
from infera_server.codec import Buffer
from infera_server.errors import RequestError, TooLarge, Unsupported, request_error
from infera_server.models.servable import Servable
from infera_server.models.versions import chosen
from infera_server.protocols import v2_grpc
from infera_server.protocols.grpc_members import EMPTY_FINAL, traces
from infera_server.requests import Request
from infera_server.scheduling.arrivals import arrivals
from infera_server.scheduling.explanation import PARAMETER, explain
from infera_server.scheduling.jobs import Batch, Done, Job
from infera_server.scheduling.rows import Arrays
from infera_server.scheduling.signature import Signature
from infera_server.service import Service

INLINE_BYTES = 1 << 18
"""What is read at once of a message, in a millisecond or two: its bytes without raw tensors, and those of texts."""

KNOWN_BYTES, MOST_KNOWN = 1 << 10, 1 << 10
"""Headers up to this size are read once, so many of them."""

Result = TypeVar("Result")


async def refuse(context: Any, error: RequestError) -> NoReturn:
    """End a call with an error. Raises what grpc ends a handler with."""
    retry = error.retry_after
    metadata = () if retry is None else (("grpc-retry-pushback-ms", str(max(1, math.ceil(retry * 1e3)))),)
    await context.abort(getattr(grpc.StatusCode, error.grpc_code), str(error), metadata)
    raise AssertionError("abort returned")


def credentials(context: Any) -> str:
    """What a call's metadata bring as an API key; empty where they bring none."""
    found = dict(context.invocation_metadata())
    return str(found.get("authorization") or found.get("x-api-key") or "")


@dataclass(slots=True, eq=False)
class Call:
    """A request to a model; `nbytes` is the size of its message, `began` a time of `time.monotonic`."""

    model: Servable
    request: Request
    nbytes: int
    began: float
    service: Service
    job: Job | None = None

    def submit(self, done: Done) -> None:
        """Give it to the model, which may call `done` before this returns. Raises RequestError."""
        arrivals.came()
        try:
            self.job = self.model.submit(self.request, self.nbytes, done)
        except Exception as error:
            raise failed(self.model, self.began, error) from None

    def cancel(self) -> None:
        """Forget it: `done` is not called."""
        if self.job is not None:
            self.model.cancel(self.job)

    def part(self, outputs: Arrays, batch: Batch | None, job: Job) -> list[Buffer]:
        """The parts of a response that others follow. Raises RequestError."""
        more = v2_grpc.final_parameter(False) + self._explained(batch, job)
        try:
            return v2_grpc.respond(self.request, outputs, self.model.signature, self.service.regions, more)
        except Exception as error:
            raise failed(self.model, self.began, error) from None

    def reply(self, result: Arrays | Exception, batch: Batch | None, more: bytes = b"") -> list[Buffer]:
        """The parts of the response, with the members of `more`; none for the end of others that nobody asks for.

        Raises RequestError where the run failed.
        """
        model, request, tracing = self.model, self.request, self.service.tracing
        job, self.job = self.job, None  # it leads here
        if tracing.on and job is not None:
            tracing.record(model.signature, request.id, self.began, job, batch)
        try:
            if isinstance(result, Exception):
                raise result
            more += self._explained(batch, job)
            if result or not model.signature.decoupled:
                parts = v2_grpc.respond(request, result, model.signature, self.service.regions, more)
            else:
                parts = v2_grpc.ended(request, model.signature, more) if request.parameters.get(EMPTY_FINAL) else []
        except Exception as error:
            raise failed(model, self.began, error) from None
        model.stats.replied(200, time.monotonic() - self.began)
        return parts

    def refused(self, error: RequestError) -> bytes:
        """The parameter that explains an error, serialised; nothing where that is not asked for."""
        return explained(error) if self.request.trace else b""

    def _explained(self, batch: Batch | None, job: Job | None) -> bytes:
        return v2_grpc.text_parameter(PARAMETER, explain(batch, job)) if self.request.trace else b""


def explained(error: RequestError) -> bytes:
    """The parameter that explains an error, serialised."""
    return v2_grpc.text_parameter(PARAMETER, explain(None, None, error))


def failed(model: Servable, began: float, error: Exception) -> RequestError:
    """What the client of a request to this model is told. It is counted."""
    refusal = request_error(error, model.signature.name)
    model.stats.failed(refusal, time.monotonic() - began)
    return refusal


@dataclass(frozen=True, slots=True)
class Known:
    """What a message's header was found to ask of a model."""

    name: str
    version: str | None
    signature: Signature
    template: v2_grpc.Template


class Inference:
    """Reads inference requests, for calls and for streams."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: dict[bytes, Known] = {}

    def credentials(self, context: Any) -> str | None:
        """The key that a call brings; None where none is asked for. Raises Unauthorized."""
        if self._service.access.is_open:
            return None
        given = credentials(context)
        self._service.access.identify(given)
        return given

    async def prepare(self, message: v2_grpc.Message, remaining: float | None, given: str | None) -> Call:
        """The call of a message whose client waits for `remaining` seconds. Raises RequestError."""
        try:
            return await self._prepare(message, remaining, given, None)
        except RequestError as error:
            error.trace = await self._traces(message.header)
            raise

    async def _prepare(
        self, message: v2_grpc.Message, remaining: float | None, given: str | None, key: Key | None
    ) -> Call:
        """The same, where the `key` that was `given` is known if nothing is given any more."""
        began = time.monotonic()
        header = message.header
        known, asked = self._known.get(header), None
        if known is None:
            asked = await self._read(header)
            name, version = asked.model_name, v2_grpc.version_of(asked.model_version)
        else:
            name, version = known.name, known.version
        if given is not None:
            key = self._service.access.admit(given, name, began)
        model = v2_grpc.look_up(self._service.model, name, version)
        signature = model.signature
        try:
            with self._service.intake.holding(message.nbytes):
                if known is None or known.signature is not signature:
                    asked = asked or await self._read(header)
                    known = Known(name, version, signature, await self._template(asked, header, signature))
                    self._keep(header, known)
                arguments = known.template, message, signature, self._service.regions_for(key), remaining
                if message.nbytes <= INLINE_BYTES or not known.template.is_slow:
                    request = v2_grpc.fill(*arguments)
                else:
                    model.check_room(message.nbytes)
                    request = await _elsewhere(v2_grpc.fill, *arguments)
        except Exception as error:
            raise failed(model, began, error) from None
        if model.retired:  # while another thread was at it
            return await self._prepare(message, remaining, None, key)
        if key is not None:
            request.claim(key.name)
        return Call(chosen(model, request), request, message.nbytes, began, self._service)

    async def _traces(self, header: bytes) -> bool:
        """Whether the request asks where its time went, as far as it can be read."""
        if (known := self._known.get(header)) is not None:
            return known.template.options.trace
        try:
            return traces((await self._read(header)).parameters)
        except RequestError:
            return False

    async def _read(self, header: bytes) -> Any:
        if len(header) <= INLINE_BYTES:
            return v2_grpc.parse(header)
        most = self._service.settings.max_json_bytes
        if len(header) > most:
            raise TooLarge(
                f"the request has {len(header):,} bytes beside raw_input_contents, at most {most:,} are accepted; "
                "send large tensors in raw_input_contents"
            )
        return await _elsewhere(v2_grpc.parse, header)

    async def _template(self, asked: Any, header: bytes, signature: Signature) -> v2_grpc.Template:
        if len(header) <= INLINE_BYTES:
            return v2_grpc.template_of(asked, signature)
        return await _elsewhere(v2_grpc.template_of, asked, signature)

    def _keep(self, header: bytes, known: Known) -> None:
        if len(header) <= KNOWN_BYTES:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[header] = known


async def _elsewhere(fn: Callable[..., Result], *arguments: Any) -> Result:
    """The function's result, found in another thread."""
    return await asyncio.get_running_loop().run_in_executor(None, fn, *arguments)


class ModelInfer:
    """The handler of one request with one response."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def handle(self, data: bytes, context: Any) -> bytes:
        answer: asyncio.Future[tuple[Arrays | Exception, Batch | None]] = asyncio.get_running_loop().create_future()

        waiting = [answer]  # emptied, since the batch in the answer leads to its jobs, and they lead here

        def done(result: Arrays | Exception, batch: Batch | None) -> None:
            if not (found := waiting.pop()).done():
                found.set_result((result, batch))

        try:
            inference = self._inference
            given = inference.credentials(context)
            call = await inference.prepare(v2_grpc.cut(data), context.time_remaining(), given)
            if call.model.signature.decoupled:
                raise Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy")
            call.submit(done)
            try:
                result, batch = await answer
            except asyncio.CancelledError:
                call.cancel()
                raise
            return b"".join(call.reply(result, batch))
        except RequestError as error:
            await refuse(context, error)
