"""ModelStreamInfer: many requests at a time on one call, their responses in the order of the requests.

As Triton has it: what goes wrong with a request is told in its response, and the stream goes on. Every response says
whether it is the last one to its request. Those of a decoupled model, which gives any number of them, are sent as they
are made and wait for no other request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any

from grpc import aio

from infera_server.errors import RequestError, Unavailable
from infera_server.protocols import v2_grpc
from infera_server.rpc.calls import Call, Inference, explained, refuse
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.rows import Arrays
from infera_server.settings import Settings


class Slot:
    """A request's place among the responses; `answer` is what is sent when it is its turn."""

    __slots__ = ("answer", "call")

    def __init__(self) -> None:
        self.call: Call | None = None
        self.answer: bytes | None = None


class Stream:
    """One call. `run` reads and writes until the client has said its last and got its last response."""

    def __init__(self, inference: Inference, context: Any, settings: Settings) -> None:
        """Raises Unauthorized."""
        self._inference = inference
        self._context = context
        self._given = inference.credentials(context)
        self._most, self._most_bytes = settings.max_queue, settings.max_body_bytes
        self._slots: deque[Slot] = deque()
        self._unordered: set[Slot] = set()
        """Requests to decoupled models, from their first to their last response."""

        self._outgoing: deque[bytes] = deque()
        self._answered_bytes = 0
        self._answered = asyncio.Event()
        self._written = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._ended = False
        self._stopped: RequestError | None = None

    async def run(self) -> None:
        self._reading = asyncio.create_task(self._read())
        try:
            while not (self._ended and not (self._slots or self._unordered or self._outgoing)):
                if self._outgoing:
                    await self._context.write(answer := self._outgoing[0])
                    self._outgoing.popleft()
                    self._answered_bytes -= len(answer)
                    self._written.set()
                elif self._slots and (first := self._slots[0].answer) is not None:
                    self._outgoing.append(first)
                    self._slots.popleft()
                else:
                    self._answered.clear()
                    await self._answered.wait()
        finally:
            self._reading.cancel()
            for slot in (*self._slots, *self._unordered):
                if slot.answer is None and slot.call is not None:
                    slot.call.cancel()
        if self._stopped is not None:
            await refuse(self._context, self._stopped)
        await self._reading

    def stop(self, reason: RequestError) -> None:
        """Read no more: the stream ends with this error once what was read is answered."""
        self._stopped = reason
        if self._reading is not None:
            self._reading.cancel()

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while (data := await self._context.read()) is not aio.EOF:
                await self._take(data)
                while self._is_full:
                    self._written.clear()
                    await self._written.wait()
        finally:
            self._ended = True
            self._answered.set()

    @property
    def _is_full(self) -> bool:
        """Whether a client that does not read its responses has enough of them here."""
        requests = len(self._slots) + len(self._unordered) + len(self._outgoing)
        return requests >= self._most or self._answered_bytes >= self._most_bytes

    async def _take(self, data: bytes) -> None:
        slot = Slot()
        self._slots.append(slot)
        request_id = ""
        try:
            message = v2_grpc.cut(data)
            request_id = message.id
            slot.call = await self._inference.prepare(message, self._context.time_remaining(), self._given)
            if slot.call.model.signature.decoupled:
                slot.call.request.each = partial(self._part, slot, slot.call)
                self._slots.remove(slot)
                self._unordered.add(slot)
            slot.call.submit(partial(self._done, slot, slot.call))
        except RequestError as error:
            asks = error.trace if slot.call is None else slot.call.request.trace
            self._answer(slot, v2_grpc.refused(str(error), request_id, explained(error) if asks else b""))
        except asyncio.CancelledError:
            if self._stopped is not None:  # else the client has left
                self._answer(slot, v2_grpc.refused(str(self._stopped), request_id))
            raise

    # --- responses ---------------------------------------------------------------------------------------------------

    def _part(self, slot: Slot, call: Call, outputs: Arrays, batch: Batch | None, job: Job) -> None:
        """A response that is not the last one."""
        if slot not in self._unordered:
            return
        try:
            self._send(v2_grpc.streamed(call.part(outputs, batch, job)))
        except RequestError as error:
            call.cancel()
            self._answer(slot, _failed(call, error))

    def _done(self, slot: Slot, call: Call, result: Arrays | Exception, batch: Batch | None) -> None:
        try:
            parts = call.reply(result, batch, v2_grpc.final_parameter())
            answer = v2_grpc.streamed(parts) if parts else b""
        except RequestError as error:
            answer = _failed(call, error)
        self._answer(slot, answer)

    def _answer(self, slot: Slot, answer: bytes) -> None:
        """The last response to a request; where it is empty, none."""
        if slot not in self._unordered:
            slot.answer = answer
            self._answered_bytes += len(answer)
            self._answered.set()
            return
        self._unordered.discard(slot)
        self._send(answer)

    def _send(self, answer: bytes) -> None:
        if answer:
            self._outgoing.append(answer)
            self._answered_bytes += len(answer)
        self._answered.set()
        self._written.set()


def _failed(call: Call, error: RequestError) -> bytes:
    return v2_grpc.failed(str(error), call.request, call.model.signature, call.refused(error))


class ModelStreamInfer:
    """The handler of streams, and all that are open."""

    def __init__(self, inference: Inference, settings: Settings, most: int) -> None:
        """At most so many streams are open at a time."""
        self._inference = inference
        self._settings = settings
        self._most = most
        self._open: set[Stream] = set()
        self._closed: RequestError | None = None

    async def handle(self, requests: Any, context: Any) -> None:
        if self._closed is not None:
            await refuse(context, self._closed)
        if len(self._open) >= self._most:
            await refuse(context, Unavailable(f"{self._most} streams are open"))
        try:
            stream = Stream(self._inference, context, self._settings)
        except RequestError as error:
            await refuse(context, error)
        self._open.add(stream)
        try:
            await stream.run()
        finally:
            self._open.discard(stream)

    def stop(self, reason: RequestError) -> None:
        """End every stream with this error, once what it has read is answered; new ones at once."""
        self._closed = reason
        for stream in self._open:
            stream.stop(reason)
