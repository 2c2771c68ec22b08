"""Replies to requests right and wrong, beside those of a real tritonserver."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from infera_server.models.discovery import discover
from infera_server.models.repository import Repository
from infera_server.settings import Settings
from tests.server.support import hosting
from tests.server.triton import Difference, Reply, ask, by_request, exchanges, mlp, unexpected

EXCHANGES = list(exchanges())

DELIBERATE = (
    Difference(
        "Triton answers health with an empty body; the protocol and kserve's client want JSON",
        {"type": "application/json", "body": {"live": True}},
        "health/live",
    ),
    Difference(
        "Triton answers health with an empty body; the protocol and kserve's client want JSON",
        {"type": "application/json", "body": {"ready": True}},
        "health/ready health/model health/model-version",
    ),
    Difference(
        "Triton answers 400 as text/plain; 404 says what is wrong",
        {"status": 404, "type": "application/json", "body": "*"},
        "health/model-unknown health/version-unknown",
    ),
    Difference(
        "Triton labels this JSON error text/plain",
        {"type": "application/json", "body": {"error": "*"}},
        """
            health/post health/no-such metadata/version-negative metadata/version-text metadata/versions
            metadata/server-slash metadata/model-slash path/unknown path/double-slash path/empty-model
            header-length/too-long header-length/negative header-length/overflow model/unknown
            model/version-unknown model/version-text verb/infer-get verb/infer-put verb/infer-delete
            verb/infer-patch verb/infer-options unloaded/infer
        """,
    ),
    Difference(
        "Triton refuses HEAD; HTTP wants it wherever GET works",
        {"status": 200},
        "health/head",
    ),
    Difference(
        "platform names the engine",
        {
            "body": {
                "name": "mlp",
                "versions": ["1"],
                "platform": "*",
                "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 784]}],
                "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 10]}],
            }
        },
        "metadata/model metadata/version",
    ),
    Difference(
        "Triton does not decode percent signs in paths",
        {"status": 200, "body": {"name": "mlp"}},
        "metadata/model-encoded",
    ),
    Difference(
        "Triton has no model list; kserve has one",
        {"status": [200, 404], "type": "application/json", "body": "*"},
        "path/models",
    ),
    Difference(
        "kserve's V1 liveness is GET /",
        {"status": [200, 404], "type": "application/json", "body": "*"},
        "path/root",
    ),
    Difference(
        "Triton keeps its metrics on a port of their own",
        {"status": [200, 404], "type": "application/json", "body": "*"},
        "path/metrics",
    ),
    Difference(
        "most of the configuration describes the engine",
        {
            "body": {
                "name": "mlp",
                "max_batch_size": 64,
                "input": [{"name": "input", "data_type": "TYPE_FP32", "dims": [784]}],
                "output": [{"name": "output", "data_type": "TYPE_FP32", "dims": [10]}],
            }
        },
        "config/model config/version",
    ),
    Difference(
        "Triton answers 500 to a client's mistake; 400 is right",
        {"status": 400, "type": "application/json", "body": {"error": "*"}},
        """
            binary/size-negative binary/size-text header-length/one-less header-length/fraction
            classification/negative classification/text bad-json/truncated bad-json/array bad-json/string
            bad-json/empty-object bad-json/inputs-object bad-json/number-too-big input/no-name input/no-shape
            input/no-datatype input/data-null input/data-short input/data-long input/data-text
            input/data-null-element input/data-bool-element dtype/fractions-for-int shape/data-mismatch
            shape/negative shape/fractions shape/text output/no-name request/id-number generate/bad-json
            generate/empty-body shm-system/register-bad-json shm-cuda/register-bad-json
            shm-system/register-text-size repository/index-bad-json repository/index-ready-text
            repository/load-bad-json repository/load-unknown-parameter repository/load-config-object
            repository/load-config-bad-json
        """,
    ),
    Difference(
        "Triton reads a header length that is no number as 0",
        {"body": {"error": "*"}},
        "header-length/text header-length/empty",
    ),
    Difference(
        "Triton takes an empty body for a raw request",
        {"body": {"error": "*"}},
        "bad-json/empty-body",
    ),
    Difference(
        "Triton appends advice about its own configuration file",
        {"body": {"error": "*"}},
        "shape/wrong shape/rank-3",
    ),
    Difference(
        "Triton takes 784 for the batch size",
        {"body": {"error": "*"}},
        "shape/no-batch-dimension",
    ),
    Difference(
        "an empty batch may be named as such",
        {"body": {"error": "*"}},
        "shape/zero-batch",
    ),
    Difference(
        "the reserved prefix is Triton's own",
        {"status": 200, "type": "application/json", "body": {"model_name": "mlp", "outputs": "*"}},
        "request/parameter-reserved",
    ),
    Difference(
        "Triton takes an undecodable body for an empty raw request",
        {"body": {"error": "*"}},
        "compression/not-gzip",
    ),
    Difference(
        "415 is the status for an unknown content coding",
        {"status": 415, "type": "application/json", "body": {"error": "*"}},
        "compression/unknown",
    ),
    Difference(
        "Triton answers 500 to a client's mistake; 400 or 404 is right",
        {"status": [400, 404], "type": "application/json", "body": {"error": "*"}},
        "shm-system/register-missing-key repository/load-unknown",
    ),
    Difference(
        "Triton answers 500 to a client's mistake; 400 is right",
        {"status": 400, "type": "application/json", "body": {"error": "*"}},
        "settings/logging-bad-json",
    ),
    Difference(
        "Triton answers 400 here and 404 elsewhere",
        {"status": 404, "body": {"error": "*"}},
        "settings/trace-model-unknown stats/model-unknown stats/version-unknown unloaded/stats",
    ),
    Difference(
        "Triton answers 200 to the unloading of an unknown model",
        {"status": [400, 404], "type": "application/json", "body": {"error": "*"}},
        "repository/unload-unknown",
    ),
    Difference(
        "Triton answers health with an empty body; 503 is what probes expect of a server that is not ready",
        {"status": 503, "type": "application/json", "body": {"ready": False}},
        "unloaded/health-ready",
    ),
    Difference(
        "Triton labels this JSON error text/plain; 404 and 503 are as good as 400",
        {"status": [404, 503], "type": "application/json", "body": "*"},
        "unloaded/model-ready",
    ),
)

ALLOWED = by_request(DELIBERATE)


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reply]]:
    """Ours, to all requests in their order."""
    path: Path = tmp_path_factory.mktemp("triton") / "mlp.onnx"
    onnx.save(mlp(), path)
    level = logging.root.level
    logging.root.setLevel(logging.INFO)  # as a server's is
    with hosting(Repository(Settings(device="cpu", threads=1), discover([path]).sources)) as server:
        yield {request["name"]: ask(server.address, request) for request, _ in EXCHANGES}
    logging.root.setLevel(level)


@pytest.mark.parametrize(("request_", "want"), EXCHANGES, ids=[request["name"] for request, _ in EXCHANGES])
def test_a_reply_is_tritons(replies: dict[str, Reply], request_: dict[str, Any], want: Reply) -> None:
    name = request_["name"]
    got = replies[name]
    assert not unexpected(want, got, ALLOWED.get(name), "Accept-Encoding" in request_.get("headers", {}))


def test_the_table_names_requests() -> None:
    assert ALLOWED.keys() <= {request["name"] for request, _ in EXCHANGES}
