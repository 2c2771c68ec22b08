"""Scheduling as clients and operators see it: traces, priorities, early refusals, goals, runs in the event loop."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from websockets.sync.client import connect

from infera_server.scheduling.costs import WINDOW
from infera_server.scheduling.explanation import explain
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.turns import Turns
from infera_server.settings import Settings
from tests.commandline import assert_fails, infera
from tests.server.support import WAIT, FakeSession, Running, any_width, doubler, flat, request_of, serving, spec, until

FIELD = re.compile(r'([a-z-]+)=("[^"]*"|-?[0-9.]+)(?:, |$)')


def traced(running: Running, model: str, x: Any, **headers: str) -> tuple[int, dict[str, str | float]]:
    """(status, the trace) of a request."""
    status, replied, _ = running.request(
        "POST", f"/v2/models/{model}/infer", json.dumps(request_of(x)), {"infera-trace": "1"} | headers
    )
    text = replied["infera-trace"]
    assert FIELD.sub("", text) == "", text
    return status, {k: v.strip('"') if v[0] == '"' else float(v) for k, v in FIELD.findall(text)}


def rows(n: int, width: int = 4) -> Any:
    return np.ones((n, width), np.float32)


def spawn(fn: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(target=fn, args=args)
    thread.start()
    return thread


# --- explanations ----------------------------------------------------------------------------------------------------


def test_a_reply_explains_itself_when_asked() -> None:
    with serving({"double": doubler()}) as running:
        status, trace = traced(running, "double", rows(3))
        assert status == 200
        assert (trace["requests"], trace["rows"], trace["bucket"], trace["most"]) == (1, 3, 4, 64)
        assert trace["padding"] == 0.25
        assert trace["waited-for"] == "nothing"
        assert {"queued", "copied", "ran", "split"} <= trace.keys()
        reply = running.request("POST", "/v2/models/double/infer", b"{}")[1]
        assert "infera-trace" not in reply


@pytest.mark.parametrize(
    ("value", "asks"), [("1", True), ("true", True), ("True", True), ("0", False), ("yes", False), ("", False)]
)
@pytest.mark.parametrize("suffix", ["infer", "generate"])
def test_a_header_asks_for_it_with_1_and_true(suffix: str, value: str, asks: bool) -> None:
    body = json.dumps(request_of(rows(1)) if suffix == "infer" else {"x": [1] * 4})
    with serving({"double": doubler()}) as running:
        for _ in range(2):  # the second head is one that came before
            status, headers, _ = running.request("POST", f"/v2/models/double/{suffix}", body, {"infera-trace": value})
            assert (status, "infera-trace" in headers) == (200, asks)


def test_a_parameter_asks_for_it_too_and_is_true_or_false() -> None:
    with serving({"double": doubler()}) as running:
        for value, asks in (*((True, True), (False, False)) * 2, (1, None)):
            body = json.dumps(request_of(rows(1), parameters={"infera_trace": value}))
            status, headers, reply = running.request("POST", "/v2/models/double/infer", body)
            if asks is None:
                assert (status, b"Unable to parse 'infera_trace'" in reply) == (400, True)
            else:
                assert (status, "rows=1" in headers.get("infera-trace", "")) == (200, asks)


def wrong() -> Iterator[dict[str, Any]]:
    """Documents, one mistake in each."""
    (tensor,) = request_of(rows(1))["inputs"]
    for change in ({"shape": [1, 5]}, {"datatype": "INT32"}, {"data": ["a"] * 4}, {"name": "z"}, {"shape": None}):
        yield {"inputs": [tensor | change]}
    yield {"inputs": []}
    yield {"inputs": 3}
    yield {}
    yield {"inputs": [tensor], "outputs": [{"name": "z"}]}
    yield {"inputs": [tensor], "id": 3}


def test_a_document_that_is_wrong_is_explained_where_it_asks() -> None:
    with (
        serving({"double": doubler()}) as running,
        connect(f"ws://{running.address}/v2/models/double/stream") as client,
    ):
        for document in wrong():
            for value in (True, False):
                body = json.dumps(document | {"parameters": {"infera_trace": value}})
                want = 'refused="no run"' if value else None
                status, headers, _ = running.request("POST", "/v2/models/double/infer", body)
                assert (status, headers.get("infera-trace")) == (400, want), document
                client.send(body)
                answer = json.loads(client.recv(WAIT))
                assert (answer["status"], answer.get("parameters", {}).get("infera_trace")) == (400, want), document


def test_bytes_that_are_wrong_are_explained_where_their_document_asks() -> None:
    words = FakeSession({"s": spec(2, dtype=object)}, {"t": spec(2, dtype=object)}, lambda feeds: {"t": feeds["s"]})
    right, broken = b"\1\0\0\0a\1\0\0\0b", b"\1\0\0\0a\2\0\0\0b"
    tensor = {"name": "s", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(right)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"infera_trace": True}}).encode()
    fields = {"Inference-Header-Content-Length": str(len(head))}
    with serving({"words": words}) as running:
        for _ in range(3):  # the second document is one that came before
            assert running.request("POST", "/v2/models/words/infer", head + right, fields)[0] == 200
            status, headers, _ = running.request("POST", "/v2/models/words/infer", head + broken, fields)
            assert (status, headers.get("infera-trace")) == (400, 'refused="no run"')


def test_what_was_waited_for_is_named() -> None:
    session = doubler()
    with serving({"double": session}) as running:
        model = running.model("double")
        flat(model.batcher)
        session.block()
        first = spawn(running.infer, "double", request_of(rows(1)))
        session.wait_entered()
        got: list[tuple[int, dict[str, str | float]]] = []
        others = [spawn(lambda: got.append(traced(running, "double", rows(2)))) for _ in range(2)]
        until(lambda: model.queued == 2)
        session.gate.set()
        for thread in (first, *others):
            thread.join()
        assert [status for status, _ in got] == [200, 200]
        for _, trace in got:
            assert trace["waited-for"] == "own run"
            assert (trace["requests"], trace["rows"], trace["bucket"]) == (2, 4, 4)


def test_another_model_on_the_device_is_named() -> None:
    slow = doubler()
    with serving({"slow": slow, "fast": doubler()}) as running:
        slow.block()
        first = spawn(running.infer, "slow", request_of(rows(1)))
        slow.wait_entered()
        got: list[tuple[int, dict[str, str | float]]] = []
        second = spawn(lambda: got.append(traced(running, "fast", rows(1))))
        until(lambda: running.model("fast").queued == 1)
        time.sleep(0.01)
        slow.gate.set()
        first.join()
        second.join()
        assert got[0][1]["waited-for"] == "device, busy with slow"
        assert float(got[0][1]["queued"]) >= 10


def test_a_refusal_explains_itself_too() -> None:
    session = doubler()
    with serving({"double": session}, max_queue=1) as running:
        session.block()
        first = spawn(running.infer, "double", request_of(rows(1)))
        session.wait_entered()
        second = spawn(running.infer, "double", request_of(rows(1)))
        until(lambda: running.host.repository.get("double").queued == 1)
        status, trace = traced(running, "double", rows(1))
        assert (status, trace["refused"]) == (429, "queue_full")
        assert float(trace["retry-after"]) >= 0
        session.gate.set()
        first.join()
        second.join()
        _, _, text = running.request("GET", "/metrics")
        assert b'infera_rejected_total{model="double",reason="queue_full",version="1"} 1.0' in text


def test_names_are_quoted_safely() -> None:
    batch = Batch([], 1, 1, 2.0, asked_at=1.0, behind='mö"del\r\n', gathered_at=2.0, ran_at=2.5, split_at=2.5)
    assert 'waited-for="device, busy with m??del??"' in explain(batch, Job({}, lambda *_: None, queued_at=0.5))


# --- priorities and deadlines ----------------------------------------------------------------------------------------


def test_a_smaller_priority_goes_first_and_none_is_in_the_middle() -> None:
    session = any_width()
    with serving({"m": session}, max_batch=1) as running:
        session.block()
        order: list[int] = []

        def ask(priority: int) -> None:
            assert running.infer("m", request_of(rows(1), parameters={"priority": priority}))[0] == 200
            order.append(priority)

        first = spawn(running.infer, "m", request_of(rows(1)))
        session.wait_entered()
        model = running.model("m")
        threads = []
        for count, priority in enumerate((9, 0, 1), start=1):
            threads.append(spawn(ask, priority))
            until(lambda count=count: model.queued == count)  # type: ignore[misc]
        levels = [[j.level for j in w.jobs] for w in model.batcher.schedule._waiting.values()]
        assert levels == [[1, 5, 9]]
        session.gate.set()
        for thread in (first, *threads):
            thread.join()
        assert sorted(order) == [0, 1, 9]


def test_a_request_that_cannot_make_its_timeout_is_refused_at_once() -> None:
    session = doubler()
    with serving({"double": session}) as running:
        model = running.model("double")
        for bucket in model.batcher.schedule.buckets:
            for _ in range(32):
                model.batcher.schedule.costs.of((("x", (), (4,)),)).learn(bucket, 200.0)
        session.block()
        first = spawn(running.infer, "double", request_of(rows(1)))
        session.wait_entered()
        asked = json.dumps(request_of(rows(1), parameters={"timeout": 10_000_000}))
        status, headers, body = running.request("POST", "/v2/models/double/infer", asked)
        assert status == 429, body
        assert int(headers["retry-after"]) == pytest.approx(510, abs=30)  # two runs and a margin, less the time it has
        assert b"would take about" in body
        session.gate.set()
        first.join()
        _, _, text = running.request("GET", "/metrics")
        assert b'reason="would_expire"' in text


# --- goals -----------------------------------------------------------------------------------------------------------


def test_the_goal_is_told_with_what_came_of_it() -> None:
    with serving({"double": doubler(), "other": doubler()}, slo_p99="1s", slo_p99_of={"other": "20ms"}) as running:
        assert running.infer("double", request_of(rows(1)))[0] == 200
        _, _, text = running.request("GET", "/metrics")
        assert b'infera_slo_seconds{model="double",version="1"} 1.0' in text
        assert b'infera_slo_seconds{model="other",version="1"} 0.02' in text
        assert b'infera_slo_met{model="double",version="1"} 1.0' in text
        assert b'infera_slo_met{model="other"' not in text  # nothing was answered


def test_without_a_goal_there_is_no_series() -> None:
    with serving({"double": doubler()}) as running:
        assert b"infera_slo" not in running.request("GET", "/metrics")[2]


@pytest.mark.parametrize(
    ("text", "seconds"), [("20ms", 0.02), ("1.5 s", 1.5), ("500us", 5e-4), (".5s", 0.5), (0.1, 0.1)]
)
def test_times_have_units(text: Any, seconds: float) -> None:
    assert Settings.model_validate({"slo_p99": text}).slo_p99 == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["20", "20 minutes", "ms", "-1ms", "0s", "inf", "1.2.3ms"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"slo_p99": text})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slo-p99", "soon"], "slo_p99: 'soon' is no time"),
        (["--slo-p99", "m=20"], "slo_p99_of.m: '20' is no time with its unit"),
        (["--tls-key", "k.pem"], "--tls-key needs --tls-cert"),
        (["--load-model", "nope"], "no model 'nope'; there are: m"),
        (["--slo-p99", "1ms", "--slo-p99", "2ms"], "one time is for all"),
        (["--share", "mlp"], "MODEL=WEIGHT"),
        (["--share", "mlp=-1"], "shares"),
    ],
)
def test_options_that_say_nothing_are_named(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "m.onnx").touch()
    assert_fails(infera("serve", tmp_path / "m.onnx", *options), message, status=2)


# --- the event loop's thread -----------------------------------------------------------------------------------------


def test_short_runs_are_made_in_the_event_loop_and_long_ones_are_not() -> None:
    threads: dict[str, set[str]] = {"short": set(), "long": set()}

    def named(name: str) -> Any:
        session = doubler()
        fn = session.fn

        def run(feeds: Any) -> Any:
            threads[name].add(threading.current_thread().name)
            return fn(feeds)

        session.fn = run
        return session

    with serving({name: named(name) for name in threads}, inline_run=5.0, max_batch=2) as running:
        for _ in range(WINDOW):  # as if it had run
            running.model("long").batcher.schedule.costs.of((("x", (), (4,)),)).learn(1, 60.0)
        for name, seen in threads.items():
            seen.clear()
            for _ in range(3):
                assert running.infer(name, request_of(rows(1)))[0] == 200
        assert threads["long"] == {"infera-engine-long"}
        assert len(threads["short"]) == 1
        assert threads["short"] != {"infera-engine-short"}


def test_a_busy_device_is_not_waited_for_in_the_event_loop() -> None:
    slow = doubler()
    with serving({"slow": slow, "fast": doubler()}, inline_run=1.0) as running:
        fast = running.model("fast")
        with running.host.repository.loader._turns_of("cpu"):
            asked = spawn(running.infer, "fast", request_of(rows(1)))
            until(lambda: fast.queued == 1)
            assert running.get("/v2/health/live")[0] == 200
        asked.join()


def test_draining_finishes_what_the_event_loop_was_to_run() -> None:
    with serving({"double": doubler()}, inline_run=1.0) as running:
        got: list[int] = []
        threads = [spawn(lambda: got.append(running.infer("double", request_of(rows(1)))[0])) for _ in range(8)]
        running.host.server.should_exit = True
        for thread in threads:
            thread.join()
        assert set(got) <= {200, 503}


# --- warming up ----------------------------------------------------------------------------------------------


def test_costs_are_known_before_the_first_request() -> None:
    session = doubler()
    with serving({"double": session}, max_batch=8) as running:
        schedule = running.model("double").batcher.schedule
        costs = schedule.costs.of((("x", (), (4,)),))
        assert [costs.runs(i) for i in range(4)] == [3, 3, 3, 3]
        assert session.batches[-16:] == [1] * 4 + [2] * 4 + [4] * 4 + [8] * 4


def test_warming_up_ends_in_time() -> None:
    session = doubler()
    with serving({"double": session}, warmup_seconds=0.0) as running:
        assert not running.model("double").batcher.schedule.costs.of((("x", (), (4,)),)).known
        assert running.infer("double", request_of(rows(1)))[0] == 200


def test_a_device_is_named_by_its_holder() -> None:
    turns = Turns()
    with turns:
        assert turns.holder == "a model that is being loaded"
