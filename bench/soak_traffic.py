"""What `bench.soak` sends, all of it at once: requests of every size, some that are left, some malformed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.servers import Server

WIDTH, ROWS = 4096, 64
"""Of the model's input, and rows of a large request: 1 MiB."""

PATIENCE, LONG_PATIENCE = 0.02, 0.25
"""Seconds between requests that are not sent as fast as possible; and for the answer to what is malformed."""

ANSWERED = 60.0
"""Seconds after which an answer that has not come is a fault."""

READ_ONLY = (
    "/", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/steady", "/v2/models/steady/config",
    "/v2/models/steady/stats", "/v2/models/stats", "/metrics", "/openapi.json", "/v2/models/steady/ready",
)  # fmt: skip


def save_model(path: Path) -> None:
    """y [N, 8] = relu(x [N, 4096] @ w), in numbers whose sums are exact in any order."""
    weights = np.random.default_rng(0).integers(-4, 5, (WIDTH, 8)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "soak",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def http(method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def inference(model: str, rows: int, binary: bool) -> bytes:
    """A request of so many rows, always the same."""
    x = np.random.default_rng(rows).integers(0, 9, (rows, WIDTH)).astype(np.float32)
    tensor: dict[str, Any] = {"name": "x", "shape": x.shape, "datatype": "FP32"}
    path = f"/v2/models/{model}/infer"
    if not binary:
        return http("POST", path, json.dumps({"inputs": [tensor | {"data": x.ravel().tolist()}]}).encode())
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    document = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return http("POST", path, document + x.tobytes(), f"Inference-Header-Content-Length: {len(document)}\r\n")


def damaged(rng: random.Random, sent: bytes) -> bytes:
    """A request with some bytes changed, taken out or put in."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(sent), 600))
        sent = sent[:at] + rng.randbytes(rng.choice((0, 1, 1, 8))) + sent[at + rng.choice((0, 1, 8)) :]
    return sent


@dataclass
class Window:
    """What happened in a stretch of time."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0


@contextlib.asynccontextmanager
async def connected(address: tuple[str, int]) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is reset at the end."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)


class Unanswered(Exception):
    """What was sent, and what of the answer came."""


class Line:
    """A connection that is opened again when it has ended."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, sent: bytes) -> tuple[int, bytes]:
        """Status and body. Raises Unanswered."""
        try:
            async with asyncio.timeout(ANSWERED):
                return await self._ask(sent)
        except (TimeoutError, asyncio.IncompleteReadError) as error:
            what = sent.partition(b"\r\n")[0].decode()
            raise Unanswered(f"{what}, {len(sent):,} bytes, was not answered: {error!r}") from error

    async def _ask(self, sent: bytes) -> tuple[int, bytes]:
        if self._open is None:
            self._open = await asyncio.open_connection(*self._address)
        reader, writer = self._open
        writer.write(sent)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.partition(b"\ncontent-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(size)
        if b"connection: close" in head:
            self.close()
        return int(head[9:12]), body

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


class Soak:
    """The traffic; `window` is where it is counted."""

    def __init__(self, server: Server) -> None:
        found = urlsplit(server.urls["binary"])
        self._address = (str(found.hostname), int(found.port or 0))
        self._rng = random.Random(0)
        self._pid = server.pid
        self._lines: list[Line] = []
        self.window = Window()

    def kinds(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """Each goes on for ever."""
        one, text, large = inference("steady", 1, True), inference("steady", 1, False), inference("steady", ROWS, True)
        return [
            *[lambda: self._steady("binary", one)] * 4,
            *[lambda: self._steady("json", text)] * 2,
            lambda: self._steady("large", large),
            lambda: self._left([one, text, large]),
            lambda: self._malformed([one, text]),
            self._read_only,
            self._reloaded,
            lambda: self._asked_meanwhile(inference("reloaded", 1, True)),
        ]

    async def _steady(self, kind: str, sent: bytes) -> None:
        line, right = self._line(), b""
        while True:
            began = time.monotonic()
            status, body = await line.ask(sent)
            self.window.seconds.append(time.monotonic() - began)
            self.window.statuses[kind, status] += 1
            right = right or body
            self.window.wrong += body != right

    async def _left(self, requests: Sequence[bytes]) -> None:
        while True:
            sent = self._rng.choice(requests)
            async with connected(self._address) as (_, writer):
                writer.write(sent[: self._rng.choice((len(sent), self._rng.randrange(len(sent))))])
                await asyncio.sleep(self._rng.random() * PATIENCE)
            self.window.statuses["left", 0] += 1

    async def _malformed(self, requests: Sequence[bytes]) -> None:
        while True:
            async with connected(self._address) as (reader, writer):
                writer.write(damaged(self._rng, self._rng.choice(requests)))
                with contextlib.suppress(TimeoutError, OSError):
                    async with asyncio.timeout(LONG_PATIENCE):  # wait_for may lose that this task is cancelled
                        head = await reader.read(12)
                    self.window.statuses["malformed", int(head[9:12] or 0)] += 1

    async def _read_only(self) -> None:
        line = self._line()
        for path in itertools.cycle(READ_ONLY):
            self.window.statuses["read only", (await line.ask(http("GET", path)))[0]] += 1
            await asyncio.sleep(PATIENCE)

    async def _reloaded(self) -> None:
        line = self._line()
        for verb in itertools.cycle(("unload", "load")):
            status, _ = await line.ask(http("POST", f"/v2/repository/models/reloaded/{verb}"))
            self.window.statuses[verb, status] += 1
            await asyncio.sleep(0.25)

    async def _asked_meanwhile(self, sent: bytes) -> None:
        line = self._line()
        while True:
            status, _ = await line.ask(sent)
            self.window.statuses["reloaded", status] += 1
            await asyncio.sleep(0.001)

    def _line(self) -> Line:
        self._lines.append(Line(self._address))
        return self._lines[-1]

    async def close(self) -> None:
        for line in self._lines:
            line.close()
        await asyncio.sleep(PATIENCE)

    def row(self, seconds: float) -> dict[str, Any]:
        """The figures of what was counted since the last one, in so many seconds."""
        done, self.window = self.window, Window()
        p50, p99 = np.percentile(done.seconds, (50, 99)) if done.seconds else (0.0, 0.0)
        proc = Path(f"/proc/{self._pid}")
        return {
            "seconds": seconds,
            "requests": done.statuses.total(),
            "statuses": {f"{kind} {status}": n for (kind, status), n in sorted(done.statuses.items())},
            "p50_ms": float(p50) * 1e3,
            "p99_ms": float(p99) * 1e3,
            "wrong": done.wrong,
            "rss_mb": int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6,
            "files": len(os.listdir(proc / "fd")),
            "threads": len(os.listdir(proc / "task")),
        }


async def soaked(server: Server, minutes: float, window: float, look: Callable[[dict[str, Any]], None]) -> None:
    """Load a server with models `steady` and `reloaded`, and hand over a row after each window. Raises what failed."""
    soak = Soak(server)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(kind()) for kind in soak.kinds()]
            for _ in range(max(1, round(minutes * 60 / window))):
                began = time.monotonic()
                await asyncio.sleep(window)
                look(soak.row(time.monotonic() - began))
            for task in tasks:
                task.cancel()
    finally:
        await soak.close()
