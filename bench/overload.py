"""`python -m bench.overload`: ten times what a server can do, and what becomes of it.

First as much as 128 connections ask for, which is the peak; then requests at ten times that rate, which no reply slows
down; then one at a time again. Reported: answers in time as a share of the peak, how long answers and refusals took,
the server's memory, and how soon it answers as before. The model is a chain of `--products` products. By default it
runs for some milliseconds, and the peak is a few hundred requests a second; with 60 it is thousands, and one event loop
cannot refuse ten times as many in time. Once with the model in the server's process and once with `--isolate`. Writes
bench/results/<host class>-overload-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from bench.environment import environment, write_results
from bench.servers import CACHE, Server, infera

WIDTH, PRODUCTS = 512, 600
CLOSED = 128
"""Connections that find the peak."""
CONNECTIONS = 2048
"""At most; an arrival that finds none free is not sent, and counted."""
FACTOR = 10.0
ENGINES: dict[str, Sequence[str]] = {
    "the server's process": (),
    "a process of its own": ("--isolate",),
    "that of one worker's engine": ("--workers", "1"),
}
GOODPUT, REFUSAL_MS = 0.95, 50.0
"""What is asked for: a share of the peak, and the 99th percentile of refusals."""
RECOVERED = 2.0
"""A reply that takes no longer than so many times the median before the load."""


def save_chain(path: Path, products: int) -> None:
    """y [N, 512] = x [N, 512], multiplied so many times by an orthogonal matrix."""
    rng = np.random.default_rng(0)
    matrix = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    names = ["input", *(f"v{i}" for i in range(1, products)), "output"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[i], "w"], [names[i + 1]]) for i in range(products)],
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", WIDTH])],
        [numpy_helper.from_array(matrix, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def request_bytes(host: str) -> bytes:
    """One row in binary."""
    x = np.ones((1, WIDTH), np.float32)
    head = (
        f'{{"inputs":[{{"name":"input","shape":[1,{WIDTH}],"datatype":"FP32",'
        f'"parameters":{{"binary_data_size":{x.nbytes}}}}}],"parameters":{{"binary_data_output":true}}}}'
    ).encode()
    return (
        f"POST /v2/models/chain/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(head) + x.nbytes}\r\n"
        f"Inference-Header-Content-Length: {len(head)}\r\n\r\n"
    ).encode() + head + x.tobytes()  # fmt: skip


@dataclass
class Phase:
    """What was asked and answered: (when, status, seconds), statuses of 0 for lost connections."""

    answers: list[tuple[float, int, float]] = field(default_factory=list)
    unsent: int = 0

    def took(self, good: bool) -> list[float]:
        return [seconds for _, status, seconds in self.answers if (status == 200) == good and status]


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._data = b""
        self._sent_at = 0.0
        self._phase: Phase | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, phase: Phase) -> None:
        self._sent_at, self._phase = time.monotonic(), phase
        self._transport.write(self._pool.request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._data[:end].lower()
        size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(self._data) >= end + 4 + size:
            self._data = b""
            self._answered(int(head[9:12]))

    def _answered(self, status: int) -> None:
        phase, self._phase = self._phase, None
        if phase is not None:
            now = time.monotonic()
            phase.answers.append((now, status, now - self._sent_at))
        self._pool.free(self, lost=status == 0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._answered(0)


class Pool:
    """Connections that are free, or may still be opened."""

    def __init__(self, address: str, request: bytes) -> None:
        self.request = request
        self.on_free: Any = None
        self._host, self._port = address.split(":")
        self._idle: deque[Client] = deque()
        self._count = 0

    @property
    def is_idle(self) -> bool:
        """Whether every connection has its answer."""
        return len(self._idle) == self._count

    async def open(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(count):
            _, client = await loop.create_connection(lambda: Client(self), self._host, int(self._port))
            self._idle.append(client)
        self._count += count

    def free(self, client: Client, lost: bool) -> None:
        if lost:
            self._count -= 1
            if client in self._idle:
                self._idle.remove(client)
            return
        self._idle.append(client)
        if self.on_free is not None:
            self.on_free()

    def ask(self, phase: Phase) -> bool:
        if not self._idle:
            phase.unsent += 1
            return False
        self._idle.popleft().ask(phase)
        return True


async def closed(pool: Pool, seconds: float, callers: int) -> Phase:
    """As much as so many callers ask for, one request each at a time."""
    phase, until = Phase(), time.monotonic() + seconds
    pool.on_free = lambda: time.monotonic() < until and pool.ask(phase)
    for _ in range(callers):
        pool.ask(phase)
    await asyncio.sleep(seconds)
    pool.on_free = None
    while not pool.is_idle:
        await asyncio.sleep(0.01)
    return phase


async def opened(pool: Pool, seconds: float, rate: float, server: Server, memory: list[int]) -> Phase:
    """Requests at a constant rate."""
    phase, began, sent, looked = Phase(), time.monotonic(), 0, 0.0
    while (passed := time.monotonic() - began) < seconds:
        for _ in range(int(passed * rate) - sent):
            pool.ask(phase)
            sent += 1
        if passed - looked > 1.0:
            looked = passed
            memory.append(resident(server.pid))
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.5)
    return phase


async def recovery(pool: Pool, limit: float) -> float:
    """Seconds until a request is answered within `limit` seconds, ten times in a row."""
    began, good, last = time.monotonic(), 0, 0.0
    while good < 10:
        phase = Phase()
        pool.ask(phase)
        while not phase.answers and not phase.unsent:
            await asyncio.sleep(0.001)
        fine = bool(phase.answers) and phase.answers[0][1] == 200 and phase.answers[0][2] <= limit
        good = good + 1 if fine else 0
        last = last if fine else time.monotonic() - began
        if time.monotonic() - began > 30:
            raise RuntimeError("the server did not recover in 30 s")
    return last


class Busiest:
    """The thread of a server that works most from now on: while it is overloaded, the one that runs the model."""

    def __init__(self, server: Server) -> None:
        self._server, self._before, self._began = server, server.thread_seconds(), time.monotonic()

    def share(self) -> float:
        """The part of the time since then that it had a processor."""
        took = time.monotonic() - self._began
        return max(v - self._before.get(k, 0.0) for k, v in self._server.thread_seconds().items()) / took


def resident(pid: int) -> int:
    """Bytes in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def percentile(values: Sequence[float], p: float) -> float:
    """Of seconds, in ms; 0 where there are none."""
    return float(np.percentile(values, p)) * 1e3 if values else 0.0


