"""Numbers that make no sense as a setting, whether it comes from the environment or by flag."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
import pytest
from pydantic import ValidationError

from infera_server.settings import MAX_BYTES, MAX_COUNT, MAX_SECONDS, PREFIX, Settings
from tests.commandline import assert_fails, infera
from tests.server.grpc_support import array_of, channel, infer, request
from tests.server.support import doubler, request_of, serving

X = np.arange(4, dtype=np.float32).reshape(1, 4)
DIGITS = "1" + "0" * 400
MANY_DIGITS = "1" + "0" * 5000
"""More than Python makes an integer of."""

ABSURD = (DIGITS, MANY_DIGITS, "nan", "inf", "-inf", "-1", "1e300")


def _types(annotation: Any) -> Iterator[Any]:
    """A type, or those of a union."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        for part in get_args(annotation):
            yield from _types(part)
    else:
        yield annotation


NUMBERS = [n for n, field in Settings.model_fields.items() if {int, float} & {*_types(field.annotation)}]
TABLES = ("shares", "slo_p99_of")


def test_every_number_is_among_them() -> None:
    assert {"port", "threads", "max_queue", "golden_tolerance", "keep_previous", "slo_p99", "grpc_port"} <= {*NUMBERS}


@pytest.mark.parametrize("name", NUMBERS)
def test_absurd_numbers_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for text in ABSURD:
        if (name, text) == ("golden_tolerance", "1e300"):
            continue
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
        with pytest.raises(ValidationError) as refused:
            Settings()
        assert {error["loc"][0] for error in refused.value.errors()} == {name}, text[:9]


@pytest.mark.parametrize(
    "name", ["max_body_bytes", "max_json_bytes", "max_intake_bytes", "max_load_bytes", "max_queue_bytes"]
)
def test_limits_that_would_refuse_everything_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings.model_validate({name: 0})


@pytest.mark.parametrize("number", ["-1", "0", "1e300", "1e999", "NaN", "Infinity", "-Infinity", DIGITS])
@pytest.mark.parametrize("name", TABLES)
def test_absurd_numbers_of_models_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, number: str) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", f'{{"m": {number}}}')
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert [error["loc"] for error in refused.value.errors()] == [(name, "m")]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("MAX_QUEUE", DIGITS, "max_queue: "),
        ("MAX_QUEUE", MANY_DIGITS, "max_queue: "),
        ("REQUEST_TIMEOUT", "nan", "request_timeout: "),
        ("KEEP_PREVIOUS", "inf", "keep_previous: "),
        ("SLO_P99", "9" * 400 + "s", "slo_p99: "),
        ("MEMORY_LIMIT", DIGITS, "memory_limit: "),
        ("SHARES", '{"m": 1e999}', "shares.m: "),
        ("SHARES", "nonsense", "INFERA_SHARES is not read, expected JSON: Expecting value"),
        ("SHARES", f'{{"m": {MANY_DIGITS}}}', "INFERA_SHARES is not read, expected JSON: Exceeds the limit"),
        ("PINNED", "net", "INFERA_PINNED is not read, expected JSON"),
    ],
)
def test_the_command_line_says_which_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, says: str
) -> None:
    monkeypatch.setenv(f"{PREFIX}{name}", text)
    assert_fails(infera("serve", tmp_path), says, status=2)


def test_watched_files_and_a_server_where_nothing_changes_contradict_each_other(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    says = "--watch loads what changes, --model-control none lets nothing change"
    assert_fails(infera("serve", tmp_path, "--watch", "--model-control", "none"), says, status=2)
    for fine in ({"watch": True}, {"watch": True, "model_control": "poll"}, {"model_control": "none"}):
        Settings.model_validate(fine)


@pytest.mark.parametrize(
    ("given", "devices", "told"),
    [
        ({"keep_deleted": True}, {"cpu"}, "--keep-deleted"),
        ({"keep_deleted": True, "model_control": "none"}, {"cuda:0"}, "--keep-deleted"),
        ({"keep_deleted": True, "watch": True}, {"cpu"}, ""),
        ({"keep_deleted": True, "model_control": "poll"}, {"cpu"}, ""),
        ({"evict": True}, {"cpu"}, "--evict"),
        ({"vram_limit": "1GiB"}, {"cpu"}, "--vram-limit"),
        ({"vram_limit": "1GiB"}, {"cuda:0", "cpu"}, ""),
        ({"vram_limit": "1GiB"}, set(), ""),
        ({"evict": True, "memory_limit": "1GiB"}, {"cpu"}, ""),
        ({"evict": True}, {"cuda:0", "cpu"}, ""),
        ({"evict": True}, set(), ""),
    ],
)
def test_what_is_set_for_nothing_is_told(given: dict[str, Any], devices: set[str], told: str) -> None:
    found = Settings.model_validate(given).without_effect(devices)
    assert [text.split(" has no effect")[0] for text in found] == ([told] if told else [])


def test_the_log_of_a_server_tells_it(caplog: pytest.LogCaptureFixture) -> None:
    with serving({"double": doubler()}, keep_deleted=True, evict=True):
        pass
    found = [record for record in caplog.records if "has no effect" in record.getMessage()]
    assert [record.levelname for record in found] == ["WARNING"] * 2


def test_what_tensors_are_padded_with_may_be_infinite() -> None:
    rule = Settings.model_validate({"pad": {"m": {"axis": "n", "value": "-inf"}}}).pad["m"]
    assert rule.value == -math.inf


def test_a_server_with_the_largest_limits_answers() -> None:
    limits = {
        name: most.le
        for name, field in Settings.model_fields.items()
        for most in field.metadata
        if hasattr(most, "le") and most.le in (MAX_BYTES, MAX_COUNT, MAX_SECONDS)
    }
    assert {"max_body_bytes", "max_queue", "request_timeout", "max_batch", "poll_interval"} <= limits.keys()
    del limits["drain_timeout"]  # or the test would take as long, should a request hang
    with serving({"double": doubler()}, **limits) as running:
        status, _, reply = running.request("POST", "/v2/models/double/infer", json.dumps(request_of(X)).encode())
        assert status == 200, reply
        with channel(running) as made:
            assert array_of(infer(made, request("double", X))).tolist() == [[0.0, 2.0, 4.0, 6.0]]
