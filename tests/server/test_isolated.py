"""Models in processes of their own: the same answers, and what ends such a process ends no other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from infera_gpu.errors import InputError, ModelError, OutOfMemoryError
from infera_server.errors import Unavailable
from infera_server.models.discovery import Source
from infera_server.models.repository import Repository
from infera_server.processes import supervisor
from infera_server.processes.isolated import IsolatedSession
from infera_server.runtime import open_file
from infera_server.settings import Settings
from tests.commandline import save_relu
from tests.descriptors import open_files
from tests.server.engines import CRASH, EXHAUST, HANG, RAISE
from tests.server.support import Running, hosting, request_of, until

X = np.ones((2, 4), np.float32)

DTYPES = [
    np.dtype(t)
    for t in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", ml_dtypes.bfloat16,
              ml_dtypes.float8_e4m3fn, ml_dtypes.int4)
]  # fmt: skip


@contextlib.contextmanager
def opened(target: str, **arguments: Any) -> Iterator[IsolatedSession]:
    session = IsolatedSession("m", f"tests.server.engines:{target}", arguments)
    try:
        yield session
    finally:
        session.close()


@contextlib.contextmanager
def serving_fragile(tmp_path: Path, **settings: Any) -> Iterator[tuple[Running, Path]]:
    """A server of a fragile model; the file has the ids of its engine processes."""
    ids = tmp_path / "ids"

    def opener(path: Path, _: Settings) -> IsolatedSession:
        arguments = {"started": str(ids)}
        return IsolatedSession(path.stem, "tests.server.engines:fragile", arguments)

    chosen = Settings(isolate=True, warmup_seconds=0, max_batch=1, **settings)
    with hosting(Repository(chosen, [Source("m", "1", Path("m.onnx"))], opener=opener)) as running:
        yield running, ids


def pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def has_started(file: Path, count: int) -> bool:
    return len(pids(file)) == count


def has_more(replies: list[Any], count: int) -> bool:
    return len(replies) > count


def first(value: float) -> Any:
    return request_of(np.full((1, 4), value, np.float32))


# --- a session -----------------------------------------------------------------------------------------------------


def test_arrays_of_every_type_and_shape_come_back_as_they_were_sent() -> None:
    rng = np.random.default_rng(0)
    with opened("echo") as session:
        for shape in ((), (0,), (3, 0, 2), (5,), (2, 3, 4), (70_000,)):
            sent = {str(d): np.asarray(rng.integers(0, 2, shape)).astype(d) for d in DTYPES}
            sent["text"] = np.full(shape, "grüße \ud800".encode("utf-8", "replace").decode(), object)
            sent["strided"] = np.asarray(rng.standard_normal((*shape, 3)))[..., 1]
            got = session.run({"x": np.zeros(1, np.float32), **sent})
            for name, array in sent.items():
                assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
                assert np.array_equal(got[name], array), name
        kept = session.run({"x": np.full(9, 1.0)})["x"]
        session.run({"x": np.full(9, 2.0)})
        assert kept.tolist() == [1.0] * 9


OPTIONS = {"device": "cpu", "threads": 1, "precision": "fp32", "batch_invariant": False, "vram_limit": None}


def test_a_model_of_the_runtime_is_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = save_relu(tmp_path)
    arguments = OPTIONS | {"path": str(path)}
    session, local = IsolatedSession("m", "infera_server.runtime:open_file", arguments), open_file(**arguments)  # type: ignore[arg-type]
    with contextlib.closing(session), contextlib.closing(local):
        assert (session.inputs, session.outputs, session.overridable) == (local.inputs, local.outputs, {})
        assert session.facts() == local.facts()
        assert session.device.name == "cpu"
        name, spec = next(iter(local.inputs.items()))
        shapes = {name: tuple(int(d) if isinstance(d, int) else 2 for d in spec.shape)}
        assert session.plan_for(shapes).arena_bytes == local.plan_for(shapes).arena_bytes
        feeds = {name: np.random.default_rng(0).standard_normal(shapes[name]).astype(np.float32)}
        for output, want in local.run(feeds).items():
            assert np.array_equal(session.run(feeds)[output], want)
        with pytest.raises(InputError) as wanted:
            local.run({"nope": feeds[name]})
        with pytest.raises(InputError) as got:
            session.run({"nope": feeds[name]})
        assert str(got.value) == str(wanted.value)


def test_what_the_model_raises_comes_back_as_what_it_was() -> None:
    with opened("fragile") as session:
        with pytest.raises(ValueError, match="singular"):
            session.run({"x": X * RAISE})
        with pytest.raises(OutOfMemoryError) as caught:
            session.run({"x": X * EXHAUST})
        assert (caught.value.needed, caught.value.available) == (5, 2)
        assert "a plan needs 5 bytes" in str(caught.value)
        assert session.run({"x": X})["y"].tolist() == (X * 2).tolist()


def test_what_cannot_be_loaded_says_so() -> None:
    arguments = OPTIONS | {"path": "/nope.onnx"}
    with pytest.raises(ModelError, match=r"nope\.onnx"):
        IsolatedSession("m", "infera_server.runtime:open_file", arguments)
    with pytest.raises(ModelError, match="was ended by SIGKILL while it loaded the model"):
        IsolatedSession("m", "tests.server.engines:stillborn", {})


def test_a_process_that_is_killed_while_idle_is_started_again_and_loses_no_request(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    with opened("fragile", started=str(ids)) as session:
        os.kill(pids(ids)[0], signal.SIGKILL)
        until(lambda: len(pids(ids)) == 2)
        session.supervision.wait()
        assert session.run({"x": X})["y"].tolist() == (X * 2).tolist()


def test_closing_ends_the_process_and_frees_what_was_shared(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    before = open_files()
    with opened("fragile", started=str(ids)) as session:
        session.run({"x": np.ones((50_000, 4), np.float32)})
        assert is_alive(pids(ids)[0])
    assert not is_alive(pids(ids)[0])
    until(lambda: open_files() == before)
    with pytest.raises(Unavailable, match="closed"):
        session.run({"x": X})


def test_it_ends_with_its_parent_and_by_no_signal_of_the_terminal(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    program = (
        "import sys; from infera_server.processes.isolated import IsolatedSession\n"
        f"s = IsolatedSession('m', 'tests.server.engines:fragile', {{'started': {str(ids)!r}}})\n"
        "print('ready', flush=True); import numpy as np; s.run({'x': np.full((1, 4), -3, np.float32)})"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        (engine,) = pids(ids)
        for sig in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine, sig)
        assert os.getsid(engine) == engine
        assert is_alive(engine)
        parent.kill()
    until(lambda: not is_alive(engine))


# --- a server ------------------------------------------------------------------------------------------------------


def test_a_crash_fails_its_own_requests_and_those_that_wait_run_afterwards(tmp_path: Path) -> None:
    with serving_fragile(tmp_path) as (running, ids):
        model = running.host.repository.get("m")
        replies: list[tuple[int, Any]] = []
        hanging = threading.Thread(target=lambda: replies.append(running.infer("m", first(HANG))))
        hanging.start()
        until(Path(f"{ids}.hangs").exists)
        waiting = [threading.Thread(target=lambda: replies.append(running.infer("m", first(1)))) for _ in range(3)]
        for client in waiting:
            client.start()
        until(lambda: model.queued == 3)
        os.kill(pids(ids)[0], signal.SIGKILL)
        for client in (hanging, *waiting):
            client.join()
        (failed,) = (body for status, body in replies if status == 503)
        assert "ended during this request and is being started again" in failed["error"]
        assert [body["outputs"][0]["data"] for status, body in replies if status == 200] == [[2.0] * 4] * 3
        assert len(pids(ids)) == 2
        assert running.get("/v2/health/ready")[0] == 200


def test_an_engine_that_is_killed_under_load_fails_what_it_ran_and_nothing_else(tmp_path: Path) -> None:
    kills = 3
    with serving_fragile(tmp_path) as (running, ids):
        replies: list[tuple[int, Any]] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                replies.append(running.infer("m", first(1)))

        clients = [threading.Thread(target=ask) for _ in range(6)]
        for client in clients:
            client.start()
        for started in range(1, kills + 2):
            until(partial(has_started, ids, started))
            enough = len(replies) + 50
            until(partial(has_more, replies, enough))
            if started <= kills:
                os.kill(pids(ids)[-1], signal.SIGKILL)
        stop.set()
        for client in clients:
            client.join()
        failed = [body["error"] for status, body in replies if status != 200]
        assert {status for status, _ in replies} <= {200, 503}
        assert len(failed) <= kills
        assert all("ended during this request and is being started again" in error for error in failed)
        assert replies[-1][0] == 200


def test_a_model_that_crashes_each_time_is_given_up_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MOST_CRASHES", 2)
    with serving_fragile(tmp_path) as (running, ids):
        for _ in range(3):
            assert running.infer("m", first(CRASH))[0] == 503
        until(lambda: running.index()["m/1"].startswith("UNAVAILABLE"))
        assert (
            "was ended by SIGSEGV, and is not started again: 3 in a row ended without one run" in running.index()["m/1"]
        )
        assert len(pids(ids)) == 3
        assert running.infer("m", first(1))[0] == 404
        running.call(running.host.service.load_model("m"))
        assert running.infer("m", first(1))[0] == 200


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with serving_fragile(tmp_path, request_timeout=0.5) as (running, ids):
        assert running.infer("m", first(HANG))[0] == 504
        until(lambda: len(pids(ids)) == 2)
        until(lambda: running.infer("m", first(1))[0] == 200)
        assert not is_alive(pids(ids)[0])
    assert not any(map(is_alive, pids(ids)))


def test_a_model_file_is_served_isolated_and_its_process_ends_when_it_is_unloaded(tmp_path: Path) -> None:
    settings = Settings(isolate=True, warmup_seconds=0, device="cpu")
    with hosting(Repository(settings, [Source("relu", "1", save_relu(tmp_path))])) as running:
        model = running.host.repository.loaded()[0].model
        assert model is not None
        assert isinstance(model.session, IsolatedSession)
        assert model.signature.layout is not None
        status, body = running.infer("relu", request_of(np.array([[-1, 2, 3]], np.float32)))
        assert (status, body["outputs"][0]["data"]) == (200, [0, 2, 3])
        session = model.session
        running.call(running.host.service.unload_model("relu"))
        until(lambda: running.index()["relu/1"] == "UNAVAILABLE: unloaded")
        with pytest.raises(Unavailable, match="closed"):
            session.facts()
