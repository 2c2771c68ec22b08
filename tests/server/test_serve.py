"""`infera serve` as users meet it: its own process, the real runtime, unmodified clients, signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from infera_server import server
from infera_server.http import connection
from infera_server.models.model import Model
from infera_server.scheduling.rows import HostArray
from tests.server.support import (
    WAIT,
    FakeSession,
    Running,
    any_width,
    doubler,
    http_request,
    read_reply,
    request_of,
    serving,
    until,
)

WEIGHTS = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
SERVE = [sys.executable, "-m", "infera_server"]
ENVIRONMENT = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


def write_linear(path: Path, weights: HostArray = WEIGHTS) -> Path:
    """y [N, 3] = relu(x [N, 6] @ weights)."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(weights, "w")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def linear(x: HostArray, weights: HostArray = WEIGHTS) -> Any:
    return np.maximum(x @ weights, 0)


@dataclass
class Process:
    """A server process; `output` is everything it has printed."""

    popen: subprocess.Popen[str]
    address: str
    lines: list[str]

    @property
    def output(self) -> str:
        return "".join(self.lines)


@contextlib.contextmanager
def process(*arguments: str | Path) -> Iterator[Process]:
    popen = subprocess.Popen(
        [*SERVE, *map(str, arguments), "--port", "0", "--grpc-port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, "COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    lines: list[str] = []
    assert popen.stderr is not None
    reader = threading.Thread(target=lines.extend, args=(popen.stderr,))
    reader.start()
    served = Process(popen, "", lines)
    try:
        until(lambda: popen.poll() is not None or "serving " in served.output)
        found = re.search(r"on http://([^\s,]+)", served.output)
        assert found, served.output
        served.address = found[1]
        yield served
    finally:
        popen.kill()
        popen.wait(WAIT)
        reader.join(WAIT)
        popen.stderr.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_linear(root / "linear.onnx")
    write_linear(root / "versions" / "1" / "model.onnx")
    write_linear(root / "versions" / "2" / "model.onnx", WEIGHTS * 2)
    (root / "broken.onnx").write_bytes(b"this is no model")
    write_linear(root / "stats" / "1" / "model.onnx")
    return root


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Process]:
    with process(folder) as found:
        yield found


@pytest.fixture
def client(served: Process) -> Iterator[Any]:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is in the test extra")
    made = http.InferenceServerClient(served.address)
    yield made
    made.close()


def x_of(rows: int) -> HostArray:
    return np.random.default_rng(rows).standard_normal((rows, 6)).astype(np.float32)


def test_threads_hand_over_soon_while_a_server_runs() -> None:
    before = sys.getswitchinterval()
    with serving({"double": doubler()}):
        assert sys.getswitchinterval() == pytest.approx(server.SWITCH_INTERVAL)
    assert sys.getswitchinterval() == before


def test_servers_in_one_process_share_what_threads_keep() -> None:
    before = sys.getswitchinterval()
    with contextlib.ExitStack() as first:
        first.enter_context(serving({"double": doubler()}))
        with serving({"double": doubler()}):
            first.close()
            assert sys.getswitchinterval() == pytest.approx(server.SWITCH_INTERVAL)
    assert sys.getswitchinterval() == before


# --- the process ---------------------------------------------------------------------------------------------------


def test_it_says_what_it_derived_and_why(served: Process) -> None:
    assert "serving 3 of 5 on http://127.0.0.1:" in served.output
    for text in (
        "x: FP32 [batch, 6]",
        "'N' occurs once in every input and output",
        "1, 2, 4, 8, 16, 32, 64: ",
        "64 MiB a body",
        "error: broken version 1: cannot be served",
        "would be served at /v2/models/stats, which is taken; rename it",
    ):
        assert text in served.output
    assert served.output.count("cannot be served") == 2
    assert {line.partition(":")[0] for line in served.lines} == {
        *("loading 5 models\n", "linear version 1", "versions version 1", "versions version 2", "error"),
        "serving 3 of 5 on http",
    }  # fmt: skip


def test_logs_are_lines_however_long() -> None:
    log = "infera_server.screen.Plain().handler().emit(logging.LogRecord('x', 30, '', 0, 'a ' * 200, None, None))"
    done = subprocess.run(
        [sys.executable, "-c", f"import logging, infera_server.screen; {log}"], capture_output=True, text=True
    )
    assert "WARNING a a a" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_request_writes_a_line_of_its_own_into_the_log(served: Process) -> None:
    name = "x\n2026-11-30 12:00:00,000 ERROR forged"
    body = json.dumps({"parameters": {"config": '{"backend": "python"}', "file:1/model.onnx": "AAAA"}})
    running = Running(None, int(served.address.rpartition(":")[2]), {})  # type: ignore[arg-type]
    assert running.request("POST", f"/v2/repository/models/{quote(name)}/load", body)[0] == 400
    until(lambda: "forged" in served.output)
    assert [line for line in served.lines if line.startswith("2026-11-30 12:00:00")] == []


def test_a_reader_that_leaves_does_not_end_the_server(folder: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [*SERVE, str(folder / "linear.onnx"), "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as popen:
        assert popen.stderr is not None
        popen.stderr.close()
        running = Running(None, port, {})  # type: ignore[arg-type]

        def is_ready() -> bool:
            try:
                return running.get("/v2/health/ready")[0] == 200
            except OSError:
                return False

        try:
            until(lambda: popen.poll() is not None or is_ready())
            assert running.infer("linear", request_of(np.ones((1, 6), np.float32)))[0] == 200
            popen.terminate()
            assert popen.wait(WAIT) == 0
        finally:
            popen.kill()


def test_nothing_loaded_is_exit_status_1(folder: Path) -> None:
    done = subprocess.run(
        [*SERVE, str(folder / "broken.onnx"), "--port", "0"], capture_output=True, text=True, timeout=WAIT * 3
    )
    assert done.returncode == 1
    assert "0 of 1 could be loaded" in done.stderr
    assert "http://" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nope.onnx"], "does not exist"),
        (["nope.onnx", "--max-batch", "0"], "max_batch"),
        (["nope.onnx", "--host", ""], "host"),
    ],
)
def test_usage_errors_are_exit_status_2(arguments: list[str], text: str) -> None:
    done = subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=WAIT * 3)
    assert done.returncode == 2
    assert text in done.stderr
    assert re.fullmatch(r"error: .*\n", done.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0(folder: Path, number: signal.Signals) -> None:
    with process(folder / "linear.onnx", "--drain-timeout", "5") as found:
        found.popen.send_signal(number)
        assert found.popen.wait(WAIT) == 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_sigterm_under_load_loses_nothing_accepted(folder: Path, workers: str) -> None:
    """Every request gets a right answer, a 503, or, once the listener is closed, no connection."""
    with process(folder / "linear.onnx", "--workers", workers) as found:
        fake = Running(None, int(found.address.partition(":")[2]), {})  # type: ignore[arg-type]
        outcomes: list[int] = []
        right = [0]

        def call(seed: int) -> None:
            x = x_of(seed + 1)
            while True:
                try:
                    status, reply = fake.infer("linear", request_of(x))
                except (ConnectionError, OSError):
                    outcomes.append(0)
                    return
                outcomes.append(status)
                if status == 200:
                    np.testing.assert_allclose(reply["outputs"][0]["data"], linear(x).ravel(), rtol=1e-4, atol=1e-5)
                    right[0] += 1

        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(call, seed) for seed in range(8)]
            until(lambda: outcomes.count(200) > 50)
            found.popen.terminate()
            for done in calls:
                done.result(WAIT)
        assert found.popen.wait(WAIT) == 0
        assert set(outcomes) <= {0, 200, 503}
        assert outcomes.count(200) == right[0]


