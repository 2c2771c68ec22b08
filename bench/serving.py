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
import json
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.environment import environment, thread_environment, write_results
from bench.peers import ORT, PEERS, Peer

HERE = Path(__file__).parent
ROOT = HERE.parent
CACHE = ROOT / ".cache" / "peers"
SIZES = (784, 512, 256, 10)
KINDS = ("binary", "json", "rows")
READY_S = 120.0
TICK = os.sysconf("SC_CLK_TCK")
TRITON = ("nvidia-pytriton==0.7.0", ORT, "numpy<2")
"""Brings tritonserver 2.51.0. Python 3.11 with a shared libpython is needed, which its backend is linked with."""


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers: `urls` by kind of body."""

    name: str
    pid: int
    urls: Mapping[str, str]

    def cpu_seconds(self) -> float:
        """Of all its processes."""
        return sum(_cpu_of(pid) for pid in _session(self.pid))

    def first_cpu_seconds(self) -> float:
        """Of the process that started the others."""
        return _cpu_of(self.pid)


def _session(leader: int) -> Iterator[int]:
    """The processes of a session and their descendants, which may have sessions of their own."""
    parents: dict[int, int] = {}
    members: set[int] = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(fields[1])
            if int(fields[3]) == leader:
                members.add(int(folder.name))
    for pid in parents:
        above: int | None = pid
        while above and above not in members:
            above = parents.get(above)
        if above:
            yield pid


def _cpu_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


# --- the model and what is sent --------------------------------------------------------------------------------------


def save_model(path: Path) -> None:
    """The MLP: `input` [N, 784] -> `output` [N, 10]."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "input"
    for i, (columns, width) in enumerate(pairwise(SIZES)):
        w = (rng.standard_normal((columns, width)) / np.sqrt(columns)).astype(np.float32)
        weights += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(np.zeros(width, np.float32), f"b{i}")]
        last = width == SIZES[-1]
        nodes.append(helper.make_node("Gemm", [value, f"w{i}", f"b{i}"], ["output" if last else f"g{i}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"g{i}"], [f"r{i}"]))
        value = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", SIZES[0]])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", SIZES[-1]])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def save_pick(path: Path) -> None:
    """The same tensors and hardly any work: the first 10 of 784 columns."""
    graph = helper.make_graph(
        [helper.make_node("Slice", ["input", "start", "stop", "axis"], ["output"])],
        "pick",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", SIZES[0]])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", SIZES[-1]])],
        [numpy_helper.from_array(np.array([v]), n) for n, v in (("start", 0), ("stop", SIZES[-1]), ("axis", 1))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def save_bodies(folder: Path) -> None:
    """One row as V2 in binary and in JSON, and as a bare list; with the headers of each."""
    x = np.random.default_rng(1).random((1, SIZES[0]), np.float32)
    entry = {"name": "input", "shape": x.shape, "datatype": "FP32"}
    asked = [{"name": "output", "parameters": {"binary_data": True}}]
    head = json.dumps(
        {"inputs": [entry | {"parameters": {"binary_data_size": x.nbytes}}], "outputs": asked}, separators=(",", ":")
    ).encode()
    plain = "Content-Type: application/json\n"
    numbers = [float(f"{v:.6f}") for v in x.ravel().tolist()]
    for name, body, headers in (
        ("binary", head + x.tobytes(), f"Inference-Header-Content-Length: {len(head)}\n"),
        ("json", json.dumps({"inputs": [entry | {"data": numbers}]}, separators=(",", ":")).encode(), plain),
        ("rows", json.dumps({"rows": [numbers]}, separators=(",", ":")).encode(), plain),
    ):
        (folder / f"{name}.body").write_bytes(body)
        (folder / f"{name}.headers").write_text(headers)


def check_answer(server: Server, body: str, folder: Path, want: Sequence[float]) -> int:
    """The bytes of a reply. Raises RuntimeError where it is not the model's answer."""
    headers = dict(line.split(": ", 1) for line in (folder / f"{body}.headers").read_text().splitlines())
    request = urllib.request.Request(server.urls[body], (folder / f"{body}.body").read_bytes(), headers)
    with _opened(server, body, request) as reply:
        content = reply.read()
        if (length := reply.headers.get("Inference-Header-Content-Length")) is not None:
            got = list(struct.unpack(f"<{SIZES[-1]}f", content[int(length) :]))
        else:
            got = [float(n) for n in re.findall(rb"-?\d+\.\d+(?:e-?\d+)?", content)][-SIZES[-1] :]
    if server.name != "asgi" and not np.allclose(got, want, rtol=1e-3, atol=1e-4):
        raise RuntimeError(f"{server.name}: {body}: answered {got}, not {want}")
    return len(content)


def _opened(server: Server, body: str, request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{server.name}: {body}: {error.code} {error.read(500)!r}") from None


# --- servers ---------------------------------------------------------------------------------------------------------


def free_ports() -> int:
    """The first of three neighbouring ports that are free."""
    while True:
        with ExitStack() as stack:
            try:
                first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
                for more in (1, 2):
                    stack.enter_context(socket.create_server(("127.0.0.1", first + more)))
            except OSError:
                continue
            return int(first)


@contextmanager
def started(
    name: str, command: Sequence[str], cwd: Path, env: Mapping[str, str], ready: str, urls: Mapping[str, str]
) -> Iterator[Server]:
    """A server as leader of a session of its own, from when it is ready."""
    with (cwd / f"{name}.log").open("wb") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                with urllib.request.urlopen(ready, timeout=2) as reply:
                    if reply.status == 200:
                        break
            except OSError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                tail = (cwd / f"{name}.log").read_text(errors="replace").splitlines()[-6:]
                raise RuntimeError(f"{name} did not start: {' | '.join(tail)}")
            time.sleep(0.2)
        yield Server(name, process.pid, urls)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for pid in list(_session(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def installed(name: str, requirements: Sequence[str]) -> Path:
    """The folder of a virtual environment with these packages."""
    venv, stamp = CACHE / name, "\n".join(requirements)
    if not (venv / "stamp").exists() or (venv / "stamp").read_text() != stamp:
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip = [str(venv / "bin/python"), "-m", "pip", "-q", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, *requirements], check=True)
        (venv / "stamp").write_text(stamp)
    return venv


def infera(folder: Path, name: str, model: str, *options: str) -> Any:
    """This server, as it starts from the command line, with one model."""
    port = free_ports()
    base = f"http://127.0.0.1:{port}"
    url = f"{base}/v2/models/{model}/infer"
    return started(
        name,
        [sys.executable, "-m", "infera_gpu.cli", "serve", str(folder / f"{model}.onnx"), "--device", "cpu",
         "--threads", "1", "--port", str(port), "--metrics-port", "off", *options],
        folder,
        {**thread_environment(1), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'server'}"},
        f"{base}/v2/health/ready",
        {"binary": url, "json": url},
    )  # fmt: skip


def asgi(folder: Path, reply_bytes: int) -> Any:
    """The bare handler under uvicorn as it is."""
    port = free_ports()
    base = f"http://127.0.0.1:{port}/"
    return started(
        "asgi",
        [sys.executable, "-m", "uvicorn", "bare_asgi:app", "--app-dir", str(HERE / "peers"), "--no-access-log",
         "--lifespan", "off", "--port", str(port)],
        folder,
        {**thread_environment(1), "REPLY_BYTES": str(reply_bytes)},
        base,
        {"binary": base, "json": base},
    )  # fmt: skip


def triton(folder: Path) -> Any:
    """tritonserver with its dynamic batching, without a delay."""
    venv = installed("triton", TRITON)
    home = next((venv / "lib").glob("python3*/site-packages"))
    server = home / "pytriton" / "tritonserver"
    stub = server / "backends" / "python" / "triton_python_backend_stub"
    if not stub.exists():
        shutil.copy(server / "python_backend_stubs" / "3.11" / stub.name, stub)
    version = folder / "triton" / "mlp" / "1"
    version.mkdir(parents=True)
    shutil.copy(folder / "mlp.onnx", version / "model.onnx")
    shutil.copy(HERE / "peers" / "triton_model.py", version / "model.py")
    shutil.copy(HERE / "peers" / "model.py", version / "session.py")
    source = (version / "model.py").read_text()
    (version / "model.py").write_text(source.replace("from model import", "from .session import"))
    (version.parent / "config.pbtxt").write_text(
        'name: "mlp" backend: "python" max_batch_size: 64\n'
        'input [ { name: "input" data_type: TYPE_FP32 dims: [784] } ]\n'
        'output [ { name: "output" data_type: TYPE_FP32 dims: [10] } ]\n'
        "dynamic_batching { max_queue_delay_microseconds: 0 }\n"
        "instance_group [ { kind: KIND_CPU count: 1 } ]\n"
    )
    port = free_ports()
    base = f"http://127.0.0.1:{port}"
    url = f"{base}/v2/models/mlp/infer"
    paths = f"{home / 'nvidia_pytriton.libs'}:{sys.base_prefix}/lib"
    return started(
        "triton",
        [str(server / "bin" / "tritonserver"), f"--model-repository={folder / 'triton'}",
         f"--backend-directory={server / 'backends'}", f"--cache-directory={server / 'caches'}",
         "--http-address=127.0.0.1", f"--http-port={port}", "--grpc-address=127.0.0.1", f"--grpc-port={port + 1}",
         "--metrics-address=127.0.0.1", f"--metrics-port={port + 2}", "--exit-timeout-secs=5"],
        folder,
        {**thread_environment(1), "LD_LIBRARY_PATH": paths, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"},
        f"{base}/v2/health/ready",
        {"binary": url, "json": url},
    )  # fmt: skip


def peer(folder: Path, found: Peer) -> Any:
    """One of `bench.peers`."""
    venv, port = installed(found.name, found.requirements), free_ports()
    own = folder / found.name
    own.mkdir()
    shutil.copy(folder / "mlp.onnx", own / "model.onnx")
    for file in (HERE / "peers").glob("*.py"):
        shutil.copy(file, own)

    def filled(text: str) -> str:
        for name, value in (("python", venv / "bin" / "python"), ("bin", venv / "bin"), ("port", port),
                            ("port+1", port + 1), ("port+2", port + 2)):  # fmt: skip
            text = text.replace(f"{{{name}}}", str(value))
        return text

    base = f"http://127.0.0.1:{port}"
    return started(
        found.name,
        [filled(part) for part in found.command],
        own,
        {**thread_environment(1), **{name: filled(value) for name, value in found.environment.items()}},
        base + found.ready,
        dict.fromkeys(found.bodies, base + found.path),
    )


# --- load ------------------------------------------------------------------------------------------------------------


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


def prepared(name: str) -> Path:
    """A folder of the cache with the models and the bodies of requests, and nothing else."""
    folder = CACHE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_model(folder / "mlp.onnx")
    save_pick(folder / "pick.onnx")
    save_bodies(folder)
    return folder


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
        want = _answer(ours, folder)
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


def _answer(server: Server, folder: Path) -> Sequence[float]:
    """What onnxruntime makes of the row that is sent."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "mlp.onnx", providers=["CPUExecutionProvider"])
    x = np.frombuffer((folder / "binary.body").read_bytes()[-4 * SIZES[0] :], np.float32).reshape(1, -1)
    found: list[float] = session.run(None, {"input": x})[0].ravel().tolist()
    return found


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
