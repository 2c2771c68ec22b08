"""`infera serve`."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError

from infera_gpu.catalogue import CATALOGUE
from infera_gpu.cli.console import print_error
from infera_gpu.cli.options import locate
from infera_gpu.errors import FetchError
from infera_server.access import MAX_RATE, Access, KeyFileError, is_local, make_key, read_keys
from infera_server.listening import CertificateError, check_certificates, listen, reserve
from infera_server.models.discovery import DiscoveryError, discover, survey
from infera_server.models.repository import Repository
from infera_server.screen import screen
from infera_server.server import Host
from infera_server.settings import Settings, unread


def serve(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="ONNX files, folders of them, NAME/VERSION/model.onnx trees, or names `infera pull` knows."
        ),
    ],
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default="8000")
    ] = None,
    grpc_port: Annotated[
        str | None,
        typer.Option(help="Port for gRPC; 0 takes a free one, off serves none.", show_default="the one after --port"),
    ] = None,
    metrics_port: Annotated[
        str | None,
        typer.Option(
            help="Port for /metrics alone, which --port has too; 0 takes a free one, off none.",
            show_default="the second after --port",
        ),
    ] = None,
    grpc_compression: Annotated[
        str | None, typer.Option(help="Of gRPC's responses: none, deflate, gzip.", show_default="none")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys, made by `infera key`: requests need one of them.")
    ] = None,
    open_management: Annotated[
        bool | None,
        typer.Option(
            "--open-management", help="Let anybody load models and change settings.", show_default="only on localhost"
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM): serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Certificates (PEM) that clients' certificates must be signed by.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="auto, cpu, cuda, cuda:N, several with commas, or cuda:all: models are spread.", show_default="auto"
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=DEVICE: the device of one model. Repeatable.", metavar="MODEL=DEVICE"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of a run, shared by all models.", show_default="all but one")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="In what float32 models are computed: fp32, tf32, fp16, bf16, int8.", show_default="fp32"),
    ] = None,
    batch_invariant: Annotated[
        bool | None,
        typer.Option(
            "--batch-invariant",
            help="On GPUs a request has the same bits whatever shares its batch, at a cost in speed.",
            show_default="no",
        ),
    ] = None,
    vram_limit: Annotated[
        str | None, typer.Option(help="Most GPU memory of all models together, as 20GiB.", show_default="what there is")
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Most host memory of all models on the CPU together, by their plans.", show_default="no limit"
        ),
    ] = None,
    evict: Annotated[
        bool | None,
        typer.Option(
            "--evict", help="A load that does not fit unloads the least recently used model.", show_default="no"
        ),
    ] = None,
    pinned: Annotated[
        list[str] | None, typer.Option("--keep", help="A model that is never evicted. Repeatable.", metavar="MODEL")
    ] = None,
    isolate: Annotated[
        bool | None,
        typer.Option(
            "--isolate",
            help="Run each model in a process of its own, which is started again after a crash; "
            "--vram-limit is then that of each.",
            show_default="off",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that take requests, while one more has the models; 0: that one takes them.",
            show_default="0",
        ),
    ] = None,
    model_control: Annotated[
        str | None,
        typer.Option(
            help="explicit: models are loaded and unloaded on request too; none: only at start; "
            "poll: as the files say.",
            show_default="explicit",
        ),
    ] = None,
    slo_p99: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer 99 of 100 requests within this time, as 20ms; MODEL=20ms for one model. Repeatable.",
            show_default="no goal",
            metavar="[MODEL=]TIME",
        ),
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(
            help="MODEL=WEIGHT: how much of a busy device's time one model gets. Repeatable.",
            show_default="1",
            metavar="MODEL=WEIGHT",
        ),
    ] = None,
    load_models: Annotated[
        list[str] | None,
        typer.Option("--load-model", help="Load this model at start, and no others. Repeatable.", show_default="all"),
    ] = None,
    watch: Annotated[
        bool | None, typer.Option("--watch", help="Load models whose files change, beside requests.", show_default="no")
    ] = None,
    poll_interval: Annotated[
        float | None, typer.Option(help="Seconds between looks at the files.", show_default="2")
    ] = None,
    keep_deleted: Annotated[
        bool | None,
        typer.Option("--keep-deleted", help="A model whose files are deleted is served on.", show_default="no"),
    ] = None,
    keep_previous: Annotated[
        float | None,
        typer.Option(
            help="Seconds that what was replaced is kept for a rollback; 0 keeps nothing.", show_default="600"
        ),
    ] = None,
    golden_requests: Annotated[
        int | None,
        typer.Option(help="Requests of live traffic that a reload must answer as before.", show_default="0"),
    ] = None,
    golden_tolerance: Annotated[
        float | None, typer.Option(help="By how much of an output's largest value it may differ.", show_default="0.001")
    ] = None,
    pad: Annotated[
        list[str] | None,
        typer.Option(
            help="MODEL=AXIS[:VALUE[:MASK]]: rows of one model are padded along this symbolic axis to share batches, "
            "the input MASK with 0; MODEL=off: they are not. Repeatable.",
            show_default="where it is proven harmless",
            metavar="MODEL=AXIS",
        ),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Most rows in a batch; 1 turns batching off.", show_default="64")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Most requests waiting for a model.", show_default="256")
    ] = None,
    max_queue_bytes: Annotated[int | None, typer.Option(help="Most bytes they may hold.", show_default="1 GiB")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body.", show_default="64 MiB")] = None,
    max_json_bytes: Annotated[
        int | None, typer.Option(help="Largest JSON part of a body.", show_default="16 MiB")
    ] = None,
    max_intake_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of bodies that are being received.", show_default="1 GiB")
    ] = None,
    max_region_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of shared memory to map; 0 turns it off.", show_default="16 GiB")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Most sequences under way, of one model.", show_default="1024")
    ] = None,
    max_sequence_bytes: Annotated[
        int | None, typer.Option(help="Most bytes their states may take.", show_default="256 MiB")
    ] = None,
    max_sequence_idle: Annotated[
        float | None, typer.Option(help="Seconds of silence that end a sequence.", show_default="60")
    ] = None,
    response_cache_bytes: Annotated[
        int | None,
        typer.Option(
            help="Most bytes of answers kept for models that ask for it; 0 keeps none.", show_default="64 MiB"
        ),
    ] = None,
    max_connections: Annotated[int | None, typer.Option(help="Most open connections.", show_default="4096")] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds a request may wait.", show_default="30")
    ] = None,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds to finish work at exit.", show_default="30")
    ] = None,
    trace_file: Annotated[
        Path | None, typer.Option(help="Where traces of requests go when clients turn them on.", show_default="nowhere")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
) -> None:
    """Serve ONNX models over HTTP (the V2 inference protocol). No configuration: the model says what it is.

    Every option can be set as an environment variable too: INFERA_PORT, INFERA_MAX_BATCH and so on.
    """
    given = {name: value for name, value in locals().items() if name in Settings.model_fields and value is not None}
    try:
        if pin:
            given["pins"] = _pairs(pin, "--pin", "MODEL=DEVICE")
        if share:
            given["shares"] = _pairs(share, "--share", "MODEL=WEIGHT")
        if pad:
            rules = _pairs(pad, "--pad", "MODEL=AXIS[:VALUE[:MASK]]")
            given["pad"] = {model: _padded(rule) for model, rule in rules.items()}
        if slo_p99:
            given |= _goals(slo_p99)
        settings = Settings(**given)
        if settings.tls_cert is not None:
            check_certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        access = access_of(settings)
        names = catalogued(paths)
        paths = [names.get(path, path) for path in paths]
        titles = {file: str(path) for path, file in names.items()}
        there = discover(paths, titles)
        rescan = partial(survey, paths, titles)
        repository = Repository(settings, there.sources, rescan=rescan, problems=there.problems)
        _require_named(repository)
    except KeyFileError as error:
        raise typer.BadParameter(str(error), param_hint="--api-keys") from None
    except CertificateError as error:
        raise typer.BadParameter(str(error)) from None
    except ValidationError as error:
        raise typer.BadParameter("; ".join(map(_told, error.errors()))) from None
    except SettingsError as error:
        raise typer.BadParameter(unread(error)) from None
    except (DiscoveryError, FetchError) as error:
        raise typer.BadParameter(str(error), param_hint="PATHS") from None
    take = reserve if settings.workers else listen
    sock = _listen(settings.host, settings.port, "--port", take)
    if settings.listen_grpc:
        _listen(settings.host, settings.listen_grpc, "--grpc-port", take).close()  # before anything is loaded
    metrics = None if (found := settings.listen_metrics) is None else _listen(settings.host, found, "--metrics-port")
    total = len(list(repository.entries()))
    with screen(total) as out:
        logging.basicConfig(level=settings.log_level.upper(), handlers=[out.handler()], force=True)
        logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.root.level))
        server = Host(repository, sock, access, metrics)  # now, since it tells what is logged

        def loaded() -> None:
            ready = sum(1 for _ in server.repository.ready())
            if server.failed and not ready:
                out.serving(f"nothing is served: 0 of {total} could be loaded")
                return
            told = "" if metrics is None else f", metrics on port {metrics.getsockname()[1]}"
            grpc = "" if server.grpc_port is None else f", gRPC on port {server.grpc_port}"
            some = f", workers: {settings.workers}" if settings.workers else ""
            out.serving(f"serving {ready} of {total} on {_url(sock.getsockname(), settings)}{grpc}{told}{some}")

        server.on_settled, server.on_loaded = (lambda entry: out.settled(entry, settings)), loaded
        status = server.run()
    raise typer.Exit(status)


def _told(error: ErrorDetails) -> str:
    where = ".".join(map(str, error["loc"]))
    return f"{where}: {error['msg']}" if where else error["msg"]


def _require_named(repository: Repository) -> None:
    """Every model that --load-model names is there, unless files are watched: then they may still come."""
    settings, there = repository.settings, {source.name for source in repository.sources} | repository.problems.keys()
    if settings.watch or settings.model_control == "poll":
        return
    for name in settings.load_models:
        if name != "*" and name not in there:
            listed = ", ".join(sorted(there)) or "none"
            raise typer.BadParameter(f"no model '{name}'; there are: {listed}", param_hint="--load-model")


def _listen(host: str, port: int, option: str, take: Callable[[str, int], socket.socket] = listen) -> socket.socket:
    try:
        return take(host, port)
    except OSError as error:
        print_error(f"cannot listen on {host}:{port}: {error}; {option} names another port")
        raise typer.Exit(1) from None


def access_of(settings: Settings) -> Access:
    """Who may do what, as set. Raises KeyFileError."""
    keys = {} if settings.api_keys is None else read_keys(settings.api_keys)
    return Access(keys, settings.open_management or is_local(settings.host))


def key(
    name: Annotated[str, typer.Argument(help="What the key is called: a-z, 0-9 and -.")],
    file: Annotated[Path, typer.Option(help="File of keys to add it to; made where there is none.")],
    model: Annotated[
        list[str] | None, typer.Option(help="A model, or a pattern, that it is for. Repeatable.", show_default="all")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second.", show_default="no limit", min=0.001, max=MAX_RATE)
    ] = None,
    management: Annotated[bool, typer.Option("--management", help="It may load models and change settings.")] = False,
) -> None:
    """Make an API key for `infera serve --api-keys FILE`. It is printed once; the file holds only its hash."""
    try:
        if file.exists() and name in read_keys(file):
            raise KeyFileError(f"{file} has a key '{name}' already; remove it there first")
        made, table = make_key(name)
    except KeyFileError as error:
        raise typer.BadParameter(str(error)) from None
    if rate is not None and math.isnan(rate):  # which is in no range, and beyond none
        raise typer.BadParameter("nan is no number of requests a second", param_hint="--rate")
    if model and not all(model):
        raise typer.BadParameter("a model's name, or a pattern, is not empty", param_hint="--model")
    lines = [table]
    if model:
        lines.append(f"models = [{', '.join(map(json.dumps, model))}]\n")
    if rate is not None:
        lines.append(f"rate = {rate!r}\n")
    if management:
        lines.append("management = true\n")
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as out:
        out.write("\n" * bool(out.tell()) + "".join(lines))
    print(made)


def _url(name: Any, settings: Settings) -> str:
    host, port = name[:2]
    scheme = "http" if settings.tls_cert is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def catalogued(paths: Sequence[Path]) -> dict[Path, Path]:
    """The files of those that are no paths but names of the catalogue, fetched where need be. Raises FetchError."""
    return {path: locate(str(path)) for path in paths if not path.exists() and str(path) in CATALOGUE}


def _pairs(texts: Sequence[str], option: str, form: str) -> dict[str, str]:
    """What an option that may be repeated says of each model, once at most."""
    found: dict[str, str] = {}
    for text in texts:
        model, equals, value = text.partition("=")
        if not (model and equals and value):
            raise typer.BadParameter(f"'{text}' is not {form}", param_hint=option)
        if model in found:
            said = f"'{model}' is given twice, '{found[model]}' and '{value}': leave one out"
            raise typer.BadParameter(said, param_hint=option)
        found[model] = value
    return found


def _padded(rule: str) -> dict[str, str]:
    return {} if rule == "off" else dict(zip(("axis", "value", "mask"), rule.split(":", 2), strict=False))


def _goals(texts: list[str]) -> dict[str, Any]:
    """`20ms` is for all models, `NAME=5ms` for one."""
    general = [text for text in texts if "=" not in text]
    if len(general) > 1:
        raise typer.BadParameter(f"{' and '.join(general)}: one time is for all models", param_hint="--slo-p99")
    own = _pairs([text for text in texts if "=" in text], "--slo-p99", "[MODEL=]TIME")
    return {"slo_p99": general[0] if general else None, "slo_p99_of": own}
