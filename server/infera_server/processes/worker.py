"""A worker process: takes requests at a port that it shares, and has the engine process run them."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
from uvicorn.loops.auto import auto_loop_factory

from infera_server.access import Access, Key, SharedBucket
from infera_server.errors import Unavailable
from infera_server.http.app import create_app
from infera_server.listening import listen
from infera_server.log_lines import LineFormatter
from infera_server.models.evictions import Elsewhere
from infera_server.models.repository import Repository
from infera_server.processes.arena import Blocks, Lent
from infera_server.processes.bulletin import Mirror
from infera_server.processes.channel import Channel, Content
from infera_server.processes.child import prepare
from infera_server.processes.forward import GRPC, RECALL, TRACE, Forward
from infera_server.processes.front_wire import run_out
from infera_server.processes.remote import Link
from infera_server.processes.ring import Reader, Signs, Writer
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.signature import Signature
from infera_server.server import make_server
from infera_server.service import Service
from infera_server.settings import Settings
from infera_server.tracing import Tracing

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that the engine has to answer beyond a request's own timeout."""

ROOM_SHARE = 1 / 8
"""Of a large body, before shared memory is reserved for all of it: so much is copied once more."""

GONE = Unavailable("the engine process is gone; send the request to another server")


class Passed(Tracing):
    """Has the engine keep the traces of this worker's requests."""

    def __init__(self, engine: Channel) -> None:
        super().__init__(None)
        self._engine = engine

    def record(self, signature: Signature, request_id: str, began: float, job: Job, batch: Batch | None) -> None:
        told = [signature.name, signature.version, request_id, began, time.monotonic(), run_out(batch, job)]
        self._engine.tell(TRACE, told)


class Worker:
    """What the engine asks of a worker, and what that answers."""

    def __init__(self, full: Signs, buckets: int, requests: int, results: int, outbox: Writer, inbox: Reader) -> None:
        self._full, self._buckets = full, buckets
        self._requests, self._results, self._outbox, self._inbox = requests, results, outbox, inbox
        self._began: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel: Channel | None = None

    async def run(self, sock: socket.socket) -> None:
        """Until the engine says that it is enough, or is gone."""
        handlers = {"begin": self._begin, "bulletin": self._read, "counted": self._counted}
        handlers |= {"drain": self._drain, "end": self._end}
        self._channel = await Channel.over(sock, handlers, self._lost)
        await self._began
        await self._server.serve([self._listening])

    async def _begin(self, told: Any, body: bytes) -> Content:
        assert self._channel is not None
        begin, first = told
        settings = Settings(**begin["settings"])
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LineFormatter(f"%(asctime)s %(levelname)s worker {begin['number']}: %(message)s"))
        logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
        logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.root.level))
        self._link = Link(
            self._full,
            Blocks(self._requests, settings.max_queue_bytes),
            Lent(self._results),
            self._outbox,
            self._inbox,
            settings.request_timeout + PATIENCE,
        )
        repository = Repository(settings.model_copy(update={"device": "cpu", "watch": False}), [])
        repository.is_settled = True
        self._service = Service(settings, repository, self._access(begin))
        self._service.tracing = Passed(self._channel)
        self._service.room, self._service.room_share = self._link.memory, ROOM_SHARE
        evicted = Elsewhere(partial(self._channel.tell, RECALL))
        self._mirror = Mirror(self._service, self._link, evicted)
        self._mirror.read(first)
        self._grpc_port: int | None = begin["grpc_port"]
        self._listening = listen(settings.host, begin["port"], shared=True)
        app = Forward(create_app(self._service, self._lifespan), self._service, self._channel)
        self._server = make_server(app, self._service)
        self._link.attach()
        self._began.set_result(None)
        while not self._server.started:
            await asyncio.sleep(0.005)
        return None, b""

    def _access(self, begin: Mapping[str, Any]) -> Access:
        keys = {
            name: Key(name, bytes.fromhex(digest), tuple(models), rate, management, SharedBucket(self._buckets, index))
            for index, (name, digest, models, rate, management) in enumerate(begin["keys"])
        }
        return Access(keys, begin["open_management"])

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[dict[str, Any]]:
        grpc = None
        if self._grpc_port is not None:
            from infera_server.rpc.server import GrpcServer  # grpc takes a while to import

            grpc = GrpcServer(self._service, self._call)
            await grpc.start(self._grpc_port)
        expiring = asyncio.create_task(self._service.expire())
        yield {"service": self._service}
        if grpc is not None:
            await grpc.stop(max(0.0, self._server.deadline - time.monotonic()))
        expiring.cancel()

    async def _call(self, method: str, data: bytes, key: Key | None) -> bytes:
        assert self._channel is not None
        return (await self._channel.ask(GRPC, [method, None if key is None else key.name], data))[1]

    async def _read(self, _: Any, body: bytes) -> Content:
        self._mirror.read(orjson.loads(body))
        self._link.flush()  # what was sent to models that are no more, before the engine hears that this is known
        return None, b""

    async def _counted(self, told: Any, body: bytes) -> Content:
        found = [[number, model.stats.handed_over()] for number, model in self._mirror.fronts.items()]
        refused = dict(self._service.access.refused)
        self._service.access.refused.clear()
        return {"models": found, "refused": refused}, b""

    async def _drain(self, deadline: Any, body: bytes) -> Content:
        """Refuse new requests; answers once those accepted are answered."""
        await self._service.drain(deadline, lambda: self._server.force_exit)
        return None, b""

    async def _end(self, told: Any, body: bytes) -> Content:
        self._server.should_exit = True
        return None, b""

    def _lost(self) -> None:
        """The engine is gone: answer what is there, and end."""
        if not self._began.done():
            os._exit(1)
        self._link.fail(GONE)
        self._service.outage = str(GONE)
        self._server.should_exit = True


async def _main() -> None:
    sock, full, buckets, requests, results, *rings = map(int, sys.argv[1:])
    worker = Worker(Signs(full), buckets, requests, results, Writer(*rings[:2]), Reader(*rings[2:]))
    await worker.run(socket.socket(fileno=sock))


def main() -> None:
    """Descriptors are the arguments: the engine's socket, files of shared memory, rings with their eventfds."""
    prepare()
    with asyncio.Runner(loop_factory=auto_loop_factory(use_subprocess=True)) as runner:
        runner.run(_main())


if __name__ == "__main__":
    main()
