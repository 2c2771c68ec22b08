"""What the parts of a running server share."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from infera_server.batcher import Batch
from infera_server.errors import Unavailable
from infera_server.model import Model
from infera_server.repository import Repository
from infera_server.settings import Settings

EXPIRY_PERIOD = 0.05
"""Seconds between looks for waiting requests whose deadline has passed."""


@dataclass(eq=False)
class Service:
    """The repository behind the sockets, and whether it takes requests. Lives in one event loop."""

    settings: Settings
    repository: Repository
    draining: bool = False

    def model(self, name: str, version: str | None) -> Model:
        """A model to send a request to. Raises NotFound, or Unavailable while loading or draining."""
        if self.draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        return self.repository.get(name, version)

    @property
    def ready(self) -> bool:
        """Whether every model that could be loaded is, at least one was, and requests are taken."""
        return not self.draining and self.repository.is_settled and any(self.repository.ready())

    async def expire(self) -> None:
        """Answer requests whose time is up while another batch runs; for ever."""
        while True:
            await asyncio.sleep(EXPIRY_PERIOD)
            for model in self.repository.ready():
                model.batcher.expire()

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and finish the accepted ones. Returns whether all were finished in `timeout` seconds."""
        self.draining = True
        models = list(self.repository.ready())
        for model in models:
            model.batcher.drain()
        deadline = time.monotonic() + timeout

        def join() -> bool:
            return all(model.batcher.join(max(0.0, deadline - time.monotonic())) for model in models)

        finished = await asyncio.to_thread(join)
        await asyncio.sleep(0)  # the last batches' replies were posted before their threads ended: let them be written
        for model in models:
            model.batcher.close()
        return finished


def explain(batch: Batch | None, queued_at: float) -> str:
    """Where a request's time went, for a human: `queued 1.2 ms, batch of 17 rows (32 padded), ran 3.4 ms`."""
    if batch is None:
        return "did not run"
    return (
        f"queued {(batch.taken_at - queued_at) * 1e3:.1f} ms, "
        f"batch of {batch.rows} rows ({batch.padded} padded, {len(batch.jobs)} requests), "
        f"ran {(batch.ran_at - batch.gathered_at) * 1e3:.1f} ms"
    )