def test_draining_finishes_the_accepted_and_refuses_the_rest() -> None:
    with serving({"double": doubler()}) as running:
        session = running.sessions["double"]
        assert isinstance(session, FakeSession)
        session.block()
        x = np.ones((1, 4), np.float32)
        with ThreadPoolExecutor(3) as pool:
            accepted = [pool.submit(running.infer, "double", request_of(x))]
            session.wait_entered()
            accepted += [pool.submit(running.infer, "double", request_of(x)) for _ in range(2)]
            model = running.host.repository.get("double")
            until(lambda: model.queued == 2)
            running.host.server.should_exit = True
            until(lambda: running.host.service.draining)
            assert running.get("/v2/health/ready") == (503, {"ready": False, "reason": "the server is shutting down"})
            assert running.get("/v2/health/live") == (200, {"live": True})
            status, document = running.infer("double", request_of(x))
            assert status == 503
            assert "shutting down" in document["error"]
            session.gate.set()
            assert [call.result(WAIT)[0] for call in accepted] == [200, 200, 200]


def test_a_drain_that_takes_too_long_is_given_up() -> None:
    with serving({"double": doubler()}, drain_timeout=0.2) as running:
        session = running.sessions["double"]
        assert isinstance(session, FakeSession)
        session.block()
        with ThreadPoolExecutor(2) as pool:
            stuck = pool.submit(running.infer, "double", request_of(np.ones((1, 4), np.float32)))
            session.wait_entered()
            waiting = pool.submit(running.infer, "double", request_of(np.ones((1, 4), np.float32)))
            model = running.host.repository.get("double")
            until(lambda: model.queued == 1)
            running.host.server.should_exit = True
            assert waiting.result(WAIT)[0] == 503
            assert stuck.result(WAIT)[0] == 503


