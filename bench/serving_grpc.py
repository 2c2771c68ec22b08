"""`python -m bench.serving_grpc`: ModelInfer's requests a second and processor time a request, beside raw handlers'.

As `bench.serving`: one model, every server in a process of its own, loaded in turn, medians of rounds. `aio`, `threads`
and `processes` are handlers of raw bytes on grpc's servers (one event loop; two threads; two processes on one port),
which read the request and answer as many bytes. `pick` is infera with a model that has hardly any work, to compare with
them, and `handler` computes the same in the one handler that anyone would write: no queue, no limits, no counters. The
load comes from one event loop, a call at a time for each caller, over at most 4 connections: it takes about as long as
the servers, so that processor time says more than requests a second.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.environment import environment, thread_environment, write_results
from bench.served_model import SIZES, prepared
from bench.servers import HERE, ROOT, Server, free_ports, infera, started, triton
from bench.serving import medians
from infera_server.protocols.protos import message

METHOD = "/inference.GRPCInferenceService/ModelInfer"
MODES = ("aio", "threads", "processes", "handler")
CHANNELS = 4
WARM_S = 0.5


def request(model: str, rows: int) -> bytes:
    """A serialised request of random rows."""
    made = message("inference.ModelInferRequest")(model_name=model)
    made.inputs.add(name="input", datatype="FP32", shape=[rows, SIZES[0]])
    made.raw_input_contents.append(np.random.default_rng(1).random((rows, SIZES[0]), np.float32).tobytes())
    return bytes(made.SerializeToString())


def echo(folder: Path, mode: str, reply_bytes: int) -> Any:
    """A raw handler."""
    port = free_ports()
    base = f"http://127.0.0.1:{port}/"
    return started(
        mode,
        [sys.executable, str(HERE / "peers" / "grpc_echo.py"), mode, str(port), str(reply_bytes)],
        folder,
        {**thread_environment(1), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'server'}"},
        base,
        {"binary": base},
    )


def target(server: Server) -> str:
    """Where its gRPC is served: one port above HTTP."""
    return f"127.0.0.1:{(urlsplit(server.urls['binary']).port or 0) + 1}"


async def load(server: Server, sent: bytes, callers: int, seconds: float) -> dict[str, float]:
    """Requests a second, the median latency in ms, the server's processor time in us a request."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    channels = [grpc.aio.insecure_channel(target(server), options) for _ in range(min(callers, CHANNELS))]
    latencies: list[float] = []

    async def call(channel: Any, until: float) -> None:
        method = channel.unary_unary(METHOD)
        while (began := time.perf_counter()) < until:
            await method(sent)
            latencies.append(time.perf_counter() - began)

    async def everybody(period: float) -> float:
        latencies.clear()
        began = time.perf_counter()
        await asyncio.gather(*(call(channels[i % len(channels)], began + period) for i in range(callers)))
        return time.perf_counter() - began

    try:
        await everybody(WARM_S)
        before = server.cpu_seconds()
        took = await everybody(seconds)
        used = server.cpu_seconds() - before
    finally:
        for channel in channels:
            await channel.close()
    count = len(latencies)
    return {"rps": count / took, "p50_ms": statistics.median(latencies) * 1e3, "cpu_us": used / count * 1e6}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving_grpc", description=__doc__)
    parser.add_argument("--callers", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1, help="of a request, 3 kB each")
    parser.add_argument("--no-triton", action="store_true", help="leave out tritonserver, which is installed first")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    before = environment()
    folder = prepared("grpc")
    console = Console(stderr=True)
    with ExitStack() as stack:
        servers = [stack.enter_context(infera(folder, name, name)) for name in ("mlp", "pick")]
        reply = asyncio.run(_reply(servers[0], request("mlp", asked.rows)))
        servers += [stack.enter_context(echo(folder, mode, len(reply))) for mode in MODES]
        if not asked.no_triton:
            servers.append(stack.enter_context(triton(folder)))
        samples: dict[tuple[str | int, ...], list[dict[str, float]]] = {}
        for _ in track(range(asked.rounds), "rounds", console=console):
            for callers in asked.callers:
                for server in servers:
                    sent = request("pick" if server.name in ("pick", "handler") else "mlp", asked.rows)
                    found = uvloop.run(load(server, sent, callers, asked.seconds))
                    samples.setdefault((server.name, callers), []).append(found)
    rows = medians(samples, "server", "callers")
    _print(console, rows)
    options = {"seconds": asked.seconds, "rounds": asked.rounds, "rows": asked.rows}
    console.print(f"written: {write_results(before, options, rows, asked.out, 'serving-grpc')}")


def _print(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="medians")
    for heading in ("callers", "server", "requests/s", "p50 ms", "CPU us a request"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    for r in sorted(rows, key=lambda r: (r["callers"], r["cpu_us"])):
        table.add_row(str(r["callers"]), r["server"], f"{r['rps']:,.0f}", f"{r['p50_ms']:.3f}", f"{r['cpu_us']:.0f}")
    console.print(table)


async def _reply(server: Server, sent: bytes) -> bytes:
    async with grpc.aio.insecure_channel(target(server)) as channel:
        return bytes(await channel.unary_unary(METHOD)(sent))


if __name__ == "__main__":
    main()
