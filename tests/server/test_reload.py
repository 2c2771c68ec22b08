"""A model is replaced while it serves: no request is lost, what is worse is not taken, and there is a way back."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from infera_gpu.errors import ModelError
from infera_server.errors import BadRequest, Unavailable
from infera_server.models.discovery import Source, stamp, survey
from infera_server.models.golden import Golden, Recorder, differing
from infera_server.models.repository import Repository
from infera_server.models.watch import Watch
from infera_server.requests import Request
from infera_server.scheduling.rows import Arrays
from infera_server.settings import Settings
from tests.server.support import WAIT, FakeSession, Running, hosting, request_of, spec, until
from tests.text import parse

X = np.ones((1, 4), np.float32)


@dataclass
class Scaling:
    """A repository's opener: sessions multiply by `factor`, as it is when they are loaded."""

    factor: float = 1.0
    sessions: list[FakeSession] = field(default_factory=list)

    def __call__(self, path: Path, settings: Settings) -> FakeSession:
        if not self.factor:
            raise ModelError("not a model")
        factor = np.float32(self.factor)

        def fn(feeds: Arrays) -> Arrays:
            return {"y": feeds["x"] * factor}

        session = FakeSession({"x": spec("N", 4)}, {"y": spec("N", 4)}, fn)
        self.sessions.append(session)
        return session


@contextmanager
def scaling(*versions: str, **settings: Any) -> Iterator[tuple[Running, Scaling]]:
    opener = Scaling()
    sources = [Source("m", version, Path("m.onnx")) for version in versions or ("1",)]
    with hosting(Repository(Settings(**settings), sources, opener)) as running:
        yield running, opener


def answer(running: Running) -> float:
    status, reply = running.infer("m", request_of(X))
    assert status == 200
    return float(reply["outputs"][0]["data"][0])


def load(running: Running) -> None:
    running.call(running.host.service.load_model("m"))


async def as_coroutine(fn: Callable[..., object], *arguments: object) -> object:
    return fn(*arguments)


def contains(found: Sequence[object], wanted: object) -> bool:
    return wanted in found[-100:]


# --- nothing is lost -----------------------------------------------------------------------------------------------


def test_no_request_is_lost_over_twenty_reloads() -> None:
    with scaling(keep_previous=0) as (running, opener):
        answers: list[tuple[int, float]] = []
        stop = threading.Event()

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=WAIT)
            body = json.dumps(request_of(X))
            while not stop.is_set():
                connection.request("POST", "/v2/models/m/infer", body)
                reply = connection.getresponse()
                document = json.loads(reply.read())
                answers.append((reply.status, document["outputs"][0]["data"][0] if reply.status == 200 else 0.0))
            connection.close()

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        for generation in range(1, 21):
            opener.factor = 1.0 + generation
            load(running)
            until(partial(contains, answers, (200, opener.factor)))
        stop.set()
        for client in clients:
            client.join()
        assert {status for status, _ in answers} == {200}
        assert {value for _, value in answers} == {1.0 + generation for generation in range(21)}
        until(lambda: all(session.closed for session in opener.sessions[:-1]))


def test_all_versions_change_at_once() -> None:
    with scaling("1", "2") as (running, opener):
        opener.factor = 3.0
        load(running)
        for path in ("m", "m/versions/1", "m/versions/2"):
            assert running.infer(path, request_of(X))[1]["outputs"][0]["data"][0] == 3.0


# --- the way back --------------------------------------------------------------------------------------------------


def test_a_rollback_serves_what_served_before_and_can_be_rolled_back() -> None:
    with scaling() as (running, opener):
        rollback = running.host.service.roll_back
        with pytest.raises(BadRequest, match="model 'm' has nothing to go back to"):
            running.call(rollback("m"))
        opener.factor = 2.0
        load(running)
        assert answer(running) == 2.0
        running.call(rollback("m"))
        assert answer(running) == 1.0
        assert running.index() == {"m/1": "READY"}
        running.call(rollback("m"))
        assert answer(running) == 2.0
        assert len(opener.sessions) == 2
        assert not any(session.closed for session in opener.sessions)