def test_who_has_just_connected_or_asked_may_ask_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on its way as the server ends is answered, and not met by a reset."""
    monkeypatch.setattr(server, "LAST_REQUESTS", WAIT)
    one = http_request(json.dumps(request_of(np.ones((1, 4), np.float32))).encode())
    with serving({"double": doubler()}) as running, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(running.connect()) for _ in range(2)]
        streams = [stack.enter_context(sock.makefile("rb")) for sock in socks]
        socks[0].sendall(one)
        assert read_reply(streams[0])[0] == 200
        until(lambda: len(running.host.service.connections) == 2)
        running.host.server.should_exit = True
        until(lambda: running.host.service.draining and not running.host.server.servers)
        for sock, stream in zip(socks, streams, strict=True):
            sock.sendall(one)
            status, headers, _ = read_reply(stream)
            assert (status, headers["connection"]) == (503, "close")
            assert stream.read() == b""


@pytest.mark.parametrize("reads", [True, False])
def test_who_reads_nothing_of_a_reply_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    monkeypatch.setattr(connection, "FAREWELL_SECONDS", 0.3)
    x = np.zeros((1, 8 << 20), np.float32)
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    document = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = f"Inference-Header-Content-Length: {len(document)}\r\n"
    with serving({"any": any_width()}, drain_timeout=10 * WAIT) as running, running.connect() as sock:
        sock.sendall(http_request(document + x.tobytes(), "/v2/models/any/infer", headers))
        stats = running.host.repository.get("any").stats
        until(lambda: stats.statuses[200] == 1)
        running.host.server.should_exit = True
        if reads:
            with sock.makefile("rb") as stream:
                status, _, body = read_reply(stream)
            assert (status, body[-x.nbytes :]) == (200, x.tobytes())
        until(lambda: not running.host.service.connections)


def test_runs_that_do_not_end_delay_the_exit_by_one_drain_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many models hang: their engine threads are not waited for one after the other."""
    close, patience = Model.close, list[float]()

    def spied(model: Model, timeout: float) -> None:
        patience.append(timeout)
        close(model, timeout)

    monkeypatch.setattr(Model, "close", spied)
    sessions = {name: doubler() for name in ("a", "b", "c")}
    with ThreadPoolExecutor(3) as pool:
        with serving(sessions, drain_timeout=0.5, request_timeout=3) as running:
            for name, session in sessions.items():
                session.block()
                pool.submit(running.infer, name, request_of(np.ones((1, 4), np.float32)))
            models = list(running.host.repository.ready())
            until(lambda: sum(model.queued for model in models) == 2)  # one runs, and the device is taken
        for session in sessions.values():
            session.gate.set()
    assert len(patience) == 3
    assert max(patience) <= 0


def test_a_run_that_does_not_end_is_answered_and_makes_the_server_unready() -> None:
    with serving({"double": doubler()}, request_timeout=0.3) as running:
        session = running.sessions["double"]
        assert isinstance(session, FakeSession)
        session.block()
        status, document = running.infer("double", request_of(np.ones((1, 4), np.float32)))
        assert status == 504
        assert "has been running" in document["error"]
        reason = "a run has kept a device for longer than a request may wait"
        assert running.get("/v2/health/ready") == (503, {"ready": False, "reason": reason})
        session.gate.set()
        until(lambda: running.get("/v2/health/ready")[0] == 200)


