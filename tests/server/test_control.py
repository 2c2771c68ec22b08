"""What clients may change while the server runs: models, traces, the log."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infera_server.errors import BadRequest, NotFound, Unsupported
from infera_server.log_lines import LineFormatter
from infera_server.log_settings import ISO, LogSettings
from infera_server.tracing import MAX_KEPT, Tracing
from tests.server.support import Running, doubler, request_of, serving, until

TRACE, MODEL = "/v2/trace/setting", "/v2/models/double/trace/setting"
DEFAULTS = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_mode": "triton",
}
ROW = request_of(np.ones((1, 4), np.float32))


def post(server: Running, path: str, document: Any = None) -> tuple[int, Any]:
    body = document if isinstance(document, bytes | None) else json.dumps(document)
    status, _, reply = server.request("POST", path, body)
    return status, json.loads(reply) if reply else None


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}) as running:
        yield running


# --- models --------------------------------------------------------------------------------------------------------


class Loads:
    """Remembers what was asked of it; `nope` is not there."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def load(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        self.calls.append((name, config, dict(files)))
        if name == "nope":
            raise NotFound("failed to load 'nope', failed to poll from model repository")

    async def unload(self, name: str, dependents: bool) -> None:
        self.calls.append((name, dependents))


@pytest.fixture
def loads(server: Running, monkeypatch: pytest.MonkeyPatch) -> Loads:
    made = Loads()
    monkeypatch.setattr(server.host.service, "load_model", made.load, raising=False)
    monkeypatch.setattr(server.host.service, "unload_model", made.unload, raising=False)
    return made


def test_models_are_loaded_and_unloaded(server: Running, loads: Loads) -> None:
    path = "/v2/repository/models/m"
    assert post(server, f"{path}/load") == (200, None)
    parameters = {"config": "{}", "file:1/model.onnx": base64.b64encode(b"abc").decode()}
    assert post(server, f"{path}/load", {"parameters": parameters}) == (200, None)
    assert post(server, f"{path}/unload", {}) == (200, None)
    assert post(server, f"{path}/unload", {"parameters": {"unload_dependents": True}}) == (200, None)
    assert loads.calls == [("m", None, {}), ("m", "{}", {"1/model.onnx": b"abc"}), ("m", False), ("m", True)]
    assert post(server, "/v2/repository/models/nope/load", {})[0] == 404


@pytest.mark.parametrize(
    ("verb", "document"),
    [
        ("load", b"{bad"),
        ("load", {"parameters": 3}),
        ("load", {"parameters": {"config": {}}}),
        ("load", {"parameters": {"bogus": "x"}}),
        ("load", {"parameters": {"file:1/m": 3}}),
        ("load", {"parameters": {"file:1/m": "not base64"}}),
        ("unload", b"{bad"),
        ("unload", {"parameters": {"unload_dependents": 3}}),
    ],
)
def test_what_cannot_be_meant(server: Running, loads: Loads, verb: str, document: Any) -> None:
    status, reply = post(server, f"/v2/repository/models/m/{verb}", document)
    assert status == 400
    assert reply["error"]
    assert loads.calls == []


def test_a_load_may_bring_files(server: Running, loads: Loads) -> None:
    file = base64.b64encode(bytes(1 << 20)).decode()
    assert post(server, "/v2/repository/models/m/load", {"parameters": {"file:1/m": file}}) == (200, None)
    assert post(server, "/v2/repository/models/m/unload", b" " * (1 << 20))[0] == 413


# --- traces --------------------------------------------------------------------------------------------------------


def test_without_a_file_nothing_is_traced(server: Running) -> None:
    assert server.get(TRACE) == (200, DEFAULTS | {"trace_file": ""})
    status, reply = post(server, TRACE, {"trace_level": ["TIMESTAMPS"]})
    assert (status, reply["error"]) == (
        400,
        "Attempting to set invalid trace setting :trace file name is not given",
    )
    assert not server.host.service.tracing.on
    assert post(server, TRACE, {"trace_rate": "5", "bogus": 1})[1]["trace_rate"] == "5"
    assert server.get(MODEL)[1]["trace_rate"] == "5"
    assert post(server, MODEL, {"trace_rate": "9"})[1]["trace_rate"] == "9"
    assert server.get(TRACE)[1]["trace_rate"] == "5"
    assert post(server, MODEL, {"trace_rate": None})[1]["trace_rate"] == "5"
    assert post(server, TRACE, {"trace_rate": None}) == (200, DEFAULTS | {"trace_file": ""})


