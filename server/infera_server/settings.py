"""What can be set: by flag, by INFERA_* environment variable, by default, in this order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from infera_gpu.budget import bytes_of
from infera_gpu.passes import Precision


def checked_bytes(size: str) -> str:
    """The text, where it is an amount of memory. Raises ValueError."""
    bytes_of(size)
    return size


class Settings(BaseSettings):
    """Limits and choices of one server. Times are seconds, sizes bytes."""

    model_config = SettingsConfigDict(env_prefix="INFERA_", extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", min_length=1)  # to a socket, "" means every interface
    port: int = Field(default=8000, ge=0, le=65535)
    api_keys: Path | None = None
    open_management: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    device: str = "auto"
    pins: dict[str, str] = Field(default_factory=dict)
    precision: Precision = "fp32"
    threads: int | None = Field(default=None, ge=1)
    vram_limit: Annotated[str, AfterValidator(checked_bytes)] | None = None
    max_body_bytes: int = Field(default=64 << 20, ge=1)
    max_json_bytes: int = Field(default=16 << 20, ge=1)
    max_intake_bytes: int = Field(default=1 << 30, ge=1)
    max_connections: int = Field(default=4096, ge=1)
    max_batch: int = Field(default=64, ge=1)
    model_control: Literal["explicit", "none"] = "explicit"
    max_queue: int = Field(default=256, ge=1)
    max_queue_bytes: int = Field(default=1 << 30, ge=1)
    request_timeout: float = Field(default=30.0, gt=0)
    drain_timeout: float = Field(default=30.0, gt=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