HANGS = """
import sys, time
from pathlib import Path
from infera_server.models.discovery import Source
from infera_server.models.repository import Repository
from infera_server.listening import listen
from infera_server.server import Host
from infera_server.settings import Settings

def opener(path, settings):
    print("loading", file=sys.stderr, flush=True)
    time.sleep(600)

sys.exit(Host(Repository(Settings(), [Source("m", "1", Path("m"))], opener=opener), listen("127.0.0.1", 0)).run())
"""


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_signal_while_loading_does_not_wait_for_the_model(signals: list[signal.Signals]) -> None:
    with subprocess.Popen([sys.executable, "-c", HANGS], stderr=subprocess.PIPE, text=True) as found:
        assert found.stderr is not None
        assert found.stderr.readline() == "loading\n"
        for number in signals:
            found.send_signal(number)
            time.sleep(0.05)
        assert found.wait(WAIT) == 0
        assert "Traceback" not in found.stderr.read()


def test_a_second_signal_does_not_wait_for_the_drain() -> None:
    with ThreadPoolExecutor(1) as pool:
        with serving({"double": doubler()}, drain_timeout=10 * WAIT) as running:
            session = running.sessions["double"]
            assert isinstance(session, FakeSession)
            session.block()
            pool.submit(running.infer, "double", request_of(np.ones((1, 4), np.float32)))
            session.wait_entered()
            running.host.server.handle_exit(signal.SIGINT, None)
            until(lambda: running.host.service.draining)
            running.host.server.handle_exit(signal.SIGINT, None)
        session.gate.set()


def test_not_ready_while_loading() -> None:
    release = threading.Event()

    class Slow(FakeSession):
        def run(self, feeds: Any) -> Any:
            assert release.wait(WAIT)
            return super().run(feeds)

    fast = doubler()
    slow = Slow(fast.inputs, fast.outputs, fast.fn)
    threading.Timer(0.5, release.set).start()
    with serving({"slow": slow}, wait=False) as running:
        assert running.get("/v2/health/live")[0] == 200
        assert running.get("/v2/health/ready") == (503, {"ready": False, "reason": "models are being loaded"})
        status, document = running.infer("slow", request_of(np.ones((1, 4), np.float32)))
        assert (status, document) == (503, {"error": "model 'slow' is still loading"})
        until(lambda: running.get("/v2/health/ready")[0] == 200)


# --- clients -------------------------------------------------------------------------------------------------------


def test_tritonclient_manages(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert not client.is_model_ready("broken")
    assert client.get_server_metadata()["name"] == "infera"
    assert client.get_model_metadata("linear")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 6]}]
    assert client.get_model_config("linear")["max_batch_size"] == 64
    assert client.get_inference_statistics("linear")["model_stats"][0]["name"] == "linear"
    told = client.get_inference_statistics("versions")["model_stats"]
    assert [(each["name"], each["version"]) for each in told] == [("versions", "1"), ("versions", "2")]
    assert client.get_log_settings()["log_info"] is True
    states = {(m["name"], m["version"]): m["state"] for m in client.get_model_repository_index()}
    assert states == {
        ("broken", "1"): "UNAVAILABLE",
        ("stats", "1"): "UNAVAILABLE",
        ("linear", "1"): "READY",
        ("versions", "1"): "READY",
        ("versions", "2"): "READY",
    }


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_tritonclient_infers(client: Any, binary_in: bool, binary_out: bool, coding: str | None) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput

    x = x_of(5)
    feed = InferInput("x", list(x.shape), "FP32")
    feed.set_data_from_numpy(x, binary_data=binary_in)
    result = client.infer(
        "linear", [feed], outputs=[InferRequestedOutput("y", binary_data=binary_out)], request_id="a-1",
        request_compression_algorithm=coding, response_compression_algorithm=coding,
    )  # fmt: skip
    np.testing.assert_allclose(result.as_numpy("y"), linear(x), rtol=1e-5, atol=1e-6)
    assert result.get_response()["id"] == "a-1"


def test_tritonclient_asks_for_versions_classes_and_nothing(client: Any) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput

    x = x_of(2)
    feed = InferInput("x", list(x.shape), "FP32")
    feed.set_data_from_numpy(x)
    for version, factor in (("1", 1), ("2", 2), ("", 2)):
        found = client.infer("versions", [feed], model_version=version).as_numpy("y")
        np.testing.assert_allclose(found, linear(x) * factor, rtol=1e-5, atol=1e-6)
    best = client.infer("linear", [feed], outputs=[InferRequestedOutput("y", class_count=1)]).as_numpy("y")
    assert [int(row[0].split(b":")[1]) for row in best] == linear(x).argmax(1).tolist()


