"""What several workers serve beside plain requests: gRPC, streams, shared memory, keys, traces, sequences."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from infera_server.access import Access, Key, make_key
from infera_server.protocols.protos import message
from tests.commandline import save_relu
from tests.server import grpc_support
from tests.server.support import WAIT, Running, doubler, request_of, serving, until
from tests.server.test_workers import X

TOKEN, TABLE = make_key("own")
SLOW_TOKEN, SLOW_TABLE = make_key("slow")
KEY = {"Authorization": f"Bearer {TOKEN}"}
ASKED = 24
"""Requests that both workers get some of: each connection is a coin's toss."""


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "trace"


@pytest.fixture(scope="module")
def served(traces: Path) -> Iterator[Running]:
    digests = {name: bytes.fromhex(table.split('"')[1]) for name, table in (("own", TABLE), ("slow", SLOW_TABLE))}
    keys = {
        "own": Key("own", digests["own"], management=True),
        "slow": Key("slow", digests["slow"], ("gated",), rate=2.0),
    }
    sessions = {"double": doubler(), "gated": doubler()}
    with serving(sessions, access=Access(keys), workers=2, trace_file=str(traces)) as running:
        yield running


def post(running: Running, path: str, document: Any = None, **headers: str) -> tuple[int, Any]:
    status, _, body = running.request("POST", path, json.dumps(document) if document else None, KEY | headers)
    return status, json.loads(body) if body else None


def all_infer(running: Running, document: Any, model: str = "double") -> list[tuple[int, Any]]:
    """The replies of both workers."""
    return [post(running, f"/v2/models/{model}/infer", document) for _ in range(ASKED)]


def test_grpc_is_served_by_every_worker_and_changes_are_known_to_all(served: Running) -> None:
    metadata = (("authorization", f"Bearer {TOKEN}"),)

    def call(made: Any, method: str, /, **members: Any) -> Any:
        asked = message(f"inference.{method}Request")(**members)
        reply = made.unary_unary(
            grpc_support.METHOD + method,
            lambda m: m.SerializeToString(),
            message(f"inference.{method}Response").FromString,
        )
        return reply(asked, timeout=WAIT, metadata=metadata)

    for _ in range(6):
        with grpc_support.channel(served) as made:
            answer = grpc_support.infer(made, grpc_support.request("double", X * 3), metadata=metadata)
            assert grpc_support.array_of(answer).tolist() == (X * 6).tolist()
            call(made, "RepositoryModelUnload", model_name="double")
            assert {status for status, _ in all_infer(served, request_of(X))} == {404}
            call(made, "RepositoryModelLoad", model_name="double")
            assert {status for status, _ in all_infer(served, request_of(X))} == {200}
            assert call(made, "ServerReady").ready
            before, after = (
                call(made, "ModelStatistics", name="double").model_stats[0].inference_stats.success.count
                for _ in range(2)
            )
            assert after == before > 0


def test_a_websocket_is_answered(served: Running) -> None:
    with connect(f"ws://{served.address}/v2/models/double/stream", additional_headers=KEY) as stream:
        for factor in range(3):
            stream.send(json.dumps(request_of(X * factor, id=str(factor))))
        replies = {reply["id"]: reply["outputs"][0]["data"][0] for reply in (json.loads(stream.recv()) for _ in "012")}
    assert replies == {"0": 0.0, "1": 2.0, "2": 4.0}


def test_memory_that_clients_share_is_known_to_all_workers(served: Running) -> None:
    system = "/v2/systemsharedmemory"
    block = shared_memory.SharedMemory(create=True, size=4096)
    try:
        assert block.buf is not None
        block.buf[: X.nbytes] = (X * 5).tobytes()
        region = {"key": f"/{block.name}", "byte_size": 4096}
        assert post(served, f"{system}/region/mine/register", region)[0] == 200
        place = {"shared_memory_region": "mine", "shared_memory_byte_size": X.nbytes}
        document = {
            "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": place}],
            "outputs": [{"name": "y", "parameters": place | {"shared_memory_offset": 64}}],
        }
        for _ in range(ASKED):
            block.buf[64 : 64 + X.nbytes] = bytes(X.nbytes)
            assert post(served, "/v2/models/double/infer", document)[0] == 200
            assert bytes(block.buf[64 : 64 + X.nbytes]) == (X * 10).tobytes()
        assert post(served, f"{system}/region/mine/unregister")[0] == 200
        replies = all_infer(served, document)
        assert {status for status, _ in replies} == {404}
    finally:
        block.close()
        block.unlink()


def test_the_rate_of_a_key_is_that_of_all_workers_together(served: Running) -> None:
    headers = {"Authorization": f"Bearer {SLOW_TOKEN}"}
    statuses = [served.infer("gated", request_of(X), **headers)[0] for _ in range(ASKED)]
    assert 4 <= statuses.count(200) <= 6
    assert statuses.count(429) == ASKED - statuses.count(200)
    assert served.infer("double", request_of(X), **headers)[0] == 403
    assert served.infer("double", request_of(X))[0] == 401
    assert served.request("POST", "/v2/repository/models/double/load", headers=headers)[0] == 403


def test_traces_of_all_workers_are_in_one_file(served: Running, traces: Path) -> None:
    setting = {"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "log_frequency": str(ASKED)}
    assert post(served, "/v2/trace/setting", setting)[0] == 200
    all_infer(served, request_of(X, id="traced"))
    file = traces.with_name("trace.0")
    until(lambda: file.exists() and file.read_bytes().endswith(b"]"))
    assert post(served, "/v2/trace/setting", {"trace_level": None, "log_frequency": None})[0] == 200
    records = json.loads(file.read_text())
    heads = [record for record in records if "model_name" in record]
    assert [head["request_id"] for head in heads] == ["traced"] * ASKED
    for record in records:
        if "timestamps" in record:
            times = [stamp["ns"] for stamp in record["timestamps"]]
            assert times == sorted(times)
            assert [stamp["name"] for stamp in record["timestamps"]][:1] == ["HTTP_RECV_START"]
            assert len(times) == 8


def test_what_is_logged_is_set_for_all(served: Running) -> None:
    assert post(served, "/v2/logging", {"log_verbose_level": 1})[1]["log_verbose_level"] == 1
    assert served.request("GET", "/v2/logging", headers=KEY)[0] == 200
    assert post(served, "/v2/logging", {"log_verbose_level": 0})[1]["log_verbose_level"] == 0


# --- a server of its own -------------------------------------------------------------------------------------------


def test_workers_end_with_an_engine_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "infera_server", str(save_relu(tmp_path)), "--workers", "1", "--device", "cpu"]
    command += ["--port", "0", "--grpc-port", "0", "--metrics-port", "off"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as engine:
        assert engine.stderr is not None
        line = next(line for line in engine.stderr if "serving" in line)
        assert "serving 1 of 1" in line
        assert "workers: 1" in line
        children = Path(f"/proc/{engine.pid}/task").glob("*/children")
        workers = [int(pid) for found in children for pid in found.read_text().split()]
        assert len(workers) == 1
        os.kill(engine.pid, signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
