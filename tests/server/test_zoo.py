"""Replies of models of many kinds, beside those of a real tritonserver: over HTTP and over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from infera_server.models.discovery import discover
from infera_server.models.repository import Repository
from infera_server.settings import Settings
from tests.server import zoo_calls
from tests.server.grpc_cases import Case, call
from tests.server.grpc_support import channel
from tests.server.support import Running, hosting
from tests.server.triton import Difference, Reply, ask, by_request, unexpected
from tests.server.zoo import write
from tests.server.zoo_cases import CASES, recorded

ERROR = {"error": "*"}

DELIBERATE = (
    Difference(
        "Triton cuts numbers that do not fit to some of their bits, or to infinity",
        {"status": 400, "body": ERROR},
        "UINT8-2^31 UINT8-300 UINT16-2^31 INT8-2^31 INT8-300 INT16-2^31 INT32-2^31 FP32-too-big",
    ),
    Difference(
        "the text says that it is the number that does not fit",
        {"body": ERROR},
        "BOOL-negative BOOL-2^31 BOOL-300 UINT8-negative UINT16-negative UINT32-negative UINT64-negative",
    ),
    Difference(
        "0 and 1 are taken for bools",
        {"status": 200, "body": {"model_name": "BOOL", "outputs": "*"}},
        "BOOL-one BOOL-nested",
    ),
    Difference("the text names the output", {"body": ERROR}, "FP16-out-as-JSON"),
    Difference("nested lists must be of one shape", {"status": 400, "body": ERROR}, "data-ragged data-mixed"),
    Difference(
        "Triton's text ends in a space, or in advice about its own configuration file",
        {"body": ERROR},
        "shape-none shape-rank-2 grid-[1,-4]-[1,-2,-3,-4]",
    ),
    Difference(
        "what is no object is said to be none",
        {"status": 400, "body": ERROR},
        "a-null-for-an-input outputs-numbers outputs-nulls",
    ),
    Difference(
        "parameters are an object, or null",
        {"status": 400, "body": ERROR},
        "an-input's-parameters-list outputs-parameters-a-list",
    ),
    Difference(
        "a binary output of no bytes is still one, and the header says where the JSON ends",
        {"type": "application/octet-stream", "body": {"header": "*", "tensors": "*"}},
        """
            texts-none grid-of-no-bytes
        """,
    ),
    Difference("bytes that are not UTF-8 make no JSON", {"status": 400, "body": ERROR}, "texts-not-UTF-8-as-JSON"),
    Difference("an empty batch may be named as such", {"body": ERROR}, "grid-[0,-2,-2]-[]"),
    Difference(
        "Triton says that none of the inputs is missing; the one that is none is named",
        {"body": ERROR},
        "an-input-more",
    ),
    Difference("the second of two inputs is the one that differs", {"body": ERROR}, "one-more-row"),
    Difference(
        "Triton leaves it to its backend to find that an input is missing",
        {"status": 400, "type": "application/json", "body": ERROR},
        "optional-alone",
    ),
    Difference(
        "the protocol has binary_data_output for outputs that are listed too; Triton for the others alone",
        {"type": "application/octet-stream", "body": {"header": "*", "tensors": "*"}},
        "classes-as-all-outputs",
    ),
    Difference("there are more kinds of scores", {"status": 200, "body": {"outputs": "*"}}, "classes-of-bools"),
    Difference("the text says what is forgotten, mostly", {"body": ERROR}, "JSON-twice"),
    Difference(
        "platform names the engine",
        {"body": {"name": "versions", "versions": "*", "inputs": "*", "outputs": "*"}},
        "versions",
    ),
    *(
        Difference(
            "platform names the engine",
            {"body": {"name": "versions", "versions": [version.lstrip("0")], "inputs": "*", "outputs": "*"}},
            f"versions/versions/{version}",
        )
        for version in ("1", "10", "01")
    ),
    Difference(
        "Triton answers health with an empty body; the protocol and kserve's client want JSON",
        {"type": "application/json", "body": {"ready": True}},
        """
            versions/ready versions/versions/1/ready versions/versions/10/ready versions/versions/01/ready
        """,
    ),
    Difference(
        "Triton answers 400 here and 404 elsewhere",
        {"status": 404, "body": ERROR},
        """
            versions/versions/2/ready versions/versions/3/ready versions/versions/0/ready versions/versions/2/stats
        """,
    ),
    Difference(
        "Triton tells of the sequence that it made for the steps",
        {"body": {"id": "e", "model_name": "ensemble", "model_version": "1", "outputs": "*"}},
        "ensemble",
    ),
    Difference(
        "texts have no request's id inside",
        {"body": ERROR},
        "generate-the-input-twice generate_stream-the-input-twice",
    ),
)

ALLOWED = by_request(DELIBERATE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("zoo")
    write(folder)
    with hosting(Repository(Settings(device="cpu", threads=1), discover([folder]).sources)) as running:
        yield running


@pytest.fixture(scope="module")
def replies(server: Running) -> dict[str, Reply]:
    """To all requests in their order, since what was counted is told too."""
    return {name: ask(server.address, case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[grpc.Channel]:
    with channel(server) as made:
        yield made


@pytest.mark.parametrize("name", CASES)
def test_a_reply_is_tritons(replies: dict[str, Reply], name: str) -> None:
    want = recorded()[name]
    if want.status >= 400:  # errors are JSON, and a client's mistake is none of the server
        want = replace(want, status=400 if want.status == 500 else want.status, type="application/json")
    assert not unexpected(want, replies[name], ALLOWED.get(name))


def test_the_table_names_cases() -> None:
    assert ALLOWED.keys() <= CASES.keys() == recorded().keys()


@pytest.mark.parametrize("case", zoo_calls.CASES, ids=lambda case: case.name)
def test_a_call_is_answered_as_by_triton(client: grpc.Channel, case: Case) -> None:
    want, got = zoo_calls.recorded()[case.name], call(client, case.method, case.request)
    assert (got.code, got.text, _told(got.message)) == (want.code, want.text, _told(want.message))


def _told(message: Any) -> Any:
    """A reply without the engine's name, counters, and the sequence that Triton makes for an ensemble's steps."""
    if "model_stats" in message:
        return [(entry["name"], entry["version"]) for entry in message["model_stats"]]
    return {key: value for key, value in message.items() if key not in ("platform", "parameters")}
