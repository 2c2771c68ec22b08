"""What can be set: by flag, by INFERA_* environment variable, by default, in this order."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from infera_gpu.budget import bytes_of
from infera_gpu.cpus import MAX_THREADS
from infera_gpu.devices import check_name
from infera_gpu.errors import DeviceError
from infera_gpu.passes import Precision
from infera_server.http.intake import MAX_MANAGEMENT_BODY
from infera_server.models.placement import named_devices
from infera_server.models.traffic import MAX_GOLDEN
from infera_server.scheduling.rows import PadRule

PREFIX = "INFERA_"
MAX_PORT = 65535
MAX_SECONDS = 366 * 86_400.0
"""Of any time: the system's calls have room for it."""

MAX_COUNT = (1 << 31) - 1
MAX_BYTES = (1 << 62) - 1
MAX_WEIGHT = 1e6


def checked_bytes(size: str) -> str:
    """The text, where it is an amount of memory. Raises ValueError."""
    bytes_of(size)
    return size


def checked_device(device: str) -> str:
    """The text, where it is a device's name. Raises ValueError."""
    with _naming_devices():
        check_name(device)
    return device


def checked_devices(devices: str) -> str:
    """The text, where it is a list of devices as `Placement` takes it. Raises ValueError."""
    with _naming_devices():
        named_devices(devices)
    return devices


@contextmanager
def _naming_devices() -> Iterator[None]:
    """What is raised in here, as pydantic expects it."""
    try:
        yield
    except DeviceError as error:
        raise ValueError(str(error)) from None


_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def seconds_of(duration: object) -> object:
    """'20ms' -> 0.02; what is no text is left to pydantic. Raises ValueError for a text without a unit."""
    if not isinstance(duration, str):
        return duration
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(us|µs|ms|s)\s*", duration)
    if found is None:
        raise ValueError(f"'{duration}' is no time with its unit, as 20ms, 500us or 1.5s")
    return float(found[1]) * _UNITS[found[2]]