@pytest.mark.parametrize(
    ("document", "status", "text"),
    [
        (b"{bad", 400, "failed to parse"),
        (b"", 400, "The document is empty"),
        ({"trace_level": "OFF"}, 400, "non-array as array"),
        ({"trace_level": [3]}, 400, "non-array as array"),
        ({"trace_level": ["OFF", "TIMESTAMPS"]}, 400, "Expect only one trace level 'OFF' is specified"),
        ({"trace_level": ["TENSORS"]}, 400, "not supported"),
        ({"trace_rate": "x"}, 400, "Unable to parse 'trace_rate', got: x"),
        ({"trace_rate": "0"}, 400, "Expecting value >= 1"),
        ({"trace_rate": "9" * 5000}, 400, "Unable to parse 'trace_rate'"),
        ({"trace_rate": 5}, 400, "non-string as string"),
        ({"trace_count": "-2"}, 400, "Unable to parse 'trace_count'. Expecting value >= -1, got:-2"),
        ({"log_frequency": "-1"}, 400, "Unable to parse 'log_frequency'"),
        ({"trace_file": "/etc/passwd"}, 501, "trace file location can not be updated through network protocol"),
    ],
)
def test_trace_settings_that_cannot_be(server: Running, document: Any, status: int, text: str) -> None:
    for path in (TRACE, MODEL):
        found, reply = post(server, path, document)
        assert found == status
        assert text in reply["error"]
    assert server.get(TRACE) == (200, DEFAULTS | {"trace_file": ""})


def test_trace_settings_of_no_model(server: Running) -> None:
    assert server.get("/v2/models/nope/trace/setting")[0] == 404
    assert post(server, "/v2/models/nope/trace/setting", {})[0] == 404