def test_only_the_last_load_is_kept_and_an_unload_keeps_nothing() -> None:
    with scaling() as (running, opener):
        load(running)
        load(running)
        until(lambda: opener.sessions[0].closed)
        assert not opener.sessions[1].closed
        running.call(running.host.service.unload_model("m"))
        until(lambda: all(session.closed for session in opener.sessions))
        with pytest.raises(BadRequest, match="nothing to go back to"):
            running.call(running.host.service.roll_back("m"))


def test_what_is_kept_is_let_go_when_its_time_is_up() -> None:
    with scaling(keep_previous=0.1) as (running, opener):
        load(running)
        until(lambda: opener.sessions[0].closed)
        assert answer(running) == 1.0


def test_what_is_kept_is_closed_with_the_server() -> None:
    with scaling() as (running, opener):
        load(running)
    assert all(session.closed for session in opener.sessions)


# --- golden requests -----------------------------------------------------------------------------------------------


def test_a_load_that_answers_live_requests_otherwise_is_not_taken() -> None:
    with scaling(golden_requests=4, golden_tolerance=1e-3) as (running, opener):
        answer(running)
        opener.factor = 1.0005
        load(running)
        assert answer(running) == pytest.approx(1.0005)
        opener.factor = 1.01
        with pytest.raises(BadRequest, match=r"golden request 1 of 1: output 'y' differs by 0.01 of its largest"):
            load(running)
        assert answer(running) == pytest.approx(1.0005)
        until(lambda: opener.sessions[-1].closed)
        opener.factor = 1.0
        opener_fn = opener.__call__

        def failing(path: Path, settings: Settings) -> FakeSession:
            session = opener_fn(path, settings)
            runs = iter(range(100))
            good = session.fn

            def fn(feeds: Arrays) -> Arrays:
                if feeds["x"].shape == (1, 4) and (feeds["x"] == 1).all():
                    raise ValueError(f"broken {next(runs)}")
                return good(feeds)

            session.fn = fn
            return session

        running.host.repository.loader._opener = failing
        with pytest.raises(BadRequest, match="a golden request failed: ValueError: broken 0"):
            load(running)


def test_a_model_says_itself_what_is_kept_and_how_equal_answers_must_be() -> None:
    with scaling(golden_requests=0) as (running, opener):
        service, golden = running.host.service, running.host.repository.serving.golden
        answer(running)
        assert golden == {}
        running.call(as_coroutine(service.set_traffic, "m", {"golden": {"requests": 2, "tolerance": 0.1}}))
        for _ in range(2):
            until(lambda: golden["m"].is_due)
            answer(running)
        assert len(golden["m"]) == 2
        running.call(as_coroutine(service.set_traffic, "m", {"golden": {"requests": 1, "tolerance": 0.1}}))
        assert len(golden["m"]) == 1
        opener.factor = 1.05
        load(running)
        opener.factor = 1.2
        with pytest.raises(BadRequest, match=r"differs by 0.2 of its largest value, at most 0.1 may be"):
            load(running)
        running.call(as_coroutine(service.set_traffic, "m", {"golden": {"requests": 0}}))
        assert golden == {}
        load(running)


def test_an_ensemble_that_answers_live_requests_otherwise_is_not_taken(tmp_path: Path) -> None:
    """It is held against what its models answer as they are now, through ensembles within it too."""
    for name, by in (("two", 2.0), ("three", 3.0)):
        (tmp_path / name / "1").mkdir(parents=True)
        factor(tmp_path / name / "1" / "model.onnx", by)
    chain(tmp_path, "inner", "two")
    chain(tmp_path, "m", "inner")
    with hosting(
        Repository(Settings(golden_requests=4), survey([tmp_path]).sources, rescan=lambda: survey([tmp_path]))
    ) as running:
        kept = running.host.repository.serving.golden["m"]
        assert answer(running) == 2.0
        chain(tmp_path, "m", "inner", "inner")
        with pytest.raises(BadRequest, match=r"golden request 1 of 1: output 'y' differs by 1 of its largest"):
            load(running)
        assert answer(running) == 2.0
        chain(tmp_path, "m", "two")
        load(running)
        assert len(kept) >= 1
        assert answer(running) == 2.0
        chain(tmp_path, "m", "three")
        with pytest.raises(BadRequest, match=r"golden request 1 of \d: output 'y' differs by 0\.5 of its largest"):
            load(running)
        chain(tmp_path, "m", "inner")
        load(running)
        assert len(kept) >= 1
        running.call(running.host.service.load_model("two"))
        assert not kept  # of m, which is built on it by another
        chain(tmp_path, "m", "three")
        load(running)
        assert answer(running) == 3.0


