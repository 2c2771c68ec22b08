"""Processes that take requests for one engine: the same answers, and what ends one of them ends no other."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest

from infera_server.models.servable import Servable
from infera_server.models.traffic import Traffic
from infera_server.processes import supervisor
from infera_server.processes.workers import Workers
from tests.server.support import (
    FakeSession,
    Running,
    any_width,
    doubler,
    flat,
    http_request,
    request_of,
    serving,
    until,
)

X = np.ones((1, 4), np.float32)


def workers_of(running: Running) -> Workers:
    assert running.host.workers is not None
    return running.host.workers


def pids(running: Running) -> list[int]:
    return sorted(worker.process.pid for worker in workers_of(running)._attached)


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with serving({"double": doubler(), "wide": any_width(), "gated": doubler()}, workers=2, max_queue=4) as running:
        yield running


def gated(running: Running) -> FakeSession:
    session = running.sessions["gated"]
    assert isinstance(session, FakeSession)
    return session


# --- requests ------------------------------------------------------------------------------------------------------


def test_requests_are_answered_by_processes_of_their_own(served: Running) -> None:
    assert len(pids(served)) == 2
    assert os.getpid() not in pids(served)
    status, reply = served.infer("double", request_of(X * 3))
    assert (status, reply["outputs"][0]["data"]) == (200, [6.0] * 4)


@pytest.mark.parametrize("width", [1, 1000, 300_000])
def test_tensors_of_any_size_come_back(served: Running, width: int) -> None:
    """The last is larger than what shared memory begins with, and than what is received in one piece."""
    x = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
    entry = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    for _ in range(3):
        status, headers, body = served.request(
            "POST", "/v2/models/wide/infer", head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
        )
        assert status == 200
        tail = body[int(headers["inference-header-content-length"]) :]
        assert np.array_equal(np.frombuffer(tail, np.float32).reshape(x.shape), x * 2)


@pytest.mark.parametrize(
    ("x", "status", "text"),
    [
        (np.ones((1, 5)), 400, "unexpected shape for input 'x'"),
        (np.full((1, 4), -1), 400, "row cannot be used"),
        (np.full((1, 4), 666), 500, "the server's log says more"),
        (np.ones((65, 4)), 400, "batch-size must be <= 64"),
    ],
)
def test_refusals_are_those_of_one_process(served: Running, x: Any, status: int, text: str) -> None:
    got, reply = served.infer("double", request_of(x.astype(np.float32)))
    assert got == status
    assert text in reply["error"]


def test_unknown_models_and_what_is_no_inference(served: Running) -> None:
    assert served.infer("nope", request_of(X)) == (404, {"error": "Request for unknown model: 'nope' is not found"})
    assert served.get("/v2/health/ready") == (200, {"ready": True})
    assert served.get("/v2/models/double")[1]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert served.get("/v2/nothing") == (404, {"error": "Not Found"})
    assert served.request("GET", "/v2/models/double/infer")[0] == 405


def test_requests_of_all_workers_share_batches(served: Running) -> None:
    session = gated(served)
    flat(served.model("gated").batcher)
    session.block()
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(served.infer, "gated", request_of(X))
        session.wait_entered()
        others = [pool.submit(served.infer, "gated", request_of(X * n)) for n in range(4)]
        model = served.host.repository.get("gated")
        until(lambda: model.queued == 4)
        session.gate.set()
        assert first.result()[0] == 200
        assert [call.result()[1]["outputs"][0]["data"][0] for call in others] == [0.0, 2.0, 4.0, 6.0]
    assert session.batches == [1, 4]


def test_a_full_queue_and_deadlines_and_who_leaves(served: Running) -> None:
    session = gated(served)
    model = served.host.repository.get("gated")
    session.block()
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(served.infer, "gated", request_of(X))
        session.wait_entered()
        sock = socket.create_connection(("127.0.0.1", served.port))
        sock.sendall(http_request(json.dumps(request_of(X)).encode(), "/v2/models/gated/infer"))
        until(lambda: model.queued == 1)
        sock.close()
        until(lambda: model.queued == 0)
        late = pool.submit(served.infer, "gated", request_of(X, parameters={"timeout": 1000}))
        assert late.result()[0] in (429, 504)  # by what is known of run times it may be refused at once
        waiting = [pool.submit(served.infer, "gated", request_of(X)) for _ in range(4)]
        until(lambda: model.queued == 4)
        status, headers, body = served.request("POST", "/v2/models/gated/infer", json.dumps(request_of(X)))
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert b"4" in body
        session.gate.set()
        assert [call.result()[0] for call in (first, *waiting)] == [200] * 5


def test_a_reply_explains_itself(served: Running) -> None:
    body = json.dumps(request_of(X)).encode()
    _, headers, _ = served.request("POST", "/v2/models/double/infer", body, {"infera-trace": "1"})
    assert 'waited-for="nothing", requests=1, rows=1' in headers["infera-trace"]
    _, headers, _ = served.request("POST", "/v2/models/double/infer", body)
    assert "infera-trace" not in headers


def test_figures_are_those_of_all_workers(served: Running) -> None:
    def answered() -> tuple[int, int]:
        stats = served.get("/v2/models/double/stats")[1]["model_stats"][0]["inference_stats"]
        return stats["success"]["count"], stats["fail"]["count"]

    before = answered()
    with ThreadPoolExecutor(4) as pool:
        assert {status for status, _ in pool.map(lambda _: served.infer("double", request_of(X)), range(40))} == {200}
    served.infer("double", {})
    assert answered() == (before[0] + 40, before[1] + 1)
    metrics = served.request("GET", "/metrics")[2].decode()
    assert f'infera_requests_total{{code="200",model="double",version="1"}} {before[0] + 40}.0' in metrics


# --- changes -------------------------------------------------------------------------------------------------------


def test_all_workers_know_at_once_what_is_served(served: Running) -> None:
    for _ in range(5):
        assert served.request("POST", "/v2/repository/models/double/unload")[0] == 200
        assert {served.infer("double", request_of(X))[0] for _ in range(6)} == {404}
        assert served.request("POST", "/v2/repository/models/double/load")[0] == 200
        assert {served.infer("double", request_of(X))[0] for _ in range(6)} == {200}


def set_golden(served: Running, name: str, requests: int) -> None:
    """Keep so many requests of a model; with any, something stands before it."""
    traffic = json.dumps({"golden": {"requests": requests}})
    assert served.request("POST", f"/v2/repository/models/{name}/traffic", traffic)[0] == 200


def test_what_workers_may_still_ask_for_is_there_until_they_know(served: Running) -> None:
    set_golden(served, "double", 4)

    async def replace() -> tuple[ref[Servable], bool]:
        before = ref(served.host.repository.get("double"))
        served.host.repository.set_traffic("double", Traffic())
        return before, before() is not None

    before, was_there = served.call(replace())
    assert was_there
    served.call(served.host.repository.audience.informed())
    until(lambda: before() is None)
    assert served.infer("double", request_of(X))[0] == 200


@pytest.mark.parametrize("golden", [0, 4])
def test_a_reload_loses_no_request(served: Running, golden: int) -> None:
    set_golden(served, "wide", golden)
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(served.infer("wide", request_of(X))[0])

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for _ in range(5):
            assert served.request("POST", "/v2/repository/models/wide/load")[0] == 200
        stop.set()
        for call in asking:
            call.result()
    assert set(statuses) == {200}


# --- ends ----------------------------------------------------------------------------------------------------------


def outcome_of(call: Future[tuple[int, Any]]) -> int:
    """The status; 0 where the connection was lost."""
    try:
        return call.result()[0]
    except OSError:
        return 0


def test_a_worker_that_is_killed_is_started_again_and_harms_nobody(served: Running) -> None:
    session = gated(served)
    session.block()
    before = pids(served)
    model = served.host.repository.get("gated")
    ran = model.stats.rows.total
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(served.infer, "gated", request_of(X))
        session.wait_entered()
        waiting = [pool.submit(served.infer, "gated", request_of(X)) for _ in range(4)]
        until(lambda: model.queued == 4)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: set(pids(served)) - set(before) != set())
        session.gate.set()
        outcomes = [outcome_of(call) for call in (first, *waiting)]
    assert before[1] in pids(served)
    assert set(outcomes) <= {200, 0}
    assert outcomes[1:].count(200) == model.stats.rows.total - ran - 1, "one ran that nobody waits for"
    assert {served.infer("double", request_of(X))[0] for _ in range(8)} == {200}


def test_a_server_whose_workers_do_not_stay_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MOST_CRASHES", 0)
    with serving({"double": doubler()}, workers=1) as running:
        os.kill(pids(running)[0], signal.SIGKILL)
        until(lambda: running.host.server.should_exit)
        assert running.host.failed


def test_at_last_a_drain_answers_what_was_accepted(served: Running) -> None:
    """The server of this module ends here."""
    session = gated(served)
    session.block()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(served.infer, "gated", request_of(X))]
        session.wait_entered()
        calls += [pool.submit(served.infer, "gated", request_of(X)) for _ in range(3)]
        model = served.host.repository.get("gated")
        until(lambda: model.queued == 3)
        ended = pids(served)
        served.host.server.should_exit = True
        until(lambda: served.infer("gated", request_of(X, parameters={"timeout": 20_000}))[0] == 503)
        assert served.get("/v2/health/ready") == (503, {"ready": False, "reason": "the server is shutting down"})
        session.gate.set()
        assert [call.result()[0] for call in calls] == [200] * 4
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ended))
