"""Servers to measure, started from the command line as leaders of sessions of their own: infera's and others.

`bench.serving`, `bench.serving_grpc`, `bench.workers`, `bench.overload` and `bench.soak` load them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environment import thread_environment
from bench.peers import ORT, Peer

HERE = Path(__file__).parent
ROOT = HERE.parent
CACHE = ROOT / ".cache" / "peers"
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

    def thread_seconds(self) -> dict[int, float]:
        """Processor time of each thread of all its processes."""
        tasks = (task for pid in _session(self.pid) for task in Path(f"/proc/{pid}/task").glob("*"))
        return {int(task.name): _cpu_of(task) for task in tasks}


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


def _cpu_of(process: int | Path) -> float:
    """Of a process, or of the thread whose folder this is."""
    try:
        fields = (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


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