def test_what_an_ensemble_answers_with_a_model_that_has_gone_is_not_kept() -> None:
    """It was asked before another was loaded in its place."""
    golden, x = Golden(3), np.ones((1, 4), np.float32)
    answers: list[Callable[..., None]] = []
    model = SimpleNamespace(
        signature=None, config=None, stats=None, device="", submit=lambda request, nbytes, done: answers.append(done)
    )
    recorder = Recorder(model, golden)
    for _ in range(2):
        recorder.submit(Request("", {"x": x}, ()), 0, lambda result, batch: None)
        golden.forget()
    recorder.submit(Request("", {"x": x}, ()), 0, lambda result, batch: None)
    for done in answers:
        golden._next = 0.0
        done({"y": x}, None)
    assert len(golden) == 1


def test_golden_requests_are_few_copies_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infera_server.models.golden.PERIOD", 0.0)
    golden, x = Golden(3), np.ones(4, np.float32)
    for value in range(5):
        x[:] = value
        assert golden.is_due
        golden.keep({"x": x}, {"y": x * 2})
    x[:] = 77
    seen: list[float] = []

    def run(feeds: Arrays) -> Arrays:
        seen.append(float(feeds["x"][0]))
        return {"y": feeds["x"] * 2}

    assert golden.difference(run, 0.0) == ""
    assert seen == [2.0, 3.0, 4.0]
    monkeypatch.setattr("infera_server.models.golden.MAX_BYTES", 40)
    golden.keep({"x": x}, {"y": x})
    assert len(golden) == 1
    golden.keep({"x": np.ones(100)}, {})
    assert len(golden) == 1


def test_between_two_that_are_kept_some_time_passes() -> None:
    golden = Golden(3)
    golden.keep({}, {})
    assert not golden.is_due
    until(lambda: golden.is_due)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({}, "output 'y' is missing"),
        ({"y": np.ones(3)}, r"output 'y' is float64\[3\], was float64\[2\]"),
        ({"y": np.ones(2, np.float32)}, "is float32"),
        ({"y": np.array([1.0, 2.1])}, "differs by 0.05 of its largest value, at most 0.01 may be"),
        ({"y": np.array([1.0, np.nan])}, "differs by inf"),
    ],
)
def test_how_outputs_differ_is_said(found: Mapping[str, Any], text: str) -> None:
    wanted = {"y": np.array([1.0, 2.0])}
    assert differing(wanted, wanted, 0.0) == ""
    with pytest.raises(AssertionError, match=text):
        assert not differing(found, wanted, 0.01), differing(found, wanted, 0.01)


def test_odd_values_compare_as_themselves() -> None:
    for array in (np.array([np.nan, np.inf, -np.inf]), np.zeros(0), np.zeros(2), np.array([True]), np.array([2**40])):
        assert differing({"y": array}, {"y": array.copy()}, 0.0) == ""
    words = np.array(["a", "b"], object)
    assert differing({"y": words}, {"y": words.copy()}, 0.0) == ""
    assert differing({"y": words}, {"y": words[::-1]}, 1.0) == "output 'y' has other strings"


# --- watched files -------------------------------------------------------------------------------------------------


