"""Traces of requests: Triton's trace extension.

https://github.com/triton-inference-server/server/blob/main/docs/user_guide/trace.md

Clients say which requests are traced, the operator alone where to: `trace_file`. A file is a JSON array in Triton's
form: for each trace an object with its model and request, then one with its timestamps, in nanoseconds of a monotonic
clock. With `log_frequency` N every N traces make a file of their own, `trace_file.0` and so on; what is left then, with
0 all of them, goes to `trace_file` when the server stops.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from infera_server.errors import BadRequest, Unsupported
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.signature import Signature

log = logging.getLogger(__name__)

MAX_KEPT = 10_000
"""Traces that wait for the end; later ones are not taken."""

LEVELS = ("OFF", "TIMESTAMPS")
DEFAULTS: Mapping[str, Any] = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
}
_LEAST = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}
MAX = 2**31 - 1


def checked(document: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a document, None for one that is cleared; what else is there is ignored, levels too.

    Raises BadRequest or Unsupported.
    """
    if "trace_file" in document:
        raise Unsupported("trace file location can not be updated through network protocol")
    found: dict[str, Any] = {}
    for name in DEFAULTS:
        if name in document:
            value = document[name]
            found[name] = value if value is None else _level(value) if name == "trace_level" else _number(name, value)
    if found.get("trace_level") == []:
        del found["trace_level"]
    return found


def _level(value: object) -> list[str]:
    if type(value) is not list or not all(type(level) is str for level in value):
        raise BadRequest("Unable to parse 'trace_level': attempt to access JSON non-array as array")
    if "OFF" in value and len(value) > 1:
        raise BadRequest("Expect only one trace level 'OFF' is specified")
    if "TENSORS" in value:
        raise BadRequest("trace level TENSORS is not supported; TIMESTAMPS is")
    return [level for level in value if level in LEVELS]


def _number(name: str, value: object) -> str:
    if type(value) is not str:
        raise BadRequest(f"Unable to parse '{name}': attempt to access JSON non-string as string")
    digits = value.removeprefix("-")
    number = int(value) if digits.isascii() and digits.isdigit() and len(digits) < 12 else None
    if number is None or number > MAX:
        raise BadRequest(f"Unable to parse '{name}', got: {value[:100]}")
    if number < _LEAST[name]:
        raise BadRequest(f"Unable to parse '{name}'. Expecting value >= {_LEAST[name]}, got:{number}")
    return str(number)


@dataclass(eq=False)
class Scope:
    """Settings of one model, or of all that have none of their own, and how much was traced by them."""

    given: dict[str, Any] = field(default_factory=dict)
    on: bool = False
    rate: int = 1000
    limit: str = ""
    count: int = -1
    frequency: int = 0
    seen: int = 0

    def take(self) -> bool:
        """Whether the next request is traced."""
        if not self.on or not self.count:
            return False
        self.seen += 1
        if self.seen % self.rate:
            return False
        self.count -= self.count > 0
        return True


@dataclass(eq=False)
class Tracing:
    """Which requests are traced, and their traces. Lives in the event loop's thread."""

    file: Path | None
    on: bool = field(default=False, init=False)
    """Whether any request may be traced: all that requests pay while none is."""

    _all: Scope = field(default_factory=Scope, init=False)
    _models: dict[str, Scope] = field(default_factory=dict, init=False)
    _records: list[bytes] = field(default_factory=list, init=False)
    _taken: int = field(default=0, init=False)
    _files: int = field(default=0, init=False)

    def settings(self, model: str | None = None) -> dict[str, Any]:
        """What holds for all models, or for one; of the count what is left."""
        scope = self._models.get(model, self._all) if model is not None else self._all
        told = {**DEFAULTS, **self._all.given, **scope.given, "trace_count": str(scope.count)}
        return {**told, "trace_file": str(self.file or ""), "trace_mode": "triton"}

    def update(self, document: Mapping[str, Any], model: str | None = None) -> dict[str, Any]:
        """Change settings; None takes a model's from all models', and theirs from the defaults. Returns all.

        Raises BadRequest or Unsupported, and changes nothing then.
        """
        changes = checked(document)
        if self.file is None and changes.get("trace_level") not in (None, ["OFF"]):
            raise BadRequest("Attempting to set invalid trace setting :trace file name is not given")
        scope = self._all if model is None else self._models.setdefault(model, Scope())
        scope.given = {k: v for k, v in {**scope.given, **changes}.items() if v is not None}
        if model is not None and not scope.given:
            del self._models[model]
        for each in (self._all, *self._models.values()):
            merged = {**DEFAULTS, **self._all.given, **each.given}
            each.on = merged["trace_level"] != ["OFF"]
            each.rate, each.frequency = int(merged["trace_rate"]), int(merged["log_frequency"])
            if (each is scope and "trace_count" in changes) or each.count < 0:
                each.count = int(merged["trace_count"])
        self.on = any(each.on for each in (self._all, *self._models.values()))
        return self.settings(model)

    def record(self, signature: Signature, request_id: str, began: float, job: Job, batch: Batch | None) -> None:
        """Trace a request that is answered now, if it is its turn; it `began` to arrive at a `time.monotonic`."""
        self.keep(signature.name, signature.version, request_id, began, time.monotonic(), job, batch)

    def keep(
        self, model: str, version: str, request_id: str, began: float, ended: float, job: Job, batch: Batch | None
    ) -> None:
        """`record`, of a request that was answered at `ended`."""
        scope = self._models.get(model, self._all)
        if len(self._records) >= MAX_KEPT or not scope.take():
            return
        self._taken += 1
        came = job.came_at or job.queued_at
        times = [("HTTP_RECV_START", began), ("REQUEST_START", came), ("QUEUE_START", came)]
        if batch is not None:
            times += [
                ("COMPUTE_START", batch.taken_at),
                ("COMPUTE_INPUT_END", batch.gathered_at),
                ("COMPUTE_OUTPUT_START", batch.ran_at),
                ("COMPUTE_END", batch.split_at),
            ]
        times.append(("REQUEST_END", ended))
        head: dict[str, Any] = {"id": self._taken, "model_name": model}
        head["model_version"] = int(version)
        if request_id:
            head["request_id"] = request_id
        if batch is not None:
            head["batch"] = {"rows": batch.rows, "padded": batch.padded, "requests": len(batch.jobs)}
        stamps = {"id": self._taken, "timestamps": [{"name": n, "ns": int(t * 1e9)} for n, t in times]}
        self._records.append(orjson.dumps(head) + b"," + orjson.dumps(stamps))
        if scope.frequency and len(self._records) >= scope.frequency:
            self._spill()

    def _spill(self) -> None:
        """Write what is kept to the next file, in another thread."""
        assert self.file is not None
        path = self.file.with_name(f"{self.file.name}.{self._files}")
        self._files += 1
        records, self._records = self._records, []
        asyncio.get_running_loop().run_in_executor(None, _write, path, records)

    def finish(self) -> None:
        """Write what is kept; the server stops."""
        if self.file is not None and self._records:
            _write(self.file, self._records)
            self._records = []


def _write(path: Path, records: Sequence[bytes]) -> None:
    try:
        path.write_bytes(b"[" + b",\n".join(records) + b"]")
    except OSError as error:
        log.warning("%d traces are lost: %s", len(records), error)
