"""The command line: its frame, and that every failure is one line without a traceback."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

import infera_gpu
from infera_gpu.cli import console, extensions
from tests.commandline import assert_fails, infera, save_relu


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    return save_relu(tmp_path)


def test_version_and_help() -> None:
    assert infera("--version") == (0, f"infera {infera_gpu.__version__}\n", "")
    status, out, _ = infera()
    assert status == 0
    for name in ("run", "inspect", "verify", "pull", "doctor", "serve"):
        assert f" {name} " in out


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("serve", ("(127.0.0.1)", "(8000)", "(the second after --port)", "(64 MiB)", "(no goal)")),
        ("key", ("(no limit)", "(all)")),
        ("verify", ("(as the precision allows)",)),
        ("inspect", ("(one for every core)", "auto")),
    ],
)
def test_help_says_what_is_usual(command: str, defaults: tuple[str, ...]) -> None:
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", infera(command, "--help")[1]).split())
    for default in defaults:
        assert f"[default: {default}" in said


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("nope",), "infera"),
        (("--nope",), "infera"),
        (("run",), "infera run"),
        (("run", "--nope"), "infera run"),
        (("run", "x", "--seed", "a"), "infera run"),
        (("ops", "--device", "gpu"), "infera ops"),
    ],
)
def test_usage_errors_are_one_line(arguments: tuple[str, ...], command: str) -> None:
    result = infera(*arguments)
    assert_fails(result, f"(see {command} --help)", status=2)
    assert "Value error" not in result[2]


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(infera_gpu.FetchError):
        infera("--debug", "run", "nothing.onnx")


def test_an_unexpected_error_is_one_line_too(relu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("infera_gpu.session.Session.run", broken)
    assert_fails(infera("run", relu, "--random", "--shape", "1,3"), "ZeroDivisionError: by zero", "--debug")


def provide(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    found = EntryPoints(points)
    monkeypatch.setattr(extensions, "entry_points", found.select)


def greet(name: str, loud: bool = False) -> None:
    """Greet someone."""
    print(f"hello {name}{'!' if loud else ''}")


def test_entry_points_become_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, EntryPoint("greet", f"{__name__}:greet", extensions.GROUP))
    assert " greet " in infera("--help")[1]
    assert infera("greet", "Ada", "--loud") == (0, "hello Ada!\n", "")
    assert "Greet someone." in infera("greet", "--help")[1]
    assert_fails(infera("greet"), "Missing argument", status=2)


def test_a_command_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    provide(monkeypatch, EntryPoint("serve", "needs_more:serve", extensions.GROUP))
    assert_fails(infera("serve"), "a_package_that_is_not_there", "pip install 'infera-gpu[server]'")
    provide(monkeypatch)
    assert_fails(infera("serve"), "not installed", "pip install 'infera-gpu[server]'")


def test_extras_exist() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert {extra.name for extra in extensions.EXTRAS.values()} <= project["optional-dependencies"].keys()


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def test_as_a_process(relu: Path, tmp_path: Path) -> None:
    done = python("-m", "infera_gpu.cli", "run", relu, "--random", "--shape", "2,3", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    done = python("-m", "infera_gpu", "run", tmp_path / "none.onnx")
    assert_fails((done.returncode, done.stdout, done.stderr), "none.onnx")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from infera_gpu.cli import main; main(['--help']);"
        "print([m for m in ('onnx', 'onnxruntime', 'cupy', 'triton', 'fastapi', 'infera_server') if m in sys.modules])"
    )
    assert python("-c", code).stdout.endswith("[]\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "infera_gpu.cli", "pull"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


# ---- what a terminal sees


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_download_shows_before_its_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with redirect_stderr(Terminal()) as terminal:
        with console.downloading("some [model]") as progress:
            assert "some [model]" in terminal.getvalue()
            progress(500, 1000)
            progress(1000, 1000)
        assert "1.0/1.0 kB" in terminal.getvalue()


def test_work_shows_before_anything_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that holds the interpreter lock lets no other thread draw."""
    monkeypatch.setenv("TERM", "xterm")
    with redirect_stderr(Terminal()) as terminal, console.working("loading [x].onnx"):
        assert "loading [x].onnx" in terminal.getvalue()


def test_a_pipe_sees_neither(capsys: pytest.CaptureFixture[str]) -> None:
    with console.downloading("model") as progress, console.working("loading"):
        progress(1, None)
    assert capsys.readouterr() == ("", "")