def factor(path: Path, value: float) -> None:
    """Write a model that multiplies by `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"g (float[N, 4] x) => (float[N, 4] y) <float f = {{{value}}}> {{ y = Mul(x, f) }}"
    onnx.save(parse(text), path)


def chain(root: Path, name: str, *models: str) -> None:
    """Write an ensemble that passes x through these models, to y."""
    tensors = ["x", *(f"t{i}" for i in range(1, len(models))), "y"]
    steps = "".join(
        f"""step {{ model_name: "{model}" model_version: -1 input_map {{ key: "x" value: "{before}" }}
        output_map {{ key: "y" value: "{after}" }} }}"""
        for model, before, after in zip(models, tensors, tensors[1:], strict=False)
    )
    (root / name / "1").mkdir(parents=True, exist_ok=True)
    (root / name / "config.pbtxt").write_text(
        f"""platform: "ensemble"
        input {{ name: "x" data_type: TYPE_FP32 dims: [-1, 4] }}
        output {{ name: "y" data_type: TYPE_FP32 dims: [-1, 4] }}
        ensemble_scheduling {{ {steps} }}"""
    )


@contextmanager
def watched(root: Path, **settings: Any) -> Iterator[Running]:
    chosen = Settings(**{"watch": True, "poll_interval": 0.05, "keep_previous": 0.0, **settings})
    with hosting(Repository(chosen, survey([root]).sources, rescan=lambda: survey([root]))) as running:
        yield running


def once(running: Running, reason: str) -> Callable[[], bool]:
    return lambda: reason in " ".join(running.index().values())


def test_a_file_that_is_replaced_is_loaded(tmp_path: Path) -> None:
    factor(tmp_path / "m.onnx", 1.0)
    with watched(tmp_path) as running:
        assert answer(running) == 1.0
        factor(tmp_path / "next", 2.0)
        os.replace(tmp_path / "next", tmp_path / "m.onnx")
        until(lambda: answer(running) == 2.0)


def test_a_file_that_is_truncated_or_broken_leaves_what_serves(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    factor(path, 1.0)
    with watched(tmp_path) as running:
        os.truncate(path, 20)
        until(lambda: running.index()["m/1"] != "READY")
        assert running.index()["m/1"].startswith("READY: ")
        assert answer(running) == 1.0
        path.write_bytes(b"")
        until(once(running, "m.onnx: "))
        assert answer(running) == 1.0
        factor(path, 3.0)
        until(lambda: answer(running) == 3.0)
        assert running.index() == {"m/1": "READY"}


def test_what_cannot_be_served_is_told_while_it_is_there(tmp_path: Path) -> None:
    factor(tmp_path / "m.onnx", 1.0)
    factor(tmp_path / "stats" / "2" / "model.onnx", 2.0)
    at_start = survey([tmp_path])
    repository = Repository(
        Settings(watch=True, poll_interval=0.05),
        at_start.sources,
        rescan=lambda: survey([tmp_path]),
        problems=at_start.problems,
    )
    with hosting(repository) as running:
        assert "stats/2" in running.index()
        factor(tmp_path / "flat" / "model.onnx", 3.0)
        until(once(running, "UNAVAILABLE: " + str(tmp_path / "flat" / "model.onnx")))
        os.replace(tmp_path / "stats", tmp_path / "statistics")
        (tmp_path / "flat" / "1").mkdir()
        os.replace(tmp_path / "flat" / "model.onnx", tmp_path / "flat" / "1" / "model.onnx")
        until(lambda: running.index() == {"flat/1": "READY", "m/1": "READY", "statistics/2": "READY"})


def test_a_file_that_is_still_being_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    factor(path, 1.0)
    with watched(tmp_path, poll_interval=3600.0) as running:
        control = running.host.service.control
        watch = Watch(running.host.repository, control)
        running.call(watch.look())
        factor(path, 2.0)
        running.call(watch.look())
        assert answer(running) == 1.0
        with path.open("ab") as file:
            file.write(b"\x00")
        running.call(watch.look())
        assert running.index() == {"m/1": "READY"}
        running.call(watch.look())
        assert running.index()["m/1"].startswith("READY: ")


def test_a_model_that_is_deleted_is_unloaded_or_kept_as_set(tmp_path: Path) -> None:
    for keep in (False, True):
        for name in ("m", "n"):
            factor(tmp_path / f"{name}.onnx", 1.0)
        with watched(tmp_path, keep_deleted=keep) as running:
            (tmp_path / "n.onnx").unlink()
            if keep:
                factor(tmp_path / "m.onnx", 2.0)
                until(lambda: answer(running) == 2.0)
                assert running.index() == {"m/1": "READY", "n/1": "READY"}
            else:
                until(lambda: running.index() == {"m/1": "READY", "n/1": "UNAVAILABLE: unloaded"})
                factor(tmp_path / "n.onnx", 1.0)
                until(lambda: running.index()["n/1"] == "READY")


def test_a_new_version_is_loaded_and_the_others_are_not_again(tmp_path: Path) -> None:
    factor(tmp_path / "m" / "1" / "model.onnx", 1.0)
    with watched(tmp_path) as running:
        before = running.host.repository.get("m", "1")
        factor(tmp_path / "m" / "2" / "model.onnx", 2.0)
        until(lambda: answer(running) == 2.0)
        assert running.host.repository.get("m", "1") is before
        (tmp_path / "m" / "infera.toml").write_text("split = { 1 = 1 }")
        until(lambda: answer(running) == 1.0)
        assert running.host.repository.get("m", "1") is before
        (tmp_path / "m" / "infera.toml").write_text("labels = { stable = 9 }")
        until(once(running, "READY: ignored: infera.toml: it names version 9, which is not served"))
        (tmp_path / "m" / "infera.toml").unlink()
        until(lambda: running.index() == {"m/1": "READY", "m/2": "READY"})
        assert answer(running) == 2.0
        (tmp_path / "m" / "config.pbtxt").write_text("version_policy: { specific { versions: [1] } }")
        until(lambda: answer(running) == 1.0)
        until(lambda: running.index()["m/2"] == "UNAVAILABLE: unloaded")
        (tmp_path / "m" / "config.pbtxt").write_text("version_policy: { nope")
        until(once(running, "cannot be read"))
        assert answer(running) == 1.0


def test_the_watch_outlives_a_look_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    async def look(self: Watch) -> None:
        looks.append(1)
        raise FileNotFoundError("a folder has gone")

    monkeypatch.setattr(Watch, "look", look)
    factor(tmp_path / "m.onnx", 1.0)
    with watched(tmp_path):
        until(lambda: len(looks) > 2)


def test_a_folder_that_goes_while_it_is_looked_at_has_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanishing(self: Path, pattern: str) -> Iterator[Path]:
        yield from self.iterdir()
        raise FileNotFoundError(self)

    (tmp_path / "model.onnx").write_bytes(b"")
    assert len(stamp(tmp_path)) == 1
    monkeypatch.setattr(Path, "rglob", vanishing)
    assert not stamp(tmp_path)


def test_in_mode_none_nothing_changes_after_the_start() -> None:
    with scaling("1", "2", model_control="none") as (running, _):
        for action, document in (
            ("load", None), ("unload", None), ("rollback", None), ("traffic", {"split": {"1": 1}}),
        ):  # fmt: skip
            body = json.dumps(document) if document else None
            status, _, reply = running.request("POST", f"/v2/repository/models/m/{action}", body)
            assert (status, "--model-control none" in json.loads(reply)["error"]) == (503, True)
        assert running.get("/v2/repository/models/m/traffic")[1]["split"] == {}
        assert set(running.index().values()) == {"READY"}


def test_in_poll_mode_nothing_is_loaded_by_request(tmp_path: Path) -> None:
    factor(tmp_path / "m.onnx", 1.0)
    with watched(tmp_path, watch=False, model_control="poll") as running:
        with pytest.raises(Unavailable, match="not allowed if polling is enabled"):
            load(running)
        factor(tmp_path / "m.onnx", 2.0)
        until(lambda: answer(running) == 2.0)


def test_models_that_options_name_and_are_not_there_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with scaling(pins={"m": "cpu", "n": "cpu"}, pinned=("o",), shares={"p": 2.0}, slo_p99_of={"q": 0.02}):
        pass
    told = [record.getMessage() for record in caplog.records if "there is no such model" in record.getMessage()]
    assert [line.split(",")[0] for line in told] == [
        *("--pin names 'n'", "--share names 'p'", "--keep names 'o'", "--slo-p99 names 'q'")
    ]


def test_the_log_says_what_was_not_loaded_and_what_was_replaced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with scaling(keep_previous=0) as (running, opener):
        opener.factor = 0.0
        with pytest.raises(BadRequest):
            load(running)
        assert "model 'm' is not loaded: load failed for model 'm': version 1" in caplog.text
        opener.factor = 3.0
        load(running)
        until(lambda: "what served as version 1 before is unloaded" in caplog.text)
        assert "unloaded model" not in caplog.text
