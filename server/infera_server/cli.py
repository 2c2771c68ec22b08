"""`infera serve`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from infera_server.report import describe
from infera_server.repository import DiscoveryError, Entry, Repository, discover
from infera_server.server import Host, listen
from infera_server.settings import Settings


def serve(
    paths: Annotated[list[Path], typer.Argument(help="ONNX files, folders of them, or NAME/VERSION/model.onnx trees.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [default: 8000]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. [default: auto]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a run. [default: all but one]")] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Most rows in a batch; 1 turns batching off. [default: 64]")
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Most requests waiting for a model. [default: 256]")] = None,
    max_queue_bytes: Annotated[int | None, typer.Option(help="Most bytes they may hold. [default: 1 GiB]")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body. [default: 64 MiB]")] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds a request may wait. [default: 30]")] = None,
    drain_timeout: Annotated[float | None, typer.Option(help="Seconds to finish work at exit. [default: 30]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [default: info]")] = None,
) -> None:
    """Serve ONNX models over HTTP (the V2 inference protocol). No configuration: the model says what it is.

    Every option can be set as an environment variable too: INFERA_PORT, INFERA_MAX_BATCH and so on.
    """
    console = Console(stderr=True)
    given = {name: value for name, value in locals().items() if name in Settings.model_fields and value is not None}
    try:
        settings = Settings(**given)
        sources = discover(paths)
    except ValidationError as error:
        raise typer.BadParameter("; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())) from None
    except DiscoveryError as error:
        raise typer.BadParameter(str(error), param_hint="PATHS") from None
    try:
        sock = listen(settings.host, settings.port)
    except OSError as error:
        console.print(f"cannot listen on {settings.host}:{settings.port}: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    _log_to(console, settings.log_level)
    server = Host(Repository(settings, sources), sock)
    address = _url(sock.getsockname())
    progress = Progress(
        SpinnerColumn(), TextColumn("loading {task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console, transient=True,
    )  # fmt: skip

    with progress:
        task = progress.add_task(f"{len(sources)} model{'s' if len(sources) > 1 else ''}", total=len(sources))

        def settled(entry: Entry) -> None:
            progress.print(describe(entry, settings))
            progress.advance(task)

        def loaded() -> None:
            progress.stop()
            ready = sum(1 for _ in server.repository.ready())
            console.print(f"serving {ready} of {len(sources)} on {address}", markup=False, highlight=False)

        server.on_settled, server.on_loaded = settled, loaded
        status = server.run()
    raise typer.Exit(status)


def _url(name: Any) -> str:
    host, port = name[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to(console: Console, level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=console, show_path=False, markup=False)],
        force=True,
    )
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
