"""`python -m bench.workers`: `infera serve` with `--workers`, against one process.

The servers, models and load of `bench.serving` and `bench.serving_grpc`. A row is a number of workers (0: one process
for everything) and a kind of request: V2 over HTTP in binary and in JSON, and gRPC. Processor time is told for
the process with the models by itself: what it takes a request bounds any number of workers. Where there
are fewer processors than processes and load, requests a second are those of the machine, and say little of the server.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.environment import environment, write_results
from bench.served_model import prepared
from bench.servers import Server, infera
from bench.serving import measure, medians
from bench.serving_grpc import load, request

KINDS = ("binary", "json", "grpc")
MODELS = ("mlp", "pick")


def asked_once(
    server: Server, model: str, kind: str, folder: Path, connections: int, seconds: float
) -> dict[str, float]:
    """Requests a second, the median latency in ms, and processor time in us a request, of which `engine_us` is that of
    the process with the models."""
    all_before, first_before = server.cpu_seconds(), server.first_cpu_seconds()
    if kind == "grpc":
        found = uvloop.run(load(server, request(model, 1), connections, seconds))
    else:
        found = measure(server, kind, folder, connections, seconds)
    used, first = server.cpu_seconds() - all_before, server.first_cpu_seconds() - first_before
    return {key: found[key] for key in ("rps", "p50_ms", "cpu_us")} | {"engine_us": found["cpu_us"] * first / used}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.workers", description=__doc__)
    parser.add_argument("--workers", type=lambda s: [int(n) for n in s.split(",")], default=[0, 1, 2])
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("bench.workers needs wrk: apt-get install wrk")
    before = environment()
    folder = prepared("workers")
    console = Console(stderr=True)
    samples: dict[tuple[str | int, ...], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        servers = [
            (model, count, stack.enter_context(infera(folder, f"{model}-{count}", model, "--workers", str(count))))
            for model in MODELS
            for count in asked.workers
        ]
        work = [(model, kind, count, server) for kind in KINDS for model, count, server in servers]
        for model, kind, _, server in work:
            asked_once(server, model, kind, folder, 8, 1.0)  # warm
        for _ in track(range(asked.rounds), "rounds", console=console):
            for model, kind, count, server in work:
                found = asked_once(server, model, kind, folder, asked.connections, asked.seconds)
                samples.setdefault((model, kind, count), []).append(found)
    rows = medians(samples, "model", "kind", "workers")
    _print(console, rows)
    options = {"seconds": asked.seconds, "rounds": asked.rounds, "connections": asked.connections}
    console.print(f"written: {write_results(before, options, rows, asked.out, 'workers')}")


def _print(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="medians")
    for heading in ("model", "request", "workers", "requests/s", "p50 ms", "CPU us", "of them the engine's"):
        table.add_column(heading, justify="left" if heading in ("model", "request") else "right")
    for r in sorted(rows, key=lambda r: (r["model"], KINDS.index(r["kind"]), r["workers"])):
        figures = (f"{r['rps']:,.0f}", f"{r['p50_ms']:.2f}", f"{r['cpu_us']:.0f}", f"{r['engine_us']:.0f}")
        table.add_row(r["model"], r["kind"], str(r["workers"]), *figures)
    console.print(table)


if __name__ == "__main__":
    main()
