"""`python -m bench.serving`: requests a second and processor time a request, of infera and of other servers.

All serve one model, an MLP of 784-512-256-10, each in a process of its own with one thread for the model. wrk loads
them in turn from one thread, in rounds; medians. All other servers are idle meanwhile, but stay up. A row is a server,
a kind of body and a number of connections. Writes bench/results/<host class>-serving-<date>.json.

`tritonserver` comes from the wheel nvidia-pytriton and runs the model in its Python backend. `asgi` is a handler that
only reads the request and answers as many bytes. Peers are installed under .cache/peers (200 to 400 MB each) when they
are first asked for: --peers triton,asgi,fastapi,mlserver,litserve,bentoml,torchserve (1.2 GB) or none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.environment import environment, write_results
from bench.peers import PEERS
from bench.served_model import check_answer, prepared, right_answer
from bench.servers import HERE, Server, asgi, infera, peer, triton

KINDS = ("binary", "json", "rows")


def measure(server: Server, body: str, folder: Path, connections: int, seconds: float) -> dict[str, float]:
    """Requests a second, latencies in ms, the server's processor time in us a request. Raises RuntimeError."""
    env = {**os.environ, "BODY": str(folder / f"{body}.body"), "HEADERS": str(folder / f"{body}.headers")}
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(HERE / "load.lua"), server.urls[body]]
    began = server.cpu_seconds()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    used = server.cpu_seconds() - began
    count, took, p50, p99, errors = map(float, done.stdout.rpartition("RESULT ")[2].split())
    if errors or not count:
        raise RuntimeError(f"{server.name}: {errors:g} of {count:g} requests failed")
    return {"rps": count / took, "p50_ms": p50 / 1e3, "p99_ms": p99 / 1e3, "cpu_us": used / count * 1e6}


def medians(
    samples: Mapping[tuple[str | int, ...], Sequence[Mapping[str, float]]], *names: str
) -> list[dict[str, Any]]:
    """A row for each key of `samples`, whose parts have these names: the medians of the rounds, and all of them."""
    return [
        dict(zip(names, key, strict=True))
        | {figure: statistics.median(s[figure] for s in found) for figure in found[0]}
        | {"samples": found}
        for key, found in samples.items()
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--peers", default="triton,asgi,fastapi", help="comma-separated; none: only infera")
    parser.add_argument("--connections", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("bench.serving needs wrk: apt-get install wrk")
    names = [n for n in asked.peers.split(",") if n and n != "none"]
    known = {p.name: p for p in PEERS}
    if unknown := set(names) - {"triton", "asgi", *known}:
        sys.exit(f"no peer is called {', '.join(sorted(unknown))}; there are triton, asgi, {', '.join(known)}")
    before = environment()
    folder = prepared("run")
    console = Console(stderr=True)
    with ExitStack() as stack:
        console.print(f"starting infera, {', '.join(names)}")
        ours = stack.enter_context(infera(folder, "infera", "mlp"))
        want = right_answer(folder)
        apart = stack.enter_context(infera(folder, "infera --isolate", "mlp", "--isolate"))
        servers = [ours, apart]
        sizes = {body: check_answer(ours, body, folder, want) for body in ("binary", "json")}
        if "asgi" in names:
            servers.append(stack.enter_context(infera(folder, "infera, next to no model", "pick")))
            servers.append(stack.enter_context(asgi(folder, sizes["binary"])))
        if "triton" in names:
            servers.append(stack.enter_context(triton(folder)))
        servers += [stack.enter_context(peer(folder, known[n])) for n in names if n in known]
        for server in servers:
            for body in server.urls:
                if server.urls[body].endswith("pick/infer"):
                    continue
                check_answer(server, body, folder, want)
        work = [(s, b, c) for c in asked.connections for b in KINDS for s in servers if b in s.urls]
        for server, body, _ in work:
            measure(server, body, folder, 8, 1.0)  # warm
        samples: dict[tuple[str | int, ...], list[dict[str, float]]] = {}
        for _ in track(range(asked.rounds), "rounds", console=console):
            for server, body, connections in work:
                found = measure(server, body, folder, connections, asked.seconds)
                samples.setdefault((server.name, body, connections), []).append(found)
    rows = medians(samples, "server", "body", "connections")
    _print(console, rows)
    options = {"seconds": asked.seconds, "rounds": asked.rounds}
    console.print(f"written: {write_results(before, options, rows, asked.out, 'serving')}")


def _print(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    ours = {(r["body"], r["connections"]): r for r in rows if r["server"] == "infera"}
    table = Table(title="infera / server: requests a second, p50, processor time a request")
    for heading in ("server", "body", "connections", "requests/s", "p50 ms", "p99 ms", "CPU us", "rps", "p50", "CPU"):
        table.add_column(heading, justify="left" if heading in ("server", "body") else "right")
    for r in rows:
        mine = ours.get((r["body"] if r["body"] != "rows" else "json", r["connections"]))
        ratios = [f"{mine[k] / r[k]:.2f}" if mine else "" for k in ("rps", "p50_ms", "cpu_us")]
        table.add_row(r["server"], r["body"], str(r["connections"]), f"{r['rps']:,.0f}", f"{r['p50_ms']:.3f}",
                      f"{r['p99_ms']:.2f}", f"{r['cpu_us']:.0f}", *ratios)  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