def test_tritonclient_is_told_its_mistakes(client: Any) -> None:
    from tritonclient.http import InferInput
    from tritonclient.utils import InferenceServerException

    feed = InferInput("x", [1, 5], "FP32")
    feed.set_data_from_numpy(np.ones((1, 5), np.float32))
    with pytest.raises(InferenceServerException, match=r"Expected \[-1,6\], got \[1,5\]") as refusal:
        client.infer("linear", [feed])
    assert refusal.value.status() == "400"


def test_tritonclient_sends_strings() -> None:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is in the test extra")
    from infera_gpu.spec import TensorSpec

    text = {"s": TensorSpec(("N",), np.dtype(object))}, {"t": TensorSpec(("N",), np.dtype(object))}
    model = FakeSession(*text, lambda feeds: {"t": feeds["s"]})
    with serving({"words": model}) as running:
        client = http.InferenceServerClient(running.address)
        words = np.array(["a", "", "ü" * 100], object)
        feed = http.InferInput("s", [3], "BYTES")
        for binary in (True, False):
            feed.set_data_from_numpy(words, binary_data=binary)
            found = client.infer("words", [feed]).as_numpy("t")
            assert [w.decode() for w in found] == words.tolist()
        client.close()


def test_curl(served: Process) -> None:
    if (curl := shutil.which("curl")) is None:
        pytest.skip("curl is not installed")
    x = x_of(200)
    body = json.dumps({"inputs": [{"name": "x", "shape": [50, 6], "datatype": "FP32", "data": x[:50].tolist()}]})
    url = f"http://{served.address}/v2/models/linear/infer"
    command = [curl, "-sS", "--compressed", "-H", "Expect: 100-continue", "--data-binary", "@-", url]
    done = subprocess.run(command, input=body, capture_output=True, text=True, timeout=WAIT, check=True)
    (output,) = json.loads(done.stdout)["outputs"]
    assert output["shape"] == [50, 3]
    np.testing.assert_allclose(output["data"], linear(x[:50]).ravel(), rtol=1e-5, atol=1e-6)


def write_shuffle(path: Path, width: int, times: int) -> HostArray:
    """y [N, width] = x [N, width], shuffled so many times by products that take milliseconds. Returns the order."""
    order = np.random.default_rng(0).permutation(width)
    names = ["x", *(f"v{i}" for i in range(1, times)), "y"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)],
        "shuffle",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", width])],
        [numpy_helper.from_array(np.eye(width, dtype=np.float32)[:, order], "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = np.arange(width)
    for _ in range(times):
        found = found[order]
    return found


def test_concurrent_clients_share_batches_of_the_real_runtime(tmp_path: Path) -> None:
    order = write_shuffle(tmp_path / "shuffle.onnx", 1024, 32)
    with process(tmp_path) as served:
        running = Running(None, int(served.address.partition(":")[2]), None)  # type: ignore[arg-type]

        def call(seed: int) -> None:
            for step in range(4):
                x = np.random.default_rng(seed).integers(0, 9, (seed * 20 % 7 + step % 3 + 1, 1024)).astype(np.float32)
                status, reply = running.infer("shuffle", request_of(x))
                assert status == 200
                assert reply["outputs"][0]["data"] == x[:, order].ravel().tolist()

        with ThreadPoolExecutor(16) as pool:
            for done in [pool.submit(call, seed) for seed in range(16)]:
                done.result(WAIT * 2)
        stats = running.get("/v2/models/shuffle/stats")[1]["model_stats"][0]
        assert stats["execution_count"] < stats["inference_stats"]["queue"]["count"]


def test_metrics_have_a_port_of_their_own(folder: Path) -> None:
    with process(folder / "linear.onnx", "--metrics-port", "0") as served:
        found = re.search(r"metrics on port (\d+)", served.output)
        assert found, served.output
        running = Running(None, int(found[1]), None)  # type: ignore[arg-type]
        status, _, body = running.request("GET", "/metrics")
        assert status == 200
        assert b"infera_queue_depth" in body
        for method, path in (("GET", "/"), ("GET", "/v2/health/ready"), ("POST", "/v2/models/linear/infer")):
            document = json.dumps(request_of(x_of(1))) if method == "POST" else None
            for _ in range(2):
                assert running.request(method, path, document)[0] == 404, path