Duration = Annotated[float, BeforeValidator(seconds_of), Field(gt=0, le=MAX_SECONDS)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
SomeBytes = Annotated[int, Field(ge=1, le=MAX_BYTES)]
Weight = Annotated[float, Field(ge=1 / MAX_WEIGHT, le=MAX_WEIGHT)]


def unread(error: SettingsError) -> str:
    """What to tell of an environment variable with several values that is no JSON."""
    field = re.search(r'field "(\w+)"', str(error))
    name = f"{PREFIX}{field[1].upper()}" if field else str(error)
    return f"{name} is not read, expected JSON: {error.__cause__}"


class Settings(BaseSettings):
    """Limits and choices of one server. Times are seconds, sizes bytes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", min_length=1)  # to a socket, "" means every interface
    port: int = Field(default=8000, ge=0, le=MAX_PORT)
    api_keys: Path | None = None
    open_management: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    device: Annotated[str, AfterValidator(checked_devices)] = "auto"
    pins: dict[str, Annotated[str, AfterValidator(checked_device)]] = Field(default_factory=dict)
    precision: Precision = "fp32"
    batch_invariant: bool = False
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] | None = None
    vram_limit: Annotated[str, AfterValidator(checked_bytes)] | None = None
    max_body_bytes: SomeBytes = 64 << 20
    max_json_bytes: SomeBytes = 16 << 20
    max_intake_bytes: SomeBytes = 1 << 30
    max_region_bytes: Bytes = 16 << 30
    max_connections: Count = 4096
    max_batch: Count = 64
    evict: bool = False
    golden_requests: int = Field(default=0, ge=0, le=MAX_GOLDEN)
    golden_tolerance: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    keep_deleted: bool = False
    keep_previous: Seconds = 600.0
    load_models: tuple[str, ...] = ("*",)
    max_load_bytes: SomeBytes = 2 << 30
    memory_limit: Annotated[str, AfterValidator(checked_bytes)] | None = None
    pinned: tuple[str, ...] = ()
    model_control: Literal["explicit", "none", "poll"] = "explicit"
    poll_interval: Seconds = Field(default=2.0, gt=0)
    watch: bool = False
    max_sequences: Count = 1024
    max_sequence_bytes: Bytes = 256 << 20
    max_sequence_idle: Seconds = Field(default=60.0, gt=0)
    response_cache_bytes: Bytes = 64 << 20
    max_queue: Count = 256
    max_queue_bytes: SomeBytes = 1 << 30
    request_timeout: Seconds = Field(default=30.0, gt=0)
    drain_timeout: Seconds = Field(default=30.0, gt=0)
    slo_p99: Duration | None = None
    slo_p99_of: dict[str, Duration] = Field(default_factory=dict)
    shares: dict[str, Weight] = Field(default_factory=dict)
    pad: dict[str, PadRule] = Field(default_factory=dict)
    priority_levels: Count = 9
    default_priority: Count = 5
    isolate: bool = False
    workers: int = Field(default=0, ge=0, le=64)
    """Processes that take requests, besides the one with the models; 0: that one takes them itself."""
    inline_run: Seconds = 0.0003
    warmup_seconds: Seconds = 2.0
    grpc_port: Annotated[int, Field(ge=0, le=MAX_PORT)] | Literal["off"] | None = None
    """None: the one after HTTP's, or a free one where HTTP takes a free one too."""
    metrics_port: Annotated[int, Field(ge=0, le=MAX_PORT)] | Literal["off"] | None = None
    """Of a listener for metrics alone. None: the second after HTTP's, or none where HTTP takes a free one."""
    grpc_compression: Literal["none", "deflate", "gzip"] = "none"
    trace_file: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        for name in ("tls_key", "tls_client_ca"):
            if getattr(self, name) is not None and self.tls_cert is None:
                raise ValueError(
                    f"--{name.replace('_', '-')} needs --tls-cert: without a certificate nothing is encrypted"
                )
        return self

    @model_validator(mode="after")
    def _check_watch(self) -> Self:
        if self.watch and self.model_control == "none":
            raise ValueError(
                "--watch loads what changes, --model-control none lets nothing change: leave one of them out"
            )
        return self

    def without_effect(self, devices: Collection[str]) -> list[str]:
        """What is set for nothing where models run on these devices."""
        found = []
        if self.keep_deleted and not self.watch and self.model_control != "poll":
            found.append("--keep-deleted has no effect: files are watched with --watch, or --model-control poll")
        if self.vram_limit is not None and {*devices} == {"cpu"}:
            found.append("--vram-limit has no effect on models on the CPU: --memory-limit is theirs")
        if self.evict and self.memory_limit is None and {*devices} == {"cpu"}:
            found.append(
                "--evict has no effect on models on the CPU without --memory-limit, until the host has no memory left"
            )
        return found

    def named_models(self) -> dict[str, Collection[str]]:
        """The models that options name, by option."""
        return {
            "--pin": self.pins,
            "--share": self.shares,
            "--keep": self.pinned,
            "--slo-p99": self.slo_p99_of,
            "--pad": self.pad,
        }

    @property
    def max_load_body(self) -> int:
        """Bytes of a load request over HTTP, which has the files in base64."""
        return -(-self.max_load_bytes // 3) * 4 + MAX_MANAGEMENT_BODY

    @property
    def listen_metrics(self) -> int | None:
        """The port for metrics alone, 0 for a free one; None for none."""
        if self.metrics_port is None:
            return self.port + 2 if 0 < self.port < MAX_PORT - 1 else None
        return None if self.metrics_port == "off" else self.metrics_port

    @property
    def listen_grpc(self) -> int | None:
        """The port for gRPC, 0 for a free one; None for none."""
        if self.grpc_port is None:
            return self.port + 1 if 0 < self.port < MAX_PORT else 0
        return None if self.grpc_port == "off" else self.grpc_port