def test_requests_are_traced(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    with serving({"double": doubler(), "other": doubler()}, trace_file=str(file)) as server:
        assert post(server, MODEL, {"trace_level": ["TIMESTAMPS"], "trace_rate": "2", "trace_count": "3"})[0] == 200
        assert post(server, MODEL, {"log_frequency": "2"})[0] == 200
        for i in range(5):
            server.infer("double", ROW | {"id": str(i)})
            server.infer("other", ROW)
        until(lambda: (tmp_path / "trace.json.0").exists())
        assert server.get(MODEL)[1]["trace_count"] == "1"
        server.request("POST", "/v2/models/double/generate", b'{"x": [1, 2, 3, 4], "id": "g"}')
        server.infer("double", ROW)
        server.infer("double", ROW)
        assert server.get(MODEL)[1]["trace_count"] == "0"
        assert server.get(TRACE)[1]["trace_level"] == ["OFF"]
    first = json.loads((tmp_path / "trace.json.0").read_bytes())
    last = json.loads(file.read_bytes())
    assert [r["request_id"] for r in [*first, *last] if "model_name" in r] == ["1", "3", "g"]
    for head, stamps in zip(first[::2], first[1::2], strict=True):
        assert (head["model_name"], head["model_version"], head["id"]) == ("double", 1, stamps["id"])
        assert head["batch"] == {"rows": 1, "padded": 1, "requests": 1}
        assert [t["name"] for t in stamps["timestamps"]] == [
            "HTTP_RECV_START",
            "REQUEST_START",
            "QUEUE_START",
            "COMPUTE_START",
            "COMPUTE_INPUT_END",
            "COMPUTE_OUTPUT_START",
            "COMPUTE_END",
            "REQUEST_END",
        ]
        times = [t["ns"] for t in stamps["timestamps"]]
        assert times == sorted(times)


def test_a_count_is_set_again(tmp_path: Path) -> None:
    tracing = Tracing(tmp_path / "t")
    tracing.update({"trace_level": ["TIMESTAMPS"], "trace_count": "2", "trace_rate": "1"})
    for levels in ([], ["BOGUS"]):  # which say nothing
        assert tracing.update({"trace_level": levels})["trace_level"] == ["TIMESTAMPS"]
    assert [tracing._all.take() for _ in range(3)] == [True, True, False]
    assert tracing.settings()["trace_count"] == "0"
    tracing.update({"trace_rate": "1"})
    assert not tracing._all.take()
    tracing.update({"trace_count": "2"})
    assert tracing._all.take()
    assert MAX_KEPT > 1
    with pytest.raises(Unsupported):
        tracing.update({"trace_file": None})


# --- the log -------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged() -> Iterator[tuple[logging.Logger, list[str]]]:
    """A logger at INFO, and the lines that its handler wrote."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    logger = logging.getLogger("alone")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = Handler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    yield logger, lines
    logger.removeHandler(handler)
    logger.propagate = True


def speak(logger: logging.Logger) -> None:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        logger.log(level, logging.getLevelName(level))


def test_kinds_of_messages_are_switched(logged: tuple[logging.Logger, list[str]]) -> None:
    logger, lines = logged
    settings = LogSettings(logger)

    def heard(**changes: Any) -> list[str]:
        lines.clear()
        settings.update(changes)
        speak(logger)
        return list(lines)

    assert settings.settings() == {
        "log_file": "",
        "log_info": True,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }
    assert heard() == ["INFO", "WARNING", "ERROR", "CRITICAL"]
    assert heard(log_warning=False) == ["INFO", "ERROR", "CRITICAL"]
    assert heard(log_verbose_level=1) == ["DEBUG", "INFO", "ERROR", "CRITICAL"]
    assert heard(log_verbose_level=0, log_info=False, log_error=False, log_warning=None) == ["CRITICAL"]
    assert heard(log_info=True, bogus=1) == ["INFO", "CRITICAL"]
    iso = heard(log_format="ISO8601", log_error=True)
    assert "T" in iso[0]
    assert "INFO alone: INFO" in iso[0]
    assert heard(log_format="default") == ["INFO", "ERROR", "CRITICAL"]
    settings.restore()
    assert heard() == ["INFO", "WARNING", "ERROR", "CRITICAL"]


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"log_info": "x"}, BadRequest),
        ({"log_info": False, "log_error": 1}, BadRequest),
        ({"log_verbose_level": "1"}, BadRequest),
        ({"log_verbose_level": -1}, BadRequest),
        ({"log_format": "x"}, BadRequest),
        ({"log_format": []}, BadRequest),
        ({"log_file": "/etc/passwd"}, Unsupported),
    ],
)
def test_log_settings_that_cannot_be(
    logged: tuple[logging.Logger, list[str]], document: Any, error: type[Exception]
) -> None:
    settings = LogSettings(logged[0])
    before = settings.settings()
    with pytest.raises(error):
        settings.update(document)
    assert settings.settings() == before


FORGED = "x\n2026-11-30 12:00:00,000 ERROR forged\r\x1b[2K\u2028\x85!"
ESCAPED = r"x\n2026-11-30 12:00:00,000 ERROR forged\r\x1b[2K\u2028\x85!"


@pytest.mark.parametrize("formatter", [LineFormatter("%(message)s"), ISO])
def test_a_message_is_one_line_and_a_traceback_is_indented(
    logged: tuple[logging.Logger, list[str]], formatter: logging.Formatter
) -> None:
    logger, lines = logged
    logger.handlers[0].setFormatter(formatter)
    logger.warning("model '%s'", FORGED)
    logger.warning("two;\n")
    assert lines[0].endswith(f"model '{ESCAPED}'")
    assert lines[1].endswith("two;")
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("failed", stack_info=True)
    first, *more = lines[2].split("\n")
    assert first.endswith("failed")
    assert more[0] == "  Traceback (most recent call last):"
    assert more[1].startswith('    File "')
    assert r"  2026-11-30 12:00:00,000 ERROR forged\r\x1b[2K\u2028\x85!" in more
    assert [line for line in more if not line.startswith("  ")] == []


def test_the_log_is_asked_over_http(server: Running) -> None:
    status, before = server.get("/v2/logging")
    assert status == 200
    for document in ({}, {"log_file": None}, b"\xef\xbb\xbf{}"):  # null, and a byte order mark, say nothing
        assert post(server, "/v2/logging", document) == (200, before)
    assert post(server, "/v2/logging", {"log_file": "x"})[0] == 501
    assert post(server, "/v2/logging", b"{bad")[0] == 400
    assert server.request("PUT", "/v2/logging")[0] == 405