async def measured(server: Server, seconds: float) -> dict[str, float]:
    """The figures of one server."""
    address = urlsplit(server.urls["binary"]).netloc
    pool = Pool(address, request_bytes(address))
    await pool.open(CLOSED)
    await closed(pool, 1.0, CLOSED)
    alone = statistics.median((await closed(pool, 1.0, 1)).took(good=True))
    busy = Busiest(server)
    peak = len((await closed(pool, 5.0, CLOSED)).took(good=True)) / 5.0
    busy_at_peak = busy.share()
    await pool.open(CONNECTIONS - CLOSED)
    before, memory = resident(server.pid), list[int]()
    busy, began = Busiest(server), time.monotonic()
    phase = await opened(pool, seconds, FACTOR * peak, server, memory)
    busy_overloaded = busy.share()
    good = [at for at, status, _ in phase.answers if status == 200 and at - began <= seconds]
    statuses = Counter(status for _, status, _ in phase.answers)
    recovered = await recovery(pool, RECOVERED * alone + 0.005)
    return {
        "peak_rps": peak,
        "asked_rps": (len(phase.answers) + phase.unsent) / seconds,
        "goodput_rps": len(good) / seconds,
        "goodput": len(good) / seconds / peak,
        "busy_at_peak": busy_at_peak,
        "busy": busy_overloaded,
        "refused": statuses[429],
        "lost": statuses[0],
        "failed": sum(n for status, n in statuses.items() if status not in (0, 200, 429)),
        "unsent": phase.unsent,
        "alone_ms": alone * 1e3,
        "answer_p50_ms": percentile(phase.took(good=True), 50),
        "answer_p99_ms": percentile(phase.took(good=True), 99),
        "refusal_p50_ms": percentile(phase.took(good=False), 50),
        "refusal_p99_ms": percentile(phase.took(good=False), 99),
        "memory_before_mb": before / 1e6,
        "memory_after_1s_mb": memory[0] / 1e6 if memory else 0.0,
        "memory_end_mb": memory[-1] / 1e6 if memory else 0.0,
        "recovery_s": recovered,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--products", type=int, default=PRODUCTS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    before = environment()
    folder = CACHE / "overload"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_chain(folder / "chain.onnx", asked.products)
    console, rows = Console(stderr=True), []
    for engine, options in ENGINES.items():
        console.print(f"the model runs in {engine}: about {asked.seconds + 15:.0f} s")
        with infera(folder, "infera", "chain", *options) as server:
            rows.append({"engine": engine, **uvloop.run(measured(server, asked.seconds))})
    table = Table("figure", *(f"in {engine}" for engine in ENGINES), "asked for")
    wanted = {"goodput": f">= {GOODPUT}", "refusal_p99_ms": f"< {REFUSAL_MS:g}", "lost": "0", "failed": "0"}
    for name in [name for name in rows[0] if name != "engine"]:
        table.add_row(name, *(f"{row[name]:,.2f}" for row in rows), wanted.get(name, ""))
    console.print(table)
    asked_for = {"seconds": asked.seconds, "products": asked.products}
    console.print(f"written: {write_results(before, asked_for, rows, asked.out, 'overload')}")


if __name__ == "__main__":
    main()
